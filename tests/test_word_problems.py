"""Sums in a sentence: their answers are what a reader works out, and what the verifier reads from them."""

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve import data, word_problems
from evolve.scorers import Item
from evolve.verifiers import Number


@given(st.integers(0, 2**32))
def test_answers_are_right_and_wrong(seed: int) -> None:
    verifier = Number()
    for row in islice(word_problems.rows(200, seed), 20):
        before, change = map(int, re.findall(r"\d+", row["prompt"]))
        expected = before - change if re.search("gives|loses|sells", row["prompt"]) else before + change
        assert int(row["gold"]) == expected >= 0
        for answer, right in (("chosen", True), ("rejected", False)):
            assert verifier.grade(Item(row["prompt"], row[answer], gold=row["gold"])).correct is right


def test_a_file_is_its_seeds_and_a_data_set(tmp_path, monkeypatch, capsys) -> None:
    files = [tmp_path / "deep" / f"{name}.jsonl" for name in ("one", "again", "other")]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        monkeypatch.setattr("sys.argv", ["word_problems", str(file), "--rows", "300", "--seed", str(seed)])
        assert word_problems.main() == 0
    one, again, other = (file.read_bytes() for file in files)
    assert one == again != other and "300 problems in" in capsys.readouterr().out
    rows = data.read(str(files[0]), "train", gold="gold")
    assert len({row["prompt"] for row in rows}) == 300 and all(row["chosen"] != row["rejected"] for row in rows)


def test_more_problems_than_there_are(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["word_problems", "--rows", "1000000"])
    with pytest.raises(SystemExit):
        word_problems.main()
    assert "1,000,000 rows: from 1 to" in capsys.readouterr().err
