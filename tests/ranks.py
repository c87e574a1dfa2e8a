"""What test_plumbing_parallel.py runs: `python ranks.py JOBS`, in one process or, under torchrun, in several.

A job is (mode, method, arguments of the command line). All in one process group, in turn: to start processes
takes longer than what they do."""

import dataclasses
import json
import sys

import torch
import torch.distributed.fsdp
from helpers import launch, toy_task

import common
import tasks
from plumbing import flags, models, parallel, run
from plumbing.parallel import Replicated, Sharded

PLAN, CLIP, CLIP_SHARDS, TOTAL = (
    models.plan, Replicated.clip_gradient, Sharded.clip_gradient, Replicated.total)
SPREAD, POLICY = parallel.spread, torch.distributed.fsdp.MixedPrecisionPolicy


def without_room(*inputs) -> tuple[bool, bool]:
    """A plan where the layers do not fit all at once: every forward of a rollout gathers them."""
    return PLAN(*inputs)[0], False


def averaged(model: Replicated, max_norm: float) -> float:
    """What DistributedDataParallel does: wrong, for the normaliser is the whole batch's."""
    for p in model.network.parameters():
        p.grad /= parallel.world()
    return CLIP(model, max_norm)


def not_finite(model: Sharded, max_norm: float) -> float:
    """In the first step, one number of one rank's shard."""
    if parallel.rank() == 1 and not hasattr(model.network, "stepped"):
        next(model.network.parameters()).grad.to_local()[0, 0] = torch.nan
    model.network.stepped = True
    return CLIP_SHARDS(model, max_norm)


def one_share(model: Replicated, values):
    """Scores that every rank keeps for itself."""
    return values if isinstance(values, torch.Tensor) else TOTAL(model, values)


def in_bf16(model: common.Denoiser, *inputs) -> common.Denoiser:
    """A model whose matrix products are in bf16, as on CUDA."""
    return SPREAD(dataclasses.replace(model, bf16=True), *inputs)


def bf16_policy(**options):
    """Layers are gathered in bf16, as on CUDA."""
    return POLICY(**options | {"param_dtype": torch.bfloat16})


def main():
    def task(name, **_):
        toy = toy_task([*(f"{'123456789'[:1 + i % 4]}{i}=" for i in range(10))])
        toy.test = toy.train[:7]
        return toy

    flags.tiny_task, tasks.find, tasks.load = lambda folder: "toy", lambda name: None, task
    common.LOGITS = 256  # the head in parts, each computed again in backward
    run.plot = lambda *_: None  # it would take a third of the time
    for name, method, argv in json.loads(sys.argv[1]):
        bf16, mode = name.endswith(", bf16"), name.removesuffix(", bf16")
        parallel.spread = in_bf16 if bf16 else SPREAD
        torch.distributed.fsdp.MixedPrecisionPolicy = bf16_policy if bf16 else POLICY
        models.plan = without_room if mode == "in step" else PLAN
        Replicated.clip_gradient = averaged if mode == "averaged" else CLIP
        Sharded.clip_gradient = not_finite if mode == "not finite" else CLIP_SHARDS
        Replicated.total = one_share if mode == "own scores" else TOTAL
        launch(method, *argv, *(["--shard"] if mode in ("whole", "in step", "not finite") else []))


if __name__ == "__main__":
    main()
