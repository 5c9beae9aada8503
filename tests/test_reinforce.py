"""Policy gradient on rewards: the stage run for real on the embedded model, and what TRL is given to train on."""

from pathlib import Path

import pytest
import torch

from evolve import engines, reinforce, templates, trainer, world
from evolve.config import HF, Lora, Optimiser, PolicyGradient, Sampling, Strategy
from evolve.engines.hf import HFEngine
from evolve.scorers import Score
from evolve.stages import Context, ModelSettings, read_rows, respond, write_rows
from evolve.stages import reinforce as stage
from evolve.stages.score import Config as ScoreConfig

PROMPTS = [row["prompt"] for row in world.rows(20, seed=5)]
READ = ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False)
SAMPLED = Sampling(temperature=1.0, top_k=0, top_p=1.0)
GRPO = {
    "loss_type": "grpo",
    "importance": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl": 0.04,
    "updates": 2,
    "scale_rewards": "group",
}
DAPO = {**GRPO, "loss_type": "dapo", "clip_high": 0.28, "kl": 0.0}
GSPO = {**GRPO, "importance": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl": 0.0}
LOSSES = {
    "grpo": GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "dr_grpo": {**DAPO, "loss_type": "dr_grpo", "scale_rewards": "none"},
}
HERE = Context("cpu", lambda done, total: None, Path("/nowhere"))


def optimiser(batch=8, micro=8, **values):
    return Optimiser(
        batch_size=batch,
        micro_batch=micro,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        layout="shared",
        sharding="none",
        checkpoint_minutes=None,
        max_loss_growth=100.0,
        **{"gradient_checkpointing": False, "devices": 1, **values},
    )


def settings(loss, *, seed=0, new=12, unfinished="drop", prompt=64, length=128, dtype="float32", **values):
    return stage.Config(
        model=READ.model_copy(update={"dtype": dtype}),
        checkpoint_dtype="float32",
        loss=PolicyGradient(**loss),
        answers=4,
        sampling=SAMPLED,
        scorer=ScoreConfig(scorer="verifier", verifier="ledger", model=None, max_length=length, batch_size=16),
        unfinished=unfinished,
        optimiser=optimiser(**values),
        learning_rate=1e-3,
        max_prompt_tokens=prompt,
        max_new_tokens=new,
        max_length=length,
        seed=seed,
        generation_batch=16,
    )


@pytest.fixture
def run(embedded, tmp_path):
    def run(name, config, prompts=PROMPTS, **inputs):
        folder, out = tmp_path / f"{name}-prompts", tmp_path / name
        folder.mkdir()
        out.mkdir()
        write_rows(folder / "rows.jsonl", [{"id": f"r{n}", "prompt": text} for n, text in enumerate(prompts)])
        return out, stage.run(config, {"model": embedded, "prompts": folder, **inputs}, out, HERE)

    return run


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def close(one, other):
    """Up to rounding, which Adam makes much of where a gradient is near 0; a step moves weights by 1e-3."""
    return all(torch.allclose(value, other[name], atol=1e-4) for name, value in one.items())


# ---- the stage


@pytest.mark.parametrize("loss", LOSSES)
def test_the_stage_makes_a_model_and_says_what_it_did(run, embedded, loss):
    from transformers import AutoModelForCausalLM

    out, report = run("out", settings(LOSSES[loss]))
    before, after = weights(embedded), weights(out)
    assert before.keys() == after.keys() and not close(before, after)
    assert all(value.isfinite().all() for value in after.values())
    AutoModelForCausalLM.from_pretrained(out)
    assert templates.load_tokenizer(out, None, False).get_vocab() == world.tokenizer().get_vocab()
    assert "reference" not in (out / "config.json").read_text()

    steps = read_rows(out / "steps.jsonl")
    assert [row["step"] for row in steps] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # 20 prompts by 8, each batch of answers gone over twice
    drawn = [row for row in steps if "reward" in row]
    assert [row["step"] for row in drawn] == [1, 3, 5] and all(0 < row["reward"] < 1 for row in drawn)
    assert all(
        {"loss", "grad_norm", "learning_rate", "entropy", "clip_ratio/region_mean"} <= row.keys() for row in steps
    )
    assert all(("kl" in row) == (LOSSES[loss]["kl"] > 0) for row in steps)
    assert all(row["clip_ratio/region_mean"] == 0 for row in drawn)  # the answers are the policy's own

    assert report.values["prompts"] == 20 and report.values["answers"] == 80 and report.values["steps"] == 6
    assert report.tokens["generated"] == pytest.approx(80 * 9, rel=0.1)  # eight balances and the end
    assert report.tokens["trained"] > 2 * report.tokens["generated"]  # twice, and prompts too
    assert sum(report.dropped.values()) == report.values["cut off at max_response_tokens"]


def test_the_same_seed_gives_the_same_bytes(run):
    one, _ = run("one", settings(GRPO))
    torch.manual_seed(99)  # the state it is called in does not count
    same, _ = run("same", settings(GRPO))
    other, _ = run("other", settings(GRPO, seed=1))
    for file in ("model.safetensors", "steps.jsonl", "config.json", "generation_config.json"):
        assert (one / file).read_bytes() == (same / file).read_bytes()
    assert not close(weights(one), weights(other))


@pytest.mark.parametrize("loss", ["grpo", pytest.param("dapo", marks=pytest.mark.slow)])
def test_micro_batches_change_nothing_but_rounding(run, loss):
    """Also in a last step that is not full; nor does gradient checkpointing."""
    whole, _ = run("whole", settings(LOSSES[loss]))
    parts, _ = run("parts", settings(LOSSES[loss], micro=2, gradient_checkpointing=True))
    assert close(weights(whole), weights(parts))
    for one, other in zip(read_rows(whole / "steps.jsonl"), read_rows(parts / "steps.jsonl"), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_what_is_too_long_is_left_out_and_counted(run):
    long = " ".join(["1"] * 40)
    out, report = run("out", settings(DAPO, prompt=30), [*PROMPTS[:8], long, long])
    assert report.dropped["prompts longer than max_prompt_tokens"] == 2 and report.values["prompts"] == 8
    same, _ = run("same", settings(DAPO), PROMPTS[:8])
    assert (out / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    _, report = run("room", settings(DAPO, length=50), [*PROMPTS[:8], long])
    assert report.dropped["prompts without room for an answer"] == 1 and report.values["prompts"] == 8
    with pytest.raises(ValueError, match=r"^all 2 prompts are longer than data.max_prompt_tokens=30"):
        run("none", settings(DAPO, prompt=30), [long, long])


def test_answers_cut_off_are_left_out_unless_they_are_kept(run):
    """Eight balances are eight tokens, and the end is the ninth."""
    with pytest.raises(
        ValueError, match=r"^none of 20 prompts has answers of different scores.* 80 were cut off, 0 had"
    ):
        run("drop", settings(DAPO, new=8))
    _, report = run("keep", settings(DAPO, new=8, unfinished="keep"))
    assert report.values["cut off at max_response_tokens"] == 80 and sum(report.dropped.values()) == 0
    assert report.tokens["generated"] == 640


def test_the_kl_term_is_to_the_reference(run, tiny):
    kl = {**GRPO, "kl": 1.0, "updates": 1}
    own, _ = run("own", settings(kl))
    other, _ = run("other", settings(kl), reference=tiny)
    assert read_rows(own / "steps.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert read_rows(other / "steps.jsonl")[0]["kl"] > 0.1
    assert not close(weights(own), weights(other))


def test_bfloat16_trains(run, embedded):
    out, _ = run("out", settings(GRPO, dtype="bfloat16"))
    assert not close(weights(embedded), weights(out))
    assert all(value.dtype == torch.float32 for value in weights(out).values())


def test_adapters_are_merged_into_what_is_saved(run, embedded):
    lora = Lora(rank=4, alpha=8, dropout=0.0, targets="all-linear")
    out, _ = run("out", settings(GRPO, lora=lora))
    before, after = weights(embedded), weights(out)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-4)}
    assert moved and all("proj" in name for name in moved)
    assert all(row["kl"] < 1e-6 for row in read_rows(out / "steps.jsonl")[:1])


# ---- what TRL is given


@pytest.fixture
def policy(embedded):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)


def rollouts_of(policy, embedded, scorer, prompts=PROMPTS):
    tokenizer = templates.load_tokenizer(embedded, None, False)
    encoded = {text: templates.encode_prompt(tokenizer, templates.direct(text)) for text in prompts}
    task = engines.Task(embedded, READ, SAMPLED, 12, 128, "cpu")
    engine = HFEngine(task, 16, policy)
    return reinforce.Rollouts(engine, scorer, encoded, dict.fromkeys(prompts), answers=4, seed=0, keep_unfinished=False)


def fit(policy, embedded, scorer, prompts=PROMPTS, *, loss=DAPO, batch=8, rate=1e-3):
    rollouts = rollouts_of(policy, embedded, scorer, prompts)
    trained = reinforce.train(
        policy,
        rollouts.engine.tokenizer,
        prompts,
        rollouts,
        PolicyGradient(**loss),
        optimiser(batch, batch),
        temperature=SAMPLED.temperature,
        max_new_tokens=12,
        learning_rate=rate,
        seed=0,
        bf16=False,
        trust_remote_code=False,
        device="cpu",
        on_step=lambda done, total: None,
    )
    return rollouts, trained.steps


def zeros(items):
    """A reward that a model of this size can learn: the share of zeros."""
    return [(index, Score(item.answer.split().count("0") / 8)) for index, item in enumerate(items)]


def test_prompts_and_answers_are_the_tokens_that_respond_has(policy, embedded, tmp_path):
    """The same ids, one BOS, and the first step's answers are those that `respond` draws of the same model."""
    seen = []

    def scorer(items):
        seen.extend((item.prompt, item.answer) for item in items)
        return zeros(items)

    rollouts = rollouts_of(policy, embedded, scorer)
    tokenizer = rollouts.engine.tokenizer
    given = rollouts([prompt for prompt in PROMPTS for _ in range(4)], None)
    (tmp_path / "prompts").mkdir()
    write_rows(tmp_path / "prompts" / "rows.jsonl", [{"id": text, "prompt": text} for text in PROMPTS])
    config = respond.Config(
        model=READ,
        engine=HF(name="hf", batch_size=64),
        strategy=Strategy(name="parallel", answers=4, branching=None, expand=None),
        template=None,
        sampling=SAMPLED,
        scorer=None,
        max_prompt_tokens=64,
        max_new_tokens=12,
        max_length=128,
        seed=0,
    )
    report = respond.run(config, {"model": embedded, "prompts": tmp_path / "prompts"}, tmp_path, HERE)
    answers = {row["id"]: row["answers"] for row in read_rows(tmp_path / "answers.jsonl")}
    drawn = [(text, answer) for text in PROMPTS for answer in answers[text]]
    assert seen == [(text, answer["text"]) for text, answer in drawn if answer["end"] == "stop"]
    assert report.tokens["generated"] == rollouts.counts["tokens generated"]
    for prompt_ids, completion_ids, mask, (text, answer) in zip(
        given["prompt_ids"], given["completion_ids"], given["env_mask"], drawn, strict=True
    ):
        assert prompt_ids == templates.encode_prompt(tokenizer, templates.direct(text))
        assert prompt_ids.count(tokenizer.bos_token_id) == 1
        assert len(completion_ids) == len(mask) == answer["tokens"]
        assert (completion_ids[-1] == tokenizer.eos_token_id) == (answer["end"] == "stop") == all(mask)
        finished = templates.encode(tokenizer, templates.direct(text), answer["text"])
        if answer["end"] == "stop":
            assert prompt_ids + completion_ids == finished.ids

    # And through TRL: the batches of all steps together hold these very prompts, each with its answers.
    seen.clear()
    fit(policy, embedded, scorer, batch=20, rate=1e-9)
    assert seen == [(text, answer["text"]) for text, answer in drawn if answer["end"] == "stop"]


def test_the_scorer_gets_each_prompts_reference_answer(policy, embedded):
    seen = []

    def scorer(items):
        seen.extend(items)
        return zeros(items)

    rollouts = rollouts_of(policy, embedded, scorer)
    rollouts.gold = {text: f"gold of {text}" for text in PROMPTS}
    rollouts([prompt for prompt in PROMPTS for _ in range(4)], None)
    assert {item.prompt for item in seen} == set(PROMPTS)
    assert all(item.gold == f"gold of {item.prompt}" for item in seen)


def test_an_answer_without_a_score_is_as_if_it_were_not_there(policy, embedded):
    from transformers import AutoModelForCausalLM

    known = set(PROMPTS[::2])

    def scorer(items):
        return [(index, score if items[index].prompt in known else Score(None)) for index, score in zeros(items)]

    rollouts, steps = fit(policy, embedded, scorer, batch=20, loss=GSPO)
    assert rollouts.counts["left out without a score"] == 40 and rollouts.counts[reinforce.DIFFER] <= 10
    alone = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    _, same = fit(alone, embedded, zeros, PROMPTS[::2], batch=10, loss=GSPO)
    assert close(policy.state_dict(), alone.state_dict())
    for key in ("reward", "reward_std", "entropy", "grad_norm"):
        assert steps[0][key] == pytest.approx(same[0][key], rel=1e-4)


def test_gspo_is_grpo_where_no_answer_is_gone_over_twice(embedded):
    """The ratio is then 1: nothing is clipped, and its gradient is the answer's mean over tokens either way."""
    from transformers import AutoModelForCausalLM

    made = {}
    for updates in (1, 2):
        for name, loss in (("grpo", {**GRPO, "kl": 0.0}), ("gspo", GSPO)):
            model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
            fit(model, embedded, zeros, loss={**loss, "updates": updates})
            made[name, updates] = model.state_dict()
    assert close(made["grpo", 1], made["gspo", 1])
    assert not close(made["grpo", 2], made["gspo", 2])


def test_rewards_rise(policy, embedded):
    prompts = [row["prompt"] for row in world.rows(96, seed=6)]
    _, steps = fit(policy, embedded, zeros, prompts, loss={**GRPO, "kl": 0.0, "updates": 1}, rate=3e-3)
    rewards = [row["reward"] for row in steps]
    assert rewards[0] < 0.4 and rewards[-1] > 0.8


def test_a_run_that_diverges_says_at_which_step(policy, embedded):
    with pytest.raises(trainer.Diverged, match=r"step 1; a smaller learning rate \(model.learning_rate\)"):
        fit(policy, embedded, zeros, rate=1e38)


def test_nothing_is_left_beside_the_output(run, tmp_path, monkeypatch):
    """No checkpoint, no completions, no log: TRL writes into a temporary folder, and W&B is not told."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr("tempfile.tempdir", None)
    out, _ = run("out", settings(DAPO))
    assert list(elsewhere.iterdir()) == []
    files = {"config.json", "generation_config.json", "model.safetensors", "steps.jsonl", "tokenizer.json"}
    assert files <= {path.name for path in out.iterdir()} <= files | {"tokenizer_config.json", "chat_template.jinja"}
