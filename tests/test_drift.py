"""What drift measures: likelihoods against transformers' own, and numbers worked out by hand."""

import json
import re
from dataclasses import replace

import pytest
from conftest import load
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import sentence_bleu

from evals import drift
from evolve import plan, sources
from evolve.stages import Context, ModelSettings, module, read_rows
from evolve.store import Store
from sweeps import differences, figures, tables
from sweeps.collect import Measurement, MemberResult, Sweep

READ = ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False)


def weigh(model, answers, template, out, batch=8):
    """Rows of the stage `perplexity`, and its report."""
    settings = {"model": READ, "template": template, "micro_batch": batch}
    config = module("perplexity").Config(**settings)
    out.mkdir()
    context = Context("cpu", lambda done, total: None, out / "partial")
    report = module("perplexity").run(config, {"model": model, "answers": answers}, out, context)
    return read_rows(out / "log_probabilities.jsonl"), report


def by_hand(model, tokenizer, messages, answer, finished):
    """log pi(answer | messages) by transformers alone."""
    import torch

    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = before + tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if finished else []
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logits[place - 1, ids[place]] for place in range(len(before), len(ids)))), len(ids) - len(before)


def test_answers_are_weighed_in_the_context_they_were_made_in(tiny, template, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evolve import templates

    (tmp_path / "made").mkdir()
    rows = [
        {
            "id": str(number),
            "prompt": prompt,
            "answers": [
                {"text": "1 2 3", "given": [], "turn": 1, "tokens": 4, "end": "stop", "read": 0},
                {"text": "2 0", "given": [0], "turn": 2, "tokens": 2, "end": "length", "read": 0},
                {"text": "3 3 3", "given": [0, 1], "turn": 3, "tokens": 4, "end": "stop", "read": 0},
                {"text": "", "given": [2], "turn": 4, "tokens": 0, "end": "too long", "read": 0},
            ],
        }
        for number, prompt in enumerate(["3 0 1 2 0 1 2", "0 0", "1 1 1"])
    ]
    (tmp_path / "made" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, report = weigh(tiny, tmp_path / "made", template, tmp_path / "out", batch=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    for row, weighed in zip(rows, found, strict=True):
        prompt = row["prompt"]
        contexts = [
            templates.direct(prompt),
            templates.refine(template, prompt, ["1 2 3"]),
            templates.refine(template, prompt, ["1 2 3", "2 0"]),
        ]
        *made, missing = weighed["answers"]
        assert weighed["id"] == row["id"] and missing is None
        for context, answer, (value, tokens) in zip(contexts, row["answers"], made, strict=False):
            expected, length = by_hand(model, tokenizer, context, answer["text"], answer["end"] == "stop")
            assert tokens == length and value == pytest.approx(expected, rel=1e-4)
    assert report.values == {"answers": 12} and report.dropped == {"answers that were not made": 3}
    alone, _ = weigh(tiny, tmp_path / "made", template, tmp_path / "alone", batch=1)
    assert [one[0] for row in alone for one in row["answers"] if one] == pytest.approx(
        [one[0] for row in found for one in row["answers"] if one], rel=1e-5
    )


WORDS = st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=8), st.integers(1, 3))
def test_distinct_is_the_share_of_different_ones(texts, size):
    named = {str(number): text for number, text in enumerate(texts)}
    grams = [
        tuple(words[first : first + size]) for words in map(str.split, texts) for first in range(len(words) - size + 1)
    ]
    values = drift.distinct(named, size)
    if not grams:
        assert values == {}
    else:
        assert values.keys() == named.keys()
        assert sum(values.values()) / len(values) == pytest.approx(len(set(grams)) / len(grams))


def test_the_spread_of_distinct_is_the_jackknifes():
    from scipy import stats

    texts = {"1": "a b c d", "2": "a b a b", "3": "c d e"}
    shares = []  # without each: 2 of 3 + 2 ... counted by hand
    shares.append(4 / 5)  # ab ba ab cd de
    shares.append(4 / 5)  # ab bc cd cd de
    shares.append(4 / 6)  # ab bc cd ab ba ab
    spread = stats.sem([drift.distinct(texts, 2)[key] for key in texts])
    middle = sum(shares) / 3
    assert spread == pytest.approx((2 / 3 * sum((share - middle) ** 2 for share in shares)) ** 0.5)


def test_self_bleu_is_sacrebleus():
    texts = {"1": "a b c d e", "2": "a b c d f", "3": "g h i j k"}
    found = drift.self_bleu(texts)
    assert found["1"] == sentence_bleu(texts["1"], [texts["2"], texts["3"]]).score
    assert found["3"] == sentence_bleu(texts["3"], [texts["1"], texts["2"]]).score < 10 < found["1"]
    assert drift.self_bleu(dict.fromkeys("xyz", "a b c d e")) == pytest.approx(dict.fromkeys("xyz", 100))
    assert drift.self_bleu({"1": "a b"}) == {}


def rows(*values):
    """answers, gold, policy, base of two turns a prompt: (text, score, log-probability by the model, by the base)."""
    names = [str(number) for number in range(len(values))]
    return (
        [{"id": n, "answers": [{"text": turn[0]} for turn in v]} for n, v in zip(names, values, strict=True)],
        [{"id": n, "scores": [turn[1] for turn in v]} for n, v in zip(names, values, strict=True)],
        *(
            [{"id": n, "answers": [[turn[side], 4] for turn in v]} for n, v in zip(names, values, strict=True)]
            for side in (2, 3)
        ),
    )


def test_numbers_by_hand():
    answers, gold, policy, base = rows(
        [("a b c", 0.0, -4.0, -6.0), ("a b c d", 1.0, -1.0, -8.0)],
        [("a b", 0.5, -2.0, -2.0), ("a b c d", 0.5, -2.0, -4.0)],
    )
    proxy = [{"id": row["id"], "scores": [2.0, 5.0]} for row in answers]
    measured = drift.measure(answers, gold, policy, base, "said", proxy)
    direct, refined, gain = drift.headline(measured.metrics).values()
    assert {name: refined[name]["value"] for name in drift.METRICS} == pytest.approx(
        {
            "gold": 0.75,
            "proxy": 5.0,
            "characters": 7.0,
            "distinct_2": 0.5,
            "self_bleu": 100.0,
            "log_perplexity": 1.5,
            "kl": 4.5,
        }
    )
    assert (direct["kl"]["value"], direct["log_perplexity"]["value"], direct["characters"]["value"]) == (1.0, 1.0, 4.0)
    assert gain["kl"]["value"] == 3.5 and gain["proxy"]["value"] == 3.0
    assert measured.items["refined"]["kl"] == {"0": 7.0, "1": 2.0}
    assert "proxy" not in drift.measure(answers, gold, policy, base, "said").metrics["turns"][0]


def test_likeness_has_no_interval_over_prompts_and_no_test(tmp_path):
    """A text stands among the references of others, so their values are not independent."""
    said = ["a b c d e", "a b c d f", "g h i j k", "a b c d e"]
    measured = drift.measure(
        *rows(*[[(text, 1.0, -n, -2.0), (said[-1], 0.5, -1.0, -n)] for n, text in enumerate(said)]), "said"
    )
    for worth in drift.headline(measured.metrics).values():
        assert worth["self_bleu"]["low"] is worth["self_bleu"]["high"] is None and worth["self_bleu"]["n"] == 4
        assert worth["kl"]["low"] < worth["kl"]["high"]
    direct, refined, gain = (worth["self_bleu"]["value"] for worth in drift.headline(measured.metrics).values())
    assert refined == pytest.approx(100) and gain == pytest.approx(refined - direct) and gain > 0
    steps = [{"phase": "base", "kind": "evaluate", "id": "evaluate/1", "benchmark": "drift"}]
    made = Measurement("base", "evaluate/1", measured.metrics, {"dropped": {}})
    sweep = Sweep(
        tmp_path, Store(tmp_path), [MemberResult("", {}, steps, [made], [], {})], {made.id: dict(measured.items)}
    )
    [tested] = differences.shown(sweep)
    assert {row[2] for row in tested.rows[1:]} == {"gold", "characters", "distinct_2", "log_perplexity", "kl"}
    [whole] = tables.shown(sweep)
    assert whole.title.endswith(f"with no value by prompt: {drift.METRICS['self_bleu']}")


def test_gold_and_proxy_are_drawn_on_one_scale(tmp_path):
    """Their units have nothing in common: both are changes from the base's direct answers, in these' SDs by prompt."""
    scores = {"base": [(0.2, 10.0), (0.4, 30.0)], "sft": [(0.5, 20.0), (0.5, 60.0)]}
    steps, made, items = [], [], {}
    for phase, by_prompt in scores.items():
        answers, gold, policy, base = rows(
            *[[("a b", one, -1.0, -2.0), ("a b", one, -1.0, -2.0)] for one, _ in by_prompt]
        )
        proxy = [{"id": row["id"], "scores": [one, one + 20]} for row, (_, one) in zip(gold, by_prompt, strict=True)]
        measured = drift.measure(answers, gold, policy, base, "said", proxy)
        steps.append({"phase": phase, "kind": "evaluate", "id": phase, "benchmark": "drift"})
        made.append(Measurement(phase, phase, measured.metrics, {"dropped": {}}))
        items[phase] = dict(measured.items)
    sweep = Sweep(tmp_path, Store(tmp_path), [MemberResult("", {}, steps, made, [], {})], items)
    [drawn] = figures.write(sweep)
    found = {(mark.series, mark.where): mark.estimate for mark in drawn.marks if "in SDs" in mark.series}
    assert {key: round(of["value"] * 2**0.5, 9) for key, of in found.items()} == {
        (", direct, gold in SDs", "base"): 0, (", direct, gold in SDs", "sft"): 2,  # 0.2 in SDs of 0.1 * 2**0.5
        (", refined, gold in SDs", "base"): 0, (", refined, gold in SDs", "sft"): 2,
        (", direct, proxy in SDs", "base"): 0, (", direct, proxy in SDs", "sft"): 2,
        (", refined, proxy in SDs", "base"): 2, (", refined, proxy in SDs", "sft"): 4,
    }  # fmt: skip
    one = found[", direct, proxy in SDs", "sft"]
    assert one["high"] - one["value"] == pytest.approx((made[1].metrics["turns"][0]["proxy"]["high"] - 40) / 200**0.5)
    text = " ".join(re.findall(r">([^<>]+)</text>", (tmp_path / "drift.svg").read_text()))
    assert "gold, and hollow: proxy; SDs from the base's direct answers" in text
    # Without the base's answers there is no such scale: each has its own panel.
    [drawn] = figures.write(replace(sweep, experiment="other", _items={key: {} for key in items}))
    assert not [mark for mark in drawn.marks if "SDs" in mark.series]
    text = " ".join(re.findall(r">([^<>]+)</text>", (tmp_path / "drift.svg").read_text()))
    assert drift.METRICS["gold"] in text and drift.METRICS["proxy"] in text


def test_what_has_no_score_is_counted():
    answers, gold, policy, base = rows(*[[("a b", 1.0, -1.0, -1.0)] * 2 for _ in range(4)])
    gold[0]["scores"][1] = None
    policy[1]["answers"][0] = None
    measured = drift.measure(answers, gold, policy, base, "said")
    assert list(measured.dropped.values()) == [2] and measured.metrics["turns"][0]["gold"]["n"] == 2
    for row in gold:
        row["scores"][0] = None
    with pytest.raises(ValueError, match="no prompt has all its answers"):
        drift.measure(answers, gold, policy, base, "said")


def test_it_shares_the_curves_answers_and_scores():
    """Beside the refinement curve it costs what weighs its answers, and the training's own scores where they differ."""
    resolver = sources.Resolver(None)

    def kinds(*overrides):
        config = load("debug=fast", *overrides)
        return [step.stage for step in plan.build("member", config, resolver).steps]

    curve, both = ({one.id: one for one in kinds(*which)} for which in ((), ("eval=drift",)))
    added = [one.kind for key, one in both.items() if key not in curve]
    phases = sum(one.kind == "evaluate" for one in curve.values())
    # The base reads its own answers once; every other model's are read by two.
    assert sorted(added) == ["evaluate"] * phases + ["perplexity"] * (2 * phases - 1)
    [*_, last] = [one for one in kinds("eval=drift", "filter=reward_model") if one.kind == "evaluate"]
    assert set(last.inputs) == {"answers", "gold", "proxy", "policy", "base"}
