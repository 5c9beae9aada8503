"""The typed configuration: what Hydra composed, checked and frozen.

DictConfig ends in this file. Every section of conf/ is a frozen model of this package: the method's (method.py), what
generates (engines.py), what is measured (evaluation.py), where it runs (resources.py), and the whole with what its
settings contradict (tree.py). A wrong key, type, value or combination raises `ConfigError`, one line that names the
key, the value and the choices, before any work is done.

A field marked `RUNTIME` says where and how a stage runs (devices, micro-batches, folders), never what comes out of it:
it stays out of every stage's identity. A field that has a default here was added after the first records were made;
its default is the behaviour from before it existed, so old records keep their identity (see store.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from evolve.config.engines import HF, VLLM, Engine, Server
from evolve.config.evaluation import (
    AlpacaEval,
    ArenaHard,
    Endpoint,
    Eval,
    Harness,
    Judge,
    JudgePrompt,
    NoJudge,
    Price,
    StandIn,
)
from evolve.config.method import (
    DIRECT_TERMS,
    Data,
    Filter,
    Lora,
    Loss,
    Model,
    Optimiser,
    PolicyGradient,
    PreferenceWeights,
    RewardModel,
    Sampling,
    SFTWeights,
    Stop,
    Strategy,
    Template,
    Trainer,
    accumulation,
)
from evolve.config.resources import Need, Node, Rates, Resources, Slurm
from evolve.config.section import CONF, HERE, ROOT, RUNTIME, ConfigError, Section, find, refuse
from evolve.config.tree import Config, Wandb

__all__ = [
    "CONF",
    "DIRECT_TERMS",
    "HERE",
    "HF",
    "ROOT",
    "RUNTIME",
    "VLLM",
    "AlpacaEval",
    "ArenaHard",
    "Config",
    "ConfigError",
    "Data",
    "Endpoint",
    "Engine",
    "Eval",
    "Filter",
    "Harness",
    "Judge",
    "JudgePrompt",
    "Lora",
    "Loss",
    "Model",
    "Need",
    "NoJudge",
    "Node",
    "Optimiser",
    "PolicyGradient",
    "PreferenceWeights",
    "Price",
    "Rates",
    "Resources",
    "RewardModel",
    "SFTWeights",
    "Sampling",
    "Section",
    "Server",
    "Slurm",
    "StandIn",
    "Stop",
    "Strategy",
    "Template",
    "Trainer",
    "Wandb",
    "accumulation",
    "find",
    "load",
    "one_line",
    "refuse",
    "runs_alike",
    "unknown_key",
]


def load(composed: Any) -> Config:
    """The frozen `Config` of a composed DictConfig (or plain dict). Raises ConfigError."""
    if not isinstance(composed, dict):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            composed = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(_one_line(str(error))) from None
    composed = {str(key): value for key, value in composed.items() if key != "hydra"}
    try:
        return Config.model_validate(composed)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _explain(error: ValidationError) -> str:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part != "function-before"]
    # Behind a section that is one of several stands which.
    key = ".".join(
        part
        for place, part in enumerate(parts)
        if place == 0 or parts[place - 1] not in ("engine", "judge", "annotator")
    )
    if first["type"] == "extra_forbidden":
        return unknown_key(key)
    if first["type"] == "missing":
        return f"{key}: not set; conf/{key.split('.')[0]}/ should give it"
    message = first["msg"].removeprefix("Value error, ")
    if parts[:1] == ["judge"] and message.startswith("engine."):  # a section that stands in two places
        message = message.replace("engine.", "judge.engine.")
    if first["type"] == "value_error":
        return message.replace(HERE, key)
    return f"{key}={first['input']}: {message[0].lower()}{message[1:]}"


def unknown_key(key: str) -> str:
    """One line for a key that the configuration does not have, with the keys that stand beside it."""
    sections: list[Any] = [Config]
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        found = [section.model_fields[parent] for section in sections if parent in section.model_fields]
        if not (inner := _sections(found)):
            parents, last = parents[:depth], parent
            break
        sections = inner
    choices = sorted({name for section in sections for name in section.model_fields})
    where = ".".join(parents)
    if last in choices:  # a key that exists, where this choice has none
        return f"{key}: not a setting of this choice of {parents[0]}; take one that has it"
    close = difflib.get_close_matches(last, choices, n=1)
    prefix = f"{where}." if where else ""
    hint = f" (did you mean {prefix}{close[0]}?)" if close else ""
    return f"{key}: unknown key{hint}; {where or 'the configuration'} has: {', '.join(choices)}"


def runs_alike(key: str) -> bool:
    """Whether a setting, or a section, says only where and how stages run.

    Not so of a name, a path, an address: they may be RUNTIME, but what they lead to counts.
    """
    sections: list[Any] = [Config]
    for name in key.split("."):
        found = [section.model_fields[name] for section in sections if name in section.model_fields]
        if found and all(RUNTIME in field.metadata and str not in _kinds(field) for field in found):
            return True
        sections = _sections(found)
    return False


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    return (field.annotation, *get_args(field.annotation))  # or null


def _sections(found: Sequence[FieldInfo]) -> list[Any]:
    """Those that stand in these fields: several, one for each choice."""
    kinds = [kind for field in found for kind in _kinds(field)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def one_line(error: Exception, overrides: Sequence[str] = ()) -> str:
    """One line for an error of Hydra's or OmegaConf's own, with the choices where there are any."""
    for override in overrides:  # Hydra says that some group is null, and not which
        group, _, choice = override.partition("=")
        if choice in ("", "null") and (CONF / group).is_dir():
            choices = ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))
            return f"{override}: a group can't be empty; {group} is one of: {choices}"

    text = _one_line(str(error.__cause__ or error) if "Error merging" in str(error) else str(error))
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        options = re.search(r"Available options in '[^']+': (.*?)(?: Config search path|$)", text)
        choices = ", ".join(options[1].split()) if options else "none"
        return f"{match[1]}={match[2]}: no such choice; {match[1]} is one of: {choices}"
    if "expecting" in text:  # the override grammar's own words name no key
        return (
            f"{text.split(' See http')[0]}; a value with spaces or special characters goes in quotes: 'key=\"value\"'"
        )
    return text
