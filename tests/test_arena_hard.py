"""Arena-Hard's files, games, labels and scores, on small cases and on published judgments."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evals import arena_hard, statistics
from evals.games import Reply
from evolve import data

FIVE = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
verdicts = st.lists(st.sampled_from([*FIVE, None, "A<B"]), min_size=2, max_size=2)
games = st.dictionaries(st.text(max_size=3), verdicts, min_size=1, max_size=9).map(lambda made: list(made.items()))
ASK = arena_hard.asks("p", "a", "r")[0]


@pytest.fixture(scope="module")
def published():
    folder = Path(os.environ.get("EVOLVE_TEST_DATA", "")) / "arena_hard"
    if not os.environ.get("EVOLVE_TEST_DATA") or not folder.exists():
        pytest.skip("EVOLVE_TEST_DATA (a folder with arena_hard/) is not set")
    return folder


def lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def command(capsys, *words):
    status = arena_hard.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, json.loads(out) if status == 0 else err


NEW = {"uid": "u1", "category": "hard_prompt", "prompt": "Why {this}?"}
OLD = {"question_id": "u1", "turns": [{"content": "Why {this}?"}]}
NEW_ANSWER = {"uid": "u1", "model": "base", "messages": [{}, {"role": "assistant", "content": {"answer": "So."}}]}
OLD_ANSWER = {"question_id": "u1", "model_id": "base", "choices": [{"turns": [{"content": "So."}]}]}


@pytest.mark.parametrize("answer", [NEW_ANSWER, OLD_ANSWER])
@pytest.mark.parametrize("question", [NEW, OLD])
def test_questions_of_both_forms(tmp_path, question, answer):
    paths = write(tmp_path / "q.jsonl", [question]), write(tmp_path / "a.jsonl.gz", [answer])
    (row,) = arena_hard.questions(*paths)
    assert row.pop("category", "hard_prompt") == "hard_prompt"
    assert row == {"id": data.row_id("Why {this}?"), "prompt": "Why {this}?", "reference": "So.", "uid": "u1"}


OTHER = {**NEW, "uid": "u2", "prompt": "And?"}
WRONG = {
    "no answer to u2": ([NEW, OTHER], [NEW_ANSWER], "q.jsonl, row 2"),
    "the id of": ([NEW, {**OTHER, "uid": "u1"}], [NEW_ANSWER], "q.jsonl, row 2"),
    "the prompt of": ([NEW, {**NEW, "uid": "u2"}], [NEW_ANSWER], "q.jsonl, row 2"),
    "a second answer to u1": ([NEW], [NEW_ANSWER, OLD_ANSWER], "a.jsonl, row 2"),
    "no 'prompt' or 'turns'; it has uid": ([{"uid": "u1"}], [NEW_ANSWER], "q.jsonl, row 1"),
    "a conversation of 2 messages": ([{**OLD, "turns": OLD["turns"] * 2}], [NEW_ANSWER], "q.jsonl, row 1"),
    "no 'messages' or 'choices'": ([NEW], [{"uid": "u1", "output": "So."}], "a.jsonl, row 1"),
    "no answer where": ([NEW], [{**NEW_ANSWER, "messages": []}], "a.jsonl, row 1"),
    "no questions": ([], [NEW_ANSWER], "q.jsonl"),
    "a list, not an object": ([NEW], [[]], "a.jsonl, row 1"),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_files_are_named(tmp_path, said):
    asked, answers, where = WRONG[said]
    with pytest.raises(ValueError) as error:
        arena_hard.questions(write(tmp_path / "q.jsonl", asked), write(tmp_path / "a.jsonl", answers))
    assert said in str(error.value)
    assert where in str(error.value)
    assert "\n" not in str(error.value)


def test_a_limit_asks_for_no_more(tmp_path):
    paths = write(tmp_path / "q.jsonl", [NEW, OTHER]), write(tmp_path / "a.jsonl", [NEW_ANSWER])
    assert [row["uid"] for row in arena_hard.questions(*paths, limit=1)] == ["u1"]


texts = st.text(st.sampled_from("a{} \n\\1promtfis") | st.characters(exclude_categories=["Cs"]), max_size=20)


@given(texts, texts, texts)
def test_games_show_each_answer_once_in_both_orders(prompt, answer, reference):
    """Whatever they hold: the places of the judge's prompt among it."""
    template = yaml.safe_dump({"user": "[[A>B]]<{prompt}|{first}|{second}>"})
    made = arena_hard.asks(prompt, answer, reference, template=template)
    shown = [f"{prompt}|{reference}|{answer}", f"{prompt}|{answer}|{reference}"]
    assert [ask.messages for ask in made] == [[{"role": "user", "content": f"[[A>B]]<{text}>"}] for text in shown]
    assert [ask.answer_first for ask in made] == [False, True]
    for ask, (first, second) in zip(
        arena_hard.asks(prompt, answer, reference), [(reference, answer), (answer, reference)], strict=True
    ):
        assert ask.fields == {"temperature": 0, "max_tokens": 4096}
        system, user = (message["content"] for message in ask.messages)
        assert all(f"[[{label}]]" in system for label in FIVE)
        assert f"\n{first}\n# End of A's" in user
        assert f"\n{second}\n# End of B's" in user


def test_upstreams_prompt_files_are_taken_as_they_are():
    """The keys and places of judge_config.yaml (v0.1), and of arena-hard-v2.0.yaml, whose labels are in code."""
    old = {"name": "x", "system_prompt": "[[A>B]]", "prompt_template": ["{question_1}|{answer_1}|{answer_2}"]}
    made = arena_hard.asks("p", "ours", "theirs", template=yaml.safe_dump(old | {"temperature": 0, "pairwise": True}))
    assert made[1].messages == [
        {"role": "system", "content": "[[A>B]]"},
        {"role": "user", "content": "p|ours|theirs"},
    ]
    new = {"prompt_template": "{QUESTION}|{ANSWER_A}|{ANSWER_B}", "max_tokens": 16000, "temperature": 1.0}
    with pytest.raises(ValueError, match=r"names no label such as \[\[A>B\]\]"):
        arena_hard.asks("p", "ours", "theirs", template=yaml.safe_dump(new))
    made = arena_hard.asks("p", "ours", "theirs", template=yaml.safe_dump(new | {"system": "[[A>B]]"}))
    assert made[0].messages[-1]["content"] == "p|theirs|ours"
    assert made[0].fields == {"temperature": 1.0, "max_tokens": 16000}


@pytest.mark.parametrize(
    "template", ["{prompt} {first} {second}", "user: '{prompt} {first} [[A>B]]'", "user: 3", "user: [", "- user"]
)
def test_other_templates_are_refused(template):
    with pytest.raises(ValueError, match="the judge's prompt") as error:
        arena_hard.asks("p", "a", "r", template=template)
    assert "\n" not in str(error.value)


def test_the_prompts_hash_is_of_what_is_sent():
    """It is part of a metric's protocol: whoever changes our prompt changes it here too."""
    own = Path(arena_hard.__file__).with_suffix(".yaml").read_text()
    assert arena_hard.prompt_hash() == arena_hard.prompt_hash("# a comment\n" + own) == "89eab13d"
    assert arena_hard.prompt_hash(own.replace("mistake", "error")) != "89eab13d"


READ = {  # v0.1: one label, however often; v2.0: the last, in single brackets where there is none in double
    "so: [[A>>B]]": ("A>>B", "A>>B"),
    "[[A=B]] as I said: [[A=B]]": ("A=B", "A=B"),
    "not [[A>B]] but [[B>A]]": (None, "B>A"),
    "[[a>b]]": (None, "A>B"),
    "[A>B]": (None, "A>B"),
    "[[A<B]]": ("A<B", "A<B"),
    "[[A]] [[C]] A>B [[]]": ("A", "A"),
    "I cannot": (None, None),
}


@pytest.mark.parametrize("text", READ)
def test_labels_are_read_as_upstream_does(text):
    found = tuple(arena_hard.read(ASK, Reply(text, "stop"), version=version) for version in arena_hard.LABELS)
    assert found == READ[text]


@pytest.mark.parametrize(("sign", "score"), [(1, 100.0), (0, 50.0), (-1, 0.0)])
def test_a_stand_in_scores_what_it_found(sign, score):
    found = arena_hard.judged([("q", arena_hard.stand_in(sign))])
    assert found["score"]["value"] == score
    assert found["first_wins"]["value"] == 0


def test_a_score_by_hand():
    """a: loses one row, wins three. b: a tie, and an unreadable game. c: none that counts."""
    made = [("a", ["A>B", "A>>B"]), ("b", ["A=B", None]), ("c", ["A<B", None])]
    found = arena_hard.judged(made)
    assert found["score"]["value"] == pytest.approx(100 * 3.5 / 5)
    assert (found["score"]["n"], found["unclustered"]["n"]) == (2, 5)
    assert (found["unscored"], found["unplayed"]) == (3, 1)
    assert found["labels"] == {"A>>B": 1, "A>B": 1, "A=B": 1, "B>A": 0, "B>>A": 0}
    assert found["first_wins"] == {"value": 100.0, "low": None, "high": None, "n": 1}
    assert found["rating"] == pytest.approx(1000 + 400 * np.log10(0.7 / 0.3))
    later = arena_hard.judged([*made, ("d", ["A<B", "B=A"])], "v2.0")
    assert later["score"]["value"] == pytest.approx(100 * (3 + 1.5) / (4 + 2))
    assert (later["unscored"], later["unplayed"]) == (4, 2)
    assert arena_hard.judged([("c", [None, None])])["score"] is None


@given(games)
def test_swapped_sides_score_the_rest(made):
    """Were the baseline the model and the model the baseline, games change places and 100 is parted the same."""
    found = arena_hard.judged(made)
    swapped = arena_hard.judged([(question, labels[::-1]) for question, labels in made])
    if found["score"] is None:
        assert swapped["score"] is None
        return
    assert found["score"]["value"] + swapped["score"]["value"] == pytest.approx(100)
    assert 0 <= found["score"]["value"] <= 100
    if found["first_wins"]:
        assert found["first_wins"] == pytest.approx(swapped["first_wins"])


@given(games)
def test_mirrored_labels_score_the_rest(made):
    mirror = dict(zip([*FIVE, None, "A<B"], [*FIVE[::-1], None, "A<B"], strict=True))
    found = arena_hard.judged(made)
    mirrored = arena_hard.judged([(question, [mirror[label] for label in labels]) for question, labels in made])
    if found["score"]:
        assert found["score"]["value"] + mirrored["score"]["value"] == pytest.approx(100)
    assert (found["unscored"], found["unplayed"]) == (mirrored["unscored"], mirrored["unplayed"])


def regression(rows, baseline):
    """Ratings as upstream's regression finds them: rows twice, so that a tie is half a win, without a penalty."""
    from sklearn.linear_model import LogisticRegression

    models = sorted({model for row in rows for model in row[:2]})
    x = np.zeros((2 * len(rows), len(models)))
    y = np.zeros(2 * len(rows))
    for number, (first, second, winner) in enumerate(rows * 2):
        x[number, models.index(first)], x[number, models.index(second)] = np.log(10), -np.log(10)
        y[number] = winner == "model_a" or (winner == "tie" and number < len(rows))
    fit = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-8).fit(x, y)
    ratings = dict(zip(models, 400 * fit.coef_[0], strict=True))
    return {model: 1000 + rating - ratings[baseline] for model, rating in ratings.items()}


def test_published_scores(published, capsys):
    """23.338 for gpt-3.5-turbo-0125, published as 23.34; and upstream's regression finds the same ratings."""
    path = published / "battles_gpt-4-1106-preview_judge.jsonl.gz"
    status, found = command(capsys, "--battles", path)
    assert status == 0
    expected = json.loads((published / "expected_scores.json").read_text())
    assert {row["model"]: row["score"]["value"] for row in found["models"]} == pytest.approx(
        {model: row["score"] for model, row in expected.items()}, rel=1e-12
    )
    assert round(expected["gpt-3.5-turbo-0125"]["score"], 2) == 23.34
    rows = [(row["model_a"], row["model_b"], row["winner"]) for row in lines(path)]
    ratings = regression(rows, "gpt-4-0314")
    for row in found["models"]:
        assert row["rating"] == pytest.approx(ratings[row["model"]], abs=0.1)
    assert [row["score"]["value"] for row in found["models"]] == sorted(
        (row["score"]["value"] for row in found["models"]), reverse=True
    )
    one = command(capsys, "--battles", path, "--model", "gpt-3.5-turbo-0125")[1]["models"]
    assert [row["model"] for row in one] == ["gpt-3.5-turbo-0125"]


def test_upstreams_bootstrap_has_the_unclustered_width(published, capsys):
    """Its 100 draws of rows are as wide, within a fifth, as the interval for independent rows.

    A prompt's rows are not independent: clustered, the interval is a third wider or more.
    """
    stored = lines(published / "bootstrapping_results.jsonl")
    _, found = command(capsys, "--battles", published / "battles_gpt-4-1106-preview_judge.jsonl.gz")
    for row in found["models"]:
        draws = [100 / (1 + 10 ** ((1000 - drawn[row["model"]]) / 400)) for drawn in stored]
        theirs = 2 * 1.96 * np.std(draws, ddof=1)
        clustered, rows = (row[kind]["high"] - row[kind]["low"] for kind in ("score", "unclustered"))
        assert rows == pytest.approx(theirs, rel=0.2)
        assert clustered > 1.3 * rows


def test_the_interval_is_that_of_drawing_questions(published):
    """A bootstrap that draws questions rather than rows, 2000 times."""
    path = published / "battles_gpt-4-1106-preview_judge.jsonl.gz"
    parts = arena_hard.battles(str(path))["gpt-3.5-turbo-0125"]
    won, rows = np.array([np.sum(games, axis=0) for games in parts.values()]).T
    draws = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    low, high = np.percentile(100 * won[draws].sum(1) / rows[draws].sum(1), [2.5, 97.5])
    found = arena_hard.score(parts)["score"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.25)


def test_every_published_label_is_read_as_it_is_stored(published):
    """Of all games: one label, several, none."""
    found = 0
    for path in sorted((published / "model_judgment").glob("*.gz")):
        for row in lines(path):
            for game in row["games"]:
                assert arena_hard.read(ASK, Reply(game["judgment"], "stop")) == game["score"], (
                    path,
                    row["question_id"],
                )
                found += 1
    assert found > 600


def test_published_questions_and_judgments_join(published, capsys, tmp_path):
    """Both forms of both files give the same rows; the games that upstream showed are ours, in our order."""
    forms = [
        arena_hard.questions(str(published / asked), str(published / "model_answer" / answers))
        for asked, answers in [
            ("question_v0.1.jsonl", "gpt-4-0314.jsonl.gz"),
            ("question_v0.1_original.jsonl", "gpt-4-0314_original.jsonl.gz"),
        ]
    ]
    assert forms[0] == forms[1]
    assert len(forms[0]) == 500
    by_uid = {row["uid"]: row for row in forms[0]}
    for path in sorted((published / "model_judgment").glob("*.gz")):
        status, found = command(capsys, "--judgments", path)
        rows = lines(path)
        labels = [label for row in rows for label in (game["score"] for game in row["games"])]
        assert (status, found["models"][0]["unscored"]) == (0, labels.count(None))
        for row in rows:
            known = by_uid[row["question_id"]]
            for ask, game in zip(arena_hard.asks("", "ANSWER", known["reference"]), row["games"], strict=True):
                shown = re.split(r"<\|The Start of Assistant [AB]'s Answer\|>\n", game["user_prompt"])
                assert known["prompt"] in shown[0]
                assert known["reference"][:80] in shown[2 if ask.answer_first else 1]


def rows_of(labels, answers=("direct", "refined")):
    """Two prompts' questions, answers and verdicts, from {turn: [labels of each prompt's games]}."""
    asked = [
        {"id": f"p{n}", "prompt": f"prompt {n}", "reference": "base", "uid": f"u{n}", "category": "c"} for n in range(2)
    ]
    made = [{"id": row["id"], "answers": [{"text": text} for text in answers]} for row in asked]
    given = [
        {"id": row["id"], "verdicts": {turn: found[n] for turn, found in labels.items() if n < len(found)}}
        for n, row in enumerate(asked)
    ]
    return asked, made, given


def test_measure_by_turn():
    made = rows_of({"1": [["A>>B", "B>A"], ["A=B", None]], "2": [["A=B", "A=B"], ["B>A", "A>B"]]})
    metrics, dropped, items, _ = arena_hard.measure(*made, "judge j, prompt 12345678")
    assert (metrics["benchmark"], metrics["protocol"], metrics["version"]) == (
        "arena_hard",
        "judge j, prompt 12345678",
        "v0.1",
    )
    assert [(turn["turn"], turn["unscored"], turn["characters"]) for turn in metrics["turns"]] == [(1, 1, 6), (2, 0, 7)]
    assert [turn["score"]["value"] for turn in metrics["turns"]] == pytest.approx([100 * 0.5 / 5, 75.0])
    assert metrics["gain"]["score"]["value"] == pytest.approx(65.0)
    # Their means are the scores, so what is paired by prompt is the gain: p0's four rows weigh more than p1's one.
    assert items["direct"]["score"] == pytest.approx({"p0": -6.0, "p1": 26.0})
    assert items["refined"]["score"] == pytest.approx({"p0": 50.0, "p1": 100.0})
    sides = [{key: [value] for key, value in items[kind]["score"].items()} for kind in ("refined", "direct")]
    assert statistics.differences({"gain": (sides[0], sides[1])})["gain"].value == pytest.approx(65.0)
    assert dropped == {"games without a verdict that counts": 1, "prompts without a game that counts": 0}
    assert list(arena_hard.headline(metrics)) == ["direct", "refined", "gain"]
    assert arena_hard.summary(metrics).startswith("Arena-Hard v0.1 direct 10.0, refined 75.0; gain +65.0 [")
    json.dumps(metrics)


def test_what_was_not_judged_is_counted():
    """The gain is over the prompts that both turns have."""
    made = rows_of({"1": [["A>B", "A>B"], ["A>B", "A>B"]], "2": [["B>A", "A>B"]]})
    metrics, dropped, items, _ = arena_hard.measure(*made, "")
    assert [turn["unplayed"] for turn in metrics["turns"]] == [0, 1]
    assert metrics["gain"]["score"] == {"value": 50.0, "low": None, "high": None, "n": 1}
    assert dropped["prompts without a game that counts"] == 1
    assert set(items["refined"]["score"]) == {"p0"}
    for nothing, said in (({"1": [[None, None]] * 2}, "turn 1: none of 4 games"), ({}, "no turn was judged")):
        with pytest.raises(ValueError, match=said):
            arena_hard.measure(*rows_of(nothing), "")


@given(st.lists(st.tuples(verdicts, verdicts), min_size=2, max_size=2))
def test_a_gain_is_the_difference_of_scores(made):
    found = rows_of({"1": [pair[0] for pair in made], "2": [pair[1] for pair in made]})
    if any(label in FIVE for pair in made for side in pair for label in side) and all(
        any(label in FIVE for label in side) for pair in made for side in pair
    ):
        metrics = arena_hard.measure(*found, "").metrics
        first, last = (turn["score"]["value"] for turn in metrics["turns"])
        assert metrics["gain"]["score"]["value"] == pytest.approx(last - first, abs=1e-9)


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
def test_judgments_are_read_again(tmp_path, capsys, version):
    draw = random.Random(0)
    labels = [[draw.choice([*FIVE, None]) for _ in range(2)] for _ in range(2)]
    asked, made, given = rows_of({"2": labels})
    for row in given:
        row["replies"] = {"2": [f"[[{label}]]" if label else "?" for label in row["verdicts"]["2"]]}
    names = {"turn": 2, "model": "m", "judge": "j", "baseline": "b", "version": version}
    rows = list(arena_hard.judgments(asked, made, given, **names))
    found = arena_hard.load([write(tmp_path / "m.jsonl.gz", rows)])
    assert found == {("m", "j"): [("u0", labels[0]), ("u1", labels[1])]}
    game = rows[0]["games"][1]
    text = game["judgment"] if version == "v0.1" else game["judgment"]["answer"]
    shown = game["user_prompt"] if version == "v0.1" else game["prompt"][-1]["content"]
    assert arena_hard.read(ASK, Reply(text, "stop"), version=version) == labels[0][1]
    assert shown == arena_hard.asks("prompt 0", "refined", "base")[1].messages[-1]["content"]
    status, scored = command(capsys, "--judgments", tmp_path / "m.jsonl.gz", "--version", version)
    assert status == 0
    assert (
        scored["models"][0]["score"]
        == arena_hard.measure(asked, made, given, "", version=version)[0]["turns"][0]["score"]
    )


def test_both_releases_files_are_scored(tmp_path, capsys):
    """Null games; a game of the newer form; v2.0's categories apart, and pooled by v0.1's scoring."""
    head = {"model": "m", "judge": "j"}
    old = [{"question_id": "q0", **head, "games": [{"judgment": "", "score": "B>A"}, None]}]
    new = [
        {"uid": "q1", **head, "category": "hard", "games": [{"score": "A>>B", "judgment": {"answer": ""}}] * 2},
        {"uid": "q2", **head, "category": "hard", "games": [None, {"score": "A>B", "judgment": None}]},
        {"uid": "q3", **head, "category": "art", "games": [{"score": None}, {"score": "A=B"}]},
        {"uid": "q4", **head, "category": "art", "games": [{"score": "A=B"}, {"score": "A=B"}]},
    ]
    paths = write(tmp_path / "old.jsonl", old), write(tmp_path / "new.jsonl.gz", new)
    _, pooled = command(capsys, "--judgments", *paths)
    assert [(row["score"]["value"], row["score"]["n"], row["unscored"]) for row in pooled["models"]] == [
        (pytest.approx(100 * (1 + 3 + 1 + 0.5 + 1) / (1 + 6 + 1 + 1 + 2)), 5, 3)
    ]
    _, parted = command(capsys, "--judgments", *paths, "--version", "v2.0")
    assert {row["category"]: row["score"] and row["score"]["value"] for row in parted["models"]} == {
        "hard": 50.0,
        "art": 50.0,
        None: None,
    }


BAD = {
    "no 'games'": {"question_id": "q", "model": "m", "winner": "tie"},
    "no 'model'": {"question_id": "q", "games": []},
    "not a list of at most two": {"question_id": "q", "model": "m", "games": [None] * 3},
    "a game's score is 7": {"question_id": "q", "model": "m", "games": [{"score": 7}]},
    "a game's score is 'A>B'": {"question_id": "q", "model": "m", "games": ["A>B"]},
    "no 'uid' or 'question_id'": {"model": "m", "games": []},
}


@pytest.mark.parametrize("said", BAD)
def test_wrong_judgments_are_one_line(tmp_path, capsys, said):
    status, error = command(capsys, "--judgments", write(tmp_path / "m.jsonl", [BAD[said]]))
    assert (status, error.count("\n")) == (2, 1)
    assert said in error
    assert "m.jsonl, row 1" in error


def test_wrong_battles_and_commands_are_one_line(tmp_path, capsys):
    battle = {"question_id": "q", "model_a": "base", "model_b": "m", "winner": "tie"}
    path = tmp_path / "b.jsonl"
    for rows, words, said in (
        ([battle, {**battle, "model_a": "x"}], (), "2 models are model_a; say which one is the baseline"),
        ([battle, {**battle, "model_a": "x"}], ("--baseline", "base"), "row 2: x against m"),
        ([{**battle, "winner": "me"}], (), "row 1: base against m, winner me"),
        ([battle], ("--model", "n"), "no model n; there are m"),
        ([battle], ("--version", "v2.0"), "battles are v0.1's"),
    ):
        status, error = command(capsys, "--battles", write(path, rows), *words)
        assert (status, error.count("\n")) == (2, 1)
        assert said in error
    for words in (("--battles", tmp_path / "none.jsonl"), ("--judgments", write(tmp_path / "empty.jsonl", []))):
        status, error = command(capsys, *words)
        assert (status, error.count("\n")) == (2, 1)
        assert str(words[1]) in error
    swapped = {**battle, "model_a": "m", "model_b": "base", "winner": "model_a"}
    _, found = command(capsys, "--battles", write(path, [battle, swapped]), "--baseline", "base")
    assert found["models"][0]["score"]["value"] == 75.0


def test_gains_are_paired(published):
    """Two turns that mostly agree: the gain's interval is narrower than either score's."""
    draw = random.Random(1)
    rows = lines(sorted((published / "model_judgment").glob("*.gz"))[1])
    first = {row["question_id"]: [game["score"] for game in row["games"]] for row in rows}
    last = {key: labels if draw.random() < 0.9 else ["B>A", "A>B"] for key, labels in first.items()}
    given = [{"id": key, "verdicts": {"1": labels, "2": last[key]}} for key, labels in first.items()]
    metrics = arena_hard.measure([{"id": key} for key in first], [], given, "").metrics
    gain, score = metrics["gain"]["score"], metrics["turns"][0]["score"]
    assert gain["low"] > 0
    assert gain["high"] - gain["low"] < score["high"] - score["low"]
    assert statistics.Estimate(**gain).n == score["n"]
