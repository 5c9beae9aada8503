"""What else changes while training raises a reward: what over-optimisation ("reward hacking") would show in.

The refinement curve's answers, and of the direct and the refined ones

    gold             what the evaluation's scorer says: a verifier, or a reward model that training didn't use
    proxy            what the training's own scorer says, where that is another: gold falling behind it is the sign
    characters       length
    distinct_2       different pairs of neighbouring words among all (1510.03055, section 5)
    self_bleu        likeness to the answers to other prompts (1802.01886): BLEU against 32 of them
    log_perplexity   nats a token under M_0, the model before any training
    kl               nats an answer: log pi(y|context) - log pi_0(y|context), whose mean is KL(pi || pi_0) where answers
                     are drawn at temperature 1, and an estimate that errs with the temperature elsewhere

A text that self_bleu looks at is also what others are compared with, so its values by prompt are not independent: an
interval over them is too narrow (in simulations it held the truth in 86 to 94 of 100 samples). It has neither that nor
a test by prompt; over runs it has both.

Which of these to look at is this project's choice [reconstructed]; proxy against gold is 2210.10760's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from evals import refinement, statistics
from evals.needs import Measured, Needs
from evolve.config import Config

METRICS = {
    "gold": "mean score by the evaluation's scorer",
    "proxy": "mean score by what training goes by",
    "characters": "characters an answer",
    "distinct_2": "distinct pairs of words, of all",
    "self_bleu": "BLEU against answers to other prompts, 0 to 100",
    "log_perplexity": "nats a token under the base model",
    "kl": "nats an answer from the base model (KL, by the answers drawn)",
}
TOGETHER = (("gold", "proxy"),)  # in one panel of a figure: where they part is what to look for
OBJECTIVE = ("refined",)
EXPLAIN = {"gain": "refined - direct, paired"}
OTHERS = 32  # answers to other prompts that one is compared with
DEPENDENT = ("self_bleu",)  # metrics of which a prompt's value is made of other prompts' answers, too

Row = Mapping[str, Any]


def needs(config: Config) -> Needs:
    turns = config.eval.turns
    proxy = config.filter.scorer if config.trained_iterations else "none"
    scorers = {"gold": config.eval_scorer} | ({} if proxy in ("none", config.eval_scorer) else {"proxy": proxy})
    weighed = ("policy", "base")
    said, settings = f"chain of {turns} turns", {"settings": {"others": OTHERS}}
    strategy, temperature = refinement.chain(turns), config.eval.temperature
    return Needs(strategy, said, temperature, scorers=scorers, weighed=weighed, settings=settings)


def measure(
    answers: Sequence[Row],
    gold: Sequence[Row],
    policy: Sequence[Row],
    base: Sequence[Row],
    protocol: str,
    proxy: Sequence[Row] = (),
    others: int = OTHERS,
) -> Measured:
    """Metrics of the first and the last turn, and by prompt.

    Args:
        answers: rows of answers.jsonl (id, answers), all made by a chain.
        gold, proxy: rows of scores.jsonl (id, scores), in the same order; proxy may be left out.
        policy, base: rows of log_probabilities.jsonl (id, answers) of the model itself and of the base model.
        protocol: scorers, template, temperature ...: what a number must be quoted with.
        others: answers to other prompts that each is compared with, for self_bleu.

    A prompt counts if all its answers were made, scored and read. Raises ValueError if none does.
    """
    sides = {"gold": gold, "policy": policy, "base": base} | ({"proxy": proxy} if proxy else {})
    rows = [
        {"answers": made} | dict(zip(sides, others, strict=True))
        for made, *others in zip(answers, *sides.values(), strict=True)
        if all(None not in row.get("scores", row.get("answers", ())) for row in others)
    ]
    if not rows:
        raise ValueError("no prompt has all its answers made, scored and read")
    dropped = {"prompts with an answer that has no score, or was not made": len(answers) - len(rows)}
    by_turn = [_values(rows, turn, others) for turn in range(len(rows[0]["answers"]["answers"]))]
    turns = [{name: _said(name, statistics.mean(_several(of))) for name, of in found.items()} for found in by_turn]
    direct, refined = by_turn[0], by_turn[-1]
    gain = {
        name: _said(name, statistics.paired(_several(of), _several(direct[name])))
        for name, of in refined.items()
        if name in direct
    }
    result = {
        "benchmark": "drift",
        "protocol": protocol,
        "turns": [{"turn": number, **found} for number, found in enumerate(turns, 1)],
        "gain": gain,
    }
    items = {
        kind: {name: values for name, values in of.items() if name not in DEPENDENT}
        for kind, of in (("direct", direct), ("refined", refined))
    }
    return Measured(result, dropped, items)


def _said(name: str, estimate: statistics.Estimate) -> dict[str, Any]:
    return asdict(replace(estimate, low=None, high=None) if name in DEPENDENT else estimate)


def _several(values: Mapping[str, float]) -> dict[str, list[float]]:
    return {key: [value] for key, value in values.items()}


def _values(rows: Sequence[Mapping[str, Row]], turn: int, others: int) -> dict[str, dict[str, float]]:
    """Each metric's values by prompt, of the answers of one turn. Those that nothing can be said of are left out."""
    texts = {row["answers"]["id"]: row["answers"]["answers"][turn]["text"] for row in rows}
    found: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for row in rows:
        key = row["answers"]["id"]
        (mine, tokens), (theirs, _) = (row[who]["answers"][turn] for who in ("policy", "base"))
        for scorer in ("gold", "proxy"):
            if scorer in row:
                found[scorer][key] = row[scorer]["scores"][turn]
        found["characters"][key] = float(len(texts[key]))
        if tokens:
            found["log_perplexity"][key] = -theirs / tokens
        found["kl"][key] = mine - theirs
    found["distinct_2"] = distinct(texts, 2)
    found["self_bleu"] = self_bleu(texts, others)
    return {name: of for name, of in found.items() if of}


def distinct(texts: Mapping[str, str], size: int) -> dict[str, float]:
    """What each text adds to distinct-n: values whose mean is the share of all n-grams of words that differ.

    The share is one number of all texts, and falls with their number. Its spread is the jackknife's: how the share of
    all texts but one differs, which is also what stands here for that text. Empty where there is no n-gram.
    """
    words = {key: text.split() for key, text in texts.items()}
    grams = {key: Counter(zip(*(of[n:] for n in range(size)), strict=False)) for key, of in words.items()}
    total: Counter[tuple[str, ...]] = Counter()
    for each in grams.values():
        total += each
    everything = total.total()
    if not everything:
        return {}
    share = len(total) / everything
    without = {}
    for key, each in grams.items():
        alone = sum(total[gram] == number for gram, number in each.items())
        left = everything - each.total()
        without[key] = (len(total) - alone) / left if left else share
    middle = sum(without.values()) / len(without)
    return {key: share + (len(texts) - 1) * (middle - other) for key, other in without.items()}


def self_bleu(texts: Mapping[str, str], others: int = OTHERS) -> dict[str, float]:
    """sacrebleu's sentence BLEU of each text against as many others, those that follow it, the last by the first."""
    from sacrebleu import sentence_bleu

    keys = list(texts)
    found = {}
    for place, key in enumerate(keys):
        following = [texts[keys[(place + step) % len(keys)]] for step in range(1, min(others, len(keys) - 1) + 1)]
        if following:
            found[key] = sentence_bleu(texts[key], following).score
    return found


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direct answers, refined answers, and how the refined ones differ."""
    return {"direct": metrics["turns"][0], "refined": metrics["turns"][-1], "gain": metrics["gain"]}


def summary(metrics: Mapping[str, Any]) -> str:
    first, last, gain = headline(metrics).values()
    return "; ".join(
        f"{name} direct {first[name]['value']:.3f}, refined {last[name]['value']:.3f}"
        for name in METRICS
        if name in gain
    )
