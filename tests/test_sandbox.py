"""Programs as a model might write them, kind and hostile, and the code tasks that run them."""

import ast
import os
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import load

from evals import harness, sandbox
from evals.harness import Setup
from evolve import launch
from evolve.config import ConfigError
from evolve.stages import write_rows

needs_sandbox = pytest.mark.skipif(sandbox.missing() is not None, reason=str(sandbox.missing()))

RIGHT = "def double(n):\n    return 2 * n\nassert double(4) == 8"
WRONG = {
    "a test that fails": "assert 1 == 2",
    "a name that is not there": "double(2)",
    "no Python": "this is no program",
    "a null": "\0",
    "leaving early": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "leaving in a test": "def double(n):\n    raise SystemExit\n\ndouble(4)",
    "saying that all went well": "import os\nfor fd in range(20):\n    os.write(fd, b'ready' + b'0' * 32)\nos._exit(0)",
    "killing its parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\n1 / 0",
    "memory": "kept = bytearray(2**30)",
    "more memory": "kept = bytearray(100 * 10**9)",
    "a file that is too large": "open('/tmp/file', 'wb').write(bytes(65 * 2**20))",
    "files that are too large": """
for n in range(100):
    with open(f"/tmp/{n}", "wb") as file:
        file.write(bytes(2**20))
""",
}


@needs_sandbox
def test_a_program_passes_that_comes_to_its_end():
    assert sandbox.passes(RIGHT)
    assert sandbox.passes("import json, math, re, collections, subprocess, typing\nopen('/tmp/own', 'w').write('x')")
    assert sandbox.passes(f"# {'long ' * 10**5}\n{RIGHT}")


@needs_sandbox
@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG)
def test_a_program_that_does_not_come_to_its_end_has_not_passed(program):
    assert not sandbox.passes(program)


@needs_sandbox
def test_nothing_of_the_host_is_to_be_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "told")
    (tmp_path / "secret").write_text("told")
    python = os.path.realpath(sys.base_prefix)
    hidden = [str(tmp_path), str(Path(__file__).parents[1]), "/etc/passwd", "/var", "/mnt", "/sys"]
    assert sandbox.passes(f"""
import os, socket
assert set(os.environ) <= {{"PWD", "LC_CTYPE"}}, os.environ
assert not [path for path in {hidden} if os.path.exists(path)]
home = {str(Path.home())!r}  # Python itself may lie in it
assert not os.path.exists(home) or (len(os.listdir(home)) == 1 and {python!r}.startswith(home))
assert os.listdir("/tmp") == []
assert [name for name in os.listdir("/proc") if name.isdigit()] == ["1", str(os.getpid())]
assert [name for _, name in socket.if_nameindex()] == ["lo"]
for path in ("/x", "/dev/x", "/dev/shm/x", "/usr/lib/x", {python!r} + "/x", "/proc/sys/kernel/hostname"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise AssertionError(path)
""")


@needs_sandbox
def test_no_server_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not sandbox.passes(f"import socket\nsocket.create_connection({server.getsockname()!r}, 2)")


@needs_sandbox
def test_output_goes_nowhere(capfd):
    assert sandbox.passes("for _ in range(1000):\n    print('x' * 10**6)\nimport sys\nprint('y', file=sys.stderr)")
    assert capfd.readouterr() == ("", "")


@needs_sandbox
def test_processes_are_few():
    assert sandbox.passes("""
import os, time
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError:
    pass
assert 0 < made < 64, made
""")


@needs_sandbox
def test_nothing_outlives_a_program(monkeypatch):
    """A daemon of one that passes, a bomb and a loop that are stopped."""
    monkeypatch.setattr(sandbox, "SECONDS", 1.5)
    names = [f"daemon{uuid4().hex}" for _ in range(3)]
    daemon = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)", "NAME"])
time.sleep(0.5)
"""
    endings = ("", "while True:\n    time.sleep(1)", "while True:\n    try: os.fork()\n    except OSError: pass")
    started = time.monotonic()
    found = [sandbox.passes(daemon.replace("NAME", name) + end) for name, end in zip(names, endings, strict=True)]
    assert found == [True, False, False] and time.monotonic() - started < 8
    deadline = time.monotonic() + 5
    while (left := [one for one in running() if any(name in one for name in names)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def running():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue


@needs_sandbox
def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "RUNNER", "raise OSError('no such limit')")
    with pytest.raises(RuntimeError, match="the sandbox did not start: OSError: no such limit"):
        sandbox.passes(RIGHT)


# ---- the tasks

HUMANEVAL = [
    {
        "task_id": f"Own/{n}",
        "prompt": f'from typing import List\n\n\ndef {name}(items: List[int]) -> int:\n    """ {text} """\n',
        "entry_point": name,
        "canonical_solution": f"    {solution}\n",
        "test": f"\n\ndef check(candidate):\n    assert candidate([3, 1, 2]) == {expected}\n",
    }
    for n, (name, text, solution, expected) in enumerate(
        [
            ("largest", "The largest.", "return max(items)", 3),
            ("total", "Their sum.", "return sum(items)", 6),
            ("count", "How many.", "return len(items)", 3),
            ("first", "The first.", "return items[0]", 3),
        ]
    )
]
MBPP = [
    {
        "task_id": n,
        "text": f"Write a function to {name}.",
        "code": f"def {name}(n):\n  return {code}",
        "test_list": [f"assert {name}({given}) == {expected}" for given, expected in tests.items()],
    }
    for n, (name, code, tests) in enumerate(
        [("double", "2 * n", {1: 2, 0: 0, 4: 8}), ("halve", "n / 2", {2: 1, 0: 0, 8: 4})],
    )
]


def answers(rows, texts):
    return [
        {"id": row["id"], "prompt": row["prompt"], "answers": [{"text": text, "end": "stop"}]}
        for row, text in zip(rows, texts, strict=True)
    ]


def measured(task, folder, stored, texts):
    write_rows(folder / "test.jsonl", stored)
    setup = Setup(task, folder / "test.jsonl")
    rows = harness.questions(setup)
    return harness.measure(setup, rows, answers(rows, texts), "")


@needs_sandbox
def test_humaneval_goes_on_where_the_prompt_ends(tmp_path):
    texts = ["    return max(items)\n", "    return 7\n", "    import os; os._exit(0)\n", "    return items[0]  # ok"]
    found = measured("humaneval", tmp_path, HUMANEVAL, texts)
    assert found.items["direct"]["pass@1"] == {f"humaneval/{n}": right for n, right in enumerate([1, 0, 0, 1])}
    assert found.metrics["turns"][0]["pass@1"]["value"] == 0.5 and not any(found.dropped.values())
    assert set(found.items["direct"]) <= set(harness.METRICS)


@needs_sandbox
def test_a_model_that_chats_writes_a_block(tmp_path):
    whole = HUMANEVAL[0]["prompt"] + HUMANEVAL[0]["canonical_solution"]
    texts = [
        f"Here it is:\n```python\n{whole}```\nIt takes the largest.",
        "```\ndef total(items: List[int]):\n    return sum(items)\n```",
        "```python\ndef count(items):\n    return 5\n```\nor\n```python\ndef count(items):\n    return len(items)\n```",
        "    return items[0]",
    ]
    found = measured("humaneval_instruct", tmp_path, HUMANEVAL, texts)
    assert list(found.items["direct"]["pass@1"].values()) == [1, 1, 0, 1]
    texts = [f"```python\n{MBPP[0]['code']}\n```", "I can't."]
    found = measured("mbpp_instruct", tmp_path, MBPP, texts)
    assert list(found.items["direct"]["pass@1"].values()) == [1, 0]


@needs_sandbox
def test_mbpp_is_a_program_by_itself(tmp_path):
    found = measured("mbpp", tmp_path, MBPP, [MBPP[0]["code"], "def halve(n):\n  return 1"])
    assert found.items["direct"]["pass@1"] == {"mbpp/0": 1, "mbpp/1": 0}


@needs_sandbox
def test_the_datas_own_solutions_pass(tmp_path):
    found = measured("humaneval", tmp_path, HUMANEVAL, [row["canonical_solution"] for row in HUMANEVAL])
    assert found.metrics["turns"][0]["pass@1"]["value"] == 1


@needs_sandbox
def test_where_the_sandbox_fails_an_answer_is_wrong_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "RUNNER", "raise OSError('no such limit')")
    texts = [f"{row['canonical_solution']}    # here" for row in HUMANEVAL]
    found = measured("humaneval", tmp_path, HUMANEVAL, texts)
    assert found.metrics["turns"][0]["pass@1"]["value"] == 0
    assert found.dropped["answers whose scorer failed, counted as wrong"] == 4


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_prompts_stops_and_versions_are_lm_evals(task, tmp_path):
    """lm-eval's code can't be loaded without the hub, so its files are read."""
    import yaml

    folder = Path(find_spec("lm_eval").origin).parent / "tasks" / task
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    theirs = yaml.load((folder / f"{task}.yaml").read_text(), loader)
    ours = harness._parts(task)[task]
    for key in ("doc_to_text", "doc_to_target", "generation_kwargs", "num_fewshot", "target_delimiter", "metadata"):
        assert ours.get(key) == theirs.get(key)
    if task == "mbpp":
        tree = ast.parse((folder / "utils.py").read_text())
        [shown] = [one for one in tree.body if getattr(one, "name", "") == "list_fewshot_samples"]
        assert ours["fewshot_config"]["samples"] == ast.literal_eval(shown.body[0].value)


def test_a_plan_says_what_is_missing(tmp_path, monkeypatch):
    write_rows(tmp_path / "test.jsonl", HUMANEVAL)
    given = ["debug=fast", "eval.benchmarks=[humaneval]", f"+eval.harness.data.humaneval={tmp_path / 'test.jsonl'}"]
    given += [f"output={tmp_path}", "dry_run=true"]
    with pytest.raises(ConfigError, match="humaneval: runs programs that the model wrote"):
        launch.plan_members([load(*given)], [given])
    given += ["eval.harness.unsafe_code=true"]
    if sandbox.missing() is None:
        launch.plan_members([load(*given)], [given])
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.missing.cache_clear()
    with pytest.raises(ConfigError, match="humaneval: needs bubblewrap: apt install bubblewrap"):
        launch.plan_members([load(*given)], [given])
    sandbox.missing.cache_clear()
