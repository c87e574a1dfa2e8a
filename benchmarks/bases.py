"""Where a tiny base lands: builds with other seeds, another order of the demonstrations, one and two threads.

python benchmarks/bases.py sudoku|countdown     some minutes a line; adds to results/bases.jsonl what it lacks
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

import pretrain  # noqa: E402
from run import git_commit  # noqa: E402
from tasks import load  # noqa: E402

RESULTS = ROOT / "results" / "bases.jsonl"
BUILDS = [(0, 0, 1), (0, 0, 2), (1, 0, 1), (2, 0, 1), (0, 1, 1)]  # seed, order (0: its own), threads


def build(settings: pretrain.Settings, order: int, threads: int) -> dict:
    """One base and what it solves of the validation and the held-out rows."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    model = pretrain.train(settings, np.random.default_rng([2, settings.seed, order]) if order else None)
    row = {"task": settings.task, "seed": settings.seed, "order": order, "threads": threads,
           "seconds": round(time.perf_counter() - begin)}
    for part in ("validation", "test"):
        rows = load(settings.task, chat=False, train=False, held_out=part)
        row[part] = pretrain.solved_share(model, rows, rows.test, pretrain.TINY[settings.task])
    return row | {"base": pretrain.base_path(settings).name, "commit": git_commit()}


if __name__ == "__main__":
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for seed, order, threads in BUILDS:
        settings = dataclasses.replace(pretrain.TINY[sys.argv[1]].settings, seed=seed)
        name = pretrain.base_path(settings).name
        if not any((row["base"], row["order"], row["threads"]) == (name, order, threads) for row in lines):
            row = build(settings, order, threads)
            with open(RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
