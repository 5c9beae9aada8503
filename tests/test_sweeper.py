"""The sweeper's members: composed together, and each as Hydra alone would compose it."""

from __future__ import annotations

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from evolve import config
from evolve.config import CONF
from hydra_plugins.evolve_harness import compose

SWEEPS = {
    "values": [[f"seed={seed}", f"loss.alpha={alpha}"] for seed in (0, 1) for alpha in (0.5, 0.8)],
    "choices and values": [[f"seed={seed}", one, "loss=sft"] for seed in (0, 1) for one in ("filter=rule", "loss=pt")],
    "what others take over": [["model.beta=0.3"], ["model.beta=0.1"], ["model.beta=0.2", "loss.beta_direct=1"]],
    "lists and null": [[f"eval.benchmarks={names}", "wandb.entity=null"] for names in ("[refinement]", "[]")],
    "sections": [["sampling={temperature: 0.5}"], ["sampling={top_k: 5}"], ["sampling.top_k=4"]],
    "other keys": [["seed=1"], ["data.seed=2"], ["seed=3"], [], ["data.seed=4"]],
    "added": [["++seed=1"], ["++seed=2"]],
    "an overlay": [["experiment=filters", f"filter={name}"] for name in ("rule", "all_pairs")],
    "a part that was null": [["eval=test_time", f"eval.test_time.answers={count}"] for count in (3, 4)],
}


@pytest.fixture(scope="module")
def context():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())


@pytest.fixture(scope="module")
def base(context):
    return context.config_loader.load_configuration("config", [], RunMode.MULTIRUN)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_members_are_what_hydra_composes(context, base, sweep):
    alone = []
    for job in SWEEPS[sweep]:
        whole = OmegaConf.to_container(context.config_loader.load_sweep_config(base, job), resolve=False)
        whole.pop("hydra")
        alone.append(config.load(OmegaConf.create(whole)))
    made = compose(context, base, SWEEPS[sweep])
    assert made == alone
    assert len({str(one) for one in made}) > 1


def test_a_later_member_that_is_wrong_is_refused_as_hydra_refuses_it(context, base):
    with pytest.raises(ConfigCompositionException, match=r"loss\.alph"):
        compose(context, base, [["loss.alpha=0.5"], ["loss.alph=0.5"]])
