"""The one protocol of tuning: the same grid for every method, on Sudoku solutions kept out of RL.

Boards of 48 of the 228 training solutions are evaluated, those of the other 180 trained on; the held-out 60
are not looked at. The grid is a half of lr x G x minibatches x prompts, two levels each (of each pair of
factors all four combinations occur twice); seed 11 for all, then seed 12 for the three best of a method. A
run is a process with one thread; one that is in results/tuning.jsonl is not repeated.

python benchmarks/tune.py [jobs]        as many at a time; about 45 minutes with 2 on 2 cores
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from run import git_commit  # noqa: E402
from tasks import sudoku_puzzles, sudoku_split  # noqa: E402

RESULTS = ROOT / "results" / "tuning.jsonl"
METHODS = {
    "EGSPO-SA": "egspo.py", "RLDF": "rldf.py", "wd1": "wd1.py --passes 2",
    "wd1++": "wd1.py --plusplus --K 4 --passes 1", "GDSD logp": "gdsd.py", "GDSD tlc": "gdsd.py --match tlc",
}
GRID = [f"--lr {lr} --G {G} --minibatches {mb} --prompts {prompts}"
        for (i, lr), (j, G), (k, mb), (m, prompts) in itertools.product(
            enumerate(("1e-4", "2e-4")), enumerate((8, 16)), enumerate((2, 4)), enumerate((16, 32)))
        if (i + j + k + m) % 2 == 0]
FIXED = "--updates 80 --eval_every 16 --eval_rows 512 --eval_threshold 0 --save_every 1000"


def boards(folder: Path) -> str:
    """Write both parts; returns the flags that name them."""
    grids = sudoku_split()[0]
    for part, chosen, count in ((0, grids[48:], 8192), (1, grids[:48], 512)):
        pairs = zip(*sudoku_puzzles(chosen, count, np.random.default_rng([3, part])), strict=True)
        rows = [{"puzzle": "".join(map(str, p)), "solution": "".join(map(str, s))} for p, s in pairs]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--data {folder}/0.jsonl --test_data {folder}/1.jsonl"


def done() -> dict[str, dict]:
    """The runs there are, by command."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["command"]: row for row in map(json.loads, lines)}


def launch(method: str, grid: str, seed: int, data: str, folder: Path):
    """One run; its line is added to the results."""
    command = f"{METHODS[method]} {grid} {FIXED} --seed {seed}"
    out = folder / command.replace(" ", "")
    argv = [sys.executable, *f"{command} {data} --out {out}".split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(argv, cwd=ROOT, env=env, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [[row["update"], round(100 * row["eval_accuracy"], 1)] for row in lines if "eval_reward" in row]
    last = [line for line in lines if "loss" in line][-1]
    costs = {k: last[k] for k in last if k.startswith("nfe") or k in ("seconds", "entropy", "equal_groups")}
    row = {"method": method, "command": f"python {command}", "seed": seed, "curve": curve, **costs,
           "commit": git_commit()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{method:10} {grid} {seed}: {curve[0][1]} -> {curve[-1][1]}, {last['seconds']:.0f} s", flush=True)


def tune(jobs: int):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        data = boards(Path(folder))

        def run_all(wanted: list[tuple[str, str, int]]):
            there = done()
            missing = [job for job in wanted
                       if f"python {METHODS[job[0]]} {job[1]} {FIXED} --seed {job[2]}" not in there]
            list(pool.map(lambda job: launch(*job, data, Path(folder)), missing))

        run_all([(method, grid, 11) for grid in GRID for method in METHODS])
        best = []
        for method in METHODS:
            rows = [row for row in done().values() if row["method"] == method and row["seed"] == 11]
            rows.sort(key=lambda row: -row["curve"][-1][1])
            best += [(method, grid, 12) for row in rows[:3] for grid in GRID if f" {grid} " in row["command"]]
        run_all(best)


if __name__ == "__main__":
    tune(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
