"""The one protocol of tuning: the same settings for every method, on validation rows, in two rounds.

Validation rows: their Sudoku solutions and Countdown problems are in neither RL's nor the base's training
data; held-out rows are not looked at. Five settings span lr, G, minibatches and prompts. First all of them
for a minute, which misleads about what lasts and is too short for large batches; so then each method's best
two and what it had before, with another seed, for as long as a default run takes. Time is that of one CPU
thread. A run starts from results/bases, is stopped by ctrl-C when its time is up, and evaluated; one that is
in results/tuning.jsonl is not repeated.

python benchmarks/tune.py sudoku|countdown [jobs]        as many at a time; an hour with 2 on 2 cores
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import BASES, base_digest  # noqa: E402
from plumbing.run import git_commit  # noqa: E402
from tasks import find  # noqa: E402

RESULTS = ROOT / "results" / "tuning.jsonl"
METHODS = {
    "EGSPO-SA": "egspo.py", "RLDF": "rldf.py", "wd1": "wd1.py --passes 2",
    "wd1++": "wd1.py --plusplus", "GDSD": "gdsd.py", "GDSD-TLC": "gdsd.py --match tlc",
    "diffu-GRPO": "baselines/diffu_grpo.py --passes 2", "ESPO": "baselines/espo.py",
    "JustGRPO": "baselines/just_grpo.py",
}
SETTINGS = [
    "--lr 1e-4 --G 8 --minibatches 4 --prompts 32", "--lr 1e-4 --G 16 --minibatches 4 --prompts 16",
    "--lr 2e-4 --G 8 --minibatches 2 --prompts 16", "--lr 2e-4 --G 16 --minibatches 2 --prompts 32",
    "--lr 3e-5 --G 8 --minibatches 4 --prompts 32",
]
BEFORE = {
    "sudoku": {
        "EGSPO-SA": "--lr 1e-4 --G 16 --minibatches 4 --prompts 32", "RLDF": SETTINGS[3],
        "wd1": "--lr 3e-5 --G 8 --minibatches 1 --prompts 32 --passes 8", "wd1++": SETTINGS[3],
        "GDSD": SETTINGS[3], "GDSD-TLC": SETTINGS[3],
        "diffu-GRPO": "--lr 3e-5 --G 8 --minibatches 1 --prompts 32 --passes 8",
        "ESPO": "--lr 1e-4 --G 16 --minibatches 2 --prompts 32",
        "JustGRPO": "--lr 1e-4 --G 16 --minibatches 4 --prompts 32",
    },
    "countdown": {
        "EGSPO-SA": "--lr 1e-4 --G 16 --minibatches 4 --prompts 32", "RLDF": SETTINGS[0], "wd1": SETTINGS[0],
        "wd1++": SETTINGS[3], "GDSD": SETTINGS[2], "GDSD-TLC": SETTINGS[2],
        "diffu-GRPO": SETTINGS[4],  # not what it had, SETTINGS[0]: that and its best two end far below 30 %
        "ESPO": "--lr 1e-4 --G 16 --minibatches 2 --prompts 16",
        "JustGRPO": "--lr 1e-4 --G 16 --minibatches 4 --prompts 32",
    },
}
ROUNDS = [(11, 60), (12, 150)]  # seed; seconds, with start-up and the evaluation before training
FIXED = "--updates 10000 --eval_every 10000 --save_every 10000 --eval_rows 512 --eval_threshold 0"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launch(task: str, method: str, setting: str, seed: int, limit: int, folder: str):
    """One run; its line is added to the results."""
    command = f"{METHODS[method]} --task {task} {setting} {FIXED} --seed {seed}"
    out = Path(folder, command.replace(" ", ""))
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
    where = ["--model", BASES / task, "--test_data", f"{folder}/validation.jsonl", "--out", out]
    process = subprocess.Popen([sys.executable, *command.split(), *where], **quiet)
    while process.poll() is None and cpu_seconds(process.pid) < limit:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, command
    script = METHODS[method].split()[0]
    subprocess.run([sys.executable, script, "--resume", out, "--eval_only"], check=True, **quiet)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    after = json.loads((out / "evals.jsonl").read_text())["eval_accuracy"]
    kept = ("update", "seconds", "entropy", "equal_groups", "nfe_rollout", "nfe_rollout_full", "nfe_update",
            "nfe_update_full")
    row = {"task": task, "method": method, "command": f"python {command}", "setting": setting, "seed": seed,
           "limit": limit,
           "before": lines[0]["eval_accuracy"], "after": after, **{k: lines[-1][k] for k in kept},
           "base": base_digest(task), "commit": git_commit()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{method:10} {setting} {seed}, {limit} s: {after:.1%} after {row['update']} updates", flush=True)


def done(task: str) -> dict[tuple, float]:
    """The solved share of each run of the two rounds that has been made from the kept base."""
    rows = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else [])
    return {(row["method"], row["setting"], row["seed"], row["limit"]): row["after"]
            for row in rows if row["task"] == task and row["base"] == base_digest(task)}


def tune(task: str, jobs: int):
    with tempfile.TemporaryDirectory() as folder:
        rows = find(task).TINY.sources["validation"]()
        Path(folder, "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = dict.fromkeys(METHODS, SETTINGS)
        for seed, limit in ROUNDS:
            there = done(task)
            missing = [job for method in METHODS for setting in settings[method]
                       if (job := (method, setting, seed, limit)) not in there]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda job: launch(task, *job, folder), missing))
            there = done(task)
            for method in METHODS:
                best = sorted(SETTINGS, key=lambda setting: -there.get((method, setting, seed, limit), 0.0))
                settings[method] = dict.fromkeys([*best[:2], BEFORE[task][method]])


if __name__ == "__main__":
    tune(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
