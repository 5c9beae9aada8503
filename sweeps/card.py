"""A finished model, its records and evaluations -> a model card in the hub's layout. Reads the store alone.

What goes out is chosen field by field (`FIT`), so that no host, path, or whatever a record may hold one day gets out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

import evals
from evolve.config import ROOT
from evolve.store import Corrupt, Store, flatten
from sweeps import collect

RECORDS, CARD = "evolve_record.json", "README.md"
FIT = ["id", "identity", "config", "inputs", "roots", "files", "dropped", "tokens", "values", "versions", "code"]
FIT += ["started", "seconds"]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Weights or data from outside: a hub id, or a local folder or file by its name alone; its commit or hash."""

    name: str
    digest: str
    hub: bool
    path: str

    @classmethod
    def of(cls, record: Record, key: str) -> Source:
        path, digest = record["sources"][key], record["inputs"][key].partition("@")[2]
        local, hub = Path(path), path.endswith(f"@{digest}")
        name = local.relative_to(ROOT).as_posix() if local.is_relative_to(ROOT) else local.name
        return cls(path.removesuffix(f"@{digest}") if hub else name, digest, hub, path)

    def __str__(self) -> str:
        return f"{self.name} `{self.digest}`" if self.digest else self.name


@dataclass(frozen=True)
class Evaluation:
    """One benchmark of a model; `split` and `data` say where its prompts are from."""

    record: Record
    metrics: Record
    data: Source
    split: str

    def estimates(self) -> Iterator[tuple[str, str, str, Record]]:
        """(metric; its title; direct, refined, gain or what the benchmark has; its value, interval and n)."""
        measurement = collect.Measurement("", self.record["id"], dict(self.metrics), dict(self.record))
        for metric, title in measurement.titles.items():
            for kind, worth in measurement.headline.items():
                if estimate := worth.get(metric):
                    yield metric, title, kind, estimate


@dataclass(frozen=True)
class Model:
    folder: Path
    chain: list[Record]  # of all that led to it, in order, its own last
    evaluations: list[Evaluation]

    @property
    def record(self) -> Record:
        return self.chain[-1]

    @property
    def base(self) -> Source:
        """Where training started."""
        records, record = {record["id"]: record for record in self.chain}, self.record
        while (above := record["inputs"]["model"]) in records:
            record = records[above]
        return Source.of(record, "model")


def load(store: Store, stage_id: str) -> Model:
    """Raises Corrupt where a file of the model, a number, or a record on the way is gone or not what was written."""
    store.verify(stage_id)
    chain: dict[str, Record] = {}

    def walk(found: str) -> None:
        if found not in chain and "@" not in found:  # what is from outside has no record
            record = _read(store, found)
            for item in record["inputs"].values():
                walk(item)
            chain[found] = record

    walk(stage_id)
    found = (one for one in store.ids() if one.startswith("evaluate/"))
    return Model(store.folder(stage_id), list(chain.values()), [e for one in found if (e := _of(store, one, stage_id))])


def _read(store: Store, stage_id: str) -> Record:
    if record := store.read(stage_id):
        return record
    raise Corrupt(f"{stage_id}: gone; the sweep's command makes it again")


def _of(store: Store, evaluate: str, stage_id: str) -> Evaluation | None:
    """An evaluation, if it is of this model."""
    try:
        record = _read(store, evaluate)
        asked = record["inputs"]
        made = _read(store, asked["answers"] if "answers" in asked else asked["likelihoods"])
    except Corrupt:  # nothing says that it is this model's
        return None
    if made["inputs"]["model"] != stage_id:
        return None
    store.verify(evaluate)
    metrics = json.loads((store.folder(evaluate) / "metrics.json").read_text())
    for key in metrics.keys() & {"protocol", "judge"}:  # a local reward model's folder
        metrics[key] = re.sub(r"(?<!\S)[~/]\S*/", "", metrics[key])
    prompts = _read(store, made["inputs"]["prompts" if "prompts" in made["inputs"] else "questions"])
    if prompts["id"].startswith("questions/"):
        found = [Source.of(prompts, key) for key in prompts["sources"]]
        own = Source(metrics["benchmark"], "", False, "")  # lm-eval finds its data by itself
        return Evaluation(record, metrics, next(iter(found), own), "its own questions")
    data = Source.of(prompts, "eval" if "eval" in prompts["sources"] else "data")
    split = prompts["config"]["eval_split"] or prompts["config"]["split"] if data.hub else "held out"
    return Evaluation(record, metrics, data, split)


def records(model: Model) -> str:
    """The record of the model, of all that led to it and of its evaluations, as JSON."""

    def fit(record: Record) -> dict[str, Any]:
        return {key: record[key] for key in FIT} | {
            "sources": {key: Source.of(record, key).name for key in record["sources"]}
        }

    evaluations = [fit(one.record) | {"metrics": one.metrics} for one in model.evaluations]
    whole = fit(model.record) | {"chain": [fit(one) for one in model.chain[:-1]], "evaluations": evaluations}
    return json.dumps(whole, indent=1) + "\n"


def readme(model: Model, name: str) -> str:
    """The card of the repository or folder `name`: front matter by huggingface_hub, then what it is and where from."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    licence, about_licence = _licence(model.base)
    data = [Source.of(one, key) for one in model.chain if one["id"].startswith("data/") for key in one["sources"]]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=one.data.name,
            dataset_name=one.data.name,
            dataset_revision=one.data.digest or None,
            dataset_split=one.split,
            metric_type=metric,
            metric_name=f"{title}, {kind}",
            metric_value=estimate["value"],
            metric_args={  # a number never travels alone
                "interval_95": [estimate["low"], estimate["high"]],
                "n": estimate["n"],
                "protocol": one.metrics["protocol"],
            },
        )
        for one in model.evaluations
        for metric, title, kind, estimate in one.estimates()
    ]
    front = ModelCardData(
        base_model=model.base.name if model.base.hub else None,  # the hub takes no other names
        datasets=sorted({source.name for source in data if source.hub}) or None,
        library_name="transformers",
        pipeline_tag="text-classification" if _scores(model) else "text-generation",
        tags=["evolve", "self-refinement", "reward-model" if _scores(model) else "preference-training"],
        model_name=name,
        eval_results=results or None,
        **licence,
    )
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{_body(model, name, about_licence)}"))


def _licence(base: Source) -> tuple[dict[str, Any], str]:
    """What the base model's own card says of its licence, as fields and in words; nothing else is relied on."""
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        path = hf_hub_download(base.name, CARD, revision=base.digest) if base.hub else Path(base.path, CARD)
        data = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError) as error:
        return {}, f"not known, for the base model's card can't be read here ({type(error).__name__})"
    if not data.get("license"):
        return {}, "none in the base model's card"
    found = {key: value for key in ("license", "license_name", "license_link") if (value := data.get(key))}
    if base.hub and "://" not in found.get("license_link", "://"):  # a file beside that card
        found["license_link"] = f"https://huggingface.co/{base.name}/blob/{base.digest}/{found['license_link']}"
    return found, f"{found['license']}, as the base model's card says"


def _scores(model: Model) -> bool:
    """Whether it is a reward model."""
    return model.record["id"].startswith("reward_model/")


def _phase(record: Record) -> str:
    """Where in the method a model stands: its newest pairs are numbered by iteration, the data set's own are 0."""
    numbers = [int(name.removeprefix("pairs_")) for name in record["inputs"] if name.startswith("pairs_")]
    if numbers:
        return f"iteration {max(numbers)}" if max(numbers) else "offline preference training"
    return {"activate": "activation (SFT)"}.get(record["id"].split("/")[0], "")


def _body(model: Model, name: str, licence: str) -> str:
    record = model.record
    phase = _phase(record)
    what = f"The model after {phase}" if phase else f"A {record['id'].split('/')[0].replace('_', ' ')}"
    auto = "AutoModelForSequenceClassification" if _scores(model) else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if record["config"]["model"]["trust_remote_code"] else ""
    evaluation = "\n".join(map(_evaluation, model.evaluations)) or "None in the store.\n"
    if (accuracy := record["values"].get("held_out_accuracy")) is not None:
        pairs = record["values"]["held_out_pairs"]
        evaluation = f"It ranks {accuracy * pairs:g} of {pairs} held-out pairs as the data set does; ties count half.\n"
    embedded = any(root.startswith("data@embedded") for root in record["roots"])
    states = {True: " with uncommitted changes", False: "", None: " in an unknown state"}
    code = dict.fromkeys(f"{one['code']['commit']}{states[one['code']['dirty']]}" for one in model.chain)
    return f"""# {name}

{what} of a reconstruction of EVOLVE \
([arXiv 2502.05605](https://arxiv.org/abs/2502.05605)), made from {model.base}. EVOLVE trains a model to answer and, \
shown an earlier answer, to answer better. This is not the work of the paper's authors: what was read in the paper, \
taken from work derived from it, or reconstructed is tagged [paper], [indirect], [reconstructed] in the project's \
configuration and in its docs/method.md.
{EMBEDDED if embedded else ""}
Licence: {licence}.

```python
from transformers import {auto}, AutoTokenizer
model = {auto}.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```

## Evaluation

{evaluation}
## How it was made

{_history(model.chain)}

Versions: {", ".join(f"{package} {version}" for package, version in record["versions"].items())}. Code: commit \
{", ".join(code)}. `{RECORDS}` has the whole record of every stage, with the hash of every file.
"""


EMBEDDED = """
Its data is the embedded world, a synthetic task: it shows that the harness works, and nothing about language models.
"""


def _evaluation(one: Evaluation) -> str:
    lines = ["| answers | metric | value | 95 % interval | n |", "|---|---|---|---|---|"]
    kinds = {kind for *_, kind, _ in one.estimates()}
    for _, title, kind, found in one.estimates():
        interval = "-" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
        lines.append(f"| {kind} | {title} | {found['value']:.3f} | {interval} | {found['n']} |")
    explain = evals.load(one.metrics["benchmark"]).EXPLAIN
    explained = [f"{kind} is {what}" for kind, what in explain.items() if kind in kinds]
    about = "; ".join(["Intervals are over prompts, not over training seeds", *explained])
    return "\n".join(lines) + (
        f"\n\nBenchmark {one.metrics['benchmark']}: {one.metrics['protocol']}; prompts of {one.data}, {one.split}. "
        f"{about}. Left out: {_counts(one.record['dropped']) or 'nothing'}. Record `{one.record['id']}`.\n"
    )


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in found.items() if count)


def _history(chain: list[Record]) -> str:
    """A table of the stages that led to the model; settings that all stages with them agree in stand once below it."""
    settings = {one["id"]: flatten(one["identity"]["config"]) for one in chain}
    seen: dict[str, set[str]] = {}
    for mine in settings.values():
        for key, value in mine.items():
            seen.setdefault(key, set()).add(json.dumps(value, ensure_ascii=False))
    lines = ["| stage | made from | tokens | seconds | left out | its own settings |", "|---|---|---|---|---|---|"]
    for one in chain:
        made_from = [
            f"{name} {Source.of(one, name) if name in one['sources'] else f'`{item}`'}"
            for name, item in one["inputs"].items()
        ]
        own = [f"{key}: {json.dumps(value)}" for key, value in settings[one["id"]].items() if len(seen[key]) > 1]
        cells = [f"`{one['id']}` {_phase(one)}", ", ".join(made_from), _counts(one["tokens"]), f"{one['seconds']:.1f}"]
        cells += [_counts(one["dropped"]) or "-", ", ".join(own) or "-"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    shared = [f"{key}: {value}" for key, (value, *others) in seen.items() if not others]
    return "\n".join([*lines, "", "Settings of every stage that has them:", "", "```yaml", *shared, "```"])
