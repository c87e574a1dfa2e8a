"""Where a tiny base lands: builds with other seeds, another order of the demonstrations, one and two threads.

python benchmarks/bases.py sudoku|countdown     some minutes a line; adds to results/bases.jsonl what it lacks
python benchmarks/bases.py keep                 the cached bases, in half precision, to results/bases

Kept because the same settings make other weights on another CPU, and all runs of a table have to start from
the same.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import BASES, base_digest, processor  # noqa: E402
from plumbing import pretrain  # noqa: E402
from plumbing.models import load_model, save_model  # noqa: E402
from plumbing.run import git_commit  # noqa: E402
from tasks import load  # noqa: E402

RESULTS = ROOT / "results" / "bases.jsonl"
BUILDS = [(0, 0, 1), (0, 0, 2), (1, 0, 1), (2, 0, 1), (0, 1, 1)]  # seed, order (0: its own), threads


def solved(model, task: str) -> dict:
    """What a base solves of the validation and the held-out rows."""
    found = {}
    for part in ("validation", "test"):
        rows = load(task, chat=False, train=False, held_out=part)
        found[part] = pretrain.solved_share(model, rows, rows.test, pretrain.TINY[task])
    return found | {"machine": processor(), "commit": git_commit()}


def build(settings: pretrain.Settings, order: int, threads: int) -> dict:
    """Build a base; its line."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    model = pretrain.train(settings, np.random.default_rng([2, settings.seed, order]) if order else None)
    row = {"task": settings.task, "seed": settings.seed, "order": order, "threads": threads,
           "seconds": round(time.perf_counter() - begin), "base": pretrain.base_path(settings).name}
    return row | solved(model, settings.task)


def keep(task: str) -> dict:
    """Put the cached base into results/bases; its line."""
    model = load_model(str(pretrain.base_folder(pretrain.TINY[task].settings)))
    model.network.half()
    save_model(model, BASES / task)
    (BASES / task / "model.safetensors").chmod(0o644)
    return {"task": task, "kept": base_digest(task)} | solved(load_model(str(BASES / task)), task)


def add(row: dict):
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        for task in pretrain.TINY:
            add(keep(task))
        sys.exit()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for seed, order, threads in BUILDS:
        settings = dataclasses.replace(pretrain.TINY[sys.argv[1]].settings, seed=seed)
        wanted = (pretrain.base_path(settings).name, order, threads)
        if not any((row.get("base"), row.get("order"), row.get("threads")) == wanted for row in lines):
            add(build(settings, order, threads))
