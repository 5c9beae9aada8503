"""Training curves: what a member's stages have logged, and what is said of each."""

from pathlib import Path

import pytest

from evolve.stages import write_rows
from evolve.store import Report, Stage, StageConfig, Store
from sweeps import figures, training
from sweeps.collect import MemberResult, Sweep


class Config(StageConfig):
    number: int


def swept(folder: Path, *lengths: int) -> Sweep:
    """One member, with a training stage of each length, whose losses are the numbers of its steps."""
    store, steps = Store(folder / "store"), []
    for number, length in enumerate(lengths):
        made = Stage("train", 1, Config(number=number))
        with store.build(made) as out:
            write_rows(out / "steps.jsonl", ({"step": step, "loss": float(step)} for step in range(1, length + 1)))
            store.commit(made, out, Report(), {})
        steps.append({"phase": f"iteration {number + 1}", "kind": "train", "id": made.id})
    return Sweep(folder, store, [MemberResult("loss=pt", {}, steps, [], [], {})])


@pytest.mark.parametrize(
    ("steps", "value", "said"),
    [(7, 7.0, "loss after 7 steps"), (600, 598.5, "loss after 600 steps, mean of the last 4")],
)
def test_a_mark_says_what_its_number_is(tmp_path: Path, steps: int, value: float, said: str) -> None:
    [drawn] = figures.write(swept(tmp_path, steps))
    [mark] = drawn.marks
    assert (mark.estimate["value"], mark.where) == (value, f"iteration 1, {said}")


def test_curves_end_before_steps_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many there were is not known, and later steps have numbers that go on from them."""
    made = swept(tmp_path, 3, 5, 4)
    [member] = made.members
    assert [before for _, _, before, _ in training.stages(made, member)] == [0, 3, 8]
    file = made.store.folder(member.steps[1]["id"]) / "steps.jsonl"
    written = file.read_bytes()
    file.write_bytes(written[::-1])  # of the same size
    assert [before for _, _, before, _ in training.stages(made, member)] == [0]
    figures.write(made)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{member.steps[1]['id']}: steps.jsonl is not what was written" in said
    file.write_bytes(written)
    [drawn] = figures.write(Sweep(made.folder, made.store, made.members))  # what was drawn without is drawn again
    assert len(drawn.marks) == 3
