"""Models of a small sweep, published to folders and to a server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils.sha import git_hash
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from evolve import config, launch, publish
from evolve.config import CONF, ROOT, ConfigError
from evolve.store import Store, digest, hash_file

SMALL = ["debug=fast", "data.eval_prompts=8", "data.sft_pairs=16", "data.offline_pairs=16", "data.prompts=8"]
SMALL += ["eval.turns=2", "trainer.batch_size=8", "trainer.micro_batch=8"]
TOKEN = "hf_nobodys0123456789"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sweep(folder: Path, *members: list[str]) -> Path:
    """A sweep whose base model is a local folder with a card, run in this process; returns its output."""
    base, out = folder / "someone" / "the-base", folder / "out"
    shutil.copytree(ROOT / "evolve" / "embedded", base)
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nThe base.\n")
    overrides = [[*member, *SMALL, f"model.path={base}", f"output={out}"] for member in members]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [config.load(hydra.compose("config", overrides=["~local", *words])) for words in overrides]
    before = dict(os.environ)
    try:
        launch.sweep(configs, overrides, inline=True)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("publish"), ["loss=sft_only"], ["loss=both"])


@pytest.fixture
def out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sweep's output, as `outputs` of the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "outputs")
    return tmp_path / "outputs"


@pytest.fixture
def ids(made: Path) -> dict[str, str]:
    """Stage ids of the member that trains throughout, by phase; the evaluation's of its last model too."""
    (folder,) = (made / "sweeps").iterdir()
    members = json.loads((folder / "sweep.json").read_text())["members"]
    (steps,) = (member["steps"] for member in members if member["name"] == "loss=both")
    found = {step["phase"]: step["id"] for step in steps if step["kind"] in ("activate", "train")}
    return found | {"evaluate": [step["id"] for step in steps if step["kind"] == "evaluate"][-1]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(out: Path, stage_id: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Gives a stage another record, as whole as the first."""
    path = out / "store" / stage_id / "record.json"
    record = json.loads(path.read_text())
    change(record)
    for name, entry in record["files"].items():
        file = path.parent / name
        entry |= {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    record.pop("checksum")
    path.write_text(json.dumps({**record, "checksum": digest(record)}))


# ---- what is published


def test_loads_as_it_was_with_plain_transformers(out: Path, ids: dict[str, str]) -> None:
    assert publish.main([ids["iteration 1"], "--to", "model"]) == 0
    stored, folder = out / "store" / ids["iteration 1"], Path("model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "2 0 1 3"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"].shape[1] > 4
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(path)(**prompt).logits for path in (folder, stored))
    assert torch.equal(one, other)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(stored).get_vocab()


def test_card(out: Path, ids: dict[str, str]) -> None:
    assert publish.main([ids["iteration 1"], "--to", "model"]) == 0
    card = ModelCard.load("model/README.md")
    assert str(card) == Path("model/README.md").read_text()
    assert (card.data.library_name, card.data.license, card.data.model_name) == ("transformers", "cc-by-4.0", "model")
    assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()  # local: no hub's names
    assert "the-base" in card.text and "cc-by-4.0" in card.text

    metrics = json.loads((out / "store" / ids["evaluate"] / "metrics.json").read_text())
    wanted = {
        f"{name}, {kind}": estimates[metric]
        for metric, name in (("reward", "mean reward"), ("accuracy", "accuracy"))
        for kind, estimates in (
            ("direct", metrics["turns"][0]),
            ("refined", metrics["turns"][1]),
            ("gain", metrics["gain"]),
        )
    }
    told = {result.metric_name: result for result in card.data.eval_results}
    assert told.keys() == wanted.keys()
    for name, estimate in wanted.items():
        assert told[name].metric_value == estimate["value"]
        assert told[name].metric_args["interval_95"] == [estimate["low"], estimate["high"]]
        assert (told[name].metric_args["n"], told[name].metric_args["protocol"]) == (8, metrics["protocol"])
        kind, metric = name.split(", ")[1], name.split(", ")[0]
        interval = f"{estimate['low']:.3f} to {estimate['high']:.3f}"
        assert f"| {kind} | {metric} | {estimate['value']:.3f} | {interval} | 8 |" in card.text
    assert metrics["protocol"] in card.text

    record = Store(out / "store").read(ids["iteration 1"])
    assert record is not None
    rates = ["loss.alpha: 0.8", "| learning_rate: 0.0003 |", "| learning_rate: 0.0002 |"]
    for told_too in (*ids.values(), record["code"]["commit"], record["versions"]["torch"], *rates):
        assert told_too in card.text
    assert ("with uncommitted changes" in card.text) is bool(record["code"]["dirty"])
    assert f"{record['tokens']['trained']} trained | {record['seconds']:.1f}" in card.text


def test_card_without_evaluation_has_no_number(out: Path, ids: dict[str, str], capsys) -> None:
    shutil.rmtree(out / "store" / "evaluate")
    assert publish.main([ids["sft"]]) == 0
    card = ModelCard(capsys.readouterr().out)
    assert card.data.eval_results is None
    assert card.text.split("## Evaluation\n\n")[1].startswith("None in the store.\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["outputs"]  # without --to, the card is only shown


def test_records(out: Path, ids: dict[str, str]) -> None:
    """The identity still hashes to the id, every input is there, every file is what it says."""
    assert publish.main([ids["iteration 1"], "--to", "model"]) == 0
    sheet = json.loads(Path("model/evolve_record.json").read_text())
    chain = {record["id"]: record for record in [*sheet["chain"], sheet]}
    assert sheet["id"] == ids["iteration 1"] and {ids["sft"], ids["offline"]} < chain.keys()
    for stage_id, record in chain.items():
        assert stage_id.split("/")[1] == digest(record["identity"])[:16]
        assert {item for item in record["inputs"].values() if "@" not in item} <= chain.keys()
    assert {name: entry["sha256"] for name, entry in sheet["files"].items()} == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents(Path("model")).items()
        if name not in ("README.md", "evolve_record.json")
    }
    assert [one["id"] for one in sheet["evaluations"]] == [ids["evaluate"]]


def test_nothing_of_the_machine(out: Path, ids: dict[str, str], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what records hold today nor what they may hold one day."""
    for stage_id in Store(out / "store").ids():
        rewrite(out, stage_id, lambda record: record.update(host="node-of-mine-17", device="node-of-mine-17:0"))
    metrics = out / "store" / ids["evaluate"] / "metrics.json"
    content = json.loads(metrics.read_text())
    for key in ("protocol", "judge"):
        content[key] = content[key].replace("ledger", "/srv/node-of-mine-17/judges/strict")
    metrics.write_text(json.dumps(content))
    rewrite(out, ids["evaluate"], lambda record: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish.main([ids["iteration 1"], "--to", "model"]) == 0
    whole = b"\n".join(contents(Path("model")).values())
    private = ["node-of-mine-17", TOKEN, str(made.parent), str(out.parent), str(Path.home()), str(ROOT), "someone/"]
    assert [text for text in private if text.encode() in whole] == []
    assert b"scored by strict" in whole


def test_file_that_names_a_folder_of_the_machine_is_not_published(out: Path, ids: dict[str, str], capsys) -> None:
    file = out / "store" / ids["sft"] / "config.json"
    file.write_text(file.read_text().replace("{", f'{{"_name_or_path": "{out.parent}/x",', 1))
    rewrite(out, ids["sft"], lambda record: None)
    assert publish.main([ids["sft"], "--to", "model"]) == 1
    assert capsys.readouterr().err.startswith("error: config.json names a folder of this machine")
    assert not Path("model").exists()


def test_damaged_model_is_not_published(out: Path, ids: dict[str, str], capsys) -> None:
    weights = out / "store" / ids["sft"] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert publish.main([ids["sft"], "--to", "model"]) == 1
    assert capsys.readouterr().err == f"error: {ids['sft']}: model.safetensors is not what was written\n"
    assert not Path("model").exists()


def test_from_the_hub(out: Path, ids: dict[str, str]) -> None:
    """A base model and data of the hub's are named as the hub does; the licence comes from the base model's card."""
    snapshot = out.parent / "cache" / "models--some--base" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: base\nlicense_link: LICENSE\n---\n")

    def from_hub(record: dict[str, Any]) -> None:
        for name in record["sources"]:
            kind = "model" if name == "model" else "data"
            record["sources"][name] = f"some/{'base' if kind == 'model' else 'rows'}@{COMMIT}"
            record["inputs"][name] = f"{kind}@{COMMIT}"

    for stage_id in Store(out / "store").ids():
        rewrite(out, stage_id, from_hub)
    done = command(out.parent, ids["iteration 1"], "--to", "model", HF_HUB_CACHE=str(out.parent / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    data = ModelCard.load("model/README.md").data
    assert (data.base_model, data.datasets) == ("some/base", ["some/rows"])
    assert (data.license, data.license_name) == ("other", "base")
    assert data.license_link == f"https://huggingface.co/some/base/blob/{COMMIT}/LICENSE"
    assert {(one.dataset_type, one.dataset_revision, one.dataset_split) for one in data.eval_results} == {
        ("some/rows", COMMIT, "train")
    }
    shutil.rmtree(snapshot)  # and where that card can't be had, none is made up
    done = command(out.parent, ids["iteration 1"], HF_HUB_CACHE=str(out.parent / "cache"))
    assert ModelCard(done.stdout).data.license is None and "Licence: not known" in done.stdout


@pytest.mark.slow
def test_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = sweep(tmp_path, ["loss=sft_only", "filter=reward_model", "eval.scorer=reward_model"])
    (folder,) = (out / "sweeps").iterdir()
    assert publish.main([str(folder), "--phase", "setup", "--to", "judge"]) == 0
    card = ModelCard.load("judge/README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in card.text and "held-out pairs" in card.text
    assert AutoModelForSequenceClassification.from_pretrained("judge").config.num_labels == 1


# ---- how it is named


NAMES = {
    "id": ["{id}"],
    "start of id": ["{start}"],
    "start of hash": ["{hash}"],
    "stage folder": ["outputs/store/{id}"],
    "member": ["{sweep}", "loss=both"],
    "number": ["{sweep}", "1"],
    "sweep name": ["{name}", "loss=both"],
    "phase": ["{sweep}", "loss=both", "--phase", "iteration 1"],
}


@pytest.mark.parametrize("way", NAMES)
def test_names(out: Path, ids: dict[str, str], capsys, way: str) -> None:
    (folder,) = (out / "sweeps").iterdir()
    model = ids["iteration 1"]
    known = {"id": model, "start": model[:14], "hash": model.split("/")[1][:12], "sweep": folder, "name": folder.name}
    assert publish.main([word.format(**known) for word in NAMES[way]]) == 0
    assert f"`{model}` iteration 1" in capsys.readouterr().out


def test_list_names_all_that_can_be_published(out: Path, ids: dict[str, str], capsys) -> None:
    other = "train/" + "0" * 16
    shutil.copytree(out / "store" / ids["offline"], out / "store" / other)
    shutil.rmtree(out / "store" / ids["iteration 1"])
    assert publish.main([]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (folder,) = (out / "sweeps").iterdir()
    assert lines[0].startswith("3 models in ")
    assert lines[1:] == [
        f"outputs/sweeps/{folder.name}",
        "0 loss=sft_only",
        f"sft {ids['sft']}",
        "1 loss=both",
        f"sft {ids['sft']}",
        f"offline {ids['offline']}",
        f"iteration 1 {ids['iteration 1']} not made yet",
        f"in no sweep's folder: {other}",
    ]


WRONG = {
    "nothing named": (["--to", "model"], "say what to publish"),
    "unknown": (["forest"], "forest: no sweep's folder, no stage of"),
    "no model": (["evaluate/"], "is no model; reward_model, activate, train, reinforce are"),
    "two models": (["train/"], "train/: 2 models start so: train/"),
    "no member": (["{sweep}"], "name one member (0: loss=sft_only; 1: loss=both); none named fits 2"),
    "unknown member": (["{sweep}", "loss=pt"], "loss=pt fits 0"),
    "number too high": (["{sweep}", "2"], "2 fits 0"),
    "unknown phase": (
        ["{sweep}", "0", "--phase", "offline"],
        "loss=sft_only: no model of phase offline; it trains: sft",
    ),
    "stage with phase": (["train/", "--phase", "sft"], "no sweep's folder, so it has no member or phase"),
    "private folder": (["{sweep}", "0", "--to", "model", "--private"], "--private goes with --to hub:USER/NAME"),
    "no user": (["{sweep}", "0", "--to", "hub:name"], "hub:USER/NAME is wanted"),
    "no hub name": (["{sweep}", "0", "--to", "hub:a b/c"], "--to hub:a b/c: Repo id must use"),
    "a file": (["{sweep}", "0", "--to", "outputs/a-file"], "is a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_is_one_line(out: Path, capsys, case: str) -> None:
    words, message = WRONG[case]
    (out / "a-file").touch()
    (folder,) = (out / "sweeps").iterdir()
    assert publish.main([word.format(sweep=folder) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert sorted(path.name for path in out.parent.iterdir()) == ["outputs"]


def test_model_that_is_not_made_yet(out: Path, ids: dict[str, str]) -> None:
    """The last model of a member is its last phase's, not whichever is there."""
    shutil.rmtree(out / "store" / ids["iteration 1"])
    (folder,) = (out / "sweeps").iterdir()
    with pytest.raises(ConfigError, match=r"iteration 1: .* is not made yet"):
        publish.choose(out, str(folder), "loss=both", None)
    assert publish.choose(out, str(folder), "loss=both", "offline")[1] == ids["offline"]


# ---- into a folder


def test_same_command_changes_nothing(out: Path, ids: dict[str, str], capsys) -> None:
    command = [ids["sft"], "--to", "some/where/model"]
    assert publish.main(command) == 0
    folder = Path("some/where/model")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert publish.main(command) == 0
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_interrupted_command_goes_on(out: Path, ids: dict[str, str]) -> None:
    assert publish.main([ids["sft"], "--to", "a/model"]) == publish.main([ids["sft"], "--to", "b/model"]) == 0
    folder = Path("b/model")
    for name in ("model.safetensors", "README.md", "evolve_record.json"):
        (folder / name).unlink()
    (folder / ".model.safetensors.tmp").write_bytes(b"half")
    assert publish.main([ids["sft"], "--to", "b/model"]) == 0
    assert contents(folder) == contents(Path("a/model"))


def test_force_replaces_what_was_published_and_nothing_else(out: Path, ids: dict[str, str], capsys) -> None:
    folder = Path("model")
    assert publish.main([ids["sft"], "--to", "model"]) == 0
    (folder / ".gitattributes").write_text("mine")
    extra = out / "store" / ids["sft"] / "model-00002.safetensors"  # a file that the next model does not have
    extra.write_bytes(b"more weights")
    rewrite(out, ids["sft"], lambda record: record["files"].update({extra.name: {}}))
    before = contents(folder)
    assert publish.main([ids["sft"], "--to", "model"]) == 2
    assert "another evolve_record.json is there" in capsys.readouterr().err
    assert contents(folder) == before
    assert publish.main([ids["sft"], "--to", "model", "--force"]) == 0
    assert (folder / extra.name).exists()
    assert publish.main([ids["offline"], "--to", "model", "--force"]) == 0
    assert publish.main([ids["offline"], "--to", "fresh/model"]) == 0
    assert contents(folder) == {**contents(Path("fresh/model")), ".gitattributes": b"mine"}


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
@pytest.mark.parametrize(
    ("published", "theirs"),
    [(False, "thesis.txt"), (False, "config.json"), (True, "thesis.txt")],
    ids=["no model", "a model of theirs", "beside a model"],
)
def test_files_of_others_are_left_alone(
    out: Path, ids: dict[str, str], capsys, force: list[str], published: bool, theirs: str
) -> None:
    folder = Path("model")
    if published:
        assert publish.main([ids["sft"], "--to", "model"]) == 0
    folder.mkdir(exist_ok=True)
    (folder / theirs).write_text("years of work")
    before = contents(folder)
    capsys.readouterr()
    assert publish.main([ids["offline"], "--to", "model", *force]) == 2
    assert capsys.readouterr().err.startswith("error: --to model: ")
    assert contents(folder) == before


# ---- to the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as publishing a model needs: repositories, card checks, LFS, commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.refuse: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def do_PUT(self) -> None:
        data = self.body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self.answer({})

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        if name not in self.server.repositories:
            return self.answer({}, 404)
        one = self.server.repositories[name]
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
            | (
                {"lfs": {"sha256": self.oid(data), "size": len(data), "pointerSize": 130}}
                if data in self.stored()
                else {}
            )
            for path, data in one["files"].items()
        ]
        self.answer({"id": name, "sha": one["sha"], "private": one["private"], "siblings": siblings})

    def do_POST(self) -> None:
        data = self.body()
        if self.path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(data)["content"].split("---\n")[1])
            wrong = [] if front["library_name"] == "transformers" else [{"message": "library_name"}]
            return self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if self.server.refuse or self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "no"}, self.server.refuse or 401)
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                return self.answer({"url": f"{self.server.url}/{name}"}, 409)
            new = {"private": asked.get("visibility") == "private", "files": {".gitattributes": b"*"}, "commits": []}
            self.server.repositories[name] = {**new, "sha": git_hash(b"")}
            return self.answer({"url": f"{self.server.url}/{name}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        user, short, action = re.fullmatch(r"/api/models/([^/]+)/([^/]+)/(preupload|commit)/main", self.path).groups()  # type: ignore[union-attr]
        one = self.server.repositories[f"{user}/{short}"]
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if ".safetensors" in file["path"] else "regular",
                }
                for file in json.loads(data)["files"]
            ]
            return self.answer({"files": modes})
        header, *changes = map(json.loads, data.splitlines())
        assert header["value"]["parentCommit"] == one["sha"]
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                one["files"][value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                one["files"][value["path"]] = self.server.large[value["oid"]]
            else:
                del one["files"][value["path"]]
        one["commits"].append(header["value"]["summary"])
        one["sha"] = git_hash(data)
        self.answer(
            {
                "success": True,
                "commitOid": one["sha"],
                "commitUrl": f"{self.server.url}/{user}/{short}/commit/{one['sha']}",
            }
        )

    def oid(self, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def stored(self) -> list[bytes]:
        return list(self.server.large.values())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def command(cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the hub's address is read when its library is imported."""
    return subprocess.run(
        [sys.executable, "-m", "evolve.publish", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "hf"), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def push(hub: Hub, cwd: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    # Without its own storage protocol (Xet), the hub's library uploads large files by LFS, which is a standard.
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    done = command(cwd, *words, **online)
    assert token not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


def test_hub_gets_what_a_folder_gets_once(hub: Hub, out: Path, ids: dict[str, str]) -> None:
    words = [ids["offline"], "--to", "hub:me/model", "--private"]
    first = push(hub, out.parent, *words)
    assert (first.returncode, first.stderr) == (0, "")
    repository = hub.repositories["me/model"]
    assert first.stdout == f"{hub.url}/me/model/commit/{repository['sha']}\n"
    assert repository["private"] and repository["commits"] == [f"{ids['offline']}, published by evolve"]
    assert hub.large.keys() == {hash_file(out / "store" / ids["offline"] / "model.safetensors")}

    assert publish.main([ids["offline"], "--to", "model"]) == 0
    wanted = contents(Path("model"))
    assert repository["files"].keys() == {*wanted, ".gitattributes"}
    assert [name for name in wanted if repository["files"][name] != wanted[name]] == ["README.md"]
    card = repository["files"]["README.md"].decode()
    assert 'AutoTokenizer.from_pretrained("me/model")' in card
    assert card.replace("me/model", "model") == wanted["README.md"].decode()

    again = push(hub, out.parent, *words)
    assert (again.returncode, again.stdout) == (0, f"hub:me/model has {ids['offline']} already\n"), again.stderr
    assert len(repository["commits"]) == 1

    other = push(hub, out.parent, ids["sft"], "--to", "hub:me/model")
    assert other.returncode == 2 and other.stderr.startswith("error: --to hub:me/model: another ")
    assert len(repository["commits"]) == 1
    repository["files"]["old.safetensors"] = b"of a larger model"
    forced = push(hub, out.parent, ids["sft"], "--to", "hub:me/model", "--force")
    assert (forced.returncode, forced.stderr) == (0, "")
    assert len(repository["commits"]) == 2 and repository["files"].keys() == {*wanted, ".gitattributes"}
    weights = (out / "store" / ids["sft"] / "model.safetensors").read_bytes()
    assert repository["files"]["model.safetensors"] == weights


def test_private_is_not_published_to_a_public_repository(hub: Hub, out: Path, ids: dict[str, str]) -> None:
    hub.repositories["me/model"] = {"private": False, "sha": git_hash(b""), "files": {}, "commits": []}
    done = push(hub, out.parent, ids["sft"], "--to", "hub:me/model", "--private")
    assert done.returncode == 2 and "is there and public" in done.stderr
    assert hub.repositories["me/model"]["commits"] == [] and not hub.large


@pytest.mark.parametrize(("status", "says"), [(401, "`hf auth login`"), (403, "may not write there"), (500, "500")])
def test_refusal_is_one_line(hub: Hub, out: Path, ids: dict[str, str], status: int, says: str) -> None:
    hub.refuse = status
    done = push(hub, out.parent, ids["sft"], "--to", "hub:me/model")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: hub:me/model: ") and done.stderr.count("\n") == 1 and says in done.stderr


def test_no_network_is_one_line(hub: Hub, out: Path, ids: dict[str, str]) -> None:
    hub.server_close()
    hub.shutdown()
    for offline in ("0", "1"):
        words = [ids["sft"], "--to", "hub:me/model"]
        done = command(out.parent, *words, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=offline, HF_TOKEN=TOKEN)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: hub:me/model: ") and done.stderr.count("\n") == 1
