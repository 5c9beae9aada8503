"""AlpacaEval 2: how often a judge prefers the model's answers to GPT-4's, raw and with length controlled for.

https://github.com/tatsu-lab/alpaca_eval. 805 instructions, each answered by gpt4_1106_preview too (the reference). A
judge sees both answers, called m and M in an order drawn from the instruction; its probabilities of the tokens m and M
are the preference: from 1, the reference wins, to 2, the answer does; 1.5, unasked, where both are the same text.
Win rate = 100 mean(preference - 1). Prompts, settings, parser, order and length control are the package's.

    "What are the names of some famous actors that started their careers on Broadway?"
    m: the reference, M: the model's; the judge says m with probability 0.75: preference 1.25, a win rate of 25

    python -m evals.alpaca_eval --annotations FILE ... --gamed df_gamed.csv --questions REFERENCE.json

scores annotations again (alpaca_annotations.py).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from evals import length_control, picks, refinement, statistics, tables
from evals.games import Ask, Replies, Reply
from evals.length_control import Control, Controlled, Game, Unfitted
from evals.needs import Asked, File, Measured, Needs, samples
from evals.statistics import Estimate
from evolve import templates
from evolve.config import Config, ConfigError, Endpoint
from evolve.data import row_id

METRICS = {"win_rate": "win rate (%)", "lc_win_rate": "length-controlled win rate (%)"}
OBJECTIVE = ("refined",)
EXPLAIN = {
    "win_rate": "mean preference of the answer over the reference, 50 where they are alike",
    "lc_win_rate": "what it would be at equal lengths, by AlpacaEval's GLM; the interval counts the fit",
    "gain": "refined - direct, paired",
    "best": picks.EXPLAIN["best"],
}
EVALUATOR = "weighted_alpaca_eval_gpt4_turbo"
TOKENS = ["m", "M"]  # of the output shown first, and second
PARSER = {"numerator_token": "m", "denominator_tokens": TOKENS, "is_binarize": False}
# Without log-probabilities: 16 tokens have room for a space or a quote before the name, which is a word of its own
# (the m of "I'm" is none). Keys are regex_parser's verdicts.
DISCRETE = {"max_tokens": 16, "temperature": 0}
NAMED = {verdict: rf"(?<![\w'’]){token}(?!\w)" for verdict, token in enumerate(TOKENS, 1)}


def needs(config: Config) -> Needs:
    own, judge, turns = config.eval.alpaca_eval, config.annotator, config.eval.turns
    weighted = isinstance(judge, Endpoint) and judge.logprobs
    said = protocol(own.evaluator, weighted) if isinstance(judge, Endpoint) else "AlpacaEval 2"
    fit = {"difficulty": own.difficulty, "gamed": own.gamed} if own.length_control else {}
    here = "eval.alpaca_eval"
    tokens = own.max_new_tokens or config.data.max_response_tokens
    some = f", {own.limit} instructions" if own.limit else ""
    if isinstance(judge, Endpoint):
        try:
            _evaluator(own.evaluator)
        except ValueError as error:
            raise ConfigError(f"{here}.evaluator: {error}") from None
    return Needs(
        refinement.chain(turns),
        f"{said}, against {own.path}{some}, chain of {turns} turns, at most {tokens} tokens",
        own.temperature,
        said if isinstance(judge, Endpoint) else "",
        asked=Asked({"path": File(f"{here}.path", own.path, own.revision)}, limit=own.limit),
        versus={"evaluator": own.evaluator, "logprobs": weighted},
        files={use: File(f"{here}.{use}", path, own.revision) for use, path in fit.items() if path},
        max_new_tokens=tokens,
        settings={"settings": {"length_controlled": own.length_control}},
        samples=samples(config, own.pick),
    )


def questions(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file of reference outputs (instruction, output, dataset, generator).

    A row is {"id", "prompt", "reference", "dataset", "generator", "index": position in the full set, "of": its size}.
    `limit` takes as many, those which the package draws for max_instances, in the file's order.

    Raises OSError, or ValueError naming the file and row.
    """
    import pandas as pd

    found: list[dict[str, Any]] = []
    table = tables.rows(path)
    for count, row in enumerate(table, 1):
        where = f"{path}, row {count}"
        prompt, reference = (tables.text(row, key, where) for key in ("instruction", "output"))
        names = {key: tables.text(row, key, where) for key in ("dataset", "generator")}
        found.append({"id": row_id(prompt), "prompt": prompt, "reference": reference, **names, "of": len(table)})
    ids = [row["id"] for row in found]
    tables.unique(ids, "instruction", path)
    for row, position in zip(found, length_control.positions(ids), strict=True):
        row["index"] = position
    drawn = pd.Series(range(len(found))).sample(frac=1, random_state=123)[:limit]
    return [found[place] for place in sorted(drawn)]


@cache
def _evaluator(name: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """An evaluator's messages with {instruction}, {output_1}, {output_2}; and its request's fields, less the model."""
    from alpaca_eval import constants, utils

    folder = constants.EVALUATORS_CONFIG_DIR
    config = utils.load_configs(name, relative_to=folder)[name] if (folder / name / "configs.yaml").is_file() else {}
    if config.get("completion_parser_kwargs") != PARSER or config.get("fn_completion_parser") != "logprob_parser":
        raise ValueError(f"{name!r} is no evaluator of alpaca_eval that weighs the tokens m and M; {EVALUATOR} is one")
    # Taken apart before the answers are in it: one that says <|im_end|> would cut the prompt.
    messages = utils.prompt_to_chatml((folder / config["prompt_template"]).read_text())
    asked = ("max_tokens", "temperature", "logprobs", "top_logprobs")
    return messages, {key: config["completions_kwargs"][key] for key in asked}


def shown_first(prompt: str) -> bool:
    """Whether the model's answer is shown first: the package's draw, by the instruction alone."""
    from alpaca_eval import utils

    return bool(utils.random_seeded_choice(seed=f"is_switched_outputs{prompt}0", choices=[False, True]))


def asks(prompt: str, answer: str, reference: str, *, evaluator: str = EVALUATOR, logprobs: bool = True) -> list[Ask]:
    """One question; none where both texts are the same, which is a tie.

    With logprobs=False the judge's words count: the first of m and M in them, at temperature 0, makes the preference 1
    or 2. That is another protocol, and a number has to say so (`protocol`).

    Raises ValueError if alpaca_eval has no such evaluator.
    """
    if answer == reference:
        return []
    first = shown_first(prompt)
    shown = (answer, reference) if first else (reference, answer)
    texts = {"instruction": prompt, "output_1": shown[0], "output_2": shown[1]}
    messages, fields = _evaluator(evaluator)
    filled = [{**one, "content": templates.fill(one["content"], **texts)} for one in messages]
    return [Ask(filled, dict(fields if logprobs else DISCRETE), first)]


def protocol(evaluator: str = EVALUATOR, logprobs: bool = True) -> str:
    """What a number has to be quoted with, beside the judge's name."""
    how = "log-probabilities of m and M" if logprobs else "the first of m and M in the judge's words, unweighted"
    return f"AlpacaEval 2, prompt of {evaluator}, {how}"


def read(ask: Ask, reply: Reply) -> float | None:
    """The preference, from 1 (the reference wins) to 2 (the answer does); None if neither m nor M can be read."""
    from alpaca_eval.completion_parsers import logprob_parser, regex_parser

    found: list[float] = []
    if not ask.fields.get("logprobs"):
        found = regex_parser(reply.text, dict(NAMED))[:1] if reply.text else []
    elif reply.logprobs and len(reply.logprobs) == 1:  # one token: one verdict
        try:
            likely = reply.logprobs[0]["top_logprobs"]
            named = [one for one in likely if one["token"] in TOKENS and one["logprob"] != -math.inf]
            found = logprob_parser({"logprobs": {"content": [{"top_logprobs": named}]}}, **PARSER) if named else []
        except (KeyError, TypeError, ValueError):  # not in the form of the protocol
            return None
    if not found or not 1 <= found[0] <= 2:  # or nan
        return None
    return float(3 - found[0] if ask.answer_first else found[0])


def stand_in(sign: int) -> list[float]:
    return [1.5 + sign / 2]


def measure(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    protocol: str,
    *,
    best_answers: Sequence[Mapping[str, Any]] = (),
    best_verdicts: Sequence[Mapping[str, Any]] = (),
    best_replies: Replies | None = None,
    difficulty: str | None = None,
    gamed: str | None = None,
    length_controlled: bool = True,
    replies: Replies | None = None,
    judge: str = "",
) -> Measured:
    """Metrics by judged turn, and of the best of several answers, where there are.

    A length-controlled win rate that can't be had is None, and its turn says why.

    Args:
        questions: rows of `questions`.
        answers: rows of answers.jsonl.
        verdicts: {"id", "verdicts": {"1": [preference or None], ...}} for each question; [] where nothing was asked.
        protocol: judge, `protocol`, strategy ...: what a number must be quoted with.
        best_answers, best_verdicts, best_replies: the same of the answers that the stage `pick` took, as turn 1.
        difficulty, gamed: files as in length_control.load.
        replies, judge: what was said and by whom, for the records.

    Raises ValueError if no answer of a turn has a preference.
    """
    control: Control | Unfitted = Unfitted("not asked for")
    if length_controlled:
        try:  # Judges are paid by now, so what is wrong with a file is a reason, not an error.
            control = length_control.load(gamed, difficulty)
            control.cover(questions[0]["of"])
        except (OSError, ValueError) as error:
            control = Unfitted(str(error))
    turns = sorted({int(turn) for row in verdicts for turn in row["verdicts"]})
    if not turns:
        raise ValueError("no turn of any answer was judged")
    played = [games(questions, answers, verdicts, turn) for turn in turns]
    played += [games(questions, best_answers, best_verdicts, 1)] if best_answers else []
    scored = [score(found, control) for found, _ in played]
    points = [{game.id: _points(game) for game in found if game.preference is not None} for found, _ in played]
    unmade = sum(count for _, count in played)
    unread = sum(found["unscored"] for found, _ in scored) - unmade
    last = len(turns) - 1
    won = {key: value - points[0][key] for key, value in points[last].items() if key in points[0]}
    direct, refined = scored[0][1], scored[last][1]
    gain = {
        "win_rate": asdict(statistics.mean({key: [value] for key, value in won.items()})) if won else None,
        "lc_win_rate": asdict(length_control.gain(refined, direct))
        if isinstance(direct, Controlled) and isinstance(refined, Controlled)
        else None,
    }
    metrics: dict[str, Any] = {
        "benchmark": "alpaca_eval",
        "protocol": protocol,
        "turns": [{"turn": turn, **found} for turn, (found, _) in zip(turns, scored, strict=False)],
        "gain": gain,
    }
    # The fit's values by prompt are not among the items: paired, they would leave out that the fit might be another.
    items = {"direct": {"win_rate": points[0]}, "refined": {"win_rate": points[last]}, "gain": {"win_rate": won}}
    if best_answers:
        metrics["sizes"] = [picks.of_all(best_answers, {"best": scored[-1][0]})]
        items["best"] = {"win_rate": points[-1]}

    def records(out: Path) -> None:
        _records(questions, answers, verdicts, replies or {}, judge, out)
        if best_answers:
            _records(questions, best_answers, best_verdicts, best_replies or {}, judge, out / "best")

    dropped = {"answers never made": unmade, "verdicts that can't be read": unread}
    return Measured(metrics, dropped, items, records)


def games(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    turn: int,
) -> tuple[list[Game], int]:
    """A turn's games, one for each question in order, and how many of them have no answer."""
    made = {row["id"]: row["answers"][turn - 1] for row in answers if len(row["answers"]) >= turn}
    said = {row["id"]: row["verdicts"].get(str(turn)) for row in verdicts}
    found, unmade = [], 0
    for row in questions:
        answer = made.get(row["id"])
        preference = (said.get(row["id"]) or [None])[0]
        if answer is None or answer["end"] == "too long":
            answer, preference, unmade = {"text": ""}, None, unmade + 1
        elif answer["text"] == row["reference"]:
            preference = 1.5
        lengths = len(answer["text"]), len(row["reference"])
        found.append(Game(row["id"], preference, *lengths, row["index"], shown_first(row["prompt"])))
    return found, unmade


def score(
    games: Sequence[Game], control: Control | Unfitted, c: float | None = None
) -> tuple[dict[str, Any], Controlled | Unfitted]:
    """The metrics of one model's games, and the fit or why there is none.

    Raises ValueError if no game has a preference.
    """
    scored = [game for game in games if game.preference is not None]
    if not scored:
        raise ValueError(f"none of {len(games)} answers has a preference, so there is no win rate")
    fitted = control if isinstance(control, Unfitted) else _fitted(scored, control, c)
    first, second = ([_points(game) for game in scored if game.first is shown] for shown in (True, False))
    metrics = {
        "win_rate": asdict(statistics.mean({game.id: [_points(game)] for game in scored})),
        "lc_win_rate": asdict(fitted.estimate) if isinstance(fitted, Controlled) else None,
        "unscored": len(games) - len(scored),
        "characters": fmean(game.length for game in scored),
        "reference_characters": fmean(game.reference_length for game in scored),
        "shown_first": len(first) / (len(first) + len(second)) if first or second else None,
        "position_bias": _difference(first, second),
    }
    return metrics | ({"no_lc_win_rate": str(fitted)} if isinstance(fitted, Unfitted) else {}), fitted


def _fitted(games: Sequence[Game], control: Control, c: float | None) -> Controlled | Unfitted:
    try:
        return length_control.fit(games, control, c)
    except Unfitted as reason:
        return reason


def _points(game: Game) -> float:
    assert game.preference is not None
    return 100 * (game.preference - 1)


def _difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any] | None:
    """The win rate where the answer is shown first less that where it is second, with Welch's interval."""
    from scipy import stats

    if min(len(first), len(second)) < 2:
        return None
    value, size = fmean(first) - fmean(second), len(first) + len(second)
    if len(set(first)) == len(set(second)) == 1:
        return asdict(Estimate(value, value, value, size))
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return asdict(Estimate(value, float(low), float(high), size))


def win_rate(preferences: Sequence[float]) -> dict[str, Any]:
    """The package's own: win_rate, standard_error, n_wins, n_wins_base, n_draws, n_total, discrete_win_rate."""
    from alpaca_eval.metrics import get_winrate

    found = {key: float(value) for key, value in get_winrate([{"preference": one} for one in preferences]).items()}
    counts = ("n_wins", "n_wins_base", "n_draws", "n_total")
    return {key: None if math.isnan(value) else int(value) if key in counts else value for key, value in found.items()}


def _records(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    replies: Replies,
    judge: str,
    out: Path,
) -> None:
    """Writes annotations_turn_N.json of each judged turn, in the package's form."""
    from evals import alpaca_annotations

    out.mkdir(exist_ok=True)
    for turn in sorted({int(turn) for row in verdicts for turn in row["verdicts"]}):
        said = {key: games[str(turn)][0] for key, games in replies.items() if games.get(str(turn))}
        known = {key: reply for key, reply in said.items() if reply is not None}
        rows = alpaca_annotations.of(
            questions, answers, verdicts, turn=turn, generator=f"turn {turn}", annotator=judge, replies=known
        )
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        (out / f"annotations_turn_{turn}.json").write_text(text + "\n", encoding="utf-8")


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direct answers, refined answers, and the gain of one over the other; the best of several."""
    turns = metrics["turns"]
    return {"direct": turns[0], "refined": turns[-1], "gain": metrics["gain"], **picks.headline(metrics)}


def summary(metrics: Mapping[str, Any]) -> str:
    found = headline(metrics)
    lines = [
        f"{name} " + ", ".join(f"{kind} {of[metric]['value']:.1f}" for kind, of in found.items() if of[metric])
        for metric, name in (("win_rate", "win rate"), ("lc_win_rate", "length-controlled"))
        if any(of[metric] for of in found.values())
    ]
    return "; ".join(lines)


if __name__ == "__main__":
    from evals.alpaca_annotations import main

    sys.exit(main())
