"""Work over rows, in parts: what is finished is kept at once, and what is left is dealt to processes.

A part is a file in the stage's partial folder that one process alone appends to: a line for each row that is finished,
led by the line's own checksum, so that a line half written when its process was killed is seen and made again. Which
process makes a row, and in which attempt, is to change nothing in it (but for rounding, where work is batched).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evolve.processes import Call
from evolve.stages import Context

Emit = Callable[[int, Any], None]


class Shared(Exception):
    """A share of the rows is made, and the stage is another job's to end."""


def _line(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}"


def read(folder: Path) -> dict[int, Any]:
    """The rows that earlier attempts finished, by number. Lines that are not as they were written are left out."""
    found: dict[int, Any] = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            text = line.partition(" ")[2]
            if text and line == _line(text):
                number, value = json.loads(text)
                found[number] = value
    return found


def run(
    work: Callable[[Any, Sequence[int], Emit, Context], None],
    argument: Any,
    count: int,
    context: Context,
    *,
    apart: bool = False,
    processes: int = 1,
    devices: int = 1,
    retries: int = 0,
) -> list[Any]:
    """What `work(argument, numbers, emit, context)` emits for each of `count` rows, in order.

    Args:
        work: a module's function; calls emit(number, value) for each number it is given, value as JSON.
        apart: in a process of its own even where there is one; several always are.
        processes, devices: how many share the rows, and how many GPUs each has.
        retries: how often a process that died is started again, for what it had not finished.

    Raises:
        ValueError, RuntimeError: an error of `work`'s; after the other processes are done, so that nothing is lost.
        Shared: the share of rows that `context` asks for is made.
    """
    found = read(context.partial)
    first, every = context.share or (0, 1)
    todo = [number for number in range(first, count, every) if number not in found]
    if not todo:
        return _whole(found, count, context)
    context.partial.mkdir(parents=True, exist_ok=True)
    if not apart and processes == 1:
        found |= _work(work, argument, todo, context)
    else:
        _deal(work, argument, todo, context, processes, devices, retries)
        found = read(context.partial)
    missing = sum(number not in found for number in todo)
    if missing:
        raise RuntimeError(f"{missing} of {count} rows were not finished; the same command goes on with them")
    return _whole(found, count, context)


def _whole(found: dict[int, Any], count: int, context: Context) -> list[Any]:
    if context.share is not None:
        raise Shared
    return [found[number] for number in range(count)]


def _work(work: Any, argument: Any, todo: Sequence[int], context: Context) -> dict[int, Any]:
    made: dict[int, Any] = {}
    with (context.partial / f"part-{uuid.uuid4().hex}.jsonl").open("a", encoding="utf-8") as file:

        def emit(number: int, value: Any) -> None:
            file.write(_line(json.dumps([number, value], ensure_ascii=False)) + "\n")
            file.flush()
            made[number] = value

        work(argument, todo, emit, context)
    return made


def _apart(
    work: Any, argument: Any, todo: Sequence[int], device: str, partial: Path, progress: Callable[[int, int], None]
) -> None:
    _work(work, argument, todo, Context(device, progress, partial))


def _deal(
    work: Any, argument: Any, todo: Sequence[int], context: Context, processes: int, devices: int, retries: int
) -> None:
    environments = _gpus(processes, devices) if context.device == "cuda" else [{}] * processes
    dealt = [share for first in range(processes) if (share := todo[first::processes])]
    tries = [0] * len(dealt)
    errors: list[Exception] = []

    def start(place: int, numbers: Sequence[int]) -> Call:
        arguments = (work, argument, numbers, context.device, context.partial)
        return Call(_apart, arguments, environment=environments[place])

    calls = {place: start(place, numbers) for place, numbers in enumerate(dealt)}
    progress: dict[int, tuple[int, int]] = {}
    try:
        while calls:
            time.sleep(0.2)
            for place, call in list(calls.items()):
                progress[place] = call.progress or progress.get(place, (0, 0))
                if call.running:
                    continue
                try:
                    call.result()
                except (RuntimeError, ValueError) as error:
                    done = read(context.partial)
                    left = [number for number in dealt[place] if number not in done]
                    if isinstance(error, RuntimeError) and tries[place] < retries and left:
                        tries[place] += 1
                        print(f"process {place + 1} of {len(dealt)}: {error}; started again", flush=True)
                        call.stop()
                        calls[place] = start(place, left)
                        continue
                    errors.append(error)
                call.stop()
                del calls[place]
            if progress:
                context.progress(sum(done for done, _ in progress.values()), sum(all for _, all in progress.values()))
    finally:
        for call in calls.values():
            call.stop()
    if errors:
        raise errors[0]


def _gpus(processes: int, each: int) -> list[dict[str, str]]:
    """The environment that gives each process its own GPUs. Raises RuntimeError if there are too few."""
    import torch

    here = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    here = here if here != [""] else [str(number) for number in range(torch.cuda.device_count())]
    if len(here) < processes * each:
        raise RuntimeError(
            f"{processes} processes of {each} GPUs each (engine.processes or reward_model.processes): there are "
            f"{len(here)} GPUs here"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(here[place * each : (place + 1) * each])} for place in range(processes)]
