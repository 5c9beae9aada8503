"""conf/ and its schema: everything composes, is commented and stated; what is wrong is one line; what counts for ids.

`python tests/test_config.py` writes tests/default_config.yaml again, so that a changed default shows in review.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evolve import config, launch, plan, sources, word_problems
from evolve.config import CONF, Config, ConfigError
from evolve.config.engines import check_server
from evolve.store import Stage, flatten

DEFAULTS = Path(__file__).with_name("default_config.yaml")
CHOICES = sorted(
    f"{file.parent.relative_to(CONF)}={file.stem}"
    for file in CONF.rglob("*.yaml")
    if file.parent != CONF and file.parent.name != "local"
)
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
RESOLVER = sources.Resolver(None)


@cache
def composed(*overrides: str) -> dict[str, Any]:
    """What Hydra makes of conf/ and overrides, as a plain dict, with Hydra's mode and sweep. No site's own settings."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        made = hydra.compose("config", overrides=["~local", *overrides], return_hydra_config=True)
    own = OmegaConf.masked_copy(made, [str(key) for key in made if key != "hydra"])
    params = OmegaConf.to_container(made.hydra.sweeper.params, resolve=True) if made.hydra.sweeper.params else {}
    return {**OmegaConf.to_container(own, resolve=True), "hydra": {"mode": made.hydra.mode, "params": params}}


def load(*overrides: str) -> Config:
    return config.load(composed(*overrides))


def changed(base: dict[str, Any], **values: Any) -> Config:
    """The config with some values replaced: changed(base, **{"loss.alpha": 0.5})."""
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in values.items():
        *parents, last = key.split(".")
        section = copy
        for parent in parents:
            section[parent] = dict(section[parent])
            section = section[parent]
        section[last] = value
    return config.load(copy)


def ids(member: Config) -> list[tuple[str, str]]:
    return [(step.phase, step.stage.id) for step in plan.build("member", member, RESOLVER).steps]


def ids_of(member: Config, kind: str) -> list[str]:
    return [stage_id for _, stage_id in ids(member) if stage_id.startswith(f"{kind}/")]


def leaves(section: dict[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in section.items() if key != "hydra"})


def default_config() -> str:
    return yaml.safe_dump(leaves(load().model_dump(mode="json")), allow_unicode=True, width=1000)


# ---- conf/ and the schema


@pytest.mark.parametrize("scale", ["embedded", "paper"])
@pytest.mark.parametrize("choice", [choice for choice in CHOICES if not choice.startswith("eval/benchmark=")])
def test_choice_composes_and_states_every_field(choice: str, scale: str) -> None:
    if (choice, scale) == ("filter=verifier", "paper"):
        pytest.skip("UltraFeedback has no verifier: refused below")
    beside = {
        "engine=openai": ["engine.url=http://localhost:8000/v1", "engine.model=m"],
        "judge=server": ["judge.engine.url=http://localhost:8000/v1", "judge.engine.model=m"],
        "filter=judge": ["judge=policy"],
        "annotator=server": ["annotator.url=http://localhost:8000/v1", "annotator.model=m"],
    }
    if scale == "paper":  # which trains on eight devices
        beside |= {f"loss={name}": ["trainer=default"] for name in ("grpo", "dapo", "gspo")}
    stated = composed(f"scale={scale}", choice, *beside.get(choice, []))
    assert leaves(stated).keys() == leaves(config.load(stated).model_dump()).keys()


@pytest.mark.parametrize(
    "overrides",
    [
        ("data=ultrafeedback", "filter=reward_model"),
        ("data=ultrafeedback", "filter=rule"),
        ("data=ultrafeedback", "reward_model=skywork"),
        ("data=ultrafeedback", "model=smollm2_135m", "debug=fast"),
        ("filter=rule", "strategy=tree", "strategy.expand=every"),
        ("filter=rule", "strategy=parallel", "loss=sft_only"),
        ("strategy.answers=1", "loss=sft_only"),
        ("data.sft_pairs=0", "loss=pt_only"),
    ],
    ids=" ".join,
)
def test_choices_that_go_together(overrides: tuple[str, ...]) -> None:
    load(*overrides)


@pytest.mark.parametrize("scale", ["embedded", "paper"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_member_of_an_experiment_composes(experiment: str, scale: str) -> None:
    overlay = (f"experiment={experiment}", f"scale={scale}")
    found = composed(*overlay)["hydra"]
    assert str(found["mode"]).endswith("MULTIRUN") and found["params"]
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in found["params"].items()])
    members = [member for batch in BasicSweeper.split_arguments(parsed, None) for member in batch]
    assert len({str(load(*overlay, *member).model_dump()) for member in members}) == len(members) > 1


@pytest.mark.parametrize("choice", [c for c in CHOICES if not c.startswith(("hydra/", "experiment=", "debug="))])
def test_every_field_has_a_comment(choice: str) -> None:
    """On its line, the line above, or its section's line. Overlays only repeat fields that groups explain."""
    assert uncommented((CONF / choice.replace("=", "/")).with_suffix(".yaml").read_text()) == []


def test_every_default_has_a_comment() -> None:
    assert uncommented((CONF / "config.yaml").read_text().split("\nhydra:")[0]) == []


def uncommented(text: str) -> list[str]:
    found, above, covered, block = [], "", -1, -1  # indents of a commented section, and of a text block
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if 0 <= block < indent or not line.strip():
            continue
        block = -1
        if match := re.match(r" *(?:- )?\w+:(.*)", line):
            commented = "#" in line or above.lstrip().startswith("#")
            is_section = match[1].split("#")[0].strip() in ("", "|")
            if indent <= covered:
                covered = -1
            if is_section and commented and covered < 0:
                covered = indent
            if "|" in match[1].split("#")[0]:
                block = indent
            if not (commented or 0 <= covered < indent or match[1].strip() == ""):
                found.append(line)
        above = line
    return found


def test_comment_check_finds_what_lacks_one() -> None:
    assert uncommented("# top\na: 1\nb: 2\nc: # section\n  d: 3\ne:\n  f: 4\n") == ["b: 2", "  f: 4"]


def test_defaults_are_the_committed_ones() -> None:
    assert default_config() == DEFAULTS.read_text(), "a default changed: `python tests/test_config.py`, then review"


# ---- what is wrong is one line that names the key and the choices


def refusal(tmp_path: Path, *overrides: str) -> str:
    """The line a command would print; evolve/main.py does the same (tests/test_cli.py)."""
    try:
        launch.plan_members([load(*overrides, f"output={tmp_path}", "dry_run=true")], [overrides])
    except ConfigError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return config.one_line(error)
    pytest.fail(f"{overrides} was accepted")


REFUSED = {
    "loss.alph=1": ["loss.alph: unknown key", "did you mean loss.alpha?", "beta_refine"],
    "+loss.alph=1": ["loss.alph: unknown key", "did you mean loss.alpha?", "beta_refine"],
    "+data.verifiers.name=x": ["data.verifiers", "unknown key", "did you mean data.verifier?"],
    "sede=1": ["sede: unknown key", "did you mean seed?", "strategy"],
    "+wibble=1": ["wibble: unknown key; ", "strategy"],
    "+strategy=tree": ["strategy"],
    "~loss.alpha": ["loss.alpha: not set"],
    "seed=-1": ["seed=-1", "greater than or equal to 0"],
    "eval.seed=4294967296": ["eval.seed=4294967296", "less than"],
    "seed=x": ["seed=x", "integer"],
    "iteration.count=0.5": ["iteration.count=0.5", "integer"],
    "loss.alpha=null": ["loss.alpha=None", "number"],
    "loss.pt=perhaps": ["loss.pt=perhaps", "'pairs', 'rewards' or 'none'"],
    "loss.pt=true": ["loss.pt=True", "'pairs', 'rewards' or 'none'"],
    "loss.direct=ppo": ["loss.direct=ppo", "'dpo', 'ipo', 'simpo', 'sppo' or 'srpo'"],
    "loss.beta_direct=0": ["loss.beta_direct=0", "greater than 0"],
    "loss.pt=rewards": ["loss.pt=rewards: loss.policy_gradient is null", "loss=grpo"],
    "loss=grpo loss.policy_gradient=null": ["loss.pt=rewards: loss.policy_gradient is null", "loss=grpo"],
    "loss=grpo loss.policy_gradient.clip=1": ["loss.policy_gradient.clip: unknown key", "clip_high, clip_low"],
    "loss=grpo +loss.policy_gradient.clip=1": ["loss.policy_gradient.clip: unknown key", "clip_high, clip_low"],
    "loss.policy_gradient.kl=1": [
        "loss.policy_gradient.kl: not a setting of this choice of loss; take one that has it"
    ],
    "loss=grpo sampling.temperature=0": ["sampling.temperature=0", "loss.pt=rewards compares them"],
    "loss=grpo trainer=lora iteration.reference=initial": ["iteration.reference=initial", "adapters", "kl=0"],
    "method=grpo_lora iteration.reference=initial": ["iteration.reference=initial", "adapters", "kl=0"],
    "loss=grpo strategy.answers=1": ["strategy.answers=1", "group of rewards"],
    "loss=grpo loss.policy_gradient.loss_type=bnpo": ["loss_type=bnpo", "'grpo', 'dapo' or 'dr_grpo'"],
    "loss=grpo filter=rule": ["loss.pt=rewards: filter.name=rule gives no scores", "filter=verifier"],
    "wandb.mode=on": ["wandb.mode=on", "'auto', 'offline', 'online' or 'disabled'"],
    "loss.alpha=1.5": ["loss.alpha=1.5", "less than or equal to 1"],
    "loss.nll=nan": ["loss.nll=nan"],
    "sampling.top_p=0": ["sampling.top_p=0", "greater than 0"],
    "trainer.batch_size=0": ["trainer.batch_size=0", "greater than or equal to 1"],
    "strategy.answers=65": ["strategy.answers=65", "less than or equal to 64"],
    "resources.workers=0": ["resources.workers=0", "greater than or equal to 1"],
    "eval.judged=some": ["eval.judged=some", "'ends' or 'all'"],
    "annotator=server annotator.model=m": ["annotator.url, annotator.serve: neither is set"],
    "annotator=server annotator.url=http://x/v1": ["annotator", "model"],
    "annotator=server annotator.url=http://x/v1 annotator.model=m annotator.max_dollars=1": [
        "annotator.max_dollars=1: needs annotator.price"
    ],
    "annotator=server annotator.url=http://x/v1 annotator.model=m annotator.path=weights": ["annotator.serve"],
    "annotator=server annotator.url=http://x/v1 annotator.model=m annotator.key=sk-1": ["annotator.key: not the name"],
    "annotator=gpt4_turbo annotator.logprob=true": ["annotator.logprob: unknown key", "annotator.logprobs?"],
    "data=ultrafeedback annotator.scorer=verifier": ["annotator.scorer=verifier", "no verifier"],
    "eval.alpaca_eval.limits=3": ["eval.alpaca_eval.limits: unknown key", "eval.alpaca_eval.limit?"],
    "data=ultrafeedback data.path=no.jsonl": ["data.path=no.jsonl: no such file"],
    "data=ultrafeedback data.path=./no": ["data.path=./no", ".jsonl", "hub id", "'embedded'"],
    "data=ultrafeedback data.path=evolve/embedded/config.json": ["data.path=evolve/embedded/config.json"],
    "template.path=no.txt": ["template.path=no.txt: no such file"],
    "template.path=LICENSE": ["template.path=LICENSE", "{prompt} 0 times"],
    "model.path=no/such/folder": ["model.path=no/such/folder: no such folder"],
    "model.path=conf": ["model.path=conf: no config.json"],
    "model.chat_template=no.jinja": ["model.chat_template=no.jinja: no such file"],
    "filter=reward_model reward_model.path=./no": ["reward_model.path=./no: no such folder"],
    "data=ultrafeedback filter=verifier": ["filter.scorer=verifier", "filter=reward_model or filter=rule"],
    "data=ultrafeedback eval.scorer=verifier": ["eval.scorer=verifier", "eval.scorer=reward_model"],
    "data=ultrafeedback data.verifier=math": ["data.verifier=math", "set data.gold to the column"],
    "data.verifier=exact": ["data.verifier=exact", "set data.gold to the column"],
    "data.gold=answer": ["data.gold", "data.path=embedded has no columns"],
    "eval=test_time strategy@eval.test_time=chain eval.test_time.chains=3": [
        "eval.test_time.chains=3: doesn't divide eval.test_time.answers=8; these do: 1, 2, 4, 8"
    ],
    "eval=test_time eval.test_time=null": ["eval.test_time=null", "take eval=test_time"],
    "eval=test_time strategy@eval.test_time=chain eval.test_time.stop=unchanged": ["eval.test_time.stop=unchanged"],
    "eval=test_time eval.test_time.wibble=1": ["eval.test_time.wibble: unknown key", "answers, branching, chains"],
    "eval=test_time data=ultrafeedback eval.select=verifier": ["eval.select=verifier", "eval.select=reward_model"],
    "eval=alpaca_eval eval.alpaca_eval.pick=[best]": [
        "eval.alpaca_eval.pick=[best]: there are no several answers",
        "strategy@eval.test_time=parallel",
    ],
    "eval=math eval.harness.pick=[best,majority]": ["eval.harness.pick=[best,majority]: there are no several answers"],
    "eval=arena_hard eval.arena_hard.pick=[best,majority] strategy@eval.test_time=parallel": [
        "eval.arena_hard.pick=[best,majority]: free text",
        "take eval.arena_hard.pick=[best]",
    ],
    "eval=math eval.harness.pick=[best] strategy@eval.test_time=parallel eval.select=verifier": [
        "eval.select=verifier: the questions of gsm8k have no reference",
        "eval.select=reward_model",
    ],
    "eval=math eval.harness.pick=[majority] strategy@eval.test_time=tree eval.select=verifier": [
        "eval.select=verifier: the questions of gsm8k",  # a tree looks at scores on the way
    ],
    "eval=math eval.harness.pick=[majority] strategy@eval.test_time=parallel eval.temperature=0": [
        "eval.temperature=0: all answers that eval.harness.pick=[majority] picks from would be the same",
    ],
    "eval=math eval.harness.pick=[majority] strategy@eval.test_time=chain eval.test_time.chains=2 eval.temperature=0": [
        "eval.temperature=0",
    ],
    "eval=math eval.harness.pick=[median]": ["eval.harness.pick", "'best' or 'majority'"],
    "eval.benchmarks=[ifeval] eval.harness.pick=[majority] strategy@eval.test_time=parallel": [
        "ifeval: extracts nothing from an answer",
        "take eval.harness.pick=[best]",
    ],
    "eval.benchmarks=[refinement,refinement]": ["eval.benchmarks", "names one twice"],
    "eval.stop=never": ["eval.stop=never", "'unchanged' or 'score_drop'"],
    "filter=rule strategy=tree": ["strategy.expand=best", "strategy.expand=every"],
    "strategy=tree strategy.answers=8 strategy.depth=2": ["strategy.depth=2", "at most 7", "strategy.branching=2"],
    "strategy=tree strategy.depth=0": ["strategy.depth=0", "greater than or equal to 1"],
    "strategy.answers=6 strategy.chains=4": ["strategy.chains=4", "strategy.answers=6", "these do: 1, 2, 3, 6"],
    "strategy.stop=unchanged": ["strategy.stop=unchanged", "set eval.stop"],
    "filter=best_random filter.scorer=none": ["filter.select=best_random: needs a scorer"],
    "filter=all_pairs filter.scorer=none": ["filter.select=all: needs a scorer"],
    "filter=rule strategy=parallel": ["filter.name=rule", "strategy.name=parallel"],
    "filter=rule filter.select=best_worst": ["filter.select=best_worst", "needs a scorer"],
    "strategy.answers=1": ["strategy.answers=1", "at least 2"],
    "data.sft_pairs=0": ["data.sft_pairs=0", "loss.sft_direct=0 loss.sft_refine=0"],
    "filter=reward_model data.reward_model_pairs=0": ["data.reward_model_pairs=0", "reward_model.path"],
    "reward_model.micro_batch=5": ["reward_model.micro_batch=5", "reward_model.batch_size=16", "1, 2, 4, 8, 16"],
    "iteration.count=30": ["data.path=embedded", "iteration.count"],
    "trainer.micro_batch=7 trainer.batch_size=16": ["trainer.micro_batch=7", "trainer.batch_size=16", "1, 2, 4, 8, 16"],
    "trainer.devices=3 trainer.batch_size=16": ["trainer.batch_size=16", "trainer.devices=3", "15 or 18 would"],
    "trainer.devices=2 trainer.batch_size=12 trainer.micro_batch=4": [
        "trainer.micro_batch=4: doesn't divide trainer.batch_size=12 over trainer.devices=2; these do: 1, 2, 3, 6"
    ],
    "trainer=lora trainer.lora.dropout=0.05": ["trainer.lora.dropout=0.05", "set it to 0"],
    "method=grpo_lora loss.policy_gradient.lora.dropout=0.05": [
        "loss.policy_gradient.lora.dropout=0.05",
        "set it to 0",
    ],
    "trainer.sharding=fsdp": ["trainer.sharding=fsdp", "trainer.devices above 1"],
    "data.max_length=16 data.max_response_tokens=16": ["data.max_length=16", "data.max_response_tokens=16"],
    "data.eval_path=LICENSE": ["data.eval_path", "leave it null"],
    "loss=bth": [
        "loss=bth: no such choice",
        "both, dapo, grpo, gspo, ipo, none, pt, pt_only, rpo, sft, sft_only, simpo, sppo, srpo",
    ],
    "model=gpt": ["model=gpt: no such choice", "embedded, gemma2_9b"],
    "experiment=figure9": ["experiment=figure9: no such choice", "figure1"],
    "engine=openai": ["engine.url, engine.serve: neither is set", "{model} and {port}"],
    "engine=openai engine.url=http://x/v1 engine.serve=x": ["engine.url, engine.serve: each is set"],
    "engine=openai engine.url=localhost:8000": [
        "engine.url=localhost:8000: no such address",
        "http://localhost:8000/v1",
    ],
    "engine=openai engine.url=http://": ["engine.url=http://: no such address"],
    "engine=openai engine.url=http://me:sesame@x/v1": ["engine.url: holds more than an address", "engine.key"],
    "engine=openai engine.url=http://x/v1 engine.key=sk-1": ["engine.key: not the name of an environment variable"],
    "engine=openai engine.model=m engine.url=http://x/v1": [
        "engine.url=http://x/v1: holds one model, and the ones trained here",
        "engine.serve",
        "loss=none loss.pt=none loss.sft_direct=0",
    ],
    "engine=openai engine.model=m engine.url=http://x/v1 loss=sft_only": ["holds one model"],
    "engine=openai engine.model=m engine.url=http://x/v1 loss=grpo": ["holds one model"],
    "engine=openai engine.url=http://x/v1 engine.endpoint=edits": ["engine.endpoint=edits", "'completions' or 'chat'"],
    "engine=openai engine.serve='x{port}'": ["engine.serve=x{port}: doesn't say where {model} goes"],
    "engine=openai engine.serve='x{model}'": ["engine.serve=x{model}: doesn't say where {port} goes"],
    "engine=openai engine.url=http://x/v1": ["engine.model: not set; of a server that runs"],
    "judge=server judge.engine.url=http://x/v1": ["judge.engine.model: not set; of a server that runs"],
    "filter=judge": ["filter.scorer=judge: judge.name=none", "judge=policy"],
    "judge=policy eval.scorer=judge": ["eval.scorer=judge", "would measure each model by itself"],
    "judge=server": ["judge.engine.url, judge.engine.serve: neither is set"],
    "judge=policy judge.engine.tensor_parallel=2": ["judge.engine.tensor_parallel: not a setting of this choice"],
    "judge=policy judge.highest=x": ["judge.highest=x: input should be a valid number"],
    "judge=policy judge.prompt.path=no.txt": ["judge.prompt.path=no.txt: no such file"],
    "judge=policy_pairwise filter=judge strategy=tree": ["judge.mode=pairwise: compares answers"],
    "judge=policy engine@judge.engine=vllm filter=judge strategy=tree": ["judge.engine.name=vllm", "take hf"],
    "resources=slurm +resources.slurm.needs.train.minutes=2": ["slurm.signal_seconds=120", "needs.train, of 2 minutes"],
    "resources=slurm resources.slurm.max_minutes=2": ["slurm.signal_seconds=120", "needs.default, of 2 minutes"],
    "hydra/launcher=moon": ["hydra/launcher=moon: no such choice", "local", "joblib", "submitit_local"],
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused_in_one_line(tmp_path: Path, overrides: str) -> None:
    line = refusal(tmp_path, *overrides.split())
    assert "\n" not in line
    assert [part for part in REFUSED[overrides] if part not in line] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["engine.url=http://me:sesame@x/v1", "engine.url=http://x/v1 engine.key=sk-sesame"])
def test_a_refusal_shows_no_secret(tmp_path: Path, wrong: str) -> None:
    assert "sesame" not in refusal(tmp_path, "engine=openai", *wrong.split())


@pytest.mark.parametrize(
    "words",
    [
        "--api-key sesame",
        "--api_key=sesame",
        "--hf-token sesame",
        "--token=sesame",
        "--header Authorization:sesame",
        "--header 'Bearer sesame'",
        "--password sesame 'unclosed",
        "sk-sesame",
        "hf_sesame",
        '{"api_key": "sesame"}',
    ],
)
@pytest.mark.parametrize("section", ["engine", "annotator"])
def test_a_key_in_a_servers_command_is_refused(section: str, words: str) -> None:
    """Records, pages and W&B show the command, and so would show the key."""
    said = rf"^{section}\.serve: looks as if it held a key .* {section}\.key$"
    with pytest.raises(ValueError, match=said) as refused:
        check_server(section, None, f"serve {{model}} --port {{port}} {words}", "KEY")
    assert "sesame" not in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="looks as if it held a key"):
        check_server(section, None, f"env VLLM_API_KEY=sesame serve {{model}} --port {{port}} {words}", "KEY")


def test_other_options_of_a_servers_command_are_not_taken_for_keys() -> None:
    for words in (
        "--tokenizer hf-internal-testing/llama --skip-tokenizer-init --max-num-batched-tokens 2048",
        "--ssl-keyfile server.key --api-key-file /run/secrets/key --return-tokens-as-token-ids",
        "--download-dir /data/token --chat-template a_b_c_d_e_f_g_h_i_j_k_l_m_n_o_p_q_r_s_t_u_v_w_x.jinja",
        "--served-model-name task-7b --seed 3 --risk-free",
    ):
        check_server("engine", None, f"vllm serve {{model}} --port {{port}} {words}", "KEY")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    line = refusal(tmp_path / "out", "data=ultrafeedback", f"data.path={file}", "model=embedded")
    assert "has 1 usable rows" in line and "data.sft_pairs 10000" in line


def test_rows_that_a_verifier_or_a_loss_has_no_use_for_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"q {n}", "answer": f"because\n#### {n}"} for n in range(40)]
    given = (
        *(
            "data=ultrafeedback",
            f"data.path={file}",
            "data.eval_split=null",
            "data.prompt=question",
            "data.gold=answer",
        ),
        *("data.verifier=math", "filter=verifier", "model=embedded", "data.eval_prompts=4", "data.prompts=8"),
        *("data.offline_pairs=0", "data.reward_model_pairs=0", "iteration.count=2"),
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refusal(tmp_path / "out", *given, "data.sft_pairs=4")
    assert "40 of 40 rows have no 'chosen' and 'rejected', and data.sft_pairs ask" in line and "or 0" in line
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": "q"}) + "\n")
    assert "row 2: no 'answer'" in refusal(tmp_path / "out", *given, "loss=pt_only", "data.sft_pairs=0")


# ---- identity: what counts for a stage's id, and what does not

BASES = [
    composed("debug=fast"),
    composed("debug=fast", "filter=reward_model", "strategy=tree", "eval.scorer=reward_model"),
    composed("debug=fast", "filter=rule", "loss=none", "iteration.count=2", "iteration.data=all"),
    composed("debug=fast", "filter=reward_model", "loss=grpo"),
]
RUNTIME = {
    "resources.workers": st.integers(1, 64),
    "resources.threads": st.integers(1, 64),
    "resources.device": st.sampled_from(["auto", "cpu", "cuda"]),
    "resources.retries": st.integers(0, 5),
    "resources.lease_timeout": st.floats(5, 1e6),
    "resources.rates": st.sampled_from([None, {"path": "rates.yaml", "rates": {"train": {"tokens_per_second": 9}}}]),
    "resources.slurm": st.sampled_from([None, yaml.safe_load((CONF / "resources/slurm.yaml").read_text())["slurm"]]),
    "trainer.micro_batch": st.sampled_from([1, 2, 4, 8, 16, 32]),
    "trainer.gradient_checkpointing": st.booleans(),
    "trainer.layout": st.sampled_from(["shared", "packed", "padded"]),
    "trainer.checkpoint_minutes": st.none() | st.floats(0, 1e6),
    "trainer.max_loss_growth": st.floats(1.1, 1e6),
    "reward_model.micro_batch": st.sampled_from([1, 2, 4, 8, 16, 32]),
    "reward_model.processes": st.integers(1, 8),
    "reward_model.memory_share": st.floats(0.1, 1),
    "engine.batch_size": st.integers(1, 4096),
    "engine.processes": st.integers(1, 8),
    "engine.retries": st.integers(0, 8),
    "engine.memory_share": st.floats(0.1, 1),
    "output": st.text("abc/", min_size=1),
    "dry_run": st.booleans(),
    "wandb.mode": st.sampled_from(["auto", "offline", "online", "disabled"]),
    "wandb.project": st.text(),
    "wandb.entity": st.none() | st.text(),
    "model.name": st.text(),
    "data.name": st.text(),
    "loss.name": st.text(),
    "filter.name": st.text(),
}


@given(st.permutations(["seed=3", "loss.alpha=0.5", "loss=pt", "strategy=tree", "debug=fast", "trainer.batch_size=32"]))
@hypothesis_settings(max_examples=12, deadline=None)
def test_order_of_overrides_does_not_matter(overrides: list[str]) -> None:
    assert ids(load(*overrides)) == ids(load(*sorted(overrides)))


@pytest.mark.parametrize("base", BASES)
@given(st.fixed_dictionaries({}, optional=RUNTIME))
@hypothesis_settings(max_examples=40, deadline=None)
def test_runtime_settings_never_change_an_id(base: dict[str, Any], values: dict[str, Any]) -> None:
    assert ids(changed(base, **values)) == ids(config.load(base))


def test_which_settings_say_only_how_a_stage_runs() -> None:
    """Of those that enter no identity all but names, addresses and paths: what these lead to may be an input."""
    text = {key for key in RUNTIME if key.endswith(".name")} | {"output"}
    for key in RUNTIME.keys() | {"trainer.devices", "trainer.sharding", "annotator.max_dollars", "resources", "wandb"}:
        assert config.runs_alike(key) == (key not in text), key
    for key in ("seed", "loss.alpha", "model.path", "template.path", "judge.model", "engine.url", "engine", "trainer"):
        assert not config.runs_alike(key), key


def test_every_other_setting_changes_an_id() -> None:
    """Where it has an effect: the second base scores with a reward model and grows trees."""
    idle = {
        "data.revision",  # of a hub data set, which this is not
        "data.eval_path",  # refused with the embedded world
        "data.eval_split",  # as revision
        "data.verifier",  # the reward model scores
        "data.prompt",  # refused with the embedded world
        "data.gold",  # as prompt
        "model.revision",  # of a hub id
        "model.path",  # its content counts
        "model.chat_template",  # a path, whose content counts
        "data.path",  # its content counts
        "template.path",  # its content counts
        "template.name",
        "reward_model.path",
        "reward_model.dtype",  # of a reward model from outside
        "reward_model.trust_remote_code",  # likewise
        "reward_model.engine",  # vllm has to be installed
        "reward_model.revision",
        "strategy.name",
        "strategy.chains",  # of chains alone
        "strategy.stop",  # of evaluation alone
        "engine.name",
        "judge.name",
        "judge.mode",
        "eval.benchmarks",
        "eval.test_time",  # of a benchmark that this doesn't run
        "eval.select",  # as test_time
        "eval.judged",  # of judged benchmarks, as their sections
        "annotator.kind",
        "annotator.scorer",
        "model.beta",  # the loss's betas count
        "loss.gamma",  # of SimPO alone
        "loss.policy_gradient",  # of rewards alone
        "trainer.devices",  # where a stage runs
        "trainer.sharding",  # as devices
    } | RUNTIME.keys()
    base = BASES[1]
    other: dict[str, Any] = {
        "model.dtype": "bfloat16",
        "model.checkpoint_dtype": "bfloat16",
        "data.split": "other",
        "data.max_characters": 100,
        "strategy.expand": "every",
        "strategy.depth": 3,
        "template.text": "{prompt} {response}",
        "template.separator": "|",
        "engine.max_length": 200,
        "loss.pt": "none",
        "loss.direct": "ipo",
        "loss.lengths": "mean",
        "loss.refine_contexts": "rejected",
        "filter.scorer": "verifier",
        "filter.select": "last_first",
        "filter.unfinished": "keep",
        "iteration.reference": "initial",
        "iteration.start": "initial",
        "iteration.data": "all",
        "trainer.schedule": "cosine",
        "trainer.lora": {"rank": 1, "alpha": 1, "dropout": 0.0, "targets": "all-linear"},
        "eval.scorer": "verifier",
        "eval.stop": "unchanged",
    }
    unnoticed = []
    for key, value in leaves(base).items():
        if key in idle or key.startswith(("eval.alpaca_eval.", "eval.arena_hard.", "eval.harness.")):
            continue  # the latter are tested below
        if key in other:
            new = other[key]
        elif isinstance(value, bool):
            new = not value
        else:
            new = value * 2 if isinstance(value, int) and value else value / 2 or 1
        reference = {"iteration.data": {"iteration.count": 2}}.get(key, {})
        if ids(changed(base, **reference, **{key: new})) == ids(changed(base, **reference)):
            unnoticed.append(f"{key}: {value} -> {new}")
    assert unnoticed == []


def test_how_a_server_is_reached_never_changes_an_id_and_what_it_is_does() -> None:
    base = composed("debug=fast", "engine=openai", "engine.serve='serve {model} {port}'")
    known = ids(config.load(base))
    runtime = {"key": "MY_KEY", "batch_size": 3, "timeout": 9.5, "retries": 0}
    for key, value in runtime.items():
        assert ids(changed(base, **{f"engine.{key}": value})) == known, key
    other = {"serve": "serve {model} {port} --quantization fp8", "model": "m", "endpoint": "chat", "max_length": 77}
    for key, value in other.items():
        assert ids(changed(base, **{f"engine.{key}": value})) != known, key
    assert {*runtime, *other, "name", "url"} == base["engine"].keys()

    untrained = ("debug=fast", "loss=none", "loss.pt=none", "loss.sft_direct=0", "engine=openai")
    one, two = (load(*untrained, "engine.model=m", f"engine.url=http://{host}/v1") for host in ("here:1", "there:2"))
    assert ids(one) == ids(two)
    assert len(stages(one, "respond")) == 1


JUDGED = ("debug=fast", "eval.benchmarks=[alpaca_eval,arena_hard]", "annotator=server", "annotator.model=m")


def test_how_an_annotator_is_reached_never_changes_an_id_and_what_it_is_does() -> None:
    base = composed(*JUDGED, "annotator.url=http://here/v1")
    known = ids(config.load(base))
    runtime = {
        "name": "x",
        "url": "http://there/v1",
        "key": "MY_KEY",
        "concurrency": 3,
        "timeout": 9.5,
        "retries": 0,
        "price": {"input": 1, "output": 2},
        "revision": "abc",
    }
    for key, value in runtime.items():
        assert ids(changed(base, **{f"annotator.{key}": value})) == known, key
    other = {"model": "n", "logprobs": False, "attempts": 5}
    for key, value in other.items():
        changed_ids = ids(changed(base, **{f"annotator.{key}": value}))
        assert changed_ids != known, key
        kept = [(phase, one) for phase, one in known if not one.startswith(("compare/", "evaluate/"))]
        assert set(kept) <= set(changed_ids), key  # answers stay
    assert {*runtime, *other, "kind", "serve", "path", "max_dollars"} == base["annotator"].keys()


@pytest.mark.parametrize(
    ("key", "value", "kinds"),
    [
        ("eval.alpaca_eval.limit", 3, {"questions", "respond", "compare", "evaluate", "overlap"}),
        ("eval.alpaca_eval.temperature", 0.1, {"respond", "compare", "evaluate"}),
        ("eval.alpaca_eval.max_new_tokens", 5, {"respond", "compare", "evaluate"}),
        ("eval.alpaca_eval.evaluator", "weighted_alpaca_eval_gpt-4o-mini-2024-07-18", {"compare", "evaluate"}),
        ("eval.arena_hard.limit", 3, {"questions", "respond", "compare", "evaluate", "overlap"}),
        ("eval.arena_hard.temperature", 0.1, {"respond", "compare", "evaluate"}),
        ("eval.arena_hard.max_new_tokens", 5, {"respond", "compare", "evaluate"}),
        ("eval.arena_hard.version", "v2.0", {"compare", "evaluate"}),
        ("eval.judged", "all", {"compare", "evaluate"}),
        ("eval.turns", 3, {"respond", "compare", "evaluate"}),
    ],
)
def test_a_judged_benchmarks_settings_make_its_own_stages_new(key: str, value: Any, kinds: set[str]) -> None:
    base = composed(*JUDGED, "annotator.url=http://here/v1")
    known, new = set(ids(config.load(base))), set(ids(changed(base, **{key: value})))
    assert {one.split("/")[0] for _, one in known - new} == kinds


@pytest.mark.parametrize(
    ("override", "kinds"),
    [
        ("eval.harness.shots=3", {"questions", "respond", "evaluate", "overlap"}),
        ("eval.harness.chat=false", {"questions", "respond", "evaluate", "overlap"}),
        ("eval.harness.limit=3", {"questions", "respond", "evaluate", "overlap"}),
        ("eval.harness.temperature=0.5", {"respond", "evaluate"}),
        ("eval.harness.max_new_tokens=7", {"respond", "evaluate"}),
    ],
)
def test_a_tasks_settings_make_its_own_stages_new(tmp_path: Path, override: str, kinds: set[str]) -> None:
    file = tmp_path / "test.jsonl"
    for name in (file, tmp_path / "train.jsonl"):
        name.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    given = ("debug=fast", "eval.benchmarks=[gsm8k]", f"eval.harness.data.gsm8k={file}")
    known, new = set(ids(load(*given))), set(ids(load(*given, override)))
    assert {one.split("/")[0] for _, one in known - new} == kinds


@pytest.mark.parametrize("benchmark", ["alpaca_eval", "gsm8k"])
def test_picks_add_their_own_stages_and_touch_no_others(tmp_path: Path, benchmark: str) -> None:
    for name in ("test.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    task = "harness" if benchmark == "gsm8k" else benchmark
    several = ("strategy@eval.test_time=parallel", f"eval.{task}.pick=[best]")
    given = ("debug=fast", f"eval.benchmarks=[{benchmark}]", f"eval.harness.data.gsm8k={tmp_path / 'test.jsonl'}")

    def stages(*more: str) -> set[tuple[str, str]]:
        return set(ids(load(*given, "filter=reward_model", *more)))

    def kinds(some: set[tuple[str, str]]) -> set[str]:
        return {one.split("/")[0] for _, one in some}

    without, picked = stages(), stages(*several)
    assert without == stages("strategy@eval.test_time=parallel", "eval.test_time.answers=3")
    assert kinds(without - picked) == {"evaluate"}
    judged = {"pick", "compare"} if benchmark == "alpaca_eval" else set()
    assert kinds(picked - without) == {"respond", "score", "evaluate"} | judged
    for change in ("eval.test_time.answers=3", "eval.temperature=0.3", "eval.seed=1"):
        assert {"respond", "score", "evaluate"} | judged <= kinds(picked - stages(*several, change)), change
    # Multiple choice has nothing to pick.
    choices = ("eval.benchmarks=[arc_easy]", f"+eval.harness.data.arc_easy={tmp_path / 'test.jsonl'}")
    assert stages(*choices) == stages(*choices, *several)


def test_a_vote_makes_no_answers_new(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    given = ("debug=fast", "eval.benchmarks=[math500]", f"eval.harness.data.math500={file}", "filter=reward_model")
    given += ("strategy@eval.test_time=parallel",)
    known, new = (set(ids(load(*given, f"eval.harness.pick=[{pick}]"))) for pick in ("best", "best,majority"))
    assert {one.split("/")[0] for _, one in known - new} == {"evaluate"}
    assert new == set(ids(load(*given, "eval.harness.pick=[majority,best]")))
    only = ids(load(*given, "eval.harness.pick=[majority]", "filter=rule"))
    assert not [one for _, one in only if one.startswith("reward_model/")]  # nobody scores


def test_a_tasks_examples_are_part_of_its_questions(tmp_path: Path) -> None:
    for name in ("test.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    given = ("debug=fast", "eval.benchmarks=[gsm8k]", f"eval.harness.data.gsm8k={tmp_path / 'test.jsonl'}")

    def questions(*more: str) -> list[str]:
        found = plan.build("member", load(*given, *more), sources.Resolver(None)).steps
        return [step.stage.id for step in found if step.stage.kind == "questions"]

    shown, unshown = questions(), questions("eval.harness.shots=0")
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "2 + 1?", "answer": "#### 3"}) + "\n")
    assert questions() != shown and questions("eval.harness.shots=0") == unshown
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"shows 5 examples.*train.jsonl.*eval.harness.shots=0"):
        questions()


def test_an_unknown_benchmark_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"eval.benchmarks: gsm8q: no such .*gsm8k.*refinement, test_time, drift, alpaca_eval"
    ):
        plan.build("member", load("eval.benchmarks=[gsm8q]"), RESOLVER)


def test_a_judge_decides_the_scores_it_gives() -> None:
    base = composed("debug=fast", "filter=judge", "judge=policy")
    known = ids(config.load(base))
    runtime = {
        "judge.name": "x",
        "judge.prompt.name": "x",
        "judge.engine.batch_size": 3,
        "judge.engine.processes": 2,
        "judge.engine.memory_share": 0.5,
    }
    decisive = {
        "judge.prompt.text": "{prompt} {response}",
        "judge.highest": 10,
        "judge.samples": 2,
        "judge.temperature": 0.5,
        "judge.max_new_tokens": 9,
        "judge.max_length": 999,
        "judge.model": base["model"]["path"],
        "judge.engine.max_length": 998,
        "seed": 1,
    }
    assert ids(changed(base, **runtime)) == known
    for key, value in decisive.items():
        other = ids(changed(base, **{key: value}))
        assert [phase for phase, _ in other] == [phase for phase, _ in known]
        assert other != known, key


def test_the_policy_judges_its_own_answers() -> None:
    member = plan.build("member", load("debug=fast", "filter=judge", "judge=policy", "iteration.count=2"), RESOLVER)
    judged = [step.stage for step in member.steps if "judge" in step.stage.inputs]
    assert len(judged) == 2
    for score in judged:
        answers = score.inputs["answers"]
        assert isinstance(answers, Stage)
        assert score.inputs["judge"].id == answers.inputs["model"].id


@given(st.floats(0, 1))
@hypothesis_settings(max_examples=30, deadline=None)
def test_alpha_belongs_to_preference_training(alpha: float) -> None:
    base, other = config.load(BASES[0]), changed(BASES[0], **{"loss.alpha": alpha})
    assert ids_of(other, "activate") == ids_of(base, "activate")
    assert (ids_of(other, "train") == ids_of(base, "train")) == (alpha == base.loss.alpha)


PREFERENCE = {
    "loss.direct": st.sampled_from(["dpo", "ipo", "simpo", "sppo", "srpo"]),
    "loss.lengths": st.sampled_from(["sum", "mean"]),
    "loss.gamma": st.floats(0, 3),
    "loss.alpha": st.floats(0, 1),
    "loss.beta_direct": st.floats(1e-3, 10),
    "loss.beta_refine": st.floats(1e-3, 10),
    "loss.refine_contexts": st.sampled_from(["both", "rejected"]),
    "loss.refine_scale": st.floats(0.1, 10),
    "loss.nll": st.floats(0, 2),
}
REWARDS = {"loss.policy_gradient": st.just(composed("loss=grpo")["loss"]["policy_gradient"])}
REFINE = ("loss.beta_refine", "loss.refine_contexts", "loss.refine_scale")
IDLE = {  # overrides -> settings that can't change what they give
    ("loss=none",): (*REFINE, "loss.gamma", *REWARDS),
    ("loss=ipo",): (*REFINE, "loss.gamma", *REWARDS),
    ("loss=simpo",): (*REFINE, *REWARDS),
    ("loss=srpo",): ("loss.gamma", *REWARDS),
    ("loss=pt", "loss.alpha=1"): ("loss.direct", "loss.lengths", "loss.gamma", "loss.beta_direct", *REWARDS),
    ("loss=sft_only",): (*PREFERENCE, *REWARDS),
}


@pytest.mark.parametrize("overrides", IDLE, ids=" ".join)
@given(data=st.data())
@hypothesis_settings(max_examples=15, deadline=None)
def test_idle_settings_of_a_loss_do_not_count(overrides: tuple[str, ...], data: st.DataObject) -> None:
    base = composed("debug=fast", *overrides)
    settings = {key: value for key, value in {**PREFERENCE, **REWARDS}.items() if key in IDLE[overrides]}
    assert ids(changed(base, **data.draw(st.fixed_dictionaries(settings)))) == ids(config.load(base))


@pytest.mark.parametrize(
    ("loss", "key", "value"),
    [
        ("none", "loss.direct", "ipo"),
        ("none", "loss.lengths", "mean"),
        ("none", "loss.nll", 1.0),
        ("simpo", "loss.gamma", 0.5),
        ("simpo", "loss.beta_direct", 0.5),
        ("srpo", "loss.direct", "dpo"),
    ],
)
def test_settings_of_a_loss_count_for_preference_training(loss: str, key: str, value: Any) -> None:
    base = composed("debug=fast", f"loss={loss}")
    one, other = config.load(base), changed(base, **{key: value})
    assert ids_of(one, "activate") == ids_of(other, "activate")
    assert not set(ids_of(one, "train")) & set(ids_of(other, "train"))


REFERENCES = {  # overrides -> whose log-probabilities under the reference model are needed
    ("loss=none",): {"direct"},
    ("loss=rpo",): {"direct"},
    ("loss=ipo",): {"direct"},
    ("loss=sppo",): {"direct"},
    ("loss=simpo",): set(),
    ("loss=simpo", "loss.nll=1"): set(),
    ("loss=simpo", "loss.alpha=0.5"): {"refine"},
    ("loss=both",): {"direct", "refine"},
    ("loss=pt", "loss.alpha=1"): {"refine"},
    ("loss=pt", "loss.alpha=1", "loss.nll=1"): {"refine"},
    ("loss=srpo",): {"direct", "refine"},
    ("loss=srpo", "loss.alpha=0"): {"direct", "refine"},
}


@pytest.mark.parametrize("overrides", REFERENCES, ids=" ".join)
def test_references_are_made_of_what_the_loss_needs(overrides: tuple[str, ...]) -> None:
    steps = plan.build("member", load("debug=fast", *overrides), RESOLVER).steps
    made = {step.stage.config.contexts for step in steps if step.stage.kind == "reference"}
    assert made == REFERENCES[overrides]
    for step in steps:
        if step.stage.kind == "train":
            given = {name.split("_")[1] for name in step.stage.inputs if name.startswith("reference_")}
            assert given == made
            assert step.stage.config.starts_at_reference == bool(made)


def test_without_a_reference_its_choice_is_idle() -> None:
    for loss, same in (("simpo", True), ("none", False)):
        one, other = (
            load("debug=fast", f"loss={loss}", f"iteration.reference={name}") for name in ("previous", "initial")
        )
        assert (ids(one) == ids(other)) == same


def test_betas_go_with_the_model() -> None:
    def betas(*overrides: str) -> tuple[float, float]:
        loss = load(*overrides).loss
        return loss.beta_direct, loss.beta_refine

    large = ("data=ultrafeedback", "model=llama31_8b")
    assert betas() == (0.5, 0.5)
    assert betas(*large) == (0.1, 0.1)
    assert betas("model.beta=0.3") == betas("model.beta=0.3", "loss=pt") == (0.3, 0.3)
    assert betas("loss.beta_direct=0.3") == (0.3, 0.5)
    assert betas(*large, "loss.beta_refine=0.3") == (0.1, 0.3)
    assert betas("loss=simpo") == (2.0, 0.5)
    assert betas("loss=simpo", "model.beta=0.3") == (2.0, 0.3)


@pytest.mark.parametrize("file", sorted((CONF / "loss").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_loss_states_no_more_than_it_changes(file: Path) -> None:
    stated = yaml.safe_load(file.read_text())
    if file.stem == "both":
        assert stated.keys() == config.Loss.model_fields.keys()
        return
    parent, own = stated.pop("defaults")
    assert own == "_self_" and stated["name"] == file.stem
    inherited, changes = leaves(composed(f"loss={parent}")["loss"]), leaves(stated)
    assert {key: value for key, value in changes.items() if inherited.get(key, "absent") == value} == {}
    if "policy_gradient" in stated:  # a section where the parent may have null
        inherited.pop("policy_gradient", None)
    assert leaves(composed(f"loss={file.stem}")["loss"]) == {**inherited, **changes}


def test_losses_share_what_they_can() -> None:
    members = {loss: load("debug=fast", f"loss={loss}") for loss in ("none", "sft", "pt", "both", "sft_only")}
    shared = {loss: ids_of(member, "activate") for loss, member in members.items()}
    assert shared["sft"] == shared["both"] == shared["sft_only"] != shared["none"] == shared["pt"]
    assert len({*(tuple(ids_of(members[loss], "train")) for loss in ("none", "sft", "pt", "both"))}) == 4


def stages(member: Config, kind: str) -> list[Stage]:
    return [step.stage for step in plan.build("member", member, RESOLVER).steps if step.stage.kind == kind]


def test_rewards_take_the_place_of_pairs() -> None:
    """The same activation and the same prompts as the losses on pairs, and no offline training."""
    member = load("debug=fast", "loss=grpo", "iteration.count=2")
    phases: dict[str, list[str]] = {}
    for phase, stage_id in ids(member):
        phases.setdefault(phase, []).append(stage_id.split("/")[0])
    assert list(phases) == ["setup", "base", "sft", "iteration 1", "iteration 2"]
    assert phases["iteration 1"] == phases["iteration 2"] == ["data", "reinforce", "respond", "score", "evaluate"]
    pairs = load("debug=fast", "loss=none", "iteration.count=2")
    assert ids_of(member, "activate") == ids_of(pairs, "activate")
    prompts = {stage.inputs["prompts"].id for stage in stages(member, "reinforce")}
    assert prompts < {stage.inputs["prompts"].id for stage in stages(pairs, "respond")} and len(prompts) == 2


@pytest.mark.parametrize("start", ["previous", "initial", "post_sft"])
@pytest.mark.parametrize("reference", ["previous", "initial", "post_sft"])
def test_rewards_start_and_refer_where_iterations_do(start: str, reference: str) -> None:
    member = load(
        "debug=fast", "loss=grpo", "iteration.count=2", f"iteration.start={start}", f"iteration.reference={reference}"
    )
    first, second = stages(member, "reinforce")
    sft, *_ = stages(member, "activate")
    models = {"previous": first.id, "initial": sft.inputs["model"].id, "post_sft": sft.id}
    assert second.inputs["model"].id == models[start]
    # Where it starts at its reference, it need not be told of it; nor where there is no KL term.
    named = second.inputs.get("reference")
    assert (named.id if named else None) == (models[reference] if start != reference else None)
    without = load("debug=fast", "loss=dapo", "iteration.count=2", f"iteration.reference={reference}")
    assert all("reference" not in stage.inputs for stage in stages(without, "reinforce"))


def test_what_makes_pairs_does_not_touch_rewards() -> None:
    base = composed("debug=fast", "loss=grpo")
    known = ids_of(config.load(base), "reinforce")
    assert ids_of(load("debug=fast", "loss=grpo", "strategy=tree"), "reinforce") == known
    for key, value in {
        "filter.margin": 0.5,
        "filter.select": "last_first",
        "iteration.data": "all",
        "loss.alpha": 0.5,
        "loss.beta_direct": 2.0,
        "trainer.epochs": {"sft": 1, "pt": 7},
    }.items():
        assert ids_of(changed(base, **{key: value}), "reinforce") == known, key
    for key, value in {
        "strategy.answers": 5,
        "filter.unfinished": "keep",
        "sampling.top_p": 0.5,
        "model.learning_rate.pt": 1e-3,
        "data.max_response_tokens": 11,
        "seed": 1,
        "loss.policy_gradient.loss_type": "dr_grpo",
        "loss.policy_gradient.importance": "sequence",
        "loss.policy_gradient.clip_low": 0.1,
        "loss.policy_gradient.clip_high": 0.3,
        "loss.policy_gradient.kl": 0.1,
        "loss.policy_gradient.updates": 3,
        "loss.policy_gradient.scale_rewards": "batch",
    }.items():
        assert not set(ids_of(changed(base, **{key: value}), "reinforce")) & set(known), key


def test_rewards_of_a_reward_model_need_one() -> None:
    member = load("debug=fast", "loss=grpo", "filter=reward_model")
    assert member.trains_reward_model and member.trained_iterations == 1
    (trained,) = stages(member, "reward_model")
    assert [stage.inputs["reward_model"].id == trained.id for stage in stages(member, "reinforce")] == [True]
    assert not load("loss=grpo", "filter=reward_model", "iteration.count=0").trains_reward_model


def word_problems_in(folder: Path) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in word_problems.rows(400, 0)))
    return f"data.path={file}"


def test_a_reward_model_makes_no_slice_new(tmp_path: Path) -> None:
    """A plan that has counted a file's rows knows that the reward model's are nobody else's."""
    base = ("debug=fast", "data=word_problems", word_problems_in(tmp_path))
    without, trained = (load(*base, f"filter={name}") for name in ("verifier", "reward_model"))
    assert trained.trains_reward_model and not without.trains_reward_model
    assert set(ids_of(without, "data")) < set(ids_of(trained, "data"))
    assert ids_of(without, "activate") == ids_of(trained, "activate")


def test_slices_that_no_plan_can_count_leave_the_reward_models_rows_out(tmp_path: Path) -> None:
    base = ("debug=fast", "data=word_problems", word_problems_in(tmp_path), "filter=reward_model")
    os.truncate(tmp_path / "rows.jsonl", 101 * 2**20)
    tails = {(stage.config.pool, stage.config.tail) for stage in stages(load(*base), "data")}
    assert tails == {("eval", 0), ("pairs", 32), ("prompts", 32)}


def test_a_plan_counts_no_row_whose_prompt_is_held_out(tmp_path: Path) -> None:
    """Those of 400 that a file of held-out prompts has, too, are trained on by nobody."""
    path, held_out = word_problems_in(tmp_path), tmp_path / "held_out.jsonl"
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[:100]))
    data = load("debug=fast", "data=word_problems", path, f"data.eval_path={held_out}").data
    assert RESOLVER.usable(data) == (300, 300)
    RESOLVER.check_rows(data, trained=True, iterations=14, reward_model=False)  # 32 + 32 + 14 x 16 = 288
    with pytest.raises(ConfigError, match="has 300 usable rows"):
        RESOLVER.check_rows(data, trained=True, iterations=14, reward_model=True)


def test_answers_that_a_model_scores_on_the_way_need_its_gpu() -> None:
    """Also where a server makes them."""
    base = ("debug=fast", "engine=openai", "engine.url=http://x/v1", "engine.model=m", "eval.stop=score_drop")
    untrained = ("loss=none", "loss.pt=none", "loss.sft_direct=0")
    for scorer, gpus in (("reward_model", 1), ("verifier", 0)):
        found = stages(load(*base, *untrained, f"eval.scorer={scorer}", "reward_model.processes=3"), "respond")
        assert [stage.config.gpus for stage in found] == [gpus]
    (first, *_) = stages(load("debug=fast", *base[-1:], "eval.scorer=reward_model", "engine.processes=2"), "respond")
    assert first.config.gpus == 2


def test_tree_settings_belong_to_trees() -> None:
    assert ids(load("strategy.branching=3", "strategy.expand=every")) == ids(load())
    assert ids(load("strategy=tree", "strategy.branching=3")) != ids(load("strategy=tree"))


def test_chains_belong_to_the_chain() -> None:
    assert ids(load("strategy.chains=2")) != ids(load())
    assert ids(load("strategy=parallel", "strategy.chains=2")) == ids(load("strategy=parallel"))
    assert ids(load("strategy.depth=3")) == ids(load())


def test_a_seed_belongs_to_the_filter_that_draws() -> None:
    def pair(*overrides: str) -> list[dict[str, Any]]:
        return [stage.identity["config"] for stage in stages(load("debug=fast", *overrides), "pair")]

    assert pair("filter=best_random") != pair("filter=best_random", "seed=1")
    assert pair("filter=all_pairs") == pair("filter=all_pairs", "seed=1")
    assert pair() == pair("seed=1")


def test_benchmarks_add_their_own_stages_and_touch_no_others() -> None:
    one, both = load("debug=fast"), load("debug=fast", "eval=test_time", "eval.select=verifier")
    assert set(ids(one)) < set(ids(both))
    assert both.uses_reward_model is False and load("eval=test_time").uses_reward_model is True
    member = plan.build("member", both, RESOLVER)
    phases = ["base", "sft", "offline", "iteration 1"]
    expected = [(phase, name) for phase in phases for name in ("refinement", "test_time")]
    assert list(member.evaluations) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval.test_time.answers", 16),
        ("eval.test_time.chains", 2),
        ("eval.select", "reward_model"),
        ("eval.temperature", 0.3),
        ("eval.seed", 1),
    ],
)
def test_settings_of_test_time_change_its_evaluations_alone(key: str, value: Any) -> None:
    base = composed("debug=fast", "eval=test_time", "strategy@eval.test_time=chain", "eval.select=verifier")
    one, other = config.load(base), changed(base, **{key: value})
    assert ids_of(one, "train") == ids_of(other, "train")

    def evaluations(member: Config, benchmark: str) -> set[str]:
        found = plan.build("member", member, RESOLVER).evaluations
        return {stage.id for (_, name), stage in found.items() if name == benchmark}

    assert not evaluations(one, "test_time") & evaluations(other, "test_time")
    same = evaluations(one, "refinement") == evaluations(other, "refinement")
    assert same == (not key.startswith(("eval.temperature", "eval.seed")))


def test_an_end_by_score_needs_the_scorer_of_evaluation() -> None:
    def answering(*overrides: str) -> list[Stage]:
        member = plan.build("member", load("debug=fast", *overrides), RESOLVER)
        evaluated = [stage.inputs["answers"] for stage in member.evaluations.values()]
        return [stage for stage in evaluated if isinstance(stage, Stage)]

    (first, *_) = answering("eval.stop=score_drop", "filter=rule")
    assert first.config.scorer.scorer == "verifier" and "reward_model" not in first.inputs
    (first, *_) = answering("eval.stop=score_drop", "filter=rule", "eval.scorer=reward_model")
    assert first.config.scorer.scorer == "reward_model" and "reward_model" in first.inputs
    (first, *_) = answering("eval.stop=unchanged")
    assert first.config.scorer is None and first.config.strategy.stop == "unchanged"


def test_content_counts_not_its_path(tmp_path: Path) -> None:
    template = tmp_path / "mine.txt"
    template.write_text(composed()["template"]["text"])
    same = load(f"template.path={template}")
    trained = [stage_id for _, stage_id in ids(same) if not stage_id.startswith("evaluate/")]
    assert trained == [stage_id for _, stage_id in ids(load()) if not stage_id.startswith("evaluate/")]
    template.write_text(template.read_text() + "!")
    other = config.load({**composed(), "template": {**composed()["template"], "path": str(template)}})
    assert ids_of(other, "activate") != ids_of(same, "activate")


if __name__ == "__main__":
    DEFAULTS.write_text(default_config())
    print(f"wrote {DEFAULTS}")
