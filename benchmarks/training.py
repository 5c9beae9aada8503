"""python -m benchmarks.training: what a step of preference training costs here, beside stock TRL's best.

All sides train the EVOLVE objective, (1 - alpha) L_DPO + alpha L_refine with six sequences a pair, on the same pairs in
the same steps, from the same weights, with reference log-probabilities made before the clock starts:

    stock         trl.DPOTrainer: each pair as three preference rows (x; w, l), (x, l, z; w, l), (x, w, z; w, l).
                  TRL's own forward, chunked head, metrics and loop; only the formula that makes a row's loss of its
                  log-probabilities is replaced, because TRL has one for all rows and its squared one is per token.
                  STOCK holds the settings that were fastest; `--settings` tries the others again.
    stock_scored  the same, with one line of TRL changed: on a GPU its head computes scored positions only, elsewhere
                  all positions. So this says how much of a ratio would be gone on a GPU. CPU only.
    (others)      evolve.trainer.train, in each of VARIANTS.

Every measurement is a fresh process. Its first optimiser step is not counted; FLOPs are counted in it. The sides
alternate, and medians are kept in benchmarks/results/training.json.

    --data FILE        preference pairs as JSONL (UltraFeedback, say) for smollm2; else random tokens of its lengths
    --workload NAME    smollm2 (needs `python -m evolve.smollm2`), embedded; both if not given
    --repeats N        how often shared and stock are measured (3); the other sides once
    --threads N        of torch; all cores if not given
    --sides A,B,...    only these
    --settings         also measure what else stock TRL can be set to, once each
    --gpu              Llama-shaped 1B and 8B with random weights instead; results in training_gpu.json

Measured and derived, by side:

    pairs_per_second   of the counted steps; `ratio` is ours over one of the stock sides
    tokens_per_second  tokens of the six sequences, without padding: the same work for all sides
    peak_mib           of the whole process on a CPU (so with the weights, AdamW's state and Python), allocated on a GPU
    ratio, memory      at the top of the file: shared over stock, of smollm2
    useful_flops       that work on six separate sequences: 6 FLOPs a token and parameter of the layers (4 where the
                       parameters are frozen, as under LoRA), the head at scored positions only, causal attention
    utilisation        useful FLOPs a second over the measured speed of the model's own matrix products; more than what
                       the hardware did if a side computes shared prefixes once
    executed           FLOPs of matrix products and attention that torch saw in the first step, over that step's useful
                       ones: above 1 is waste (padding, unscored positions), below 1 is work saved. Attention counts in
                       full, masked or not.
    hardware           utilisation times executed: the share of the matmul speed that the hardware was kept at
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.workloads import GPU_WORKLOADS, SHAPES, WORKLOADS, Workload, configuration, load, lora, processor
from evolve.config import ROOT, Lora, Optimiser, PreferenceWeights

if TYPE_CHECKING:
    from evolve.pairs import EncodedPair
    from evolve.trainer import Objective

RESULTS = ROOT / "benchmarks" / "results"
LOSS = PreferenceWeights(
    direct="dpo",
    lengths="sum",
    gamma=None,
    alpha=0.8,
    beta_direct=0.1,
    beta_refine=0.1,
    refine_contexts="both",
    refine_scale=1.0,
    nll=0.0,
)
LORA = Lora(rank=16, alpha=32, dropout=0.0, targets="all-linear")

# Stock's settings, those that were fastest here by `--settings`: DPOConfig's fields. What depends on sizes stands with
# the workload: `rows` (per_device_train_batch_size), `attention`. Rows of one step are always sorted by length.
STOCK: dict[str, Any] = {"optim": "adamw_torch_fused"}
SCORED: dict[str, Any] = {"scored_positions_only": True}  # not a setting: see the docstring
TRIED: dict[str, dict[str, Any]] = {
    **{f"rows {rows}": {"rows": rows} for rows in (1, 2, 3, 6, 12, 48, 192)},
    "bf16": {"bf16": True},
    "float32": {"bf16": False},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "optimiser not fused": {"optim": "adamw_torch"},
    "attention sdpa": {"attention": "sdpa"},
    "attention eager": {"attention": "eager"},
    "padding_free": {"padding_free": True},
    "liger": {"use_liger_kernel": True},
    "compiled": {"torch_compile": True},
}
# Ours: what each technique gives on its own. Optimiser's fields.
VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "packed": {"layout": "packed"},
    "padded": {"layout": "padded"},
    "padded_all_logits": {"layout": "padded", "without": ["logits at scored positions alone"]},
    "shared_log_softmax": {"without": ["log-softmax in chunks"]},
}


@dataclass(frozen=True)
class Result:
    """One measurement. Counts and seconds are the counted steps'; losses and order are of every step."""

    pairs: int
    tokens: int
    seconds: float
    cpu_seconds: float
    reference_seconds: float
    peak_mib: float
    losses: list[float]
    order: list[list[str]]
    useful_flops: float
    executed: float


def layer_weights(model: Any) -> list[Any]:
    """The matrices of all layers, without adapters."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim == 2 and "lora_" not in name
    ]


def useful_flops(model: Any, pairs: Sequence[EncodedPair]) -> float:
    """Of a forward and backward pass over six separate sequences a pair, as the module's docstring defines it."""
    config = model.config
    layers = sum(weight.numel() for weight in layer_weights(model))
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    passes = 2 if any("lora_" in name for name, _ in model.named_parameters()) else 3
    flops = 0.0
    for pair in pairs:
        for sequence in pair.sequences.values():
            length, scored = len(sequence.ids), len(sequence.ids) - sequence.answer
            flops += passes * 2 * (layers * length + config.hidden_size * config.vocab_size * scored)
            flops += 3 * 2 * config.num_hidden_layers * width * length**2
    return flops


class Clock:
    """Counts the FLOPs of the first step and takes the time after each."""

    def __init__(self, device: str):
        import torch
        from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

        self.device = device
        self.ends: list[tuple[float, float]] = []  # wall clock, processor time of all threads
        aten = torch.ops.aten
        # What a CPU runs, and torch has no count for.
        self.counter = FlopCounterMode(
            display=False,
            custom_mapping={
                aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
                aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                    lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
                ),
            },
        )

    def start(self) -> None:
        self.counter.__enter__()

    def step(self) -> None:
        import torch

        if not self.ends:
            self.counter.__exit__(None, None, None)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    @property
    def seconds(self) -> tuple[float, float]:
        return self.ends[-1][0] - self.ends[0][0], self.ends[-1][1] - self.ends[0][1]


def measured(
    workload: Workload,
    model: Any,
    pairs: Sequence[EncodedPair],
    clock: Clock,
    reference_seconds: float,
    losses: list[float],
    order: list[list[str]],
) -> Result:
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if workload.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    by_id = {pair.id: pair for pair in pairs}
    first, *counted = [[by_id[name] for name in step] for step in order]
    done = [pair for step in counted for pair in step]
    return Result(
        pairs=len(done),
        tokens=sum(len(sequence.ids) for pair in done for sequence in pair.sequences.values()),
        seconds=clock.seconds[0],
        cpu_seconds=clock.seconds[1],
        reference_seconds=reference_seconds,
        peak_mib=peak,
        losses=losses,
        order=order,
        useful_flops=useful_flops(model, done),
        executed=clock.counter.get_total_flops() / useful_flops(model, first),
    )


def recorded(objective: Objective) -> tuple[Objective, list[str]]:
    """The objective, and a list that the ids of the pairs it is asked for are added to."""
    seen: list[str] = []

    def loss(logp: Any, batch: Mapping[str, Any], items: float) -> Any:
        seen.extend(batch["ids"])
        return objective.loss(logp, batch, items)

    return replace(objective, loss=loss), seen


def references(
    model: Any, pairs: Sequence[EncodedPair], pad_id: int, bf16: bool, device: str, micro_batch: int, layout: str
) -> list[dict[str, Any]]:
    """Pairs as `trainer.train` takes them: with their log-probabilities under the model as it is."""
    import torch

    from evolve.losses import DIRECT, REFINE
    from evolve.pairs import batch, log_probabilities, prepare

    names = DIRECT + REFINE
    plain, attention = model.forward, model.config._attn_implementation
    prepare(model.eval(), layout, bf16)
    examples = []
    with torch.inference_mode():
        for first in range(0, len(pairs), micro_batch):
            some = pairs[first : first + micro_batch]
            made = batch([[pair.sequences[name] for name in names] for pair in some], layout, pad_id).to(device)
            found = log_probabilities(model, made).reshape(len(some), len(names)).tolist()
            for pair, values in zip(some, found, strict=True):
                examples.append({"pair": pair, "reference": dict(zip(names, values, strict=True))})
    model.forward = plain
    model.set_attn_implementation(attention)
    return examples


def without(technique: str) -> None:
    """Takes one technique out of ours, in this process: so the benchmark can say what it gives."""
    import torch

    from evolve import pairs

    if technique == "logits at scored positions alone":
        chosen = pairs.batch

        def everywhere(groups: Any, how: str, pad_id: int) -> Any:
            made = chosen(groups, how, pad_id)
            picked = torch.zeros(made.input_ids.shape, dtype=torch.bool)
            picked[:, made.kept] = made.picked  # type: ignore[assignment]
            return replace(made, kept=torch.arange(picked.shape[1]), picked=picked)

        pairs.batch = everywhere
    elif technique == "log-softmax in chunks":

        class Whole:
            @staticmethod
            def apply(logits: Any, targets: Any) -> Any:
                return logits.float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)

        pairs.LogProbability = Whole  # type: ignore[assignment, misc]
    else:
        raise ValueError(technique)


def ours(workload: Workload, settings: Mapping[str, Any]) -> Result:
    """One measurement of evolve.trainer.train."""
    from evolve import pairs as layouts
    from evolve import trainer

    settings = dict(settings)
    for technique in settings.pop("without", ()):
        without(technique)
    layouts.check = lambda *_: None  # once a stage, and not a step's work
    model, tokenizer, pairs = load(workload)
    bf16 = workload.dtype == "bfloat16"
    began = time.perf_counter()
    layout = settings.get("layout", "shared")
    examples = references(model, pairs, tokenizer.pad_token_id, bf16, workload.device, workload.micro_batch, layout)
    reference_seconds = time.perf_counter() - began
    objective, seen = recorded(trainer.preference_objective(LOSS, True))
    clock = Clock(workload.device)
    clock.start()
    with TemporaryDirectory() as folder:
        trained = trainer.train(
            model,
            objective,
            examples,
            optimiser(
                batch_size=workload.batch,
                micro_batch=workload.micro_batch,
                gradient_checkpointing=workload.gradient_checkpointing,
                lora=LORA if workload.lora else None,
                **settings,
            ),
            epochs=1,
            learning_rate=workload.learning_rate,
            seed=0,
            pad_id=tokenizer.pad_token_id,
            bf16=bf16,
            device=workload.device,
            folder=Path(folder),
            on_step=lambda done, total: clock.step(),
        )
    order = [seen[start : start + workload.batch] for start in range(0, len(seen), workload.batch)]
    losses = [step["loss"] for step in trained.steps]
    return measured(workload, trained.trainer.model, pairs, clock, reference_seconds, losses, order)


def optimiser(**changes: Any) -> Optimiser:
    """Ours, with nothing but what `changes` says: a constant rate, no decay, no checkpoints."""
    settings = {
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "layout": "shared",
        "devices": 1,
        "sharding": "none",
        "checkpoint_minutes": None,
        "max_loss_growth": 100.0,
    }
    return Optimiser(**{**settings, **changes})


def stock(workload: Workload, settings: Mapping[str, Any], order: Sequence[Sequence[str]] | None) -> Result:
    """One measurement of trl.DPOTrainer, on the pairs of `order` step by step (None: as they come)."""
    from benchmarks import stock_trl

    model, tokenizer, pairs = load(workload)
    clock = Clock(workload.device)
    by_id = {pair.id: pair for pair in pairs}
    if order is None:
        size = workload.batch
        order = [[pair.id for pair in pairs[first : first + size]] for first in range(0, len(pairs), size)]
    settings = dict(settings)
    model.set_attn_implementation(settings.pop("attention", workload.attention))
    if settings.pop("scored_positions_only", False):
        import trl.trainer.utils as where_the_head_asks

        where_the_head_asks._use_triton = lambda device: True
    trainer = stock_trl.trainer(
        model,
        tokenizer,
        [[by_id[name] for name in step] for step in order],
        LOSS,
        clock.step,
        peft_config=lora() if workload.lora else None,
        **{
            "learning_rate": workload.learning_rate,
            "bf16": workload.dtype == "bfloat16",
            "use_cpu": workload.device == "cpu",
            "gradient_checkpointing": workload.gradient_checkpointing,
            "rows": workload.rows,
            **settings,
        },
    )
    clock.start()
    trainer.train()
    steps = [list(step) for step in order]
    return measured(workload, trainer.model, pairs, clock, trainer.precompute_seconds, trainer.losses, steps)


def matmul_gflops(workload: Workload, tokens: int = 1024) -> dict[str, float]:
    """GFLOP/s of the model's own matrix products, forward and backward, by dtype: each kind weighted as it occurs."""
    import torch
    from transformers import AutoModelForCausalLM

    if workload.threads:
        torch.set_num_threads(workload.threads)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(configuration(workload))
    shapes = [tuple(weight.shape) for weight in layer_weights(model)]
    shapes.append((model.config.vocab_size, model.config.hidden_size))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        flops = seconds = 0.0
        for out, into in sorted(set(shapes)):
            x, weight, y = (
                torch.randn(size, device=workload.device, dtype=dtype)
                for size in ((tokens, into), (out, into), (tokens, out))
            )
            times = []
            for _ in range(4):
                began = time.perf_counter()
                for left, right in ((x, weight.t()), (y, weight), (y.t(), x)):
                    torch.mm(left, right)
                if workload.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            flops += shapes.count((out, into)) * 6 * tokens * out * into
            seconds += shapes.count((out, into)) * min(times)
        found[str(dtype).removeprefix("torch.")] = flops / seconds / 1e9
    return found


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def machine(workload: Workload) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    if workload.threads:
        torch.set_num_threads(workload.threads)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def summary(runs: Sequence[Result], gflops: float) -> dict[str, Any]:
    """Medians over the runs of one side."""

    def median(value: Callable[[Result], float]) -> float:
        return statistics.median(map(value, runs))

    utilisation = median(lambda run: run.useful_flops / run.seconds) / 1e9 / gflops
    executed = median(lambda run: run.executed)
    return {
        "pairs_per_second": median(lambda run: run.pairs / run.seconds),
        "pairs_per_cpu_second": median(lambda run: run.pairs / run.cpu_seconds),
        "tokens_per_second": median(lambda run: run.tokens / run.seconds),
        "peak_mib": median(lambda run: run.peak_mib),
        "reference_seconds": median(lambda run: run.reference_seconds),
        "utilisation": utilisation,
        "executed": executed,
        "hardware": utilisation * executed,
        "runs": [
            {"seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak_mib": run.peak_mib, "losses": run.losses}
            for run in runs
        ],
    }


def attempt(function: Callable[..., Result], *arguments: Any) -> Result | str:
    """A measurement, or that the memory does not suffice for it."""
    try:
        return apart(function, *arguments)
    except BrokenProcessPool:
        return "the process was killed, most likely for memory"
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return "out of memory"


def compare(workload: Workload, repeats: int, asked: Sequence[str]) -> dict[str, Any]:
    """Both sides, in turn; a side that can't run has its reason in place of numbers."""
    gflops = apart(matmul_gflops, workload)
    measurements: dict[str, list[Result]] = {}
    reasons: dict[str, str] = {}
    order: list[list[str]] | None = None

    def take(name: str, function: Callable[..., Result], *arguments: Any) -> None:
        if name in reasons or (asked and name not in asked):
            return
        result = attempt(function, *arguments)
        if isinstance(result, str):
            reasons[name] = result
            print(f"{workload.name:16} {name:14} {result}", flush=True)
            return
        nonlocal order
        order = order or result.order
        measurements.setdefault(name, []).append(result)
        print(
            f"{workload.name:16} {name:14} {result.pairs / result.seconds:8.3f} pairs/s "
            f"{result.tokens / result.seconds:8.0f} tokens/s {result.peak_mib:8.0f} MiB "
            f"{result.executed:5.2f} executed  last loss {result.losses[-1]:.5f}",
            flush=True,
        )

    stocks = {"stock": STOCK}
    if workload.device == "cpu":
        stocks["stock_scored"] = stocks["stock"] | SCORED
    for repeat in range(repeats):
        for name, settings in VARIANTS.items():
            if repeat == 0 or name == "shared":  # what is compared; the others say what a technique gives
                take(name, ours, workload, settings)
        for name, settings in stocks.items():
            if repeat == 0 or name == "stock":
                take(name, stock, workload, settings, order)
    sides: dict[str, Any] = {name: summary(runs, gflops[workload.dtype]) for name, runs in measurements.items()}
    for name in VARIANTS.keys() & sides.keys():
        for base in stocks.keys() & sides.keys():
            ratio = sides[name]["pairs_per_second"] / sides[base]["pairs_per_second"]
            memory = sides[name]["peak_mib"] / sides[base]["peak_mib"]
            pairs = zip(measurements[name][0].losses, measurements[base][0].losses, strict=True)
            difference = max(abs(one - other) for one, other in pairs)
            sides[name][f"over_{base}"] = {"ratio": ratio, "memory": memory, "largest_loss_difference": difference}
            print(f"{workload.name:16} {name:14} {ratio:.2f} times {base}, {memory:.2f} its memory")
    some = next((runs[0] for runs in measurements.values()), None)
    return {
        "machine": apart(machine, workload),
        "workload": described(workload) | ({"tokens_per_pair": some.tokens / some.pairs} if some else {}),
        "matmul_gflops": gflops,
        "sides": sides | reasons,
    }


def described(workload: Workload) -> dict[str, Any]:
    """The workload without this machine's paths."""
    local = {"data": "a file"} if workload.data not in ("synthetic", "embedded") else {}
    return asdict(workload) | {"model": Path(workload.model).name} | local


def try_settings(workload: Workload) -> dict[str, Any]:
    """Stock TRL under other settings, once each, in an order of steps that ours takes."""
    order = apart(ours, workload, next(iter(VARIANTS.values()))).order
    found: dict[str, Any] = {}
    for name, settings in {"as chosen": {}, **TRIED}.items():
        if settings.get("rows", 0) > 3 * workload.batch:  # more than a step has
            continue
        try:
            result = attempt(stock, workload, {**STOCK, **settings}, order)
        except Exception as error:  # a setting that this machine or TRL refuses: kept as what it says
            result = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if isinstance(result, str):
            found[name] = result
            print(f"{workload.name:16} {name:28} {result}", flush=True)
            continue
        found[name] = {
            "pairs_per_second": result.pairs / result.seconds,
            "pairs_per_cpu_second": result.pairs / result.cpu_seconds,
            "peak_mib": result.peak_mib,
            "executed": result.executed,
        }
        print(
            f"{workload.name:16} {name:28} " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()),
            flush=True,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--workload", action="append", choices=[workload.name for workload in WORKLOADS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", default="")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    sides = [name for name in arguments.sides.split(",") if name]
    if unknown := set(sides) - {*VARIANTS, "stock", "stock_scored"}:
        print(f"--sides: no {sorted(unknown)[0]}; there are {', '.join([*VARIANTS, 'stock', 'stock_scored'])}")
        return 2
    if arguments.gpu and apart(machine, WORKLOADS[0])["accelerator"] is None:
        print("no GPU here: nothing was measured, and no result was changed")
        return 0
    workloads = GPU_WORKLOADS if arguments.gpu else WORKLOADS
    if arguments.workload:
        workloads = tuple(workload for workload in workloads if workload.name in arguments.workload)
    for workload in workloads:
        if workload.model not in SHAPES and not (ROOT / workload.model).is_dir():
            print(f"{workload.model}: no such folder; `python -m evolve.smollm2` makes it", file=sys.stderr)
            return 1
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    file = RESULTS / ("training_gpu.json" if arguments.gpu else "training.json")
    results = json.loads(file.read_text()) if file.exists() else {}
    for workload in workloads:
        data = str(Path(arguments.data).resolve()) if arguments.data and workload.data == "synthetic" else workload.data
        workload = replace(workload, data=data, threads=arguments.threads)
        if workload.model not in SHAPES:
            workload = replace(workload, model=str(ROOT / workload.model))
        if arguments.settings:
            results.setdefault(workload.name, {})["stock_settings"] = try_settings(workload)
            file.write_text(json.dumps(results, indent=1) + "\n")
        kept = results.get(workload.name, {}).get("stock_settings")
        results[workload.name] = compare(workload, arguments.repeats, sides) | (
            {"stock_settings": kept} if kept else {}
        )
        over = results[workload.name]["sides"].get("shared", {}).get("over_stock")
        if over and workload.name == "smollm2":
            results |= {"ratio": over["ratio"], "memory": over["memory"]}
        file.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
