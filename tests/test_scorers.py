import random

import pytest
import torch

from evolve import templates, world
from evolve.scorers import RewardModel, Score, Verifier


@pytest.fixture(scope="module")
def save(tiny, tmp_path_factory):
    """The tiny model with a classification head of as many outputs."""
    from transformers import AutoModelForSequenceClassification

    def save(labels):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=labels, dtype=torch.float32)
        folder = tmp_path_factory.mktemp("classifier")
        model.save_pretrained(folder)
        templates.load_tokenizer(tiny, None, False).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def one_output(save):
    return save(1)


def load(path, batch=4, length=128):
    return RewardModel(
        path,
        chat_template=None,
        trust_remote_code=False,
        dtype="float32",
        max_length=length,
        batch_size=batch,
        device="cpu",
    )


def ledger(seed):
    draw = random.Random(seed)
    return " ".join(draw.choices("0123", k=draw.randint(1, 20)))


ITEMS = [(ledger(n), ledger(n + 100)) for n in range(17)]


def quiet(done, total):
    pass


def test_a_score_is_the_models_output_for_that_answer_alone(one_output):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(one_output, dtype=torch.float32).eval()
    tokenizer = templates.load_tokenizer(one_output, None, False)
    expected = []
    for prompt, answer in ITEMS:
        ids = templates.encode(tokenizer, templates.direct(prompt), answer).ids
        with torch.inference_mode():
            expected.append(model(torch.tensor([ids])).logits.item())
    assert torch.tensor(expected).std() > 1e-3
    for batch in (1, 4, 64):
        scores = load(one_output, batch)(ITEMS, quiet)
        assert [score.value for score in scores] == pytest.approx(expected, abs=1e-4)
        assert all(score.correct is None for score in scores)
    backwards = load(one_output)(ITEMS[::-1], quiet)[::-1]
    assert [score.value for score in backwards] == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_scored_is_none(one_output):
    """Answers that would have to be cut; an empty one is scored. The scores stay in their places."""
    long = " ".join("0" * 40)
    items = [ITEMS[0], ("1 2", ""), (ITEMS[0][0], long), ("1 2", " \n"), ITEMS[1]]
    seen = []
    scores = load(one_output, batch=1, length=45)(items, lambda done, total: seen.append((done, total)))
    assert [score.value is None for score in scores] == [False, False, True, False, False]
    alone = load(one_output)(ITEMS[:2], quiet)
    assert [scores[0].value, scores[4].value] == pytest.approx([score.value for score in alone], abs=1e-4)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert load(one_output)([], quiet) == []


def test_a_model_of_two_outputs_is_refused(save):
    with pytest.raises(ValueError, match="one output, this has 2"):
        load(save(2))


def test_the_verifier_is_the_worlds_reward():
    right, near, wrong = "3 0 0 3 1 1 0 2", "2 3 3 2 0 0 3 1", "not a ledger"
    prompt = "3 0 1 2 0 1 2"
    answers = [right, near, wrong, "", " ".join(str(9 % 4) for _ in range(8))]
    scores = Verifier("ledger")([(prompt, answer) for answer in answers], quiet)
    assert scores == [Score(*world.reward(prompt, answer)) for answer in answers]
    assert [score.correct for score in scores[2:4]] == [False, False]
    assert [score.value for score in scores[2:4]] == [0.0, 0.0]
    # What can be graded can be voted for, however it is spaced.
    said = [
        Verifier("ledger").extract(answer) for answer in (right, f"  {right.replace(' ', chr(10))} ", *answers[2:4])
    ]
    assert said == [right, right, None, None]
    with pytest.raises(KeyError):
        Verifier("unheard of")
