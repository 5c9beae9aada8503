"""A stage in several processes: gloo on the CPU, the same code that NCCL runs on GPUs."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.training import optimiser
from evolve import ranks
from evolve.config import PreferenceWeights, SFTWeights, Template
from evolve.stages import Context, ModelSettings, module, read_rows, stage, write_rows

pytestmark = pytest.mark.slow  # each process imports torch and transformers for itself

ROWS = [
    {"id": f"r{n}", "prompt": "0 1 2 3 " + "1 " * n, "chosen": f"{n % 4} 1 2", "rejected": f"3 {n % 3}"}
    for n in range(11)
]


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """A model, pairs, and the reference log-probabilities of both kinds of context."""
    root = tmp_path_factory.mktemp("inputs")
    pairs = root / "pairs"
    pairs.mkdir()
    write_rows(pairs / "rows.jsonl", ROWS)
    found = {"model": Path(tiny), "pairs_1": pairs}
    for contexts in ("direct", "refine"):
        out = root / contexts
        out.mkdir()
        made = stage("reference", {}, contexts=contexts, micro_batch=4, layout="shared", **common())
        module("reference").run(made.config, {"model": Path(tiny), "pairs": pairs}, out, here(root))
        found[f"reference_{contexts}_1"] = out
    return found


def common():
    template = Template(name="t", text="0 {prompt} 1 {response} 2", separator=" ", path=None)
    read = ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False)
    return {"model": read, "template": template, "max_length": 128, "max_dropped": 0.0}


def here(partial):
    return Context("cpu", lambda done, total: None, partial / "partial")


def training(kind="train", **changes):
    loss = {
        "train": {
            "loss": PreferenceWeights(
                direct="dpo", lengths="sum", gamma=None, alpha=0.8, beta_direct=0.1, beta_refine=0.1,
                refine_contexts="both", refine_scale=1.0, nll=0.0,
            ),
            "starts_at_reference": True,
        },
        "activate": {"loss": SFTWeights(direct=1.0, refine=1.0)},
    }[kind]  # fmt: skip
    # A batch of 8, so that the last step of an epoch has 3 pairs for 2 processes of up to 2 pairs.
    minimiser = optimiser(batch_size=8, micro_batch=2, schedule="linear", **changes)
    settings = {"checkpoint_dtype": "float32", "epochs": 2, "learning_rate": 1e-4, "seed": 0, **common(), **loss}
    return stage(kind, {}, **settings, optimiser=minimiser)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


SHARDING = ["none", "deepspeed"]  # FSDP needs GPUs


@pytest.mark.parametrize("sharding", SHARDING)
def test_two_processes_train_as_one(inputs, tmp_path, sharding):
    if sharding == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    alone = training()
    module("train").run(alone.config, inputs, one, here(tmp_path))
    shown = []
    context = Context("cpu", lambda *now: shown.append(now), tmp_path / "partial two")
    report = ranks.run(training(devices=2, sharding=sharding), inputs, two, context, 2)
    expected, found = read_rows(one / "steps.jsonl"), read_rows(two / "steps.jsonl")
    assert len(expected) == len(found) == report.values["steps"] == 4
    for row, other in zip(expected, found, strict=True):
        # An accuracy is which of two is larger: a coin's throw at the first step, where both are 0.
        assert {name: value for name, value in row.items() if "accuracy" not in name} == pytest.approx(
            {name: value for name, value in other.items() if "accuracy" not in name}, abs=1e-5, rel=1e-5
        )
    before, after = weights(one), weights(two)
    assert before.keys() == after.keys()
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-5
    start = weights(inputs["model"])
    assert max((start[name] - after[name]).abs().max().item() for name in start) > 1e-4  # something was learnt
    assert shown[-1] == (4, 4)
    assert (two / "config.json").read_text() == (one / "config.json").read_text()


def test_fsdp_is_refused_on_a_cpu(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"^trainer\.sharding=fsdp: needs GPUs"):
        ranks.run(training(devices=2, sharding="fsdp"), inputs, tmp_path, here(tmp_path), 2)


def test_adapters_train_on_two_processes_as_on_one(inputs, tmp_path):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    module("train").run(training(lora=lora).config, inputs, one, here(tmp_path))
    ranks.run(training(lora=lora, devices=2), inputs, two, here(two), 2)
    before, after = weights(one), weights(two)
    assert before.keys() == after.keys() == weights(inputs["model"]).keys()
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-5


def test_a_process_that_is_killed_is_not_mistaken_for_the_one_that_complains(inputs, tmp_path):
    endless = training("activate", devices=2)
    endless = stage("activate", {}, **{**endless.config.model_dump(), "epochs": 100000})

    def kill_one(done, total):
        workers = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if {"evolve.processes", "-u"} <= set(process.cmdline()):
                    workers.append(process)
        if workers:
            workers[-1].kill()

    context = Context("cpu", kill_one, tmp_path / "partial")
    given = {"model": inputs["model"], "pairs": inputs["pairs_1"]}
    with pytest.raises(RuntimeError, match=r"^one of 2 processes: it ended with no error of its own"):
        ranks.run(endless, given, tmp_path, context, 2)


def test_an_error_in_a_process_is_the_stages(inputs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    broken = training("activate", devices=2)
    broken = stage("activate", {}, **{**broken.config.model_dump(), "max_length": 6})
    with pytest.raises(ValueError, match=r"^11 of 11 pairs are longer than data\.max_length=6 tokens"):
        ranks.run(broken, {"model": inputs["model"], "pairs": inputs["pairs_1"]}, out, here(tmp_path), 2)


def test_processes_end_with_the_one_that_started_them(inputs, tmp_path):
    """However it ends: kill -9 of a worker must leave nobody who holds a GPU."""
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import pickle, sys; from evolve import ranks;"
        "stage, inputs, out, context = pickle.loads(open(sys.argv[1], 'rb').read());"
        "ranks.run(stage, inputs, out, context, 2)"
    )
    endless = training("activate", devices=2)
    endless = stage("activate", {}, **{**endless.config.model_dump(), "epochs": 100000})
    import pickle

    job = tmp_path / "job"
    given = {"model": inputs["model"], "pairs": inputs["pairs_1"]}
    job.write_bytes(pickle.dumps((endless, given, out, Context("cpu", print, tmp_path / "partial"))))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    starter = subprocess.Popen([sys.executable, "-c", program, str(job)], env=environment, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert json.loads("[" + starter.stdout.readline().decode().strip().replace(" ", ",") + "]")[0] >= 1  # it trains
    family = psutil.Process(starter.pid).children(recursive=True)
    assert len(family) >= 3  # torchrun and two processes
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < deadline, family
        time.sleep(0.2)


def test_a_prepared_model_is_sharded_by_fsdp2_as_it_is(tiny, template, tmp_path):
    """transformers' Trainer shards on GPUs alone; what it calls there runs on a CPU too, with one process."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from evolve import pairs, templates

    tokenizer = templates.load_tokenizer(tiny, None, False)
    encoded = pairs.encode(tokenizer, template, ROWS, 128, 0.0)[0]
    batch = pairs.batch([list(pair.sequences.values()) for pair in encoded], "shared", 0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for bf16 in (False, True):
            plain, sharded = (
                pairs.prepare(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), "shared", bf16)
                for _ in range(2)
            )
            for layer in sharded.model.layers:
                fully_shard(layer)
            fully_shard(sharded)
            expected, found = pairs.log_probabilities(plain, batch), pairs.log_probabilities(sharded, batch)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            expected.sum().backward()
            found.sum().backward()
            for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
                gradient = other.grad.full_tensor()
                torch.testing.assert_close(gradient, one.grad, rtol=1e-4, atol=1e-4, msg=name)
    finally:
        torch.distributed.destroy_process_group()
