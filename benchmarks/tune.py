"""Which settings were tried for the tiny tasks: a minute of one CPU thread for each, on validation rows.

Validation rows: their Sudoku solutions and Countdown problems are in neither RL's nor the base's training
data; held-out rows are not looked at. The minute is CPU time, so it does not matter what else runs, and holds
the start (some 10 s). A run starts from plumbing/bases/TASK-0, is stopped by ctrl-C when its time is up, and
evaluated; one that is in results/tuning.jsonl is not repeated.

python benchmarks/tune.py sudoku|countdown [jobs]        as many at a time
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

from benchmarks.compare import BASES, digest  # noqa: E402
from plumbing.run import git_commit  # noqa: E402
from tasks import find  # noqa: E402

RESULTS = ROOT / "results" / "tuning.jsonl"
SECONDS = 60
ORDERS = [
    f"{script} --order {order}"
    for script in ("egspo.py", "wd1.py", "wd1.py --plusplus", "baselines/diffu_grpo.py", "baselines/espo.py")
    for order in ("confidence", "top_prob")]
SLOW = "gdsd.py --prompts 16 --G 16 --minibatches 4 --lr 1e-4 --psi 0.2"
QUICK = "gdsd.py --prompts 16 --G 16 --minibatches 4 --num_mc 1 --passes 1"
WIDE = "gdsd.py --prompts 32 --G 8 --minibatches 8 --num_mc 1 --passes 1"
GROUPS = "gdsd.py --prompts 32 --G 8 --minibatches 4 --num_mc 1 --passes 1 --lr 2e-4"
FEW = "gdsd.py --prompts 16 --G 8 --minibatches 2 --num_mc 1 --passes 1 --lr 2e-4"
TRIED = {  # (seed, command)
    "sudoku": [
        *((11, command) for command in ORDERS),
        (11, "rldf.py --p_min 0"), (11, "rldf.py --p_min 0.6"),
        *((11, f"{command} --order top_prob") for command in (
            f"{SLOW} --num_mc 2 --passes 2",
            f"{QUICK} --lr 1e-4 --psi 0.2", f"{QUICK} --lr 1e-4 --psi 1", f"{QUICK} --lr 3e-5 --psi 1",
            f"{QUICK} --lr 1e-4 --psi 0.2 --minibatches 1", f"{QUICK} --lr 2e-4 --psi 1 --minibatches 1",
            f"{QUICK} --lr 1e-4 --psi 1 --prompts 8 --minibatches 2", f"{QUICK} --lr 2e-4 --psi 1",
            f"{QUICK} --lr 4e-4 --psi 1", f"{QUICK} --lr 2e-4 --psi 1 --minibatches 8",
            f"{QUICK} --lr 1e-4 --psi 1 --match tlc", f"{QUICK} --lr 2e-4 --psi 1 --match tlc",
            f"{WIDE} --lr 1e-4 --psi 0.2 --minibatches 4", f"{WIDE} --lr 2e-4 --psi 1")),
        *((11, f"{command} --order confidence") for command in (
            f"{WIDE} --lr 2e-4 --psi 0.625", f"{WIDE} --lr 3e-4 --psi 0.625",
            f"{WIDE} --lr 2e-4 --psi 0.625 --prompts 64 --minibatches 16",
            f"{WIDE} --lr 2e-4 --psi 0.625 --match tlc", f"{WIDE} --lr 2e-4 --psi 0.625 --weights elbo"))],
    "countdown": [
        *((11, command) for command in ORDERS),
        *((12, command) for command in ORDERS if command.startswith(("egspo.py", "wd1.py --plusplus"))),
        (11, "wd1.py --plusplus --order confidence --lr 1e-4"),
        *((seed, f"rldf.py --p_min {p_min}") for seed in (11, 12) for p_min in ("0", "0.6")),
        (11, f"{FEW} --psi 1 --order confidence"), (11, f"{FEW} --psi 1 --order top_prob"),
        (11, f"{GROUPS} --psi 0.625 --order confidence"), (11, f"{GROUPS} --psi 1.25 --order confidence"),
        (11, f"{GROUPS} --psi 1.25 --order confidence --match tlc")],
}
FIXED = "--updates 10000 --eval_every 10000 --save_every 10000 --eval_rows 512 --eval_threshold 0"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launch(task: str, seed: int, command: str, folder: str):
    """One run; its line is added to the results."""
    out = Path(folder, f"{command} {seed}".replace(" ", "").replace("/", ""))
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
    where = ["--model", BASES / f"{task}-0", "--test_data", f"{folder}/validation.jsonl", "--out", out]
    words = f"{command} --task {task} {FIXED} --seed {seed}".split()
    process = subprocess.Popen([sys.executable, *words, *where], **quiet)
    while process.poll() is None and cpu_seconds(process.pid) < SECONDS:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, command
    subprocess.run([sys.executable, words[0], "--resume", out, "--eval_only"], check=True, **quiet)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    after = json.loads((out / "evals.jsonl").read_text().splitlines()[-1])["eval_accuracy"]
    row = {"task": task, "command": command, "seed": seed, "before": lines[0]["eval_accuracy"],
           "after": after, "update": lines[-1]["update"], "base": digest(BASES / f"{task}-0"),
           "commit": git_commit()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{after:.1%} after {row['update']} updates: {command}, seed {seed}", flush=True)


def tune(task: str, jobs: int):
    there = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["task"], row["seed"], row["command"]) for row in there
            if row["base"] == digest(BASES / f"{row['task']}-0")}
    missing = [job for job in TRIED[task] if (task, *job) not in done]
    with tempfile.TemporaryDirectory() as folder:
        rows = find(task).TINY.sources["validation"]()
        Path(folder, "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: launch(task, *job, folder), missing))


if __name__ == "__main__":
    tune(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
