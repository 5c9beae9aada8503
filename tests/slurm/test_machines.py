"""What a partition has, as sinfo says it."""

import pytest

from evolve import simulate


def test_machines_are_those_of_the_partition_that_are_in_order(cluster, monkeypatch: pytest.MonkeyPatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    node = (cluster.gpus, cluster.cpus, cluster.memory)
    assert simulate.machines({None}) == simulate.machines({"low", "main"}) == [node] * len(cluster.nodes)
    assert simulate.machines({"moon"}) == []
    cluster.run("scontrol", "update", f"NodeName={cluster.nodes[0]}", "State=DOWN", "Reason=test")
    try:
        assert simulate.machines({"low"}) == [node] * (len(cluster.nodes) - 1)
    finally:
        cluster.run("scontrol", "update", f"NodeName={cluster.nodes[0]}", "State=RESUME")
