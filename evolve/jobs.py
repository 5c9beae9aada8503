"""Stages -> jobs of a cluster: a few stages that run one after another, with the same resources.

    respond -> score -> pair -> reference, reference -> train        one job, where all of them want the same
    [respond] -> [score, pair] -> [reference, reference] -> [train]  where generating, scoring and training differ

A job whose results only one other job needs, and which wants the same as that one, is made part of it. So a job has one
stage that others build on, its last, and `afterok` between jobs says just what stages need of one another: where a
stage fails, nothing stops that could have run. Stages that take seconds and no GPU go with whichever neighbour. A stage
whose rows several jobs share begins a job. Slices of one data set that several jobs need are the exception: one job
makes them, and fails with any of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from evolve.config import ConfigError, Need, Resources
from evolve.store import Stage, digest


@dataclass(frozen=True)
class Job:
    """Stages in the order they run in, and what the job gets."""

    stages: tuple[Stage, ...]
    need: Need

    @cached_property
    def key(self) -> str:
        return digest([stage.id for stage in self.stages])[:16]

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Ids of the stages that it builds on and doesn't make."""
        own = {stage.id for stage in self.stages}
        return frozenset(item.id for stage in self.stages for item in stage.stages if item.id not in own)

    @property
    def shared(self) -> Stage | None:
        """The stage whose rows an array of jobs makes before this one: the first that takes time, where it can be."""
        first = next((stage for stage in self.stages if not stage.config.light), None)
        if self.need.shards == 1 or first is None or not first.config.SHARED:
            return None
        own = {stage.id for stage in self.stages}
        return None if any(item.id in own for item in first.stages) else first


def need(stage: Stage, resources: Resources) -> Need | None:
    """What a stage's job gets, the number of GPUs as well; None for one that goes with a neighbour.

    Raises ConfigError where its devices don't divide over the nodes that it is to run on.
    """
    assert resources.slurm is not None
    table = resources.slurm.needs
    if stage.config.light and stage.kind not in table:
        return None
    found = table.get(stage.kind, table["default"])
    if (devices := stage.config.ranks) % found.nodes:
        raise ConfigError(
            f"resources.slurm.needs.{stage.kind}.nodes={found.nodes}: trainer.devices={devices}, which is all of them "
            f"together, doesn't divide over so many nodes; take a multiple of {found.nodes}"
        )
    if found.gpus is not None:
        return found
    return found.model_copy(update={"gpus": 0 if resources.device == "cpu" else stage.config.gpus // found.nodes})


def group(stages: Iterable[Stage], resources: Resources) -> list[Job]:
    """Jobs for stages, both in an order where inputs come first. Inputs that aren't among the stages come from outside.

    The time limit of a job is the sum of its stages'.
    """
    assert resources.slurm is not None
    ordered = list(stages)
    place = {stage.id: number for number, stage in enumerate(ordered)}
    consumers: dict[str, set[str]] = defaultdict(set)
    for stage in ordered:
        for item in stage.stages:
            if item.id in place:
                consumers[item.id].add(stage.id)
    of = {stage.id: stage.id for stage in ordered}  # the stage that a stage's job ends with
    held: dict[str, list[Stage]] = {stage.id: [stage] for stage in ordered}
    wants = {stage.id: need(stage, resources) for stage in ordered}
    # The ends of jobs that begin with a stage whose rows an array shares.
    dealt = {stage.id for stage in ordered if stage.config.SHARED and (asked := wants[stage.id]) and asked.shards > 1}
    for stage in reversed(ordered):
        ends = {of[consumer] for consumer in consumers[stage.id]}
        if len(ends) != 1:
            continue
        [end] = ends
        mine, theirs = wants[stage.id], wants[end]
        if end in dealt:
            continue  # what it makes is to be there before the array that shares the work begins
        if mine is None or theirs is None or _alike(mine, theirs):
            of[stage.id] = end
            held[end].append(stage)
            wants[end] = theirs if mine is None else mine
            if stage.id in dealt:
                dealt.add(end)
            del held[stage.id], wants[stage.id]
    small = resources.slurm.needs["small"]
    # What many jobs need and takes seconds, of the same sources: together, or each would wait in the queue by itself.
    first: dict[frozenset[str], str] = {}
    for end, members in list(held.items()):
        if all(wants[end] is None and not item.stages for item in members):
            kept = first.setdefault(members[0].roots, end)
            if kept != end:
                held[kept] += held.pop(end)
    jobs = []
    for end, members in held.items():
        members.sort(key=lambda stage: place[stage.id])
        found = wants[end] or small
        minutes = sum(asked.minutes for stage in members if (asked := need(stage, resources))) or small.minutes
        most = resources.slurm.max_minutes or math.inf
        shards = next((asked.shards for stage in members if (asked := need(stage, resources))), 1)
        own = {"minutes": min(minutes, most), "shards": shards}
        jobs.append(Job(tuple(members), found.model_copy(update=own)))
    return jobs


def _alike(one: Need, other: Need) -> bool:
    own = {"minutes": 1, "shards": 1}
    return one.model_copy(update=own) == other.model_copy(update=own)


def after(jobs: Collection[Job]) -> dict[str, set[str]]:
    """By job's key: the keys of the jobs that it waits for."""
    maker = {stage.id: job.key for job in jobs for stage in job.stages}
    return {job.key: {maker[item] for item in job.inputs if item in maker} for job in jobs}
