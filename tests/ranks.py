"""What test_parallel.py runs: `python ranks.py JOBS`, in one process or, under torchrun, in several.

A job is (mode, method, arguments of the command line). All in one process group, in turn: to start processes
takes longer than what they do."""

import json
import sys

import torch
from conftest import toy_task
from test_methods import launch

import common
import models
import parallel
import run
import tasks

PLAN, CLIP, SUMMED = models.plan, parallel.clip, parallel.summed


def without_room(*inputs) -> tuple[bool, bool]:
    """A plan where the layers do not fit all at once: every forward of a rollout gathers them."""
    return PLAN(*inputs)[0], False


def averaged(network: torch.nn.Module, max_norm: float) -> float:
    """What DistributedDataParallel does: wrong, for the normaliser is the whole batch's."""
    for p in network.parameters():
        p.grad /= parallel.world()
    return CLIP(network, max_norm)


def not_finite(network: torch.nn.Module, max_norm: float) -> float:
    """In the first step, one number of one rank's shard."""
    if parallel.rank() == 1 and not hasattr(network, "stepped"):
        next(network.parameters()).grad.to_local()[0, 0] = torch.nan
    network.stepped = True
    return CLIP(network, max_norm)


def one_share(values, op: str = "sum"):
    """Scores that every rank keeps for itself."""
    return values if isinstance(values, torch.Tensor) else SUMMED(values, op)


def main():
    def task(name, **_):
        toy = toy_task([*(f"{'123456789'[:1 + i % 4]}{i}=" for i in range(10))])
        toy.test = toy.train[:7]
        return toy

    run.tiny_task, tasks.find, tasks.load = lambda folder: "toy", lambda name: None, task
    common.LOGITS = 256  # the head in parts, each computed again in backward
    for mode, method, argv in json.loads(sys.argv[1]):
        models.plan = without_room if mode == "in step" else PLAN
        parallel.clip = {"averaged": averaged, "not finite": not_finite}.get(mode, CLIP)
        run.Run.summed = staticmethod(one_share if mode == "own scores" else SUMMED)
        launch(method, *argv, *(["--shard"] if mode in ("whole", "in step", "not finite") else []))


if __name__ == "__main__":
    main()
