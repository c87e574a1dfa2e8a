"""The one protocol of tuning: the same settings for every method, on Sudoku solutions kept out of RL.

Boards of 48 of the 228 training solutions are evaluated, those of the other 180 trained on; the held-out 60
are not looked at. Four settings span lr, G, minibatches and prompts, two seeds each. Every run has the same
CPU time on one thread, is then stopped by ctrl-C, and evaluated; one that is in results/tuning.jsonl is not
repeated.

python benchmarks/tune.py [jobs]        as many at a time; about 40 minutes with 2 on 2 cores
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
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
SETTINGS = [
    "--lr 1e-4 --G 8 --minibatches 4 --prompts 32", "--lr 1e-4 --G 16 --minibatches 4 --prompts 16",
    "--lr 2e-4 --G 8 --minibatches 2 --prompts 16", "--lr 2e-4 --G 16 --minibatches 2 --prompts 32",
]
SECONDS = 75  # of CPU time, with start-up and the evaluation before training (some 10)
FIXED = "--updates 10000 --eval_every 10000 --save_every 10000 --eval_rows 512 --eval_threshold 0"


def boards(folder: str) -> str:
    """Write both parts; returns the flags that name them."""
    grids = sudoku_split()[0]
    for part, chosen, count in ((0, grids[48:], 8192), (1, grids[:48], 512)):
        pairs = zip(*sudoku_puzzles(chosen, count, np.random.default_rng([3, part])), strict=True)
        rows = [{"puzzle": "".join(map(str, p)), "solution": "".join(map(str, s))} for p, s in pairs]
        Path(folder, f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--data {folder}/0.jsonl --test_data {folder}/1.jsonl"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launch(method: str, setting: str, seed: int, data: str, folder: str):
    """One run; its line is added to the results."""
    command = f"{METHODS[method]} {setting} {FIXED} --seed {seed}"
    out = Path(folder, command.replace(" ", ""))
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, *f"{command} {data} --out {out}".split()], **quiet)
    while process.poll() is None and cpu_seconds(process.pid) < SECONDS:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, command
    script = METHODS[method].split()[0]
    subprocess.run([sys.executable, script, "--resume", out, "--eval_only"], check=True, **quiet)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    after = json.loads((out / "evals.jsonl").read_text())["eval_accuracy"]
    kept = ("update", "seconds", "entropy", "equal_groups", "nfe_rollout", "nfe_rollout_full", "nfe_update",
            "nfe_update_full")
    row = {"method": method, "command": f"python {command}", "setting": setting, "seed": seed,
           "before": lines[0]["eval_accuracy"], "after": after, **{k: lines[-1][k] for k in kept},
           "commit": git_commit()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{method:10} {setting} {seed}: {after:.1%} after {row['update']} updates", flush=True)


def tune(jobs: int):
    rows = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else [])
    there = {(row["method"], row["setting"], row["seed"]) for row in rows}
    missing = [job for seed in (11, 12) for job in itertools.product(METHODS, SETTINGS, [seed])
               if job not in there]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        data = boards(folder)
        list(pool.map(lambda job: launch(*job, data, folder), missing))


if __name__ == "__main__":
    tune(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
