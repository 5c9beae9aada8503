"""The paper's tables and figures: each plans at both sizes; formats, bold, published numbers, comparisons."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import load, sweep_here
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, RunMode
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from evolve import launch, plan
from evolve.config import CONF, ROOT, ConfigError, Sampling
from evolve.engines import Task, memory
from evolve.store import seal, unseal
from hydra_plugins.evolve_harness import MemberSweeper, compose
from sweeps import best, collect, compare, figures, formats, paper, report, spent, style, summary
from sweeps.formats import Cell, Table

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
SMALL = ["debug=fast", "data.eval_prompts=32", "data.sft_pairs=64", "eval.turns=3", "iteration.count=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two methods and one setting that is a number."""
    out = tmp_path_factory.mktemp("paper")
    members = [[*SMALL, f"method={m}", f"output={out}"] for m in ("self_refine", "evolve")]
    return sweep_here(members).folder


@pytest.fixture(scope="module")
def sweep(folder: Path) -> collect.Sweep:
    return collect.load(folder)


# ---- one command each


@pytest.fixture(scope="module")
def context() -> HydraContext:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())


# What is measured of the benchmarks that experiments ask for.
MEASURED = {"refinement": ("reward", "accuracy"), "alpaca_eval": ("win_rate", "lc_win_rate"), "arena_hard": ("score",)}
MEASURED |= {"gsm8k": ("strict", "flexible"), "math": ("accuracy",)}


def run(planned: launch.Planned, experiment: str) -> collect.Sweep:
    """The sweep as if all had been measured."""
    members = []
    for described in map(plan.describe, planned.graph.members):
        measurements = []
        for step in described["steps"]:
            if name := step.get("benchmark"):
                turn = {metric: {"value": 0.5, "low": None, "high": None, "n": 1} for metric in MEASURED[name]}
                metrics = {"benchmark": name, "turns": [turn, turn], "gain": turn}
                measurements.append(collect.Measurement(step["phase"], step["id"], metrics, {}))
        members.append(collect.MemberResult(**described, measurements=measurements, missing=[], generated={}))
    return collect.Sweep(planned.folder, planned.store, members, experiment=experiment)


def documented(experiment: str, size: str) -> set[str]:
    """The figures that docs/paper.md names beside an experiment's command."""
    lines = (ROOT / "docs" / "paper.md").read_text().splitlines()
    [cell] = [line.split("|")[3] for line in lines if f"| `experiment={experiment}` |" in line]
    whole, _, embedded = cell.partition("; embedded: ")
    return set(re.findall(r"\w+(?:-\w+)+", embedded if embedded and size == "embedded" else whole))


def check_memory(planned: launch.Planned, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever generates holds a model of Llama-3.1-8B's size and its context on a GPU of 80 GB."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 8192, **shape}))
    header = json.dumps({"all": {"dtype": "BF16", "shape": [8_030_261_248], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)  # weights are never read
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (79 * 2**30, 80 * 2**30))
    for stage in planned.graph.stages.values():
        config: Any = stage.config
        if stage.kind == "respond":
            engine, length, answer = config.engine, config.engine.max_length or config.max_length, config.max_new_tokens
        elif stage.kind == "score" and config.judge is not None:
            engine, length, answer = config.judge.engine, config.max_length, config.judge.max_new_tokens
        else:
            continue
        memory.check(
            engine, Task(folder, config.model, Sampling(temperature=0, top_k=0, top_p=1), answer, length, "cuda")
        )
        assert 2 * answer <= length


@pytest.mark.parametrize("size", paper.SIZES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_plans_without_a_network_and_draws_what_is_documented(
    context: HydraContext, experiment: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [f"experiment={experiment}", f"scale={size}", f"output={tmp_path}", "dry_run=true"]
    loader = context.config_loader
    base = loader.load_configuration("config", ["~local", *words], RunMode.MULTIRUN)
    params = OmegaConf.to_container(base.hydra.sweeper.params, resolve=True)
    assert isinstance(params, dict)
    lists = [f"{key}={value}" for key, value in params.items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*lists, "~local", *words])
    [jobs] = MemberSweeper.split_arguments(parsed, None)
    planned = launch.plan_members(compose(context, base, jobs), jobs)
    assert len(planned.graph.members) == len(jobs) > 1 and not list(tmp_path.iterdir())
    assert {member.config.data.name for member in planned.graph.members} == (
        {"embedded"} if size == "embedded" else {"ultrafeedback"}
    )
    if size == "paper":
        check_memory(planned, tmp_path / "weights", monkeypatch)
    assert set() < documented(experiment, size) <= figures.drawings(run(planned, experiment)).keys()
    if experiment == "main":
        judging = [str(judge) for judge in planned.judging]
        assert len(judging) == (size == "paper")
        assert all(line.startswith("gpt-4-1106-preview: ") and "can't be priced until" in line for line in judging)
        assert not any("0 verdicts" in line or "dollars," in line for line in judging)
        names = " ".join(member.name for member in planned.graph.members)
        assert ("method=self_rewarding_stand_in" in names) == (size == "embedded") and "method=self_rewarding" in names


def test_the_command_that_is_named_is_one(tmp_path: Path) -> None:
    words = shlex.split(paper.command("main", "paper", str(tmp_path / "an output")))
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / words[1]), *words[2:], "dry_run=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=nowhere, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^plan +\d+ stages for 6 members", done.stdout, re.M)


def test_methods_are_what_they_are_called() -> None:
    rewarding = load("scale=paper", "method=self_rewarding")
    assert (rewarding.judge.mode, rewarding.filter.scorer, rewarding.loss.name) == ("graded", "judge", "none")
    assert load("method=self_refine").loss.sft is None and load("method=self_refine").trained_iterations == 0
    assert load("scale=paper", "method=self_rewarding", "engine=hf").judge.engine.name == "hf"  # as what generates
    assert load("scale=paper", "method=self_rewarding", "engine@judge.engine=hf").engine.name == "vllm"
    assert load("method=evolve") == load() and load("method=grpo").loss.pt == "rewards"


# ---- formats

SAYS = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<"}
SAYS |= {r"\textgreater{}": ">", r"\textbar{}": "|", r"\textasciigrave{}": "`", r"\textquotedbl{}": '"'}
SAYS |= {r"\ensuremath{\pm}": "±", r"\ensuremath{\times}": "×", "{[}": "[", "{*}": "*", "{-}": "-"}
SAYS |= {f"\\{char}": char for char in "&%$#_{}"}
TOKEN = re.compile("|".join(re.escape(word) for word in SAYS) + r"|[^\\{}&%$#_~^]")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_latex_reads_back_as_what_was_written(value: str) -> None:
    """Every character that means something to LaTeX stands in a form that prints it, and nothing else is left."""
    escaped = formats.escape(value)
    found = TOKEN.findall(escaped)
    assert "".join(found) == escaped
    plain = "".join(" " if ord(char) < 32 or 127 <= ord(char) < 160 else char for char in value)
    assert "".join(SAYS.get(token, token) for token in found) == re.sub(r"\s+", " ", plain)


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1))
def test_tables_keep_their_shape_whatever_is_in_them(rows: list[tuple[str, str, str]]) -> None:
    cells = [Cell(row[2]) for row in rows]
    for cell in cells[:1]:
        cell.best = True
    made = Table(
        "a_title %", [["a|b", "b", "c"], *([row[0], row[1], cell] for row, cell in zip(rows, cells, strict=True))]
    )
    pages = re.findall(r"\\midrule\n(.*?)\n\\bottomrule", formats.latex(made, "x"), re.DOTALL)
    body = [line for page in pages for line in page.split("\n") if line != r"\addlinespace"]
    assert len(pages) == -(-len(rows) // formats.PAGE)
    assert len(body) == len(rows) and all(line.endswith(r" \\") for line in body)
    assert all(len(re.findall(r"(?<!\\)&", line)) == 2 for line in body)
    assert body[0].count(r"\textbf{") == 1 and not any(r"\textbf{" in line for line in body[1:])
    for line in formats.markdown(made).splitlines()[2:]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 4


def test_labels_are_what_latex_takes_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder's name, and where it is given as a dot."""
    made = Table("a title", [["a", "b", "c"], ["x", "y", Cell("1")]])
    for name, label in (("loss-1f", "loss-1f"), ("50% {of} #1 \\x", "50-of-1-x"), ("a_b.c", "a_b.c")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for folder in (Path(tmp_path, name), Path(".")):
            formats.write(folder, [made, made])
            found = re.findall(r"\\label\{(.*)\}", (tmp_path / name / "table.tex").read_text())
            assert found == [f"tab:{label}-1", f"tab:{label}-2"]


@pytest.mark.skipif(
    not shutil.which("pdflatex") or subprocess.run(["kpsewhich", "adjustbox.sty"], capture_output=True).returncode != 0,
    reason="no LaTeX with adjustbox here",
)
def test_latex_sets_tables_of_any_length(tmp_path: Path) -> None:
    """On pages that hold them, each under one number, whatever stands in a cell that LaTeX gives a meaning to."""
    odd = "".join(formats.SPECIAL) + "é"
    rows = [[f"{odd} {n // 30}", str(n), Cell(f"-{n}.5 ±0.1")] for n in range(100)]
    (tmp_path / "table.tex").write_text(formats.latex(Table(f"a title {odd}", [["a", "b", odd], *rows]), "x"))
    packages = r"\usepackage[T1]{fontenc}\usepackage{adjustbox,booktabs}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{table.tex}}\ref{{tab:x}}\end{{document}}"
    (tmp_path / "it.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "it.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "it.log").read_text(errors="replace")
    assert "too large for page" not in log and "(4 pages" in done.stdout  # three of the table, and the reference


# ---- what is in them


@pytest.mark.parametrize("losses", [("sft_only", "pt_only"), ("grpo", "pt_only"), ("pt_only", "sft", "none")])
def test_phases_stand_in_the_methods_order(tmp_path: Path, losses: tuple[str, ...]) -> None:
    """Whatever phases members have, and whoever of them comes first."""
    every = ["base", "sft", "offline", "iteration 1", "iteration 2"]
    for order in (losses, losses[::-1]):
        words = [["debug=fast", f"loss={loss}", "iteration.count=2", f"output={tmp_path}"] for loss in order]
        planned = launch.plan_members([load(*word) for word in words], words)
        launch.write_sweep(planned)
        assert collect.load(planned.folder).phases == every


def test_bold_is_what_a_paired_corrected_test_says(sweep: collect.Sweep) -> None:
    """A clear winner is bold, a lead that noise explains is not, and equal records are bold together."""
    made = sweep.members[0].measurements[0]
    prompts = [str(number) for number in range(30)]

    def marked(*shifts: float, noise: float) -> list[bool]:
        contest, items = [], {}
        for number, shift in enumerate(shifts):
            values = {p: shift + noise * ((7 * n + 11 * number) % 13 - 6) for n, p in enumerate(prompts)}
            items[f"e/{number}"] = {"direct": {"reward": values}}
            cell = Cell("x", {"value": sum(values.values()) / len(values)}, [f"e/{number}"])
            contest.append(best.Rival(cell, replace(made, id=f"e/{number}"), "direct", "reward"))
        contest.append(replace(contest[-1], cell=Cell("x", contest[-1].cell.estimate)))
        best.mark(replace(sweep, _items=items), [contest])
        return [one.cell.best for one in contest]

    assert marked(0.0, 0.1, 0.5, noise=0.01) == [False, False, True, True]
    assert marked(0.0, 0.1, 0.11, noise=0.2) == [False, False, False, False]
    assert marked(0.5, noise=0.01) == [False, False]  # nobody to be better than


def test_the_summary_keeps_the_three_questions_apart(sweep: collect.Sweep) -> None:
    [made] = summary.shown(sweep)
    parts = list(dict.fromkeys(row[0] for row in made.rows[1:]))
    assert parts == ["direct answers", "refined answers", "self-refinement"]
    assert [row[1:3] for row in made.rows[1:3]] == [["self_refine", "base"], ["evolve", "iteration 1"]]
    assert "the paper's numbers for these are not published here" in made.title


def test_published_numbers_stand_beside_their_method_alone(sweep: collect.Sweep) -> None:
    refine, once = sweep.members
    score = ("arena_hard", "", "score")
    evolve = replace(once, config={**once.config, "iteration": {**once.config["iteration"], "count": 3}})
    assert summary.published(once, "refined", score) == "not published here"  # after three iterations
    assert summary.published(evolve, "refined", score) == "50.3 [paper]"
    assert summary.published(evolve, "direct", score) == "not published here"
    assert summary.published(refine, "refined", score) == "not published here"
    assert summary.published(evolve, "refined", ("gsm8k", "", "accuracy")) == "not published here"
    for part, key, value, known in (
        ("model", "name", "llama31_8b", True),
        ("model", "name", "smollm2_135m", False),
        ("filter", "select", "best_random", False),
        ("filter", "select", "all", False),
        ("template", "name", "revise", False),
        ("strategy", "name", "tree", False),
    ):
        changed = replace(evolve, config={**evolve.config, part: {**evolve.config[part], key: value}})
        assert (summary.published(changed, "refined", score) == "50.3 [paper]") == known


def test_every_number_leads_to_its_records(sweep: collect.Sweep, folder: Path) -> None:
    report.show([folder])
    with (folder / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines and all(line["records"] for line in lines)
    for line in lines:
        assert all(sweep.record(one) is not None for one in line["records"].split())
    values = {line["value"] for line in lines if line["row"].endswith("evolve / iteration 1")}
    assert str(sweep.members[1].measurements[-1].headline["gain"]["reward"]["value"]) in values


def test_figures_are_the_same_bytes_when_drawn_again(folder: Path) -> None:
    report.show([folder])
    drawn = {path: path.read_bytes() for form in style.FORMATS for path in folder.glob(f"*.{form}")}
    names = {path.name for path in drawn}
    assert {f"{name}-reward.{form}" for name in ("iterations", "turns", "compute") for form in style.FORMATS} <= names
    (folder / ".figures.json").unlink()
    report.show([folder])
    assert {path: path.read_bytes() for path in drawn} == drawn


def test_no_two_members_look_alike() -> None:
    for names in ([f"loss={n}" for n in range(40)], [f"a={a} b={b}" for a in range(6) for b in range(7)]):
        looks = style.styles(names)
        assert len(set(looks.values())) == len(names)


def test_cost_grows_and_leaves_evaluation_out(sweep: collect.Sweep) -> None:
    refine, evolve = (spent.spent(sweep, member) for member in sweep.members)
    assert refine["base"].made == evolve["base"].made == 0
    made = [evolve[phase].made for phase in ("base", "sft", "offline", "iteration 1")]
    assert made == sorted(set(made))
    asked = {one.record["inputs"]["answers"] for member in sweep.members for one in member.measurements}
    assert asked.isdisjoint(evolve["iteration 1"].records)
    assert any(record.startswith("respond/") for record in evolve["iteration 1"].records)


def test_time_counts_for_the_devices_that_a_stage_was_made_with(sweep: collect.Sweep, tmp_path: Path) -> None:
    """Whatever a member's settings say now; of a record that says nothing of them, these."""
    copied = shutil.copytree(sweep.folder.parent.parent, tmp_path / "out") / "sweeps" / sweep.folder.name
    found = collect.load(copied)
    member = found.members[1]
    many = {"trainer": {"devices": 2}, "engine": {"processes": 3}, "reward_model": {"processes": 5}}
    later = replace(member, config=member.config | {part: member.config[part] | of for part, of in many.items()})
    records = spent.spent(found, member)["iteration 1"].records
    seconds = {key: record["seconds"] for key in records if (record := found.record(key))}
    scored = [key for key in records if key.startswith("score/")]
    assert scored and spent.spent(found, later)["iteration 1"].seconds == pytest.approx(sum(seconds.values()))

    def spends(noted: dict[str, int], scorer: str, times: dict[str, int]) -> bool:
        for key in records:
            file = found.store.folder(key) / "record.json"
            record = {name: of for name, of in unseal(file.read_bytes()).items() if name != "devices"} | noted
            record["config"] |= {"scorer": scorer} if key in scored else {}
            file.write_text(seal(record))
        made = spent.spent(found, later)["iteration 1"].seconds
        return made == pytest.approx(sum(seconds[key] * times.get(key.split("/")[0], 1) for key in records))

    assert spends({"devices": 4}, "reward_model", dict.fromkeys((*spent.FOR_TRAINING, "respond", "score"), 4))
    assert spends({}, "reward_model", {"activate": 2, "train": 2, "respond": 3, "score": 5})
    assert spends({}, "verifier", {"activate": 2, "train": 2, "respond": 3})  # which has one process, whatever is set


# ---- what is missing


def test_what_is_missing_is_said_with_the_command(sweep: collect.Sweep) -> None:
    gone = replace(sweep.members[1], missing=[("iteration 1", "refinement")])
    lines = paper.missing(replace(sweep, members=[sweep.members[0], gone], command="python evolve/main.py x=1"))
    assert lines == [f"missing {gone.name}: refinement after iteration 1", "made by python evolve/main.py x=1"]
    assert paper.missing(sweep) == []


def test_the_listing_has_every_experiment_and_finds_those_made(folder: Path, tmp_path: Path) -> None:
    lines = list(paper.listing(str(tmp_path)))
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == EXPERIMENTS
    assert sum("made by python evolve/main.py experiment=" in line for line in lines) == 2 * len(EXPERIMENTS)
    content = unseal((folder / "sweep.json").read_bytes())
    (folder / "sweep.json").write_text(seal({**content, "experiment": "main", "command": "c"}))
    listed = list(paper.listing(str(folder.parent.parent)))
    assert f"  embedded  {folder}: 2 members, embedded on embedded" in listed


@pytest.mark.parametrize(
    ("words", "by"),
    [
        ("experiment=figure3", []),
        ("-m experiment=figure3 scale=paper output=x resources=slurm +resources.slurm.needs.train.nodes=2", []),
        ("experiment=figure3 hydra/launcher=slurm hydra.launcher.wait=true wandb.mode=disabled dry_run=false", []),
        ("experiment=figure3 trainer.devices=2 engine.processes=2 annotator.max_dollars=9 wandb=default", []),
        ("experiment=figure3 loss=both", ["loss=both"]),
        (
            "experiment=figure3 model=smollm2_135m data=ultrafeedback 'data.path=a b.jsonl'",
            ["model=smollm2_135m", "data=ultrafeedback", "data.path=a b.jsonl"],
        ),
        ("experiment=figure3 hydra/sweeper=search hydra.sweeper.params.loss=both", None),
        ("experiment=figure3 template.path=mine.txt engine.url=http://x judge.model=x", None),  # RUNTIME, but content
        ("experiment=figure3 engine=vllm seed=1 ~local strategy@eval.test_time=parallel", None),
    ],
)
def test_what_changes_an_experiment(sweep: collect.Sweep, words: str, by: list[str] | None) -> None:
    """by: the words that do; None: all but the experiment's own."""
    found = paper.changed(replace(sweep, command=f"python evolve/main.py {words}"))
    assert found == (shlex.split(words)[1:] if by is None else by)


def test_a_changed_experiment_is_none_of_its_size(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder.parent.parent, tmp_path / "out") / "sweeps" / folder.name
    content = unseal((copied / "sweep.json").read_bytes())
    for words, listed in (("", "embedded"), (" loss=both", "changed"), (" data=ultrafeedback data.path=x", "changed")):
        command = f"python evolve/main.py experiment=main{words}"
        (copied / "sweep.json").write_text(seal({**content, "experiment": "main", "command": command}))
        lines = list(paper.listing(str(tmp_path / "out")))
        [line] = [line for line in lines if str(copied) in line and "report" not in line]
        assert line.startswith(f"  {listed:<9} {copied}: 2 members") and line.endswith(words and f", by{words}")
        to_make = f"  embedded  missing all of it, made by {paper.command('main', 'embedded', str(tmp_path / 'out'))}"
        assert (to_make in lines) == bool(words)


def test_the_command_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "evolve" / "main.py", *SMALL, "experiment=templates", "template=rewrite"]
    command += ["loss=untrained", f"output={tmp_path}/o 1", "wandb.mode=disabled"]
    subprocess.run(command, check=True, capture_output=True, timeout=600, cwd=tmp_path)
    [file] = tmp_path.glob("o 1/sweeps/*/sweep.json")
    made = collect.load(file.parent)
    assert made.experiment == "templates" and made.command is not None
    assert shlex.split(made.command) == ["python", "evolve/main.py", *map(str, command[2:])]


# ---- two members


def test_comparing_two_members(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [f"{folder}:method=self_refine", f"{folder}:method=evolve"]
    pair = compare.pairs(compare.choose(sides[0]), compare.choose(sides[1]))
    assert compare.settings(pair[0])["loss.name"] == ("untrained", "both")
    monkeypatch.setattr(sys, "argv", ["compare", *sides])
    assert compare.main() == 0  # the base is the same record in both: nothing differs
    shown = capsys.readouterr().out
    assert "loss.alpha: 0.0 -> 0.8" in shown and "same stage" in shown and "±0.000 " not in shown
    [same] = compare.pairs(compare.choose(str(folder)), compare.choose(str(folder)))[:1]
    assert compare.settings(same) == {}
    monkeypatch.setattr(sys, "argv", ["compare", f"{folder}:x", str(folder)])
    assert compare.main() == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_stage_is_not_tested_against_itself(sweep: collect.Sweep) -> None:
    """It is shown as what it is, and what else is tested is not corrected for it."""
    refine, evolve = sweep.members
    base, last = evolve.of("refinement")[0], evolve.of("refinement")[-1]
    other = replace(evolve, measurements=[replace(last, phase="base")])
    real = (compare.Side(sweep, replace(evolve, measurements=[base])), compare.Side(sweep, other))
    itself = (compare.Side(sweep, refine), compare.Side(sweep, evolve))  # both after the base, which they share
    alone, both = compare.table([real]), compare.table([real, itself])
    assert [row[-3:] for row in both.rows[1 : len(alone.rows)]] == [row[-3:] for row in alone.rows[1:]]
    assert {tuple(row[-3:]) for row in both.rows[len(alone.rows) :]} == {("same stage", "-", "32")}
    assert "corrected over 6 of them" in alone.title and "corrected over 6 of them" in both.title
    assert "corrected over 0 of them" in compare.table([itself]).title


def test_who_is_compared_with_nobody_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answers that have left the store are not shown, while their numbers stand."""
    copied = shutil.copytree(folder.parent.parent, tmp_path / "out") / "sweeps" / folder.name
    content = unseal((copied / "sweep.json").read_bytes())
    content["members"][0]["name"] = "another"
    (copied / "sweep.json").write_text(seal(content))
    shutil.rmtree(tmp_path / "out" / "store" / "respond")
    monkeypatch.setattr(sys, "argv", ["compare", str(folder), str(copied)])
    assert compare.main() == 0
    shown = capsys.readouterr().out
    said = "not compared, for the other side has none of the name"
    assert f"{folder}: {said}: method=self_refine\n" in shown and f"{copied}: {said}: another\n" in shown
    measured = collect.load(copied).members[1].measurements
    here = compare.choose(f"{copied}:method=evolve")[0]
    there = replace(here, member=replace(here.member, measurements=[replace(measured[1], phase="base")]))
    lines = compare.prompts((here, there))  # before and after activation
    assert lines and all(re.fullmatch(r"[+-]\d\.\d{3} mean reward, prompt \S+", line) for line in lines)


def test_damaged_answers_are_not_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(folder.parent.parent, tmp_path / "out") / "sweeps" / folder.name
    for file in copied.parent.parent.glob("store/respond/*/answers.jsonl"):
        file.write_bytes(file.read_bytes()[::-1])
    monkeypatch.setattr(sys, "argv", ["compare", f"{folder}:method=evolve", f"{copied}:method=self_refine"])
    before = compare.choose(f"{folder}:method=evolve")[0]
    base, *_ = before.member.measurements
    after = replace(before.member.measurements[-1], phase="base")
    there = compare.choose(f"{copied}:method=self_refine")[0]
    pair = (replace(before, member=replace(before.member, measurements=[after])), there)
    lines = compare.prompts(pair)
    assert lines and all(line.count("\n") == 2 for line in lines)  # the prompt, and A alone
    said = capsys.readouterr().err
    assert f"{base.record['inputs']['answers']}: answers.jsonl is not what was written" in said
    assert said.count("\n") == 1


def test_prompts_of_one_side_alone_are_counted(sweep: collect.Sweep) -> None:
    member = sweep.members[0]
    [made] = member.of("refinement")
    ids = sorted(next(iter(sweep.items(made)["direct"].values())))

    def side(some: list[str]) -> compare.Side:
        items = {
            kind: {metric: {key: values[key] for key in values.keys() & some} for metric, values in of.items()}
            for kind, of in sweep.items(made).items()
        }
        return compare.Side(replace(sweep, _items={made.id: items}), member)

    def told(one: list[str], other: list[str]) -> set[str]:
        table = compare.table([(side(one), side(other))])
        return {row[table.rows[0].index("prompts")] for row in table.rows[1:]}

    assert len(ids) == 32 and told(ids, ids) == {"32"} and told(ids[:30], ids[4:]) == {"26 of 32"}
    with pytest.raises(ConfigError, match="on other prompts"):
        told(ids[:16], ids[16:])
    nothing = compare.Side(sweep, replace(member, measurements=[]))
    with pytest.raises(ConfigError, match="nothing has been measured of both"):
        compare.table([(side(ids), nothing)])


def test_comparing_trainings(tmp_path: Path) -> None:
    """Another seed's training against the first's: differences are B - A over the same prompts."""
    made = sweep_here([[*SMALL, "loss=sft_only", f"seed={seed}", f"output={tmp_path}"] for seed in (0, 1)])
    names = [member.name for member in made.graph.members]
    [pair] = compare.pairs(*(compare.choose(f"{made.folder}:{name}") for name in names))
    shown = compare.table([pair])
    assert shown is not None
    row = next(row for row in shown.rows if row[1:4] == ["mean reward", "sft", "direct"])
    numbers = [cell.estimate["value"] for cell in row[4:7] if isinstance(cell, Cell) and cell.estimate]
    assert numbers[2] == pytest.approx(numbers[1] - numbers[0])
