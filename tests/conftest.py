"""What several files of tests share: no network, the same examples on every run, a template, and a tiny model."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import yaml
from hypothesis import HealthCheck, settings

from evolve.config import CONF, ROOT, Template

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    # Fixtures here are read-only, so that examples can share them.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The base model that comes with the project."""
    return ROOT / "evolve" / "embedded"


@pytest.fixture(scope="session")
def template() -> Template:
    return Template(**yaml.safe_load((CONF / "template" / "rewrite.yaml").read_text()))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama with the world's tokenizer; its large weights make every answer's probabilities far from equal."""
    return random_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """The same with wider heads, the smallest that vLLM runs on a CPU."""
    return random_llama(tmp_path_factory.mktemp("wide"), head_dim=32)


def random_llama(folder: Path, **settings) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evolve import world

    tokenizer = world.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def drain(engine, requests) -> dict:
    """All that an engine makes of the requests, by key."""
    engine.submit(requests)
    found = {}
    while done := engine.poll():
        found |= {completion.key: completion for completion in done}
    assert engine.poll() == []
    return found


@pytest.fixture
def respond(template, tmp_path):
    """Runs the stage `respond`: rows of answers.jsonl, and the report. Again under the same name, it goes on."""
    from evolve.config import Sampling, Strategy
    from evolve.stages import Context, ModelSettings, module, read_rows, stage, write_rows

    greedy = Sampling(temperature=0, top_k=0, top_p=1)

    def respond(
        engine, model, prompts, *, name=None, sampling=greedy, answers=3, new=12, length=200, limit=100, until=()
    ):
        out = tmp_path / (name or f"{len(list(tmp_path.iterdir()))}")
        (out / "prompts").mkdir(parents=True, exist_ok=True)
        write_rows(out / "prompts" / "rows.jsonl", ({"id": str(n), "prompt": text} for n, text in enumerate(prompts)))
        config = stage(
            "respond",
            {},
            model=ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False),
            engine=engine,
            strategy=Strategy(name="chain", answers=answers, branching=None, expand=None),
            template=template,
            sampling=sampling,
            scorer=None,
            max_prompt_tokens=limit,
            max_new_tokens=new,
            max_length=length,
            seed=0,
            until=until,
        ).config
        context = Context("cpu", lambda done, total: None, out / "partial")
        report = module("respond").run(config, {"model": model, "prompts": out / "prompts"}, out, context)
        return read_rows(out / "answers.jsonl"), report

    return respond


def load(*overrides: str):
    """The configuration that these overrides compose, without a site's own settings."""
    import hydra

    from evolve import config

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return config.load(hydra.compose("config", overrides=["~local", *overrides]))


def sweep_here(members: list[list[str]]):
    """Runs the members' sweep in this process, which keeps its environment."""
    from evolve import launch

    before = dict(os.environ)
    try:
        return launch.sweep([load(*words) for words in members], members, inline=True)
    finally:
        os.environ.clear()
        os.environ.update(before)
