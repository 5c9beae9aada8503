"""transformers' Trainer over pairs, with the objective as a pure function of log-probabilities (losses.py).

The Trainer brings the optimiser, schedule, mixed precision, devices, sharding and checkpoints. Ours: which pairs make a
step (the same ones on any number of devices), how their sequences are laid out (pairs.py), the objective, its
normalisation over the whole step, and three checks: the layout, the values at step 1, and that the loss stays sane.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from evolve import losses, pairs
from evolve.config import Lora, Optimiser, PreferenceWeights, SFTWeights, accumulation
from evolve.pairs import EncodedPair
from evolve.store import Corrupt, hash_file, open_up, replace, seal, unseal

COMPLETE = "complete"  # a file that a checkpoint has once all of it is written


# Arguments of the Trainer for each trainer.sharding. Weights, gradients and what devices exchange are float32 in all of
# them; the forward pass autocasts itself (pairs.prepare), so none is told of bfloat16.
SHARDING: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "deepspeed": {
        "deepspeed": {
            "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
            "gradient_clipping": "auto",
            "gradient_accumulation_steps": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        }
    },
}


class Diverged(RuntimeError):
    """The loss is no longer a number that training could come back from."""


@dataclass(frozen=True)
class Objective:
    """What a step minimises: the sequences of a pair that it needs, the items that it counts, and the loss.

    items: answers' lengths by name, [pairs] each -> how many items (pairs, or tokens) these pairs are. loss:
    (log-probabilities by name, batch, items of the whole step) -> (the batch's part of the step's loss, a scalar;
    metrics [pairs] by name). expected: metrics at the first step, where they are known exactly.
    """

    names: tuple[str, ...]
    items: Callable[[Mapping[str, Tensor]], int]
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Any], float], tuple[Tensor, dict[str, Tensor]]]
    expected: Mapping[str, float] = field(default_factory=dict)


def sft_objective(loss: SFTWeights) -> Objective:
    """L_SFT, per answer token of the step."""

    def compute(
        logp: Mapping[str, Tensor], batch: Mapping[str, Any], tokens: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lengths = batch["tokens"]["chosen"]
        metrics = {
            "nll_direct" if name == "direct_chosen" else "nll_refine": -logp[name].detach() / lengths for name in logp
        }
        return losses.sft(logp, loss, tokens), metrics

    names = tuple(
        name for name, weight in (("direct_chosen", loss.direct), ("rejected_chosen", loss.refine)) if weight > 0
    )
    return Objective(names, lambda tokens: int(tokens["chosen"].sum()), compute)


def preference_objective(loss: PreferenceWeights, starts_at_reference: bool) -> Objective:
    """(1 - alpha) L_direct + alpha L_refine + nll L_NLL, per pair of the step."""

    def compute(logp: Mapping[str, Tensor], batch: Mapping[str, Any], count: float) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = losses.preference(logp, batch.get("reference", {}), loss, batch["tokens"])
        metrics |= {f"{answer}_tokens": lengths.float() for answer, lengths in batch["tokens"].items()}
        return total.sum() / count, metrics

    expected = losses.at_reference(loss) if starts_at_reference else {}
    return Objective(losses.needed(loss), lambda tokens: len(tokens["chosen"]), compute, expected)


def order(count: int, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """Which examples make each optimiser step: every epoch a new permutation, cut into batches.

    A function of its arguments alone, so it is the same on any number of devices and after a resume.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        step.tolist() for _ in range(epochs) for step in torch.randperm(count, generator=generator).split(batch_size)
    ]


def deal(step: Sequence[int], rounds: int, devices: int) -> list[list[int]]:
    """A step's examples as rounds x devices micro-batches, in the order that the devices take them; the last of a
    short step may be empty."""
    size = -(-len(step) // (rounds * devices))
    return [list(step[first * size : (first + 1) * size]) for first in range(rounds * devices)]


class PairTrainer(Trainer):
    """Minimises an `Objective` over pairs. Its data set is the list of all micro-batches of the run, in order."""

    objective: Objective

    def __init__(self, objective: Objective, layout: str, pad_id: int, tolerance: float, max_growth: float, **kw: Any):
        self.objective, self.layout, self.pad_id = objective, layout, pad_id
        self.tolerance, self.max_growth = tolerance, max_growth
        self.run_tokens = self.real_tokens = 0  # through the model, and in the sequences as if nothing were shared
        self._sums: dict[str, list[float]] = {}
        self._prompts: tuple[int, list[str]] = (0, [])  # a step, and the ids of its pairs so far
        super().__init__(data_collator=self._collate, **kw)
        # The objective divides by the whole step's items, so the Trainer must not divide by the micro-batches again.
        self.model_accepts_loss_kwargs = True

    def _collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        (micro,) = examples
        chosen = micro["examples"]
        encoded: list[EncodedPair] = [example["pair"] for example in chosen]
        names = self.objective.names
        made: dict[str, Any] = {
            "ids": [pair.id for pair in encoded],
            "packed": pairs.batch(
                [[pair.sequences[name] for name in names] for pair in encoded], self.layout, self.pad_id
            ),
            "tokens": pairs.answer_tokens(encoded),
            "items": micro["items"],
            "weight": micro["weight"],
        }
        if "reference" in chosen[0]:
            made["reference"] = {
                name: torch.tensor([example["reference"][name] for example in chosen])
                for name in names
                if name in chosen[0]["reference"]
            }
        return made

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        return torch.tensor(1)  # each micro-batch says itself what its step counts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        packed: pairs.Batch = inputs["packed"].to(self.args.device)
        self.run_tokens += packed.input_ids.numel()
        self.real_tokens += packed.tokens
        names = self.objective.names
        logp = dict(zip(names, pairs.log_probabilities(model, packed).reshape(-1, len(names)).T, strict=True))
        loss, metrics = self.objective.loss(logp, inputs, inputs["items"])
        loss = inputs["weight"] * loss
        step = self.state.global_step + 1
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}", step, inputs["ids"])
        if inputs["weight"]:
            self._prompts = step, [*(self._prompts[1] if self._prompts[0] == step else []), *inputs["ids"]]
            if self.state.global_step == 0:
                self._check_first(metrics)
            for name, values in metrics.items():
                self._add(name, values.float().sum().item(), len(values))
            self._add("loss", loss.item(), 0)
        return loss * self.args.world_size  # the devices' gradients will be averaged, and this is one part of a sum

    def _add(self, name: str, value: float, count: int) -> None:
        sums = self._sums.setdefault(name, [0.0, 0])
        sums[0] += value
        sums[1] += count

    def _check_first(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in self.objective.expected.items():
            if name in metrics and abs(metrics[name].mean().item() - value) > self.tolerance * max(1.0, abs(value)):
                raise RuntimeError(
                    f"{name} is {metrics[name].mean().item():.6f} at the first step and must be {value:.6f}: the "
                    "reference log-probabilities are not this policy's"
                )

    def diverged(self, what: str, step: int, prompts: Sequence[str] | None = None) -> Diverged:
        """The error, with what it is known to come from: some prompts, or all that this device ran for the step."""
        # The weights after the step before gave this loss, so a checkpoint of just these is no good one.
        kept = last_checkpoint(Path(str(self.args.output_dir)), step - 1)
        return Diverged(
            f"{what} at step {step}, prompts {', '.join(prompts or self._prompts[1])}; "
            f"{f'the last good checkpoint is {kept}' if kept else 'there is no good checkpoint'}; "
            "a smaller learning rate (model.learning_rate) is the usual remedy"
        )

    def take_metrics(self) -> dict[str, float]:
        """Means over the pairs of the step that has just ended, on all devices; `loss` is the step's."""
        names = sorted(self._sums)
        sums = torch.tensor([self._sums[name] for name in names], dtype=torch.float64)
        self._sums = {}
        if self.args.world_size > 1:
            gathered: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, (names, sums))
            names = sorted({name for there, _ in gathered for name in there})
            sums = sum(  # type: ignore[assignment]
                torch.stack([values[there.index(name)] if name in there else torch.zeros(2) for name in names])
                for there, values in gathered
            )
        return {
            name: (total / count if count else total).item() for name, (total, count) in zip(names, sums, strict=True)
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            replace(folder / COMPLETE, seal({"files": _hashes(folder)}))
            open_up(folder, like=folder / COMPLETE)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def _drop_broken(folder: Path) -> None:
    """Removes checkpoints that were half written, and the newest ones until one is what was written."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    while newest := last_checkpoint(folder):
        with contextlib.suppress(Corrupt):
            if unseal((newest / COMPLETE).read_bytes()).get("files") == _hashes(newest):
                return
        print(f"{newest}: not what was written; removed", flush=True)
        shutil.rmtree(newest)


def last_checkpoint(folder: Path, before: float = inf) -> Path | None:
    """The newest checkpoint of which everything was written, from earlier than step `before`."""
    whole = {int(path.parent.name.split("-")[1]): path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")}
    return max(((step, path) for step, path in whole.items() if step < before), default=(0, None))[1]


class _Steps(TrainerCallback):
    """A row of metrics for each step, kept in the Trainer's own history, which its checkpoints hold."""

    trainer: PairTrainer

    def __init__(self, minutes: float | None, on_step: Callable[[int, int], None]):
        self.minutes, self.on_step = minutes, on_step
        self.saved = time.monotonic()
        self.first: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = self.trainer.take_metrics()
        self.first = self.first or next((entry["loss"] for entry in state.log_history if "loss" in entry), row["loss"])
        if abs(row["loss"]) > self.trainer.max_growth * max(abs(self.first), 1e-3):
            raise self.trainer.diverged(
                f"the loss is {row['loss']:.4g}, more than trainer.max_loss_growth={self.trainer.max_growth:g} times "
                f"the first step's {self.first:.4g},",
                state.global_step,
            )
        state.log_history.append({"step": state.global_step, **row})
        self.on_step(state.global_step, state.max_steps)
        due = self.minutes is not None and time.monotonic() - self.saved >= 60 * self.minutes
        if args.world_size > 1:  # every device must agree
            flag = [due]
            torch.distributed.broadcast_object_list(flag, src=0)
            due = flag[0]
        if due and state.global_step < state.max_steps:
            control.should_save = True
            self.saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The Trainer's own row comes behind ours: what we don't have is taken over, the rest dropped."""
        if not logs or "grad_norm" not in logs:
            return
        if not isfinite(logs["grad_norm"]):  # no loss will show it if this was the last step
            raise self.trainer.diverged("the gradient is not finite", state.global_step)
        for row in reversed(state.log_history):
            if row["step"] == state.global_step and "epoch" not in row:
                row |= {name: float(logs[name]) for name in ("grad_norm", "learning_rate")}
                break
        state.log_history[:] = [row for row in state.log_history if "epoch" not in row]


@dataclass(frozen=True)
class Trained:
    """What `train` gives back: a row of metrics for each optimiser step, and how fast it went (never reproducible)."""

    steps: list[dict[str, float]]
    timing: dict[str, float]
    trainer: Trainer
    settings: Optimiser


def train(
    model: Any,
    objective: Objective,
    examples: Sequence[Mapping[str, Any]],
    settings: Optimiser,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    pad_id: int,
    bf16: bool,
    device: str,
    folder: Path,
    on_step: Callable[[int, int], None],
) -> Trained:
    """Trains in place; goes on from the last checkpoint in `folder` if there is one.

    Args:
        model: a causal language model, not yet prepared.
        examples: dicts with 'pair' (EncodedPair) and, where the objective needs it, 'reference' (name ->
            log-probability).
        folder: where checkpoints are kept until the stage is done; the same for a run and its resumption.
        on_step: called with (step, steps) after each optimiser step.

    Raises:
        ValueError: the batch doesn't divide over the devices; or the model can't be run in this layout.
        Diverged: the loss is not finite or has grown out of bounds; names the step, the prompts and the checkpoint.
    """
    if settings.sharding == "fsdp" and device == "cpu":
        raise ValueError("trainer.sharding=fsdp: needs GPUs; take trainer.sharding=none, which runs on CPUs too")
    if settings.sharding != "none":  # whose checkpoints nothing else can read
        folder = folder / f"{settings.sharding}-{settings.devices}"
    for module in model.modules():  # as in TRL: a policy with dropout is not its own reference
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    set_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one micro-batch, of trainer.micro_batch pairs
        num_train_epochs=1,  # `order` has them all
        learning_rate=learning_rate,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device == "cpu",
        seed=seed,
        logging_steps=1,
        save_strategy="no",  # `_Steps` asks for checkpoints
        save_total_limit=2,  # the last may be half written
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **SHARDING[settings.sharding],
    )
    one_device(arguments)
    devices = arguments.world_size
    arguments.gradient_accumulation_steps = accumulation("trainer", settings.batch_size, settings.micro_batch, devices)
    steps = order(len(examples), epochs, settings.batch_size, seed)
    arguments.warmup_steps = round(settings.warmup * len(steps))
    if settings.sharding == "none":
        longest = max(examples, key=lambda example: max(len(s.ids) for s in example["pair"].sequences.values()))
        pairs.check(model.to(arguments.device), [list(longest["pair"].sequences.values())], settings.layout, pad_id)
    pairs.prepare(model, settings.layout, bf16)
    if settings.lora is not None:
        model = with_adapters(model, settings.lora)
    use_cache = model.config.use_cache
    callback = _Steps(settings.checkpoint_minutes, on_step)
    trainer = PairTrainer(
        objective,
        settings.layout,
        pad_id,
        tolerance=0.05 if bf16 else 1e-3,
        max_growth=settings.max_loss_growth,
        model=model,
        args=arguments,
        train_dataset=_micro_batches(objective, examples, steps, arguments, settings),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    if arguments.should_save:  # what was half written would push whole ones out as newer ones come
        _drop_broken(folder)
    trainer.accelerator.wait_for_everyone()
    before = [last_checkpoint(folder)]
    if devices > 1:  # what one machine has just written, another may not see yet, and all must begin at the same step
        torch.distributed.broadcast_object_list(before, src=0)
    trainer.train(resume_from_checkpoint=None if before[0] is None else str(before[0]))
    model.config.use_cache = use_cache  # which the Trainer turns off, for whoever loads what is saved too
    seconds = time.monotonic() - started
    timing = {
        "train_seconds": seconds,
        "tokens_per_second": devices * trainer.real_tokens / seconds,
        "padding_share": 1 - trainer.real_tokens / trainer.run_tokens if settings.layout == "padded" else 0.0,
        "shared_share": 1 - trainer.run_tokens / trainer.real_tokens if settings.layout == "shared" else 0.0,
    }
    # The state that a checkpoint holds has its names sorted; so do all rows, or a resumed run's would differ.
    rows = [{"step": row["step"], **dict(sorted(row.items()))} for row in trainer.state.log_history if "loss" in row]
    return Trained(rows, timing, trainer, settings)


def _micro_batches(
    objective: Objective,
    examples: Sequence[Mapping[str, Any]],
    steps: Sequence[Sequence[int]],
    arguments: TrainingArguments,
    settings: Optimiser,
) -> list[dict[str, Any]]:
    """The run as the Trainer's data set. A device that has nothing to do in a step's rest runs a pair of weight 0."""
    rounds, devices = arguments.gradient_accumulation_steps, arguments.world_size
    found = []
    for step in steps:
        items = objective.items(pairs.answer_tokens([examples[index]["pair"] for index in step]))
        for group in deal(step, rounds, devices):
            chosen = [examples[index] for index in group or step[:1]]
            found.append({"examples": chosen, "items": items, "weight": 1.0 if group else 0.0})
    return found


def one_device(arguments: TrainingArguments) -> None:
    """Keeps the Trainer from splitting batches over all GPUs that it sees (DataParallel): a process has one device."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def with_adapters(model: Any, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
        ),
    )


def whole(trained: Trained, load: Callable[[], Any]) -> Any | None:
    """The trained model in one piece, adapters merged; None on every device but the first. All have to call it.

    Args:
        load: loads the model that training started from; called where no device holds all of it.
    """
    trainer, settings = trained.trainer, trained.settings
    model: Any = trainer.model
    state = None if settings.sharding == "none" else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return None
    if state is not None:
        unset_hf_deepspeed_config()  # or what is loaded would be sharded too, by this one process of many
        model = load() if settings.lora is None else with_adapters(load(), settings.lora)
        lacking = set(model.load_state_dict(state, strict=False).missing_keys)
        if lacking - set(model.all_tied_weights_keys):
            raise RuntimeError(f"the sharded model gave no {sorted(lacking)[0]}")
        model.tie_weights()
    return model if settings.lora is None else model.merge_and_unload()


def save(model: Any, tokenizer: Any, out: Path, dtype: str) -> None:
    """Weights as safetensors in the hub's layout, with tokenizer and chat template, so that any tool can load them."""
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)
