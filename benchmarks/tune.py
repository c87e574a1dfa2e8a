"""Settings to try for the tiny tasks: a minute of one CPU thread for each, on validation rows.

Validation rows: their Sudoku solutions and Countdown problems are in neither RL's nor the base's training
data; held-out rows are not looked at. The minute is CPU time, so it does not matter what else runs, and holds
the start (some 10 s). A run starts from the named base, is stopped by ctrl-C when its time is up, and
evaluated; one that is in results/tuning.jsonl is not repeated.

python benchmarks/tune.py BASE [JOBS]        BASE: a key of TRIED; JOBS: so many at a time (default 1)
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

from benchmarks.compare import BASES, digest, json_lines  # noqa: E402
from plumbing.run import git_commit  # noqa: E402
from tasks import find  # noqa: E402

RESULTS = ROOT / "results" / "tuning.jsonl"
SECONDS = 60
ORDERS = [f"{script} --order {order}" for script in ("wd1.py", "baselines/diffu_grpo.py")
          for order in ("confidence", "top_prob")]
PLUSPLUS = [f"wd1.py --plusplus --order {order}" for order in ("confidence", "top_prob")]


def gdsd(prompts: int, G: int, minibatches: int, lr: str, psi: float, order: str, more: str = "",
         num_mc: int = 1, passes: int = 1) -> str:
    """A command of GDSD, every setting in it that was varied."""
    return " ".join(f"""gdsd.py --prompts {prompts} --G {G} --minibatches {minibatches} --lr {lr} --psi {psi}
        --num_mc {num_mc} --passes {passes} --order {order} {more}""".split())


def around(script: str, prompts: int, G: int, lr: float, other: tuple[int, int] | None = None) -> list[str]:
    """Commands of a method: its settings; half and twice the learning rate; and, with other prompts and G,
    those, and a higher temperature."""
    tried = [(prompts, G, lr, 1.0), (prompts, G, lr / 2, 1.0), (prompts, G, lr * 2, 1.0)]
    tried += [(prompts, G, lr, 1.2), (*other, lr, 1.0)] if other else []
    return [f"{script} --prompts {prompts} --G {G} --lr {lr:g} --temperature {temperature}"
            for prompts, G, lr, temperature in tried]


ESPO = around("baselines/espo.py", 32, 8, 1e-4, (16, 16))
TRIED = {
    "sudoku-0": ORDERS + [gdsd(*setting) for setting in (
        (16, 16, 4, "1e-4", 0.2, "top_prob", "", 2, 2), (16, 16, 4, "1e-4", 0.2, "top_prob"),
        (16, 16, 4, "1e-4", 1, "top_prob"), (16, 16, 4, "3e-5", 1, "top_prob"),
        (16, 16, 1, "1e-4", 0.2, "top_prob"), (16, 16, 1, "2e-4", 1, "top_prob"),
        (8, 16, 2, "1e-4", 1, "top_prob"), (16, 16, 4, "2e-4", 1, "top_prob"),
        (16, 16, 4, "4e-4", 1, "top_prob"), (16, 16, 8, "2e-4", 1, "top_prob"),
        (16, 16, 4, "1e-4", 1, "top_prob", "--match tlc"), (16, 16, 4, "2e-4", 1, "top_prob", "--match tlc"),
        (32, 8, 4, "1e-4", 0.2, "top_prob"), (32, 8, 8, "2e-4", 1, "top_prob"),
        (32, 8, 8, "2e-4", 0.625, "confidence"), (32, 8, 8, "3e-4", 0.625, "confidence"),
        (64, 8, 16, "2e-4", 0.625, "confidence"), (32, 8, 8, "2e-4", 0.625, "confidence", "--match tlc"))] + [
        "gdsd.py", "gdsd.py --betas 0.9 0.999"],
    # The weakest base: what a method lacks shows there.
    "sudoku-1": [
        *around("egspo.py", 16, 16, 1e-4, (32, 8)), *around("rldf.py", 32, 16, 2e-4, (32, 8)),
        *around("wd1.py", 32, 8, 3e-5, (16, 16)), *around("wd1.py --plusplus", 16, 8, 2e-4, (32, 8)),
        *around("gdsd.py", 32, 8, 2e-4, (16, 16)), *around("baselines/diffu_grpo.py", 32, 8, 3e-5, (16, 16)),
        *ESPO,
        *around("baselines/just_grpo.py", 16, 16, 1e-4, (32, 8)), "wd1.py --lr 1e-5"],
    "countdown-0": [*ORDERS, *PLUSPLUS, f"{PLUSPLUS[0]} --lr 1e-4"] + [gdsd(*setting) for setting in (
        (16, 8, 2, "2e-4", 1, "confidence"), (16, 8, 2, "2e-4", 1, "top_prob"),
        (16, 8, 2, "2e-4", 1.25, "confidence"), (32, 8, 4, "2e-4", 0.625, "confidence"),
        (32, 8, 4, "2e-4", 1.25, "confidence"), (32, 8, 4, "2e-4", 1.25, "confidence", "--match tlc"))] + [
        *around("egspo.py", 16, 8, 2e-4), *around("rldf.py", 16, 16, 1e-4), *around("wd1.py", 32, 8, 1e-4),
        *around("wd1.py --plusplus", 16, 8, 2e-4), *around("gdsd.py", 16, 8, 2e-4),
        *around("baselines/diffu_grpo.py", 32, 8, 3e-5), *around("baselines/espo.py", 16, 8, 2e-4),
        *around("baselines/just_grpo.py", 32, 8, 1e-4)],
}
AGAIN = {  # with seed 12
    "sudoku-0": [ESPO[0], ESPO[3]], "sudoku-1": [ESPO[0], ESPO[3]],  # its two temperatures
    "countdown-0": ["egspo.py --order confidence", "egspo.py --order top_prob", "rldf.py --p_min 0",
                    "rldf.py --p_min 0.6", PLUSPLUS[0]],
}
FIXED = "--updates 10000 --eval_every 10000 --save_every 10000 --eval_rows 512 --eval_threshold 0"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def launch(task: str, base: str, seed: int, command: str, folder: str):
    """One run; its line is added to the results."""
    out = Path(folder, f"{command} {seed}".replace(" ", "").replace("/", ""))
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
    where = ["--model", BASES / base, "--test_data", f"{folder}/validation.jsonl", "--out", out]
    words = f"{command} --task {task} {FIXED} --seed {seed}".split()
    process = subprocess.Popen([sys.executable, *words, *where], **quiet)
    while process.poll() is None and cpu_seconds(process.pid) < SECONDS:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, command
    subprocess.run([sys.executable, words[0], "--resume", out, "--eval_only"], check=True, **quiet)
    lines = json_lines(out / "metrics.jsonl")
    after = json_lines(out / "evals.jsonl")[-1]["eval_accuracy"]
    row = {"task": task, "command": command, "seed": seed, "before": lines[0]["eval_accuracy"],
           "after": after, "update": lines[-1]["update"], "base": digest(BASES / base),
           "commit": git_commit()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{after:.1%} after {row['update']} updates: {command}, seed {seed}", flush=True)


def tune(base: str, jobs: int):
    weights = digest(BASES / base)
    done = {(row["seed"], row["command"]) for row in json_lines(RESULTS) if row["base"] == weights}
    task = base.split("-")[0]
    wanted = [(seed, command) for seed, commands in ((11, TRIED), (12, AGAIN)) for command in commands[base]]
    with tempfile.TemporaryDirectory() as folder:
        rows = find(task).TINY.sources["validation"]()
        Path(folder, "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: launch(task, base, *job, folder),
                          [job for job in wanted if job not in done]))


if __name__ == "__main__":
    tune(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
