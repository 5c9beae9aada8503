"""The method's settings: model, data, strategy, template, losses, filter, loop, training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from evolve.config.section import (
    HERE,
    RUNTIME,
    Count,
    Positive,
    Rate,
    Section,
    Seed,
    Share,
    Weight,
    check_fields,
    text_of,
)

Stop = Literal["unchanged", "score_drop"]
DirectLoss = Literal["dpo", "ipo", "simpo", "sppo", "srpo"]


class DirectTerm(NamedTuple):
    """What an L_direct (losses.py) is a function of, beside both answers' own log-probabilities.

    refines: log-probabilities of refinements. settings: of PreferenceWeights. relative: to a reference model's.
    """

    refines: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("beta_direct",)
    relative: bool = True


DIRECT_TERMS: dict[str, DirectTerm] = {
    "dpo": DirectTerm(),
    "ipo": DirectTerm(),
    "simpo": DirectTerm(settings=("beta_direct", "gamma"), relative=False),
    "sppo": DirectTerm(),
    "srpo": DirectTerm(refines=("rejected_chosen", "chosen_rejected")),
}


def accumulation(section: str, batch_size: int, micro_batch: int, devices: int = 1) -> int:
    """How many micro-batches each device runs for a step. Raises ValueError where the batch doesn't divide."""
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        fits = " or ".join(str(n) for n in sorted({below, above} - {0}))
        raise ValueError(
            f"{section}.batch_size={batch_size}: doesn't divide over {section}.devices={devices}; {fits} would"
        )
    each = batch_size // devices
    micro = min(micro_batch, each)
    if each % micro:
        fits = ", ".join(str(n) for n in range(1, each + 1) if each % n == 0)
        over = f" over {section}.devices={devices}" if devices > 1 else ""
        raise ValueError(
            f"{section}.micro_batch={micro_batch}: doesn't divide {section}.batch_size={batch_size}{over}; "
            f"these do: {fits}"
        )
    return each // micro


class LearningRates(Section):
    sft: Rate
    pt: Rate
    reward_model: Rate


class Model(Section):
    name: str
    path: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    checkpoint_dtype: Literal["float32", "bfloat16"]
    chat_template: str | None
    trust_remote_code: bool
    beta: Rate
    learning_rate: LearningRates


class Data(Section):
    name: str
    path: str
    revision: str | None
    split: str
    eval_path: str | None
    eval_split: str | None
    verifier: Literal["ledger", "math", "number", "exact"] | None
    prompt: str = "prompt"
    gold: str | None = None
    seed: Seed
    eval_prompts: Positive
    sft_pairs: Count
    offline_pairs: Count
    prompts: Positive
    reward_model_pairs: Count
    max_characters: Positive | None
    max_prompt_tokens: Positive
    max_response_tokens: Positive
    max_length: Positive


class Strategy(Section):
    name: Literal["parallel", "chain", "tree", "few_shot"]
    answers: Annotated[int, Field(ge=1, le=64)]
    branching: Positive | None
    expand: Literal["best", "every"] | None
    depth: Positive | None = None
    chains: Positive = 1
    stop: Stop | None = None

    @property
    def refines(self) -> bool:
        """Whether some of its answers are made from others, by the template."""
        return self.name != "parallel"

    @model_validator(mode="before")
    @classmethod
    def _only_what_counts(cls, values: Any) -> Any:
        """A setting that only trees or chains have is no part of another strategy: it can't make its answers new."""
        if isinstance(values, dict) and values.get("name") != "tree":
            values = {**values, "branching": None, "expand": None, "depth": None}
        if isinstance(values, dict) and values.get("name") != "chain":
            values = {**values, "chains": 1, "stop": None}
        return values

    @model_validator(mode="after")
    def _gives_its_answers(self) -> Strategy:
        answers, branching = f"{HERE}.answers={self.answers}", self.branching or 1
        if self.answers % self.chains:
            fits = ", ".join(str(n) for n in range(1, self.answers + 1) if self.answers % n == 0)
            raise ValueError(f"{HERE}.chains={self.chains}: doesn't divide {answers}; these do: {fits}")
        if self.depth is not None:
            most = sum(branching**level for level in range(self.depth + 1))
            if most < self.answers:
                raise ValueError(
                    f"{HERE}.depth={self.depth}: gives at most {most} answers with {HERE}.branching={branching}, and "
                    f"{answers}; raise one of the first two"
                )
        return self


class Sampling(Section):
    temperature: Weight
    top_k: Count
    top_p: Annotated[float, Field(gt=0, le=1)]


class Template(Section):
    name: Annotated[str, RUNTIME]
    text: str
    separator: str
    path: Annotated[str | None, RUNTIME]  # its content replaces `text`, which is what counts

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, values: Any) -> Any:
        return text_of("template", values)

    @model_validator(mode="after")
    def _has_fields(self) -> Template:
        check_fields("template", self.name, self.path, self.text, ("{prompt}", "{response}"))
        return self


class SFTWeights(Section):
    """L_SFT's terms."""

    direct: float
    refine: float


class PreferenceWeights(Section):
    """L = (1 - alpha) L_direct + alpha L_refine + nll L_NLL; None stands where a weight of 0 makes a setting idle."""

    alpha: float
    direct: DirectLoss | None = "dpo"
    lengths: Literal["sum", "mean"] | None = "sum"
    gamma: float | None = None
    beta_direct: float | None
    beta_refine: float | None
    refine_contexts: Literal["both", "rejected"] | None
    refine_scale: float | None
    nll: float

    @property
    def reference_contexts(self) -> tuple[str, ...]:
        """Where log-probabilities under the reference model are needed: of direct answers, of refinements, or both."""
        term = DIRECT_TERMS[self.direct] if self.direct else DirectTerm(relative=False)
        return ("direct",) * term.relative + ("refine",) * (self.alpha > 0 or bool(term.refines))


class Lora(Section):
    """Low-rank adapters (PEFT), merged into the weights that a stage saves."""

    rank: Positive
    alpha: Positive
    dropout: float
    targets: str

    @field_validator("dropout")
    @classmethod
    def _is_none(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"{HERE}={dropout:g}: which inputs are dropped would go by micro-batches, layout and "
                "devices, and no result may; set it to 0"
            )
        return dropout


class PolicyGradient(Section):
    """Policy gradient on scores of the policy's own answers, in the terms of TRL's GRPOTrainer."""

    loss_type: Literal["grpo", "dapo", "dr_grpo"]  # TRL's bnpo goes by the micro-batch, which no result may
    importance: Literal["token", "sequence"]
    clip_low: Weight
    clip_high: Weight
    kl: Weight
    updates: Positive
    scale_rewards: Literal["group", "batch", "none"]
    lora: Lora | None = None


class Loss(Section):
    name: str
    sft_direct: Weight
    sft_refine: Weight
    pt: Literal["pairs", "rewards", "none"]
    direct: DirectLoss
    lengths: Literal["sum", "mean"]
    gamma: Weight
    alpha: Share
    beta_direct: Rate
    beta_refine: Rate
    refine_contexts: Literal["both", "rejected"]
    refine_scale: Rate
    nll: Weight
    policy_gradient: PolicyGradient | None

    @model_validator(mode="after")
    def _has_policy_gradient(self) -> Loss:
        if self.pt == "rewards" and self.policy_gradient is None:
            raise ValueError(
                "loss.pt=rewards: loss.policy_gradient is null; take loss=grpo, loss=dapo or loss=gspo, which set it"
            )
        return self

    @property
    def sft(self) -> SFTWeights | None:
        """What activation minimises; None: there is none."""
        if self.sft_direct == self.sft_refine == 0:
            return None
        return SFTWeights(direct=self.sft_direct, refine=self.sft_refine)

    @property
    def preference(self) -> PreferenceWeights | None:
        """What preference training on pairs minimises; None: there is none."""
        if self.pt != "pairs":
            return None
        directs, refines = self.alpha < 1, self.alpha > 0
        return PreferenceWeights(
            alpha=self.alpha,
            direct=self.direct if directs else None,
            lengths=self.lengths if directs else None,
            gamma=self.gamma if directs and "gamma" in DIRECT_TERMS[self.direct].settings else None,
            beta_direct=self.beta_direct if directs else None,
            beta_refine=self.beta_refine if refines else None,
            refine_contexts=self.refine_contexts if refines else None,
            refine_scale=self.refine_scale if refines else None,
            nll=self.nll,
        )

    @property
    def rewards(self) -> PolicyGradient | None:
        """What training on scores of own answers goes by; None: there is none."""
        return self.policy_gradient if self.pt == "rewards" else None


class Filter(Section):
    name: Annotated[str, RUNTIME]
    scorer: Literal["reward_model", "verifier", "judge", "none"]
    select: Literal["best_worst", "last_first", "best_random", "all"]
    margin: Weight
    unfinished: Literal["drop", "keep"]

    @property
    def compares(self) -> bool:
        """Whether it goes by scores."""
        return self.select != "last_first"

    @property
    def draws(self) -> bool:
        """Whether it takes a seed."""
        return self.select == "best_random"

    @property
    def several(self) -> bool:
        """Whether a prompt may give more than one pair."""
        return self.select == "all"


class RewardModel(Section):
    path: str | None
    revision: str | None
    epochs: Positive
    batch_size: Positive
    micro_batch: Annotated[Positive, RUNTIME]
    dtype: Literal["float32", "bfloat16"] | None = None
    trust_remote_code: bool = False
    engine: Literal["hf", "vllm"] = "hf"
    processes: Annotated[Positive, RUNTIME] = 1
    memory_share: Annotated[float, Field(gt=0, le=1), RUNTIME] = 0.9

    @model_validator(mode="after")
    def _divides(self) -> RewardModel:
        accumulation("reward_model", self.batch_size, self.micro_batch)
        return self


class Iteration(Section):
    count: Count
    reference: Literal["previous", "initial", "post_sft"]
    start: Literal["previous", "initial", "post_sft"]
    data: Literal["this", "all"]


class Epochs(Section):
    sft: Positive
    pt: Positive


class Optimiser(Section):
    """How a loss is minimised; AdamW's own settings are torch's."""

    batch_size: Positive
    micro_batch: Annotated[Positive, RUNTIME]
    schedule: Literal["linear", "cosine", "constant"]
    warmup: Share
    weight_decay: Weight
    max_grad_norm: Rate
    lora: Lora | None = None
    gradient_checkpointing: Annotated[bool, RUNTIME]
    layout: Annotated[Literal["shared", "packed", "padded"], RUNTIME]
    devices: Annotated[Positive, RUNTIME]
    sharding: Annotated[Literal["none", "fsdp", "deepspeed"], RUNTIME]
    checkpoint_minutes: Annotated[float | None, Field(ge=0), RUNTIME]
    max_loss_growth: Annotated[float, Field(gt=1), RUNTIME]


class Trainer(Optimiser):
    epochs: Epochs
    max_dropped: Share

    @property
    def optimiser(self) -> Optimiser:
        return Optimiser(**{name: getattr(self, name) for name in Optimiser.model_fields})

    @model_validator(mode="after")
    def _divides(self) -> Trainer:
        accumulation("trainer", self.batch_size, self.micro_batch, self.devices)
        if self.sharding != "none" and self.devices == 1:
            raise ValueError(f"trainer.sharding={self.sharding}: needs trainer.devices above 1")
        return self
