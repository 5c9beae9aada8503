"""Any task of lm-evaluation-harness: answered by stages of this harness, scored by lm-eval's own filters and scorers.

    questions   lm-eval builds each prompt; a model that only records keeps it   {"id": "gsm8k/0", "prompt": "..."}
    respond     a chain answers and refines
    measure     lm-eval scores each turn once: a model replays that turn's answers

What lm-eval reports of a document is kept by document, so turns and models are compared in pairs. A group (mmlu,
hendrycks_math) is pooled over its documents. Multiple-choice tasks have no answers that could be refined: the stage
`likelihood` asks the model for the choices' probabilities, and there is one turn.

A number depends on more than its task's name: `protocol` says on what. GSM8K's "strict" wants "#### 18", "flexible"
takes the last number; between the two of one run there can be fifty points.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from evals import picks, sandbox, statistics
from evals.needs import Measured
from evolve import data
from evolve.store import digest, hash_file

TASKS = Path(__file__).resolve().parent / "tasks"  # ours; they go before lm-eval's of the same name
SANDBOXED = ("humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct")  # of ours, those that run what a model wrote
OBJECTIVE = ("refined", "direct")
EXPLAIN = {"gain": "refined - direct, paired", **picks.EXPLAIN}
EXPLAIN |= {"majority": "the answer most often given, as extracted", "oracle": "the best of all by the metric: pass@n"}
METRICS = {
    "accuracy": "accuracy",
    "strict": "strict match",
    "flexible": "flexible extraction",
    "prompt_level_strict_acc": "prompts followed, strict",
    "prompt_level_loose_acc": "prompts followed, loose",
    "inst_level_strict_acc": "instructions followed, strict",
    "inst_level_loose_acc": "instructions followed, loose",
    "acc_norm": "accuracy, choices by length",
    "pass@1": "programs that pass, pass@1",
}
NAMES = {
    ("exact_match", "strict-match"): "strict",
    ("exact_match", "flexible-extract"): "flexible",
    ("exact_match", "none"): "accuracy",
    ("acc", "none"): "accuracy",
    ("pass@1", "create_test"): "pass@1",
    ("pass@1", "extract_code"): "pass@1",
}
UNSCORED = "unscored"  # among a sample's metrics: its scorer failed
NEVER_MADE, FAILED = "answers never made, counted as wrong", "answers whose scorer failed, counted as wrong"
INVALID = frozenset({"", "[invalid]", "None"})  # what filters leave of an answer where they find none

Row = dict[str, Any]
Data = str | Path | Mapping[str, str | Path] | None


@dataclass(frozen=True)
class Setup:
    """A task and how it is asked.

    data: a file (JSONL, .gz too) instead of the hub's data; examples are then in one beside it that is named like their
        split (train.jsonl). {split: file} names both. Of a group: a folder with a file for each of its tasks.
    shots: examples that are shown; None: as many as the task has by itself.
    limit: the first so many documents, of a group: of each task.
    chat: laid out as for a chat template, in one user turn.
    revisions: commits of the hub's data sets, by name.
    """

    task: str
    data: Data = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = True
    revisions: Mapping[str, str] = field(default_factory=dict)


# ---- what a task is, from its YAML alone


def kind(task: str) -> str:
    """'generate' or 'likelihood': what the task wants of a model.

    Raises ValueError for a task that isn't there, one that is both, and one that can't be measured by this harness.
    """
    kinds = set()
    for name, config in _parts(task).items():
        if config.get("unsafe_code") and not str(config.get("process_results")).startswith(f"{TASKS}/"):
            raise ValueError(f"{name}: runs what the model wrote; in a sandbox there are {', '.join(SANDBOXED)} alone")
        if "class" in config:
            raise ValueError(f"{name}: a task in Python, of which its YAML doesn't say what it asks; take one in YAML")
        if config.get("repeats", 1) > 1:
            raise ValueError(f"{name}: wants {config['repeats']} answers a document, and a turn has one")
        if config.get("doc_to_image") or config.get("doc_to_audio"):
            raise ValueError(f"{name}: shows images or sounds, and prompts here are text")
        kinds.add("generate" if config.get("output_type", "generate_until") == "generate_until" else "likelihood")
    if len(kinds) > 1:
        raise ValueError(f"{task}: some of its tasks generate and some compare likelihoods; take them by themselves")
    return kinds.pop()


def runs_programs(task: str) -> bool:
    """Whether the task runs what the model wrote: of those that `kind` lets pass, in evals/sandbox.py."""
    return any(config.get("unsafe_code") for config in _parts(task).values())


def until(task: str) -> tuple[str, ...]:
    """The strings before which an answer ends. Raises ValueError for a group whose tasks differ in them."""
    found = {_until(config) for config in _parts(task).values()}
    if len(found) > 1:
        raise ValueError(f"{task}: its tasks stop at different strings; take them by themselves")
    return found.pop()


@lru_cache
def definition(task: str) -> str:
    """A hash of what the task is: lm-eval's version, its config, and the code here that it names."""
    config = json.dumps(_parts(task), default=str)
    code = {file.name: hash_file(file) for file in sorted(TASKS.glob("*.py")) if f'"{TASKS / file.stem}.' in config}
    for place, folder in (("evals", TASKS), ("lm_eval", _packaged())):  # the same wherever they are installed
        config = config.replace(str(folder), place)
    return digest([version("lm_eval"), json.loads(config), code])[:16]


def splits(task: str) -> tuple[str, str | None]:
    """The split that is asked, and the one that examples are taken from."""
    return _splits(next(iter(_parts(task).values())))


def _splits(config: Mapping[str, Any]) -> tuple[str, str | None]:
    tested = str(config.get("test_split") or config.get("validation_split"))
    examples = config.get("fewshot_config") or {}
    found = [examples.get("split"), *map(config.get, ("fewshot_split", "training_split", "validation_split"))]
    return tested, next((split for split in found if split), None)


def examples(task: str, file: Path, shots: int | None) -> Path | None:
    """The file beside a task's own that examples are taken from; None: none are, or the task has them in itself.

    Raises ValueError where they are asked for and not there.
    """
    config = next(iter(_parts(task).values()))
    tested, shown = splits(task)
    own = (config.get("fewshot_config") or {}).get("samples")
    if not file.is_file() or not _shots(config, shots) or own or shown in (None, tested):
        return None
    try:
        return _file(file.parent, str(shown))
    except ValueError as error:
        raise ValueError(f"{task}: shows {_shots(config, shots)} examples; {error}; set eval.harness.shots=0") from None


def datasets(task: str) -> list[str]:
    """The hub's data sets that the task reads."""
    return sorted({str(config["dataset_path"]) for config in _parts(task).values()})


def extractions(task: str) -> dict[str, frozenset[str]]:
    """Filters that do more to an answer than take it, by name: what they leave where they find nothing to take.

    None of programs: two that do the same are hardly ever the same text.
    """
    found: dict[str, frozenset[str]] = {}
    if runs_programs(task):
        return found
    for config in _parts(task).values():
        for one in config.get("filter_list") or []:
            steps = [step for step in one["filter"] if step["function"] not in ("take_first", "take_first_k")]
            if steps:
                invalid = {str(step["fallback"]).strip() for step in steps if "fallback" in step}
                found[one["name"]] = found.get(one["name"], INVALID) | invalid
    return found


def verifier(task: str) -> str | None:
    """Who scores the answers to a task that _verified.yaml is of, and so reads them; no filter does."""
    scorers = [str(config.get("process_results")) for config in _parts(task).values()]
    return "math" if all(scorer.endswith("verified.score") for scorer in scorers) else None


def _until(config: Mapping[str, Any]) -> tuple[str, ...]:
    """As TaskConfig has it: where nothing is said, few-shot examples' delimiter."""
    stops = (config.get("generation_kwargs") or {}).get("until", [config.get("fewshot_delimiter", "\n\n")])
    return (stops,) if isinstance(stops, str) else tuple(stops or ())


def protocol(setup: Setup, tokens: int | None = None) -> str:
    """What a number of this task must be quoted with. tokens: the most that an answer may have."""
    task = setup.task
    parts = list(_parts(task).values())
    versions = sorted({str((config.get("metadata") or {}).get("version", "?")) for config in parts})
    used = sorted({_shots(config, setup.shots) for config in parts})
    filters = [one["name"] for one in parts[0].get("filter_list") or []]
    generates = kind(task) == "generate"
    words = [
        f"lm-eval {version('lm_eval')} {task} version {'/'.join(versions)}",
        *([f"pooled over {len(parts)} tasks"] if len(parts) > 1 else []),
        f"{'/'.join(map(str, used))}-shot",
        # The engines have no other way; `chat` decides how lm-eval lays the prompt out.
        "one user turn of the chat template" if setup.chat or generates else "no chat template",
        *([f"extraction {' and '.join(filters)}"] if filters else []),
        *([f"stops at {json.dumps(until(task), ensure_ascii=False)}"] if generates and until(task) else []),
        *([f"at most {tokens} tokens"] if generates and tokens else []),
        *([f"first {setup.limit} documents{' of each' if len(parts) > 1 else ''}"] if setup.limit else []),
        *([sandbox.PROTOCOL] if runs_programs(task) else []),
        *(["data from a file"] if setup.data else []),
    ]
    return ", ".join(words)


def _shots(config: Mapping[str, Any], shots: int | None) -> int:
    own = config.get("num_fewshot")
    if own == 0 and shots:
        raise ValueError(f"{config['task']}: is a task without examples (num_fewshot: 0), so {shots} can't be shown")
    return int(shots if shots is not None else own or 0)


@lru_cache
def _manager(*folders: Path) -> Any:
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant
    return lm_eval.tasks.TaskManager(include_path=[*folders, TASKS], include_defaults=False)


def _packaged() -> Path:
    """The folder of lm-eval's own tasks."""
    package = find_spec("lm_eval")
    assert package is not None and package.origin is not None, "lm-eval is among the project's packages"
    return Path(package.origin).resolve().parent / "tasks"


@lru_cache
def _find(task: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The manager that knows the task, and the configs of the tasks it consists of, functions unresolved.

    All of lm-eval's YAML takes seconds to read: the folder that is named like the task comes first.
    """
    packaged = _packaged()
    named = [folder for folder in packaged.iterdir() if task.startswith(folder.name) and folder.is_dir()]
    for folders in ([], [max(named, key=lambda folder: len(folder.name))] if named else [], [packaged]):
        manager = _manager(*folders)
        with contextlib.suppress(KeyError):
            return manager, dict(_leaves(task, manager.task_index))
    close = difflib.get_close_matches(task, manager.all_tasks, n=5)
    raise ValueError(f"{task}: no such task in lm-eval; close to it: {', '.join(close) or 'none'}")


def _parts(task: str) -> dict[str, dict[str, Any]]:
    return _find(task)[1]


def _leaves(name: str, index: Mapping[str, Any], above: Mapping[str, Any] = {}) -> Iterator[tuple[str, dict[str, Any]]]:
    entry = index[name]
    if entry.tags and not entry.cfg:
        for tagged in sorted(entry.tags):
            yield from _leaves(tagged, index, above)
    elif "group" not in entry.cfg:
        yield name, {**entry.cfg, **above, "task": name}
    else:
        for item in entry.cfg["task"]:
            item = {"task": item} if isinstance(item, str) else dict(item)
            child = item.pop("group", None) or item.pop("task")
            yield from _leaves(child, index, {**above, **item})


# ---- running lm-eval


def _run(setup: Setup, model: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's results, and its tasks by name."""
    from langdetect import DetectorFactory
    from lm_eval import evaluator

    DetectorFactory.seed = 0  # IFEval's guess of a language draws: the same answer could be right and then wrong
    evaluator.add_env_info = _about  # lm-eval's own describes the machine, for most of the time that a run takes
    task = setup.task
    kind(task)
    manager, parts = _find(task)
    for config in parts.values():
        _shots(config, setup.shots)
    local = [{"task": name, **_local(setup, name)} for name in parts if setup.data is not None] or [
        {"task": name, "dataset_kwargs": {**(config.get("dataset_kwargs") or {}), "revision": revision}}
        for name, config in parts.items()
        if (revision := setup.revisions.get(str(config["dataset_path"])))
    ]
    try:
        loaded = manager.load([{"group": f"{task} (local)", "task": local} if local else task])
    except (ImportError, AssertionError) as error:
        raise ValueError(f"{task}: lm-eval's own code for it can't be loaded here: {error}") from None
    group = None if local else loaded["groups"].get(task)
    chosen = [group] if group else list(loaded["tasks"].values())
    for one in loaded["tasks"].values():
        one.process_results = (lambda doc, results: {}) if more.get("predict_only") else _counted(one)
    results = evaluator.simple_evaluate(
        model=model,
        tasks=chosen,
        task_manager=manager,
        num_fewshot=setup.shots,
        limit=setup.limit,
        apply_chat_template=setup.chat,
        fewshot_as_multiturn=False,
        confirm_run_unsafe_code=runs_programs(task),
        **more,
    )
    return results, loaded["tasks"]


def _about(results: dict[str, Any]) -> None:
    results["lm_eval_version"] = version("lm_eval")


def _local(setup: Setup, name: str) -> dict[str, Any]:
    """What the config of one of its tasks says instead, to be read from files.

    Raises ValueError where a file is missing.
    """
    parts, given = _parts(setup.task), setup.data
    config = parts[name]
    tested, shown = _splits(config)
    examples, shots = config.get("fewshot_config") or {}, _shots(config, setup.shots)
    files: dict[str | None, Path] = {}
    if isinstance(given, Mapping):
        files = {split: Path(path) for split, path in given.items()}
    else:
        path = Path(given or "")
        files[tested] = _file(path, name) if len(parts) > 1 or path.is_dir() else path
        if shots and shown not in (None, tested):
            with contextlib.suppress(ValueError):
                files[shown] = _file(files[tested].parent, shown)
    wanted = {tested} | ({shown} if shots and not examples.get("samples") else set())
    for split in wanted:
        if split not in files or not files[split].is_file():
            where = files.get(split, f"no {split}.jsonl beside the other")
            raise ValueError(f"{name}: its split {split!r} is in no file ({where}); give data as {{split: file}}")
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        **{
            name: split if (split := config.get(name)) in files else None
            for name in ("training_split", "validation_split", "fewshot_split")
        },
    }


def check(setup: Setup) -> None:
    """Reads the setup's files. Raises ValueError naming file and line for what can't be asked as the task."""
    for name, config in _parts(setup.task).items() if setup.data else ():
        for file in _local(setup, name)["dataset_kwargs"]["data_files"].values():
            rows = data.parse(file)
            if not rows:
                raise ValueError(f"{file}: has no rows")
            for number, row in rows:
                try:
                    _render(config, row)
                except Exception as error:  # of a template: whatever its expressions raise
                    raise ValueError(f"{file}, line {number}: is nothing that {name} can ask: {error}") from None


def _render(config: Mapping[str, Any], row: Any) -> None:
    """Makes a document's prompt and target where only these are needed to know how."""
    from lm_eval.utils import apply_template

    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    for template in (config.get("doc_to_text"), config.get("doc_to_target")):
        if config.get("process_docs") or not isinstance(template, str) or template in row:
            continue
        module, _, function = Path(template).name.partition(".")
        if Path(template).parent == TASKS:
            getattr(importlib.import_module(f"evals.tasks.{module}"), function)(row)
        elif template.isidentifier() and template == config.get("doc_to_text"):  # lm-eval would ask this very word
            raise ValueError(f"no '{template}'; it has {', '.join(row)}")
        else:
            apply_template(template, row)


def _file(folder: Path, name: str) -> Path:
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise ValueError(f"{folder}: has no {name}.jsonl or {name}.jsonl.gz")


def _counted(task: Any) -> Any:
    """The task's scorer; where it fails, or has no log-likelihoods to go by, every metric says wrong, and UNSCORED."""
    from lm_eval.api.metrics import mean

    from evals.replay import UNASKED

    score = task.process_results
    better, averaged = task.higher_is_better(), task.aggregation()

    def counted(doc: Any, results: Sequence[Any]) -> dict[str, Any]:
        try:
            if any(result is UNASKED for result in results):
                raise ValueError("no log-likelihoods")
            return dict(score(doc, results))
        except Exception as error:
            if not averaged or any(averaged[name] is not mean or not better.get(name, True) for name in averaged):
                raise RuntimeError(f"{task.task_name}: its scorer fails ({error!r}), and has no worst value") from error
            return {**dict.fromkeys(averaged, 0.0), UNSCORED: 1}

    return counted


# ---- questions and metrics


def questions(setup: Setup) -> list[Row]:
    """Rows {"id", "prompt", "text", "task", "doc", "shots", "version"} and "until", or "requests" and "chat".

    text: what this document's prompt has to itself, without examples and instructions: what contamination is about.

    Raises:
        ValueError: no such task, or its data or examples are not there.
    """
    from evals.replay import Recorder

    recorder = Recorder(kind(setup.task))
    _, tasks = _run(setup, recorder, predict_only=True, log_samples=False, bootstrap_iters=0)
    texts = {part: _own(one) for part, one in tasks.items()}
    rows = []
    for name, row in recorder.rows.items():
        part, _, number = name.rpartition("/")
        about = {
            "text": texts[part][int(number)],
            "task": part,
            "doc": int(number),
            "shots": tasks[part].config.num_fewshot,
            "version": tasks[part].VERSION,
        }
        rows.append({"id": name, **row, **about})
    return rows


def _own(task: Any) -> list[str]:
    """Each document's prompt without what all of them begin and end with, to the nearest space."""
    texts = [str(task.doc_to_text(doc)) for doc in task.eval_docs]
    if len(set(texts)) < 2:
        return texts
    head = _shared(texts)
    tail = _shared([text[len(head) :][::-1] for text in texts])
    return [text[len(head) : len(text) - len(tail)] for text in texts]


def _shared(texts: Sequence[str]) -> str:
    return re.sub(r"\S*\Z", "", os.path.commonprefix(list(texts)))  # noqa: RUF071 - characters are meant


class Scored(NamedTuple):
    """One answer for each question, scored. By metric's title, then by question's id:

    values: as the metric's scorer gives them; texts: what the metric's filter took out of the answer (of likelihoods:
    nothing). By title alone, combine: what makes lm-eval's number of all values; filters: the metric's filter; higher:
    whether more is better. failed: questions whose scorer failed.
    write: lm-eval's own files of this run, results_*.json and samples_*.jsonl, into a folder.
    """

    values: dict[str, dict[str, Any]]
    texts: dict[str, dict[str, str]]
    combine: dict[str, Callable[[list[Any]], float]]
    filters: dict[str, str]
    higher: dict[str, bool]
    failed: frozenset[str]
    write: Callable[[Path], None]


def score(setup: Setup, questions: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> Scored:
    """Runs lm-eval's filters and scorers on what was given to each question: a text or log-likelihoods, None: nothing.

    Raises ValueError where the questions are not the task's any more, RuntimeError where programs can't be run here.
    """
    from lm_eval.loggers import EvaluationTracker

    from evals.replay import Replayer

    if runs_programs(setup.task) and (missing := sandbox.missing()):
        raise RuntimeError(f"{setup.task}: {missing}")
    model = Replayer(kind(setup.task), {row["id"]: row["prompt"] for row in questions}, given)
    tracker = EvaluationTracker()
    results, tasks = _run(setup, model, evaluation_tracker=tracker, bootstrap_iters=1000)
    samples = results.pop("samples")
    now = {f"{part}/{sample['doc_id']}" for part, rows in samples.items() for sample in rows}
    if now != given.keys():
        raise ValueError(f"{setup.task}: {len(given)} questions were asked, and it has {len(now)}; has limit changed?")
    values: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, str]] = {}
    combine: dict[str, Callable[[list[Any]], float]] = {}
    filters: dict[str, str] = {}
    higher: dict[str, bool] = {}
    failed = set()
    for part, rows in samples.items():
        for sample in rows:
            name = f"{part}/{sample['doc_id']}"
            if sample.get(UNSCORED) and given[name] is not None:
                failed.add(name)
            for metric in sample["metrics"]:
                if metric != UNSCORED:
                    title = _title(metric, sample["filter"])
                    values.setdefault(title, {})[name] = sample[metric]
                    combine.setdefault(title, tasks[part].aggregation()[metric])
                    filters.setdefault(title, sample["filter"])
                    higher.setdefault(title, tasks[part].higher_is_better().get(metric) is not False)
                    if model.generates:
                        texts.setdefault(title, {})[name] = str(sample["filtered_resps"][0])

    def write(folder: Path) -> None:
        for config in results["configs"].values():
            if files := (config.get("dataset_kwargs") or {}).get("data_files"):
                config["dataset_kwargs"] = {"data_files": {split: Path(path).name for split, path in files.items()}}
        tracker.output_path, tracker.general_config_tracker.model_name_sanitized = str(folder.parent), folder.name
        tracker.save_results_aggregated(results, samples)
        for part, rows in samples.items():
            tracker.save_results_samples(part, rows)
        if len(list(folder.glob("*.json*"))) < 1 + len(samples):  # it only warns
            raise OSError(f"{folder}: lm-eval could not write its results there")

    return Scored(values, texts, combine, filters, higher, frozenset(failed), write)


def _title(metric: str, extraction: str) -> str:
    return NAMES.get((metric, extraction)) or (metric if extraction == "none" else f"{metric}, {extraction}")


def measure(
    setup: Setup, questions: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]], protocol: str
) -> Measured:
    """Metrics by turn; `records` writes lm_eval/turn_N/, each turn as lm-eval writes a run.

    Args:
        questions: rows that `questions` made of the same setup.
        made: rows of answers.jsonl, all made by a chain, or of likelihoods.jsonl. An answer that was never made counts
            as wrong; the answer that ended a chain early stands for the turns that were not made.

    Raises:
        ValueError: the questions are not the task's any more.
    """
    by_turn, values, writers, dropped = [], [], [], {NEVER_MADE: 0, FAILED: 0}
    for turn, given in enumerate(turns(questions, made), 1):
        scored = score(setup, questions, given)
        estimates, by_id = _estimates(scored.values, scored.combine)
        never = sum(answer is None for answer in given.values())
        dropped[NEVER_MADE] += never
        dropped[FAILED] += len(scored.failed)
        by_turn.append({"turn": turn, **estimates, "unscored": len(scored.failed), "never_made": never})
        values.append(by_id)
        writers.append(scored.write)
    direct, refined = values[0], values[-1]
    gain = {
        metric: asdict(statistics.paired(_clusters(refined[metric]), _clusters(direct[metric])))
        for metric in direct
        if len(by_turn) > 1 and metric in refined
    }
    metrics = {
        "benchmark": setup.task,
        "task": setup.task,
        "protocol": protocol,
        "kind": kind(setup.task),
        "turns": by_turn,
        "gain": gain,
        "less_is_better": [metric for metric, more in scored.higher.items() if not more],
    }

    def records(out: Path) -> None:
        for turn, write in enumerate(writers, 1):
            write(out / "lm_eval" / f"turn_{turn}")

    return Measured(metrics, dropped, {"direct": direct, **({"refined": refined} if len(by_turn) > 1 else {})}, records)


def turns(questions: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was given to each question, turn by turn; None: nothing."""
    rows = {row["id"]: row for row in made}
    if any("likelihoods" in row for row in made):
        return [{row["id"]: rows.get(row["id"], {}).get("likelihoods") for row in questions}]
    turns = []
    for turn in range(max((len(row["answers"]) for row in made), default=1)):
        found: dict[str, str | None] = {}
        for row in questions:
            answers = rows.get(row["id"], {"answers": []})["answers"][: turn + 1]
            found[row["id"]] = answers[-1]["text"] if answers and answers[-1]["end"] != "too long" else None
        turns.append(found)
    return turns


def _clusters(values: Mapping[str, float]) -> dict[str, list[float]]:
    return {name: [value] for name, value in values.items()}


def _estimates(
    found: Mapping[str, Mapping[str, Any]], combine: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Estimates by metric, and values by metric and document, of what `Scored` has of them."""
    estimates: dict[str, Any] = {}
    values: dict[str, dict[str, float]] = {}
    for title, raw in found.items():
        numbers = by_document(raw, combine[title])
        if numbers is None:  # perplexity, F1 ...: of all documents together, and no mean of theirs
            estimates[title] = asdict(
                statistics.Estimate(float(combine[title](list(raw.values()))), None, None, len(raw))
            )
            continue
        estimates[title], values[title] = asdict(estimate(numbers)), numbers
    return estimates, values


def estimate(numbers: Mapping[str, float]) -> statistics.Estimate:
    """The mean over questions; of those that are right or wrong, their share."""
    estimator = statistics.share if set(numbers.values()) <= {0.0, 1.0} else statistics.mean
    return estimator(_clusters(numbers))


def by_document(raw: Mapping[str, Any], combine: Any) -> dict[str, float] | None:
    """Values by document whose mean is lm-eval's number; None: there are none.

    A document may have several parts, each right or wrong, that are pooled (IFEval's instructions). With the share R of
    all parts, s of the document's n right, and m parts in a document on average, its value is R + (s - R n) / m: the
    linearised ratio, so that the interval over documents is the ratio's.
    """
    from lm_eval.api.metrics import mean

    if combine is mean:
        return {name: float(value) for name, value in raw.items()}
    if not all(isinstance(value, list) and value for value in raw.values()):
        return None
    parts = sum(len(value) for value in raw.values())
    share = sum(sum(value) for value in raw.values()) / parts
    if not math.isclose(share, combine(list(raw.values())), abs_tol=1e-9):
        return None
    each = parts / len(raw)
    return {name: share + (sum(value) - share * len(value)) / each for name, value in raw.items()}


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direct answers, refined answers, and the gain of one over the other; of likelihoods, direct ones alone.

    And each way to use several answers, where there are.
    """
    direct, *later = metrics["turns"]
    refined = {"refined": later[-1], "gain": metrics["gain"]} if later else {}
    return {"direct": direct, **refined, **picks.headline(metrics)}


def summary(metrics: Mapping[str, Any]) -> str:
    found = {kind: worth for kind, worth in headline(metrics).items() if kind != "gain"}
    lines = [
        f"{metric} " + ", ".join(f"{kind} {of[metric]['value']:.1%}" for kind, of in found.items() if metric in of)
        for metric, value in found["direct"].items()
        if isinstance(value, dict)
    ]
    return f"{metrics['task']}: {'; '.join(lines)}"
