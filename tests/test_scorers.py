import random
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evolve import templates, world
from evolve.config import HF, Sampling, Strategy, Template
from evolve.scorers import Item, RewardModel
from evolve.stages import Context, ModelSettings, read_rows, respond, reward_model, score, write_rows

READ = ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False)
# Tokenizers and templates as published models have them: (pad token, what the template writes behind the end token,
# BOS, end token). The world's tokenizer drops newlines, so "3" stands for what some write.
KINDS = {
    "a pad token of its own": ("<pad>", "", "<s>", "</s>"),
    "pad is EOS": ("</s>", "", "<s>", "</s>"),
    "no pad token": (None, "", "<s>", "</s>"),
    "text behind EOS": ("<pad>", "3", "<s>", "</s>"),
    "text behind EOS, which is pad": ("</s>", "3", "<s>", "</s>"),
    "pad behind EOS": ("<pad>", "<pad>", "<s>", "</s>"),
    "no BOS": ("</s>", "", None, "</s>"),
    "BOS is EOS": ("<pad>", "", "</s>", "</s>"),
}


@pytest.fixture(scope="module")
def save(tiny, tmp_path_factory):
    """The tiny model with a classification head of as many outputs and a tokenizer of a kind."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def save(kind="a pad token of its own", labels=1, doubled="", **shape):
        pad, behind, bos, end = KINDS[kind]
        tokenizer = world.tokenizer()
        tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token = pad, bos, end
        # What a text starts with: a BOS of the template's own only where it is not the end token, as in such models.
        start = "" if bos == end else "{{ bos_token }}"
        rest = world.CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
        tokenizer.chat_template = doubled + start + rest.replace("eos_token }}", f"eos_token + '{behind}' }}}}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = AutoConfig.from_pretrained(tiny, num_labels=labels, **shape)
            model = AutoModelForSequenceClassification.from_config(config)
        model.config.pad_token_id = tokenizer.pad_token_id
        folder = tmp_path_factory.mktemp("classifier")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def one_output(save):
    return save()


def load(path, batch=4, length=128):
    return RewardModel(path, READ, max_length=length, batch_size=batch, device="cpu")


def scores_of(scorer, items):
    found = dict(scorer(items))
    assert sorted(found) == list(range(len(items)))
    return [found[index] for index in range(len(items))]


def values_of(scorer, items):
    return [score.value for score in scores_of(scorer, items)]


def ledger(seed):
    draw = random.Random(seed)
    return " ".join(draw.choices("0123", k=draw.randint(1, 20)))


ITEMS = [Item(ledger(n), ledger(n + 100)) for n in range(17)]


def authors(path, items):
    """How the authors of published reward models call them: one at a time, no padding, the last token's logit."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    model.config.pad_token_id = None  # then transformers reads the last token, whatever it is
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for prompt, answer, _ in items:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_tensors="pt", return_dict=False)
        with torch.inference_mode():
            found.append(model(ids).logits[0][0].item())
    assert torch.tensor(found).std() > 1e-3
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_what_the_models_authors_read(save, kind):
    """In batches of any size: so it doesn't depend on what else is in its batch."""
    path = save(kind)
    expected = authors(path, ITEMS)
    for batch in (1, 2, 5, 64):
        assert values_of(load(path, batch), ITEMS) == pytest.approx(expected, abs=1e-5)


@given(st.permutations(ITEMS), st.integers(1, 20))
def test_a_score_does_not_depend_on_its_batch(one_output, items, batch):
    alone = dict(zip(ITEMS, values_of(load(one_output, 1), ITEMS), strict=True))
    assert values_of(load(one_output, batch), items) == pytest.approx([alone[item] for item in items], abs=1e-5)


def test_a_second_bos_is_refused(save):
    path = save(doubled="{{ bos_token }}")
    with pytest.raises(ValueError, match="where one BOS"):
        scores_of(load(path), ITEMS)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1), min_size=1, max_size=6), st.none() | st.integers(0, 3))
def test_padding_is_no_sequences_end(sequences, preferred):
    ends = {ids[-1] for ids in sequences}
    pad = templates.padding(sequences, preferred)
    assert pad not in ends
    assert pad == preferred or preferred is None or preferred in ends


def test_what_cannot_be_scored_is_none(one_output):
    """Answers that would have to be cut; an empty one is scored. The scores stay in their places."""
    long = " ".join("0" * 40)
    items = [ITEMS[0], Item("1 2", ""), Item(ITEMS[0].prompt, long), Item("1 2", " \n"), ITEMS[1]]
    scores = scores_of(load(one_output, batch=1, length=45), items)
    assert [score.value is None for score in scores] == [False, False, True, False, False]
    assert all(score.correct is None for score in scores)
    alone = values_of(load(one_output), ITEMS[:2])
    assert [scores[0].value, scores[4].value] == pytest.approx(alone, abs=1e-5)
    assert scores_of(load(one_output), []) == []


def test_equal_answers_have_equal_scores(one_output):
    """Which of two equals is better must not be a matter of rounding in unequal batches."""
    items = [ITEMS[0], *ITEMS, ITEMS[3], ITEMS[0]]
    values = values_of(load(one_output, batch=2), items)
    assert values[0] == values[1] == values[-1] and values[4] == values[-2]
    assert values[1:-2] == values_of(load(one_output, batch=2), ITEMS)


def test_a_model_of_two_outputs_is_refused(save):
    with pytest.raises(ValueError, match="one output, this has 2"):
        load(save(labels=2))


# ---- the stage that scores


@pytest.fixture
def answered(tmp_path):
    """answers.jsonl of nine prompts, two answers each but for one that has none."""
    rows = [
        {
            "id": str(n),
            "prompt": item.prompt,
            "answers": [{"text": ITEMS[n + k].answer, "end": "stop"} for k in range(2 if n else 0)],
        }
        for n, item in enumerate(ITEMS[:9])
    ]
    write_rows(tmp_path / "answers.jsonl", rows)
    return tmp_path


def run(answered, path, seen=None, **settings):
    out = answered / "out"
    out.mkdir(exist_ok=True)
    seen = [] if seen is None else seen
    context = Context("cpu", lambda done, total: seen.append((done, total)), answered / "partial")
    config = score.Config(scorer="reward_model", verifier=None, model=READ, max_length=128, batch_size=4, **settings)
    report = score.run(config, {"answers": answered, "reward_model": path}, out, context)
    return read_rows(out / "scores.jsonl"), report


def check(found, folders):
    rows = read_rows(folders[0] / "answers.jsonl")
    items = [Item(row["prompt"], answer["text"]) for row in rows for answer in row["answers"]]
    assert [(row["id"], len(row["scores"])) for row in found] == [(row["id"], len(row["answers"])) for row in rows]
    assert [value for row in found for value in row["scores"]] == pytest.approx(authors(folders[1], items), abs=1e-4)
    assert all(correct is None for row in found for correct in row["correct"])


def test_a_killed_stage_goes_on_where_it_was(answered, one_output):
    seen = []
    found, report = run(answered, one_output, seen)
    check(found, (answered, one_output))
    assert report.values == {"answers": 16} and report.dropped == {"answers without a score": 0}
    assert seen[-1] == (16, 16) and all(one < other for one, other in pairwise(seen))
    (part,) = (answered / "partial").glob("part-*.jsonl")
    part.write_text(part.read_text()[:-10].rpartition("\n")[0][:-7])  # two rows are gone: one whole, one in part
    seen.clear()
    again, _ = run(answered, one_output, seen)
    assert again == found and seen[-1] == (4, 4)
    seen.clear()
    assert run(answered, answered / "no model is needed", seen)[0] == found and seen == []


def test_an_answer_that_was_not_made_has_no_score(answered, one_output):
    rows = read_rows(answered / "answers.jsonl")
    rows[1]["answers"][0] = {"text": "", "end": "too long"}
    rows[2]["answers"] = [{"text": "", "end": "too long"}] * 2
    write_rows(answered / "answers.jsonl", rows)
    found, report = run(answered, one_output)
    assert [[value is None for value in row["scores"]] for row in found[:4]] == [
        [],
        [True, False],
        [True, True],
        [False, False],
    ]
    assert report.dropped == {"answers without a score": 3}


def test_reference_answers_reach_the_verifier(tiny, tmp_path):
    """From the data set's rows, through a strategy that looks at scores on the way, to the stage that scores."""
    prompts = [item.prompt for item in ITEMS[:4]]
    write_rows(tmp_path / "rows.jsonl", [{"id": p, "prompt": p, "gold": "3"} for p in prompts])
    context = Context("cpu", lambda done, total: None, tmp_path / "partial")
    config = score.Config(scorer="verifier", verifier="exact", model=None, max_length=128, batch_size=4)
    template = Template(name="t", text="{prompt} {response}", separator=" ", path=None)
    asking = respond.Config(
        model=READ,
        engine=HF(name="hf", batch_size=8),
        strategy=Strategy(name="tree", answers=6, branching=2, expand="best"),
        template=template,
        sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0),
        scorer=config,
        max_prompt_tokens=64,
        max_new_tokens=4,
        max_length=128,
        seed=0,
    )
    respond.run(asking, {"model": tiny, "prompts": tmp_path}, tmp_path, context)
    rows = read_rows(tmp_path / "answers.jsonl")
    assert [row["gold"] for row in rows] == ["3"] * 4
    texts = [answer["text"] for row in rows for answer in row["answers"]]
    gold = max(texts, key=len)
    write_rows(tmp_path / "answers.jsonl", [{**row, "gold": gold} for row in rows])
    (tmp_path / "partial" / "score").mkdir()
    score.run(config, {"answers": tmp_path}, tmp_path, replace(context, partial=tmp_path / "partial" / "score"))
    found = [right for row in read_rows(tmp_path / "scores.jsonl") for right in row["correct"]]
    assert found == [text == gold for text in texts] and any(found) and not all(found)


@pytest.mark.slow
def test_answers_are_dealt_to_processes(answered, one_output):
    found, _ = run(answered, one_output, processes=2)
    check(found, (answered, one_output))
    assert len(list((answered / "partial").glob("part-*.jsonl"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", ["pad is EOS", "text behind EOS, which is pad"])
def test_vllm_gives_the_same_scores(answered, save, kind):
    path = save(kind, head_dim=32)  # the smallest that vLLM's attention takes on a CPU
    found, _ = run(answered, path, engine="vllm", memory_share=0.5)
    check(found, (answered, path))


# ---- the stage that trains a reward model


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The stage's folder and report for a base whose tokenizer is of a kind."""
    rows = world.rows(48, seed=0)

    def trained(kind, pairs=32, **settings):
        folder = tmp_path_factory.mktemp("trained")
        base, out = folder / "base", folder / "out"
        for each in (base, out, folder / "pairs", folder / "held_out"):
            each.mkdir()
        for file in tiny.iterdir():
            (base / file.name).write_bytes(file.read_bytes())
        pad, behind, *_ = KINDS[kind]
        tokenizer = world.tokenizer()
        tokenizer.pad_token = pad
        tokenizer.chat_template = world.CHAT_TEMPLATE.replace("eos_token }}", f"eos_token + '{behind}' }}}}")
        tokenizer.save_pretrained(base)
        write_rows(folder / "pairs" / "rows.jsonl", rows[:pairs])
        write_rows(folder / "held_out" / "rows.jsonl", rows[32:])
        config = reward_model.Config(
            model=READ,
            checkpoint_dtype="float32",
            epochs=2,
            batch_size=8,
            max_length=128,
            max_dropped=0.0,
            seed=0,
            **{"micro_batch": 8, "learning_rate": 1e-3, **settings},
        )
        inputs = {"model": base, "pairs": folder / "pairs", "held_out": folder / "held_out"}
        return out, reward_model.run(config, inputs, out, Context("cpu", lambda done, total: None, folder / "partial"))

    return trained


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_reward_model_is_trained_where_it_is_read(trained):
    """So the pad token, which says where transformers reads, changes nothing; not even where it is the last token."""
    (one, report), (other, same) = trained("a pad token of its own"), trained("pad is EOS")
    before, after = weights(one), weights(other)
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items())
    assert report.values == same.values
    assert report.values["pairs"] == 32 and report.values["held_out_pairs"] == 16
    right = [
        better > worse
        for better, worse in zip(
            authors(one, [Item(row["prompt"], row["chosen"]) for row in world.rows(48, 0)[32:]]),
            authors(one, [Item(row["prompt"], row["rejected"]) for row in world.rows(48, 0)[32:]]),
            strict=True,
        )
    ]
    assert report.values["held_out_accuracy"] == sum(right) / 16


@pytest.mark.slow
def test_how_many_pairs_run_at_once_changes_no_weight(trained):
    """Of 13 pairs, the second step has 5: at once, or as 4 and 1."""
    whole, parts = (
        weights(trained("pad is EOS", pairs=13, micro_batch=micro, learning_rate=1e-4)[0]) for micro in (8, 4)
    )
    assert all(torch.allclose(value, parts[name], atol=1e-6) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a pad token of its own", "pad is EOS", "pad behind EOS", "no pad token"])
def test_a_trained_reward_model_is_read_right_by_others(trained, kind):
    """By transformers, with the pad token that the saved model and tokenizer have."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path, _ = trained(kind)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.pad_token_id == model.config.pad_token_id
    texts = [
        [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}] for item in ITEMS
    ]
    batch = tokenizer.apply_chat_template(
        texts, tokenize=True, padding=True, padding_side="right", return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        found = model(**batch).logits[:, 0].tolist()
    assert found == pytest.approx(authors(path, ITEMS), abs=1e-5)
    assert found == pytest.approx(values_of(load(path), ITEMS), abs=1e-5)
