"""What generates: the settings of engine, and of a judge's engine."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from evolve.config.section import RUNTIME, Count, Positive, Rate, Section

# In a command: an option or a variable that holds a key (--api-key, HF_TOKEN=), a header, or a key by its form.
SECRET = re.compile(
    r"(?<![\w/-])-{0,2}(?:[^\W_]+[-_])*(?:api[-_]?key|token|secret|password)(?=[\s=:'\"]|$)"
    r"|authorization|bearer(?=\s)|(?<!\w)(?:sk-|hf_)(?=\w)",
    re.IGNORECASE,
)


class HF(Section):
    """transformers' generate."""

    name: Literal["hf"]
    batch_size: Annotated[Positive, RUNTIME]
    max_length: Positive | None = None
    processes: Annotated[Positive, RUNTIME] = 1
    retries: Annotated[Count, RUNTIME] = 1
    memory_share: Annotated[float, Field(gt=0, le=1), RUNTIME] = 0.9

    @property
    def gpus(self) -> int:
        """How many GPUs it uses, where there are some."""
        return self.processes

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run)."""
        return {"processes": self.processes, "retries": self.retries}


class VLLM(Section):
    """vLLM, in a process of its own."""

    name: Literal["vllm"]
    batch_size: Annotated[Positive, RUNTIME]
    max_length: Positive | None = None
    quantization: str | None = None
    tensor_parallel: Annotated[Positive, RUNTIME] = 1
    processes: Annotated[Positive, RUNTIME] = 1
    retries: Annotated[Count, RUNTIME] = 1
    memory_share: Annotated[float, Field(gt=0, le=1), RUNTIME] = 0.9

    @property
    def gpus(self) -> int:
        """How many GPUs it uses."""
        return self.processes * self.tensor_parallel

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run)."""
        return {
            "apart": True,
            "processes": self.processes,
            "devices": self.tensor_parallel,
            "retries": self.retries,
        }


class Server(Section):
    """Any server that speaks OpenAI's protocol: one that runs, or one that is started for each stage's model."""

    name: Literal["openai"]
    url: Annotated[str | None, RUNTIME]
    serve: str | None
    model: str | None
    endpoint: Literal["completions", "chat"]
    key: Annotated[str, RUNTIME]
    max_length: Positive | None = None
    batch_size: Annotated[Positive, RUNTIME]
    timeout: Annotated[Rate, RUNTIME]
    retries: Annotated[Count, RUNTIME]

    @property
    def gpus(self) -> int:
        """How many GPUs it uses on the machine that asks: a server that is started there is taken to use one."""
        return int(self.serve is not None)

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run): the server has its own."""
        return {}

    @model_validator(mode="after")
    def _has_a_server(self) -> Server:
        check_server("engine", self.url, self.serve, self.key)
        return self


def check_server(section: str, url: str | None, serve: str | None, key: str) -> None:
    """Raises ValueError unless exactly one of an address and a command is given, and either makes sense."""
    if (url is None) == (serve is None):
        raise ValueError(
            f"{section}.url, {section}.serve: {'neither' if url is None else 'each'} is set; set one: the url of a "
            "server that runs, or a command that starts one, with {model} and {port} in it"
        )
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{section}.url={url}: no such address; one is http://localhost:8000/v1")
        if parts.username is not None or parts.query:  # they would stand in logs and records
            raise ValueError(f"{section}.url: holds more than an address; a key is in the variable {section}.key names")
    else:
        assert serve is not None
        if found := SECRET.search(serve):  # the command itself isn't shown: it holds the key
            raise ValueError(
                f"{section}.serve: looks as if it held a key ({found[0]}), which records and logs would show; give it "
                f"to the server in an environment variable (vLLM reads VLLM_API_KEY), and name that in {section}.key"
            )
        try:
            words = shlex.split(serve)
        except ValueError as error:
            raise ValueError(f"{section}.serve={serve}: {str(error).lower()}") from None
        for field in ("{model}", "{port}"):
            if not any(field in word for word in words):
                raise ValueError(f"{section}.serve={serve}: doesn't say where {field} goes")
    if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):  # its value isn't shown: it may be a key
        raise ValueError(f"{section}.key: not the name of an environment variable; the key itself is that one's value")


Engine = Annotated[HF | VLLM | Server, Field(discriminator="name")]
