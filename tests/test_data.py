import gzip
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve import data
from evolve.data import DataError


def row(number, prompt=None):
    return {"prompt": prompt or f"prompt {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}


def write(path, rows):
    lines = "".join(json.dumps(item) + "\n" for item in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if path.name.endswith(".json") else lines)
    return str(path)


def take(path, pool="pairs", start=0, count=1, reserve=0, eval_path=None, seed=0, **settings):
    settings = {"split": "train", "eval_split": None, "max_characters": None, **settings}
    return data.slice_rows(path, eval_path, pool=pool, start=start, count=count, reserve=reserve, seed=seed, **settings)


def prompts(rows):
    return [item["prompt"] for item in rows]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_file_formats(tmp_path, name):
    rows = [row(number) for number in range(4)]
    found, dropped = take(write(tmp_path / name, rows), count=4)
    assert dropped == {}
    for item in found:
        assert item == {"id": data.row_id(item["prompt"]), **row(item["prompt"].split()[1])}
    assert sorted(prompts(found)) == sorted(prompts(rows))


def test_message_lists_are_their_last_message(tmp_path):
    def chat(text):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    given = {"prompt": "q", "chosen": chat("yes"), "rejected": chat("no"), "extra": [1]}
    found = data.read(write(tmp_path / "rows.jsonl", [given]), "train")
    assert found == [{"prompt": "q", "chosen": "yes", "rejected": "no"}]


def test_reference_answers(tmp_path):
    """In GSM8K's form and others, with pairs or without; its columns by the names that they have."""
    golds = ["6 * 7 = 42\n#### 42", " 42 ", 42, 4.5, "#### 1\n#### 2"]
    rows = [{"question": f"q {n}", "answer": gold} for n, gold in enumerate(golds)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = data.read(path, "train", "question", "answer")
    assert found == [{"prompt": f"q {n}", "gold": gold} for n, gold in enumerate(["42", "42", "42", "4.5", "2"])]
    for pool in ("eval", "prompts"):
        taken, dropped = take(path, pool, count=2, reserve=2, prompt="question", gold="answer")
        assert len(taken) == 2 and all(item.keys() == {"id", "prompt", "gold"} for item in taken) and not dropped
    with pytest.raises(DataError, match=r"pairs are asked of rows without 'chosen'.*or 0"):
        take(path, "pairs", count=1, prompt="question", gold="answer")
    path = write(tmp_path / "pairs.jsonl", [{**row(n), "gold": str(n)} for n in range(4)])
    assert [item["gold"] for item in take(path, "pairs", count=4, gold="gold")[0]] == [
        item["prompt"].split()[1] for item in take(path, "pairs", count=4)[0]
    ]
    for broken_row, what in (
        ({"question": "q"}, "row 1: no 'answer'; it has question"),
        ({"answer": "3"}, "row 1: no 'question'"),
        ({"question": "q", "answer": "3", "chosen": "c"}, "row 1: no 'rejected'"),
        ({"question": "q", "answer": "3 ####"}, "row 1, answer: an empty reference answer"),
        ({"question": "q", "answer": True}, "row 1, answer: neither"),
    ):
        with pytest.raises(DataError, match=what):
            data.read(write(tmp_path / "broken.jsonl", [broken_row]), "train", "question", "answer")


sizes = st.integers(0, 6)


@given(sizes, sizes, sizes, sizes, sizes, st.integers(0, 4), st.integers(0, 3))
def test_slices_of_one_file_are_apart(held_out, sft, offline, fresh, reward, spare, seed):
    """Held-out rows, two stretches of pairs, two iterations' prompts, and the reward model's pairs from the end."""
    total = held_out + sft + offline + 2 * fresh + reward + spare
    rows = [row(number) for number in range(total)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "rows.jsonl", rows)
        slices = [
            take(path, "eval", 0, held_out, held_out, seed=seed),
            take(path, "pairs", 0, sft, held_out, seed=seed),
            take(path, "pairs", sft, offline, held_out, seed=seed),
            take(path, "prompts", sft + offline, fresh, held_out, seed=seed),
            take(path, "prompts", sft + offline + fresh, fresh, held_out, seed=seed),
            take(path, "pairs", -reward, reward, held_out, seed=seed) if reward else ([], {}),
        ]
        with pytest.raises(DataError, match=r"rows\.jsonl: .* make data\.eval_prompts"):
            take(path, "pairs", sft + offline, total + 1, held_out)
    assert [len(found) for found, _ in slices] == [held_out, sft, offline, fresh, fresh, reward]
    together = [item["id"] for found, _ in slices for item in found]
    assert len(together) == len(set(together)) == total - spare


@given(st.permutations(range(12)), st.integers(0, 3))
def test_the_order_of_the_file_does_not_count(order, seed):
    rows = [row(number) for number in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        one = write(Path(folder) / "one.jsonl", rows)
        other = write(Path(folder) / "other.jsonl", [rows[number] for number in order])
        for slice in ({"pool": "eval", "count": 3}, {"start": 2, "count": 4}, {"start": -2, "count": 2}):
            assert take(one, reserve=3, seed=seed, **slice) == take(other, reserve=3, seed=seed, **slice)


def test_the_seed_draws_the_slices(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(number) for number in range(40)])
    assert prompts(take(path, count=10)[0]) != prompts(take(path, count=10, seed=1)[0])


def test_what_is_left_out_is_counted(tmp_path):
    rows = [
        row(0),
        row(1, prompt="prompt 0"),
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "\n"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "long", "chosen": "x" * 30, "rejected": "b"},
        row(2),
    ]
    found, dropped = take(write(tmp_path / "rows.jsonl", rows), count=2, max_characters=29)
    assert sorted(prompts(found)) == ["prompt 0", "prompt 2"]
    assert dropped == {"empty": 3, "too many characters": 1, "chosen is rejected": 1, "prompt seen before": 1}
    assert {item["prompt"]: item["chosen"] for item in found}["prompt 0"] == "good 0"


def test_prompts_of_a_held_out_file_are_kept_out_of_training(tmp_path):
    """However they are spaced and capitalised there."""
    path = write(tmp_path / "train.jsonl", [row(number) for number in range(6)])
    held_out = write(tmp_path / "eval.jsonl", [row(7, "PROMPT  0"), row(8, "prompt 3\n"), row(9, "another")])
    pairs, dropped = take(path, "pairs", count=4, eval_path=held_out)
    assert sorted(prompts(pairs)) == ["prompt 1", "prompt 2", "prompt 4", "prompt 5"]
    assert dropped == {"prompt is held out": 2}
    with pytest.raises(DataError, match="which has 4"):
        take(path, "prompts", count=5, eval_path=held_out)
    judged, dropped = take(path, "eval", count=3, eval_path=held_out)
    assert sorted(prompts(judged)) == ["PROMPT  0", "another", "prompt 3\n"]
    assert dropped == {}


def test_too_few_rows_names_the_pool_and_the_remedy(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(number) for number in range(5)])
    for wanted in ({"count": 4}, {"start": 3, "count": 1}, {"start": -4, "count": 4}, {"pool": "eval", "count": 3}):
        with pytest.raises(DataError, match="which has") as error:
            take(path, **{"reserve": 2, "pool": "prompts", **wanted})
        assert "\n" not in str(error.value)


def broken(path, where):
    with pytest.raises(DataError) as error:
        data.read(str(path), "train")
    text = str(error.value)
    assert text.startswith(f"{path}{where}"), text
    assert "\n" not in text
    return text


def test_wrong_columns_name_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [row(0), {"prompt": "p", "chosen": "a", "answer": "b"}])
    assert broken(path, ", row 2: no 'rejected'").endswith("it has prompt, chosen, answer")
    write(path, [row(0), row(1), ["prompt", "chosen", "rejected"]])
    broken(path, ", row 3: ")
    for value in (3, None, [], ["text"], [{"role": "user"}], {"content": "a"}):
        write(path, [{**row(0), "chosen": value}])
        broken(path, ", row 1, chosen: neither")


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(0)) + "\n\n{'prompt': 1}\n")
    broken(path, ", line 3: not JSON")


def test_a_json_list_that_is_none_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "p",')
    broken(path, "")
    path.write_text("7")
    broken(path, "")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write(path, [row(number) for number in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    broken(path, "")


def test_half_a_character_is_named(tmp_path):
    """JSON can hold half of a surrogate pair, which no text file and no hash can."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row(0), "prompt": "\ud800"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1"):
        take(str(path))


def test_slices_of_the_embedded_world_are_apart():
    held_out, _ = take("embedded", "eval", count=200)
    first, _ = take("embedded", "pairs", count=100)
    second, _ = take("embedded", "pairs", start=100, count=100)
    fresh = [take("embedded", "prompts", start=start, count=150)[0] for start in (0, 150)]
    slices = [held_out, first, second, *fresh]
    together = [item["id"] for found in slices for item in found]
    assert len(together) == len(set(together)) == 700
    assert all(item["id"] == data.row_id(item["prompt"]) for item in held_out)
    assert all(item["chosen"] != item["rejected"] for item in first + second)
    assert take("embedded", "pairs", start=50, count=100)[0] == first[50:] + second[:50]


@pytest.fixture
def real():
    folder = os.environ.get("EVOLVE_TEST_DATA")
    if not folder:
        pytest.skip("EVOLVE_TEST_DATA (a folder with preference/ultrafeedback_binarized_1000.jsonl.gz) is not set")
    file = Path(folder) / "preference" / "ultrafeedback_binarized_1000.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"EVOLVE_TEST_DATA: no {file}")
    return str(file)


def test_real_ultrafeedback(real):
    rows = data.read(real, "train")
    assert len(rows) == 1000
    limit = 4000
    held_out, dropped = take(real, "eval", count=100, reserve=100, max_characters=limit)
    left = len(rows) - sum(dropped.values())
    assert 500 < left < 1000
    rest, _ = take(real, "pairs", count=left - 100, reserve=100, max_characters=limit)
    assert len({item["id"] for item in held_out + rest}) == left
    assert all(len(item[key]) <= limit for item in held_out + rest for key in ("prompt", "chosen", "rejected"))
    originals = {(item["prompt"], item["chosen"], item["rejected"]) for item in rows}
    drawn = random.Random(0).sample(rest, 20)
    assert all((item["prompt"], item["chosen"], item["rejected"]) in originals for item in drawn)
