"""The one protocol of tuning: the same settings for every method, on validation rows.

Their Sudoku solutions and Countdown problems are in neither RL's nor the base's training data; held-out rows
are not looked at. Four settings span lr, G, minibatches and prompts, two seeds each. Every run has the same
CPU time on one thread, starts from results/bases, is then stopped by ctrl-C, and evaluated; one that is in
results/tuning.jsonl is not repeated.

python benchmarks/tune.py sudoku|countdown [jobs]        as many at a time; an hour with 2 on 2 cores
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from compare import BASES, base_digest  # noqa: E402
from run import git_commit  # noqa: E402
from tasks import TINY_TASKS  # noqa: E402

RESULTS = ROOT / "results" / "tuning.jsonl"
METHODS = {
    "EGSPO-SA": "egspo.py", "RLDF": "rldf.py", "wd1": "wd1.py --passes 2",
    "wd1++": "wd1.py --plusplus --K 4 --passes 1", "GDSD": "gdsd.py", "GDSD-TLC": "gdsd.py --match tlc",
    "diffu-GRPO": "baselines/diffu_grpo.py --passes 2", "ESPO": "baselines/espo.py",
    "JustGRPO": "baselines/just_grpo.py",
}
SETTINGS = [
    "--lr 1e-4 --G 8 --minibatches 4 --prompts 32", "--lr 1e-4 --G 16 --minibatches 4 --prompts 16",
    "--lr 2e-4 --G 8 --minibatches 2 --prompts 16", "--lr 2e-4 --G 16 --minibatches 2 --prompts 32",
]
SECONDS = 60  # of CPU time, with start-up and the evaluation before training
FIXED = "--updates 10000 --eval_every 10000 --save_every 10000 --eval_rows 512 --eval_threshold 0"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launch(task: str, method: str, setting: str, seed: int, folder: str):
    """One run; its line is added to the results."""
    command = f"{METHODS[method]} --task {task} {setting} {FIXED} --seed {seed}"
    out = Path(folder, command.replace(" ", ""))
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
    where = ["--model", BASES / task, "--test_data", f"{folder}/validation.jsonl", "--out", out]
    process = subprocess.Popen([sys.executable, *command.split(), *where], **quiet)
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
    row = {"task": task, "method": method, "command": f"python {command}", "setting": setting, "seed": seed,
           "before": lines[0]["eval_accuracy"], "after": after, **{k: lines[-1][k] for k in kept},
           "base": base_digest(task), "commit": git_commit()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{method:10} {setting} {seed}: {after:.1%} after {row['update']} updates", flush=True)


def tune(task: str, jobs: int):
    rows = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else [])
    there = {(row["task"], row["method"], row["setting"], row["seed"]) for row in rows}
    missing = [job for seed in (11, 12) for job in itertools.product([task], METHODS, SETTINGS, [seed])
               if job not in there]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        rows = TINY_TASKS[task].sources["validation"]()
        Path(folder, "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        list(pool.map(lambda job: launch(*job, folder), missing))


if __name__ == "__main__":
    tune(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
