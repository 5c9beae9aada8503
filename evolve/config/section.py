"""What every section of the configuration is made of: frozen models, their types, refusals in one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evolve.snapshot import CHECKOUT, ROOT, frozen

CONF = ROOT / "conf"
RUNTIME = "runtime"  # metadata of fields that never enter an identity
HERE = "{here}"  # in the message of a section that stands in several places: where it stands

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(Exception):
    """A setting that can't be run, as one line: what is wrong, where, what to do."""


def refuse(what: str) -> None:
    raise ValueError(what)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


def find(path: str) -> Path | None:
    """A file or folder by the user's path, from the working directory or else the project's; None where it is not."""
    for base in (Path.cwd(), CHECKOUT):
        candidate = frozen((base / os.path.expanduser(path)).resolve())
        if candidate.exists():
            return candidate
    return None


def text_of(section: str, values: Any) -> Any:
    """A section's values with the content of the file at `path`, where there is one, in place of `text`."""
    if isinstance(values, dict) and isinstance(values.get("path"), str):
        file = find(values["path"])
        if file is None or not file.is_file():
            raise ValueError(f"{section}.path={values['path']}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{section}.path={values['path']}: not a text in UTF-8") from None
        except OSError as error:
            raise ValueError(f"{section}.path={values['path']}: can't be read ({error.strerror})") from None
        if not text.strip():
            raise ValueError(f"{section}.path={values['path']}: an empty file")
        return {**values, "name": file.stem, "text": text}
    return values


def check_fields(section: str, name: str, path: str | None, text: str, fields: Sequence[str]) -> None:
    for field in fields:
        if text.count(field) != 1:
            where = f"{section}.path={path}" if path else f"{section}.text of '{name}'"
            raise ValueError(f"{where}: holds {field} {text.count(field)} times; it must stand there once")
