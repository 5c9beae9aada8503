"""lm-eval's tasks through this harness: questions, answers, scores, measured against what lm-eval says by itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import load

from evals import harness
from evals.harness import Setup
from evolve import launch
from evolve.config import HF, ROOT, ConfigError, Sampling
from evolve.stages import Context, ModelSettings, module, read_rows, write_rows

GREEDY = Sampling(temperature=0, top_k=0, top_p=1)
PROBLEMS = [("Ann has 3 pens and buys 4. How many?", 7), ("2 boxes of 600?", 1200), ("9 less 5?", 4), ("1 and 1?", 2)]
BOMB = "The answer is \\boxed{9^{9^{9^{9^9}}}}"


@pytest.fixture
def gsm8k(tmp_path):
    """A file in GSM8K's form, and examples beside it."""
    rows = [{"question": text, "answer": f"It is <<{gold}={gold}>>{gold}.\n#### {gold}"} for text, gold in PROBLEMS]
    write_rows(tmp_path / "test.jsonl", rows)
    examples = [{"question": f"{n} and {n}?", "answer": f"{n}+{n} is {2 * n}.\n#### {2 * n}"} for n in range(20, 26)]
    write_rows(tmp_path / "train.jsonl", examples)
    return tmp_path / "test.jsonl"


def answers(questions, *texts):
    """Rows of answers.jsonl: of each question its turns' texts, None for an answer that was not made."""
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "answers": [{"text": text or "", "end": "too long" if text is None else "stop"} for text in turns],
        }
        for row, turns in zip(questions, texts, strict=True)
    ]


def values(measured):
    return [
        {name: worth["value"] for name, worth in turn.items() if isinstance(worth, dict)}
        for turn in measured.metrics["turns"]
    ]


@pytest.mark.slow
def test_a_task_is_the_same_wherever_it_lies(tmp_path):
    """Ours and lm-eval's own, whose configs name functions by the files that they stand in."""
    tasks = ["math500", "ifeval"]
    lm_eval = Path(find_spec("lm_eval").origin).parent

    def others(folder, names):  # thousands of files
        return [name for name in names if folder == str(lm_eval / "tasks") and "." not in name and name not in tasks]

    shutil.copytree(ROOT / "evals", tmp_path / "evals")
    shutil.copytree(lm_eval, tmp_path / "lm_eval", ignore=others)
    program = "from evals import harness; print(harness.__file__); print(*map(harness.definition, {tasks}))"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-P", "-c", program.format(tasks=tasks)]
    env = {**os.environ, "PYTHONPATH": path}
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert told.split() == [str(tmp_path / "evals" / "harness.py"), *map(harness.definition, tasks)]


def test_questions_are_lm_evals_prompts(gsm8k):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=0))
    assert [row["id"] for row in rows] == [f"gsm8k/{n}" for n in range(4)]
    assert rows[0]["prompt"] == "Question: Ann has 3 pens and buys 4. How many?\nAnswer:"
    assert tuple(rows[0]["until"]) == harness.until("gsm8k") == ("Question:", "</s>", "<|im_end|>")
    assert {(row["task"], row["doc"], row["shots"], row["version"]) for row in rows} == {
        ("gsm8k", n, 0, 3.0) for n in range(4)
    }
    shown = harness.questions(Setup("gsm8k", data=gsm8k, shots=2, limit=3))
    assert len(shown) == 3 and len({row["prompt"] for row in shown}) == 3
    for row, direct in zip(shown, rows, strict=False):
        assert row["prompt"].endswith("\n\n" + direct["prompt"])
        assert len(re.findall(r"Question: (2\d) and \1\?\nAnswer: \1\+\1 is (\d+)\.\n#### \2\n\n", row["prompt"])) == 2
    files = {"test": gsm8k, "train": gsm8k.parent / "train.jsonl"}
    assert shown == harness.questions(Setup("gsm8k", data=files, shots=2, limit=3))


def test_strict_and_flexible_by_turn_and_answers_never_made_are_wrong(gsm8k):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=0))
    made = answers(
        rows,
        ("So 7.", "#### 7"),  # flexible alone finds the first
        ("It is 1,200.", None),  # was right, and is not there any more
        ("#### 5", "So 4."),
        ("#### 2", "#### 2\nThe 3rd time."),
    )
    measured = harness.measure(Setup("gsm8k", data=gsm8k, shots=0), rows, made, "said")
    assert values(measured) == [{"strict": 0.25, "flexible": 0.75}, {"strict": 0.5, "flexible": 0.5}]
    assert [turn["never_made"] for turn in measured.metrics["turns"]] == [0, 1]
    assert sum(measured.dropped.values()) == 1
    assert measured.items["refined"]["strict"] == {"gsm8k/0": 1, "gsm8k/1": 0, "gsm8k/2": 0, "gsm8k/3": 1}
    assert measured.items["direct"]["flexible"] == {"gsm8k/0": 1, "gsm8k/1": 1, "gsm8k/2": 0, "gsm8k/3": 1}
    gain = measured.metrics["gain"]
    assert (gain["strict"]["value"], gain["flexible"]["value"], gain["strict"]["n"]) == (0.25, -0.25, 4)
    assert gain["strict"]["low"] < 0.25 < gain["strict"]["high"]
    assert list(harness.headline(measured.metrics)) == ["direct", "refined", "gain"]
    assert harness.summary(measured.metrics) == (
        "gsm8k: strict direct 25.0%, refined 50.0%; flexible direct 75.0%, refined 50.0%"
    )
    assert measured.metrics["protocol"] == "said"
    assert set(values(measured)[0]) <= set(harness.METRICS)


def test_rows_that_are_missing_are_wrong_and_a_chain_that_ended_early_keeps_its_answer(gsm8k):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=0))
    made = answers(rows, ("#### 7",), ("#### 1", "#### 1200"), ("#### 4", "#### 4"), ("#### 2", "#### 2"))[:-1]
    measured = harness.measure(Setup("gsm8k", data=gsm8k, shots=0), rows, made, "")
    assert [turn["strict"] for turn in values(measured)] == [0.5, 0.75]
    assert [turn["never_made"] for turn in measured.metrics["turns"]] == [1, 1]


def test_answers_to_other_questions_are_refused(gsm8k):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=0))
    made = answers(rows, *[("4",)] * 4)
    with pytest.raises(ValueError, match="gsm8k/0: was not asked, or asked otherwise"):
        harness.measure(Setup("gsm8k", data=gsm8k, shots=1), rows, made, "")
    with pytest.raises(ValueError, match="gsm8k/2: was not asked"):
        harness.measure(Setup("gsm8k", data=gsm8k, shots=0), rows[:2], made[:2], "")
    with pytest.raises(ValueError, match="gsm8k: 4 questions were asked, and it has 2"):
        harness.measure(Setup("gsm8k", data=gsm8k, shots=0, limit=2), rows, made, "")


def test_lm_eval_writes_the_same_numbers(gsm8k, tmp_path):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=0))
    made = answers(rows, ("So 7.", "#### 7"), ("1,200", "1,200"), ("", "#### 4"), ("#### 3", "#### 3"))
    measured = harness.measure(Setup("gsm8k", data=gsm8k, shots=0), rows, made, "")
    measured.records(tmp_path)
    folder = tmp_path / "lm_eval" / "turn_2"
    [file] = folder.glob("results_*.json")
    found = json.loads(file.read_text())
    assert str(tmp_path) not in json.dumps(found)  # paths are nobody's business
    said = found["results"]["gsm8k"]
    assert (said["exact_match,strict-match"], said["exact_match,flexible-extract"]) == (0.5, 0.75)
    assert values(measured)[1] == {"strict": 0.5, "flexible": 0.75}
    assert said["exact_match_stderr,strict-match"] > 0
    [file] = folder.glob("samples_gsm8k_*.jsonl")
    assert len(read_rows(file)) == 8


def test_a_score_says_what_each_filter_took_out_of_an_answer(gsm8k):
    setup = Setup("gsm8k", data=gsm8k, shots=0, limit=2)
    rows = harness.questions(setup)
    scored = harness.score(setup, rows, {"gsm8k/0": "6, no: #### 7.\nor 8", "gsm8k/1": None})
    assert scored.texts["strict"] == {"gsm8k/0": "7.", "gsm8k/1": "[invalid]"}
    assert scored.texts["flexible"] == {"gsm8k/0": "8", "gsm8k/1": "[invalid]"}
    assert scored.values == {
        "strict": {"gsm8k/0": 1, "gsm8k/1": 0},
        "flexible": {"gsm8k/0": 0, "gsm8k/1": 0},
    }


def test_a_group_is_pooled_over_its_documents(tmp_path):
    three = ["algebra", "prealgebra", "intermediate_algebra"]
    for part in [*three, "counting_and_prob", "geometry", "num_theory", "precalc"]:
        problems = [
            {"problem": f"{part} {n}", "solution": f"$\\boxed{{{n}}}$"} for n in range(3 if part in three else 1)
        ]
        write_rows(tmp_path / f"hendrycks_math_{part}.jsonl", problems)
    rows = harness.questions(Setup("hendrycks_math", data=tmp_path))
    assert len(rows) == len({row["id"] for row in rows}) == 3 * 3 + 4
    made = answers(rows, *[("it is $0$",) for _ in rows])
    measured = harness.measure(Setup("hendrycks_math", data=tmp_path), rows, made, "")
    assert values(measured) == [{"accuracy": pytest.approx(7 / 13)}]
    assert "pooled over 7 tasks" in harness.protocol(Setup("hendrycks_math", data=tmp_path))
    assert list(harness.headline(measured.metrics)) == ["direct"]


@pytest.mark.parametrize(
    ("task", "columns", "right"),
    [
        ("math500", {"problem": "Halve 1.", "solution": "no", "answer": "\\frac{1}{2}"}, "\\boxed{0.5}"),
        ("math", {"problem": "Halve 1.", "solution": "$\\boxed{\\frac{1}{2}}$"}, "The final answer is $1/2$."),
        ("minerva_math", {"problem": "Halve 1.", "solution": "\\boxed{.5}"}, "it is $\\frac12$"),
        ("aime24", {"problem": "p", "question": "p", "answer": "204"}, "so \\boxed{204}"),
        ("amc23", {"question": "p", "answer": 27.0}, "so \\boxed{27}"),
        ("olympiadbench", {"context": None, "question": "p", "final_answer": ["1", "2"]}, "\\boxed{1, 2}"),
    ],
)
def test_mathematics_is_compared_by_value(tmp_path, task, columns, right):
    write_rows(tmp_path / "any.jsonl", [columns, columns])
    rows = harness.questions(Setup(task, data=tmp_path / "any.jsonl"))
    assert rows[0]["prompt"].startswith(columns.get("problem", "p")) and "\\boxed{}" in rows[0]["prompt"]
    made = answers(rows, ("\\boxed{13}", right), (right, right))
    assert values(harness.measure(Setup(task, data=tmp_path / "any.jsonl"), rows, made, "")) == [
        {"accuracy": 0.5},
        {"accuracy": 1.0},
    ]


@pytest.mark.slow
def test_instructions_are_pooled_over_documents(tmp_path):
    """IFEval: two documents, of one and two instructions; the first turn follows none, the second all."""
    rows = [
        {"key": 0, "prompt": "Say hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "key": 1,
            "prompt": "Say bye.",
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
            "kwargs": [{}, {}],
        },
    ]
    write_rows(tmp_path / "ifeval.jsonl", rows)
    questions = harness.questions(Setup("ifeval", data=tmp_path / "ifeval.jsonl"))
    farewell = "oh well, it was good to see you all, and i hope that you will come back next year."
    made = answers(questions, ("Oh, hello.", "Hello."), (farewell.upper(), farewell.replace(",", "")))
    measured = harness.measure(Setup("ifeval", data=tmp_path / "ifeval.jsonl"), questions, made, "")
    first, second = values(measured)
    assert first["prompt_level_strict_acc"] == first["inst_level_strict_acc"] == 0
    assert second["prompt_level_strict_acc"] == second["inst_level_strict_acc"] == 1
    made = answers(questions, ("Hello.",), (farewell,))
    [partly] = values(harness.measure(Setup("ifeval", data=tmp_path / "ifeval.jsonl"), questions, made, ""))
    assert partly["prompt_level_strict_acc"] == 0.5 and partly["inst_level_strict_acc"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_a_language_that_is_guessed_is_guessed_alike_each_time(tmp_path):
    """IFEval's detector draws: unseeded, it takes this text for Somali, English or Welsh."""
    row = {"key": 0, "prompt": "Say bye.", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
    write_rows(tmp_path / "ifeval.jsonl", [row] * 30)
    questions = harness.questions(Setup("ifeval", data=tmp_path / "ifeval.jsonl"))
    made = answers(questions, *[("goodbye to you all.",)] * 30)
    measured = harness.measure(Setup("ifeval", data=tmp_path / "ifeval.jsonl"), questions, made, "")
    assert len(set(measured.items["direct"]["prompt_level_strict_acc"].values())) == 1


def test_what_is_the_questions_own_has_no_examples_and_no_instructions(gsm8k):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=2))
    assert [row["text"] for row in rows] == [text for text, _ in PROBLEMS]
    assert all("Question: " in row["prompt"] for row in rows)


def test_an_answer_that_no_scorer_survives_is_wrong_and_counted(tmp_path):
    write_rows(tmp_path / "any.jsonl", [{"problem": "p", "answer": "3"}] * 2)
    rows = harness.questions(Setup("math500", data=tmp_path / "any.jsonl"))
    made = answers(rows, (BOMB,), ("\\boxed{3}",))
    measured = harness.measure(Setup("math500", data=tmp_path / "any.jsonl"), rows, made, "")
    assert values(measured) == [{"accuracy": 0.5}]
    assert measured.metrics["turns"][0]["unscored"] == 1
    assert measured.dropped["answers whose scorer failed, counted as wrong"] == 1


def test_a_model_answers_through_respond_and_stops_where_the_task_says(gsm8k, respond, tiny):
    rows = harness.questions(Setup("gsm8k", data=gsm8k, shots=0))
    made, _ = respond(HF(name="hf", batch_size=4), tiny, [row["prompt"] for row in rows], until=("1",), answers=2)
    assert not any("1" in answer["text"] for row in made for answer in row["answers"])
    named = [{**row, "id": asked["id"]} for row, asked in zip(made, rows, strict=True)]
    measured = harness.measure(Setup("gsm8k", data=gsm8k, shots=0), rows, named, "")
    golds = {f"gsm8k/{n}": str(gold) for n, (_, gold) in enumerate(PROBLEMS)}
    numbers = {row["id"]: re.findall(r"-?[0-9.,$]{2,}|-?[0-9]+", row["answers"][0]["text"]) for row in named}
    assert measured.items["direct"]["flexible"] == {
        key: float(found[-1:] == [golds[key]]) for key, found in numbers.items()
    }


# ---- likelihoods

CHOICES = {"text": ["1 1", "2", "3 0 1"], "label": ["A", "B", "C"]}


@pytest.fixture
def arc(tmp_path):
    rows = [{"question": f"{n} 2 {n}", "choices": CHOICES, "answerKey": "ABC"[n % 3]} for n in range(4)]
    write_rows(tmp_path / "test.jsonl", rows)
    return tmp_path / "test.jsonl"


def likelihoods(model, rows, folder):
    (folder / "questions").mkdir()
    write_rows(folder / "questions" / "rows.jsonl", rows)
    config = module("likelihood").Config(
        model=ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False), batch_size=2
    )
    inputs = {"model": model, "questions": folder / "questions"}
    report = module("likelihood").run(config, inputs, folder, Context("cpu", lambda *_: None, folder / "partial"))
    return read_rows(folder / "likelihoods.jsonl"), report


@pytest.mark.parametrize("chat", [True, False])
def test_choices_are_likely_as_lm_eval_finds_them(arc, tiny, tmp_path, chat):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = harness.questions(Setup("arc_easy", data=arc, chat=chat))
    assert harness.kind("arc_easy") == "likelihood" and [len(row["requests"]) for row in rows] == [3] * 4
    made, report = likelihoods(tiny, rows, tmp_path)
    assert report.values == {"questions": 4, "likelihoods": 12} and report.tokens["read"] > 36
    measured = harness.measure(Setup("arc_easy", data=arc, chat=chat), rows, made, "")

    class Seen(HFLM):
        def loglikelihood(self, requests, **more):
            self.found = super().loglikelihood(requests, **more)
            return self.found

    model = Seen(pretrained=str(tiny), device="cpu", dtype="float32", batch_size=2)
    manager, _ = harness._find("arc_easy")
    local = {"task": "arc_easy", **harness._local(Setup("arc_easy", arc), "arc_easy")}
    theirs = simple_evaluate(
        model=model,
        tasks=list(manager.load([{"group": "theirs", "task": [local]}])["tasks"].values()),
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    flat = [tuple(pair) for row in made for pair in row["likelihoods"]]
    assert [greedy for _, greedy in flat] == [greedy for _, greedy in model.found]
    assert [value for value, _ in flat] == pytest.approx([value for value, _ in model.found], abs=1e-4)
    assert len({round(value, 3) for value, _ in flat}) > 6
    said = theirs["results"]["arc_easy"]
    assert values(measured) == [{"accuracy": said["acc,none"], "acc_norm": said["acc_norm,none"]}]
    assert measured.metrics["gain"] == {} and list(measured.items) == ["direct"]


def test_a_question_too_long_for_the_model_is_wrong_and_counted(arc, tiny, tmp_path):
    long = [{"question": " 1" * 300, "choices": CHOICES, "answerKey": "A"}]
    write_rows(arc, [*read_rows(arc), *long])
    rows = harness.questions(Setup("arc_easy", data=arc))
    made, report = likelihoods(tiny, rows, tmp_path)
    assert report.dropped == {"questions too long for the model": 1}
    assert [row["likelihoods"] is None for row in made] == [False] * 4 + [True]
    measured = harness.measure(Setup("arc_easy", data=arc), rows, made, "")
    assert measured.items["direct"]["accuracy"]["arc_easy/4"] == 0
    assert measured.metrics["turns"][0]["never_made"] == 1 and measured.metrics["turns"][0]["accuracy"]["n"] == 5


# ---- what is known of a task from its YAML alone


@pytest.mark.parametrize(
    ("task", "kind", "until"),
    [
        ("gsm8k", "generate", ("Question:", "</s>", "<|im_end|>")),
        ("math500", "generate", ()),
        ("hendrycks_math", "generate", ("Problem:",)),
        ("ifeval", "generate", ()),
        ("mmlu", "likelihood", None),
        ("truthfulqa_mc2", "likelihood", None),
    ],
)
def test_kinds(task, kind, until):
    assert harness.kind(task) == kind
    if until is not None:
        assert harness.until(task) == until


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("mbpp_plus", "runs what the model wrote; in a sandbox there are humaneval, humaneval_instruct, mbpp"),
        ("leaderboard", "some of its tasks generate and some compare likelihoods"),
        ("gsm8k_cot_self_consistency", "wants 64 answers"),
    ],
)
def test_tasks_that_are_not_measured_here(task, why):
    with pytest.raises(ValueError, match=f"^{task}.*{why}"):
        harness.kind(task)


@pytest.mark.slow
def test_an_unknown_task_has_neighbours():
    with pytest.raises(ValueError, match=r"gsmk8: no such task in lm-eval; close to it: .*gsm8k"):
        harness.kind("gsmk8")


def test_a_protocol_says_what_a_number_depends_on(gsm8k):
    said = harness.protocol(Setup("gsm8k", data=gsm8k, shots=3, limit=10), tokens=512)
    for word in (
        "gsm8k version 3",
        "3-shot",
        "strict-match and flexible-extract",
        "512 tokens",
        "first 10",
        "Question:",
    ):
        assert word in said
    assert "5-shot" in harness.protocol(Setup("gsm8k"))
    assert "no chat template" in harness.protocol(Setup("mmlu", chat=False))


def test_a_definition_goes_with_the_code_that_a_task_names_and_not_with_its_place(tmp_path, monkeypatch):
    def definition(task):
        for cached in (harness._manager, harness._find, harness.definition):
            cached.cache_clear()
        return harness.definition(task)

    before, other = definition("math500"), definition("gsm8k")
    copied = shutil.copytree(harness.TASKS, tmp_path / "tasks")
    monkeypatch.setattr(harness, "TASKS", copied)
    (copied / "programs.py").write_text("# changed")
    assert (definition("math500"), definition("gsm8k")) == (before, other)
    (copied / "verified.py").write_text("# changed")
    assert definition("math500") != before and definition("gsm8k") == other
    monkeypatch.undo()
    assert definition("math500") == before


def test_examples_that_can_not_be_shown(gsm8k):
    (gsm8k.parent / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"gsm8k: its split 'train' is in no file \(no train.jsonl beside the other\)"):
        harness.questions(Setup("gsm8k", data=gsm8k))
    with pytest.raises(ValueError, match="math500: is a task without examples"):
        harness.questions(Setup("math500", data=gsm8k, shots=3))


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("gsm8k", "", "has no rows"),
        ("gsm8k", '{"question": "1", "answer": "#### 1"}\n{"question"\n', "line 2: not JSON"),
        ("gsm8k", '["question", "answer"]\n', "line 1: is nothing that gsm8k can ask: a list, not an object"),
        ("gsm8k", '{"question": "1", "answer": "#### 1"}\n{"question": "1"}\n', "line 2: .*'answer' is undefined"),
        ("math500", '{"question": "1", "answer": "1"}\n{"answer": "1"}\n', "line 2: .*no 'problem' or 'question'"),
        ("math500", '{"question": "1", "solution": "one"}\n', "line 1: .*no answer"),
        ("ifeval", '{"text": "1"}\n', "line 1: .*no 'prompt'; it has text"),
        ("arc_easy", '{"question": "1", "answerKey": "A"}\n', "line 1: .*'choices' is undefined"),
    ],
)
def test_a_wrong_file_is_one_line_in_the_plan(tmp_path, task, text, said):
    (tmp_path / "file.jsonl").write_text(text)
    given = ["debug=fast", f"eval.benchmarks=[{task}]", "eval.harness.shots=0", f"output={tmp_path}", "dry_run=true"]
    given += [f"++eval.harness.data.{task}={tmp_path / 'file.jsonl'}"]
    with pytest.raises(ConfigError, match=f"^eval.harness.data.{task}: {tmp_path}/file.jsonl.*{said}"):
        launch.plan_members([load(*given)], [given])


# ---- against published data


@pytest.fixture
def folder():
    found = os.environ.get("EVOLVE_TEST_DATA")
    if not found:
        pytest.skip("EVOLVE_TEST_DATA (a folder with gsm8k/ and math/) is not set")
    return Path(found)


@pytest.mark.slow
def test_published_solutions_are_right_of_themselves(folder):
    for task, file, solution in (
        ("gsm8k", "gsm8k/test.jsonl", "answer"),
        ("math500", "math/math500_test.jsonl", "solution"),
    ):
        stored = read_rows(folder / file)
        rows = harness.questions(Setup(task, data=folder / file))
        made = answers(rows, *[(stored[row["doc"]][solution],) for row in rows])
        measured = harness.measure(Setup(task, data=folder / file), rows, made, "")
        assert set(values(measured)[0].values()) == {1.0} and len(rows) == len(stored)


@pytest.mark.slow
def test_lm_evals_filters_agree_with_openais_labels(folder):
    """Of solutions that end as the data's do, strict and flexible extraction find what the label says."""
    import gzip

    file = folder / "gsm8k" / "example_model_solutions_0_660.jsonl.gz"
    graded = {row["question"]: row for row in map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines())}
    stored = read_rows(folder / "gsm8k" / "test.jsonl")
    setup = Setup("gsm8k", data=folder / "gsm8k" / "test.jsonl", shots=0, limit=660)
    rows = harness.questions(setup)
    made = [graded[stored[row["doc"]]["question"]]["175b_verification"] for row in rows]
    texts = [(one["solution"].replace("\nA: ", "\n#### "),) for one in made]
    measured = harness.measure(setup, rows, answers(rows, *texts), "")
    labels = [float(one["is_correct"]) for one in made]
    strict = [measured.items["direct"]["strict"][row["id"]] for row in rows]
    assert sum(one != other for one, other in zip(strict, labels, strict=True)) <= 3
