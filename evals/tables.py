"""Tables that others wrote: JSON, JSONL or CSV, and values that are refused with their file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSON list, JSONL or CSV (told by what it starts with), gzipped or not. A CSV's values are texts.

    Raises OSError, or ValueError naming the file.
    """
    raw = Path(path).read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
        if text.lstrip()[:1] == "[":
            found = json.loads(text)
        elif text.lstrip()[:1] == "{":
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            found = list(csv.DictReader(io.StringIO(text, newline="")))
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path}: neither JSON, JSONL nor CSV in UTF-8, or damaged ({error})") from None
    if not found:
        raise ValueError(f"{path}: no rows")
    for count, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {count}: a {type(row).__name__}, not an object")
    return found


def number(row: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number, also as a CSV's text. Raises ValueError."""
    value = _value(row, key, where)
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{where}, {key}: {value!r:.40} is not a number")
    return found


def text(row: Mapping[str, Any], key: str, where: str, empty: bool = False) -> str:
    """A text that can be written as UTF-8; `empty`: it may have nothing to read. Raises ValueError."""
    value = _value(row, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}, {key}: {value!r:.40} is not a text")
    if not (value.strip() or empty):
        raise ValueError(f"{where}, {key}: empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}, {key}: holds half a character (a lone surrogate)") from None
    return value


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where}: no '{key}'; it has {', '.join(map(str, row))}")
    return row[key]


def unique(keys: Sequence[Any], what: str, where: str) -> None:
    """Raises ValueError naming the first two rows with the same key."""
    seen: dict[Any, int] = {}
    for count, key in enumerate(keys, 1):
        if seen.setdefault(key, count) != count:
            raise ValueError(f"{where}: rows {seen[key]} and {count} have the same {what}")
