"""What is measured and who judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evolve.config.engines import Engine, check_server
from evolve.config.method import Stop, Strategy
from evolve.config.section import HERE, RUNTIME, Count, Positive, Rate, Section, Seed, Weight, check_fields, text_of


class NoJudge(Section):
    name: Annotated[str, RUNTIME]
    mode: Literal["none"]


class JudgePrompt(Section):
    name: Annotated[str, RUNTIME]
    text: str
    path: Annotated[str | None, RUNTIME]  # its content replaces `text`, which is what counts

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, values: Any) -> Any:
        return text_of("judge.prompt", values)


class Judge(Section):
    """A language model that scores answers. `model` and `revision` are no identity: the model itself is an input."""

    name: Annotated[str, RUNTIME]
    mode: Literal["graded", "pairwise"]
    model: Annotated[str | None, RUNTIME]
    revision: Annotated[str | None, RUNTIME]
    engine: Engine
    prompt: JudgePrompt
    highest: Rate | None
    samples: Positive
    temperature: Weight
    max_new_tokens: Positive
    max_length: Positive

    @model_validator(mode="after")
    def _agrees(self) -> Judge:
        fields = {"graded": ("{prompt}", "{response}"), "pairwise": ("{prompt}", "{first}", "{second}")}[self.mode]
        check_fields("judge.prompt", self.prompt.name, self.prompt.path, self.prompt.text, fields)
        if self.mode == "graded" and self.highest is None:
            raise ValueError("judge.highest=null: judge.mode=graded needs the highest grade that the prompt names")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"judge.samples={self.samples}: all would be the same at judge.temperature=0; set 1")
        if self.model is not None and self.engine.name == "openai" and self.engine.url:
            raise ValueError(
                f"judge.model={self.model}: a server that runs has a model of its own; set judge.model=null, or "
                "judge.engine.serve in place of judge.engine.url"
            )
        if self.model is None and not (self.engine.name == "openai" and self.engine.url):
            raise ValueError(
                "judge.model=null: only a server that runs has a model of its own (engine@judge.engine=openai "
                "judge.engine.url=...); set judge.model to `policy`, a folder or a hub id"
            )
        return self


class Price(Section):
    """Dollars for a million tokens."""

    input: Weight
    output: Weight


class Endpoint(Section):
    """A judge of benchmarks: where it is, which model it is, and what it may cost.

    logprobs: whether the server says how probable its tokens were, which weighted verdicts are read from.
    attempts: how often a verdict is asked for, each time with another seed, until one can be read.
    max_dollars: the most that this model may cost, over all that was ever asked under one `output`.
    """

    kind: Literal["server"] = "server"
    name: Annotated[str | None, RUNTIME]
    model: str
    url: Annotated[str | None, RUNTIME]
    serve: str | None
    path: Annotated[str | None, RUNTIME] = None  # of the model that is served, which is an input
    revision: Annotated[str | None, RUNTIME] = None
    key: Annotated[str, RUNTIME]
    logprobs: bool
    attempts: Positive = 2
    concurrency: Annotated[Positive, RUNTIME]
    timeout: Annotated[Rate, RUNTIME]
    retries: Annotated[Count, RUNTIME]
    price: Annotated[Price | None, RUNTIME] = None
    max_dollars: Annotated[Rate | None, RUNTIME] = None

    @property
    def gpus(self) -> int:
        """How many GPUs it uses on the machine that asks: a server that is started there is taken to use one."""
        return int(self.serve is not None)

    @field_validator("model", mode="before")
    @classmethod
    def _is_named(cls, model: Any) -> Any:
        if model is None:
            raise ValueError(f"{HERE}: not set; what the endpoint calls the judge, which is part of every number")
        return model

    @model_validator(mode="after")
    def _has_a_server(self) -> Endpoint:
        check_server(HERE, self.url, self.serve, self.key)
        if self.max_dollars is not None and not (self.price and (self.price.input or self.price.output)):
            raise ValueError(
                f"{HERE}.max_dollars={self.max_dollars:g}: needs {HERE}.price, the dollars for a million tokens"
            )
        return self


class StandIn(Section):
    """A scorer in a judge's place: it prefers the answer that it scores higher."""

    kind: Literal["scorer"]
    scorer: Literal["auto", "verifier", "reward_model"]


class Questions(Section):
    """What benchmarks with questions of their own have in common: how many are asked, and how answers are made.

    pick: which of the answers that eval.test_time makes to a question count too: the best by eval.select, the majority.
    """

    limit: Positive | None
    temperature: Weight
    max_new_tokens: Positive | None
    pick: tuple[Literal["best", "majority"], ...] = ()


class AlpacaEval(Questions):
    path: str
    revision: str | None
    evaluator: str
    length_control: bool
    difficulty: str | None
    gamed: str | None


class ArenaHard(Questions):
    path: str
    baseline: str
    revision: str | None
    version: Literal["v0.1", "v2.0"]
    prompt_file: str | None


class Harness(Questions):
    """Tasks of lm-eval."""

    shots: Count | None
    chat: bool
    data: dict[str, str | None]
    unsafe_code: bool = False


class Eval(Section):
    benchmarks: tuple[str, ...]
    turns: Annotated[int, Field(ge=1, le=64)]
    temperature: Weight
    seed: Seed
    scorer: Literal["auto", "verifier", "reward_model", "judge"]
    stop: Stop | None = None
    test_time: Strategy | None = None
    select: Literal["verifier", "reward_model"] = "reward_model"
    judged: Literal["ends", "all"] = "ends"
    alpaca_eval: AlpacaEval
    arena_hard: ArenaHard
    harness: Harness
