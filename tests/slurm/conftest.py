"""What the tests on a real Slurm share: they are marked `cluster`, and skip themselves where there can be none."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .cluster import Cluster
from .install import Unavailable


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")
    items.sort(key=lambda item: item.path.name != "test_sweeps.py")  # the longest first, so that none is left alone


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Three nodes of four CPUs and two GPUs, without accounting; idle at each test's start."""
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def tidy(request) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").reset()


@pytest.fixture
def make_cluster(tmp_path_factory) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster of the test's own with Cluster's keywords; it stops when the test ends."""
    with ExitStack() as clusters:
        yield lambda **settings: clusters.enter_context(running(tmp_path_factory.mktemp("slurm"), **settings))


@contextmanager
def running(logs: Path, **settings) -> Iterator[Cluster]:
    with ExitStack() as started:
        try:
            cluster = started.enter_context(Cluster(logs, **settings))
        except Unavailable as reason:
            pytest.skip(f"no Slurm here: {reason}")
        yield cluster
