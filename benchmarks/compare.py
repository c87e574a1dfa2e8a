"""Which method, at what cost: methods x variants x tasks x seeds, and the tables and figures of them.

One run per process, as many at a time as there are cores, one thread each, all from the bases that are kept
in results/bases. A finished run is a line of results/runs.jsonl and is never repeated; stopped and started
again, the others go on from their checkpoints.

python benchmarks/compare.py             all runs that are missing; --study main --seeds 3 for some of them
python benchmarks/compare.py --report    the tables between the marks of README.md and results/README.md, and
                                         the figures
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tables  # noqa: E402
from plumbing.parallel import refuse  # noqa: E402
from plumbing.pretrain import TINY  # noqa: E402
from plumbing.report import plot_methods  # noqa: E402
from plumbing.run import git_commit  # noqa: E402

RUNS = ROOT / "results" / "runs.jsonl"
BASES = ROOT / "results" / "bases"  # of each task: pretrain.py builds other weights on another CPU
MAIN = {
    "EGSPO": "egspo.py --lam 0", "EGSPO-SA": "egspo.py", "RLDF": "rldf.py", "wd1": "wd1.py",
    "wd1++": "wd1.py --plusplus", "GDSD": "gdsd.py", "GDSD-TLC": "gdsd.py --match tlc",
    "diffu-GRPO": "baselines/diffu_grpo.py", "ESPO": "baselines/espo.py",
    "JustGRPO": "baselines/just_grpo.py",
}
ABLATIONS = {  # each differs from its method's line in MAIN by what is added; Sudoku alone, three seeds
    "EGSPO-SA": ["--select uniform", "--select all", "--baseline rank", "--order confidence",
                 "--order random"],
    "RLDF": ["--select uniform", "--p_min 0", "--masks random"],
    "wd1": ["--positive_only"], "wd1++": ["--positive_only"],
    "GDSD": ["--psi 0.02", "--psi 0.063", "--psi 0.63", "--psi 2", "--num_mc 1"],
}
FIVE_MINUTES = [f"{MAIN['EGSPO-SA']} --task sudoku --seed {seed} --updates 800" for seed in (1, 2, 3)]
LONG = {method: f"{MAIN[method]} --task sudoku --seed 1 --eval_every 100 --updates {updates}"  # 10 x default
        for method, updates in {"EGSPO-SA": 3200, "wd1++": 2000, "RLDF": 1600}.items()}
PAPER = {  # LLaDA-8B on the papers' own Sudoku and Countdown, for orientation
    "sudoku": {"before": "6.7", "EGSPO": "93.6", "EGSPO-SA": "94.3", "wd1": "76.4", "GDSD": "89.8",
               "GDSD-TLC": "92.0"},
    "countdown": {"before": "19.5", "EGSPO": "75.8", "EGSPO-SA": "78.5", "wd1": "51.2", "GDSD": "84.0",
                  "GDSD-TLC": "85.6"},
}


@dataclass
class Args:
    study: Literal["main", "ablations", "long", "all"] = "all"
    task: Literal["sudoku", "countdown", "all"] = "all"
    seeds: int = 5  # of the main study: 1 to this; the ablations have three
    jobs: int = os.cpu_count() or 1  # runs at a time, one thread each
    report: bool = False  # run nothing, rebuild tables and figures


# ------------------------------------------------------------------------------------------------- the runs


def commands(args: Args) -> list[str]:
    """The command lines of a study; a seed of everything before the next seed of anything."""
    found = []
    for seed in range(1, args.seeds + 1):
        if args.study in ("main", "all"):
            found += [f"{command} --task {task} --seed {seed}" for task in TINY if args.task in (task, "all")
                      for command in MAIN.values()]
        if args.study in ("ablations", "all") and seed <= 3 and args.task != "countdown":
            found += [f"{MAIN[method]} {change} --task sudoku --seed {seed}"
                      for method, changes in ABLATIONS.items() for change in changes]
    if args.study in ("long", "all") and args.task != "countdown":
        found += [*FIVE_MINUTES, *LONG.values()]
    return found


def base_digest(task: str) -> str:
    """Names the weights that the runs of a task start from."""
    return hashlib.sha256((BASES / task / "model.safetensors").read_bytes()).hexdigest()[:12]


def finished(kept: bool = True) -> dict[str, dict]:
    """The line of every finished run from the kept bases, or else from earlier ones, by its command."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    bases = set(map(base_digest, TINY))
    return {row["command"]: row for row in map(json.loads, lines) if (row["base"] in bases) == kept}


def run_folder(command: str) -> Path:
    return ROOT / "runs" / "compare" / re.sub(r"[^\w.+-]+", "_", command)


def execute(command: str) -> dict:
    """Make a run, or go on with it, and return its line. RuntimeError if it fails."""
    out = run_folder(command)
    if not (out / "state.pt").exists():
        shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    script, *flags = command.split()
    base = BASES / re.search(r"--task (\w+)", command)[1]
    flags = ["--resume", out] if out.exists() else [*flags, "--model", base, "--out", out]
    with open(f"{out}.log", "w") as log:
        done = subprocess.run([sys.executable, script, *flags], cwd=ROOT, stdout=log, stderr=log,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"python {command}: exit status {done.returncode}, see {out}.log")
    return line_of(command, out)


def line_of(command: str, out: Path) -> dict:
    """The line of the finished run in a folder."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((out / "evals.jsonl").read_text().splitlines()[-1])
    curve, update = [], {"seconds": 0, "nfe_rollout_full": 0, "nfe_update_full": 0}
    for line in lines:
        if "eval_accuracy" in line:
            forwards = update["nfe_rollout_full"] + update["nfe_update_full"]
            curve.append([line["update"], round(update["seconds"], 1), forwards, line["eval_accuracy"]])
        else:
            update = line
    kept = ("seconds", "nfe_rollout", "nfe_rollout_full", "nfe_update", "nfe_update_full", "equal_groups",
            "entropy")
    decoded = [[line["threshold_accuracy"], line["threshold_nfe_per_row"]] for line in (lines[0], lines[-1])]
    correct = np.packbits([int(c) for _, c in last["answers"]]).tobytes().hex()
    return {"command": command, **{k: update[k] for k in kept}, "curve": curve, "adaptive": decoded,
            "rows": last["rows"], "correct": correct, "commit": git_commit(), "torch": last["torch"],
            "base": base_digest(last["args"]["task"]),
            "machine": f"{processor()}, one thread of {os.cpu_count()}"}


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def make(args: Args):
    """Make the runs that are missing; exit status 1 if one failed."""
    there, failed = finished(), []
    missing = [command for command in commands(args) if command not in there]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), unit="run", smoothing=0) as bar:
        for job in as_completed([pool.submit(execute, command) for command in missing]):
            bar.update()
            try:
                row = job.result()
            except RuntimeError as error:
                failed.append(error)
                tqdm.write(f"error: {error}")
                continue
            with open(RUNS, "a") as file:
                file.write(json.dumps(row) + "\n")
            tqdm.write(f"{row['curve'][0][-1]:.1%} -> {row['curve'][-1][-1]:.1%}  {row['command']}")
    sys.exit(1 if failed else 0)


# ----------------------------------------------------------------------------------------------- the report


def main_runs(there: dict[str, dict]) -> dict[str, dict[str, list[dict]]]:
    """Of the finished runs those of each task and method, seed by seed."""
    return {task: {method: of(there, command, task) for method, command in MAIN.items()} for task in TINY}


def of(there: dict[str, dict], command: str, task: str) -> list[dict]:
    """The finished runs of a command, seed by seed."""
    seeds = [f"{command} --task {task} --seed {seed}" for seed in range(1, 100)]
    return [there[seed] for seed in seeds if seed in there]


def every_table() -> dict[str, str]:
    """Every generated text, by the name in its marks."""
    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]

    there = finished()
    runs = main_runs(there)
    tuned = lines("tuning.jsonl")
    changed = [(method, change, of(there, f"{MAIN[method]} {change}".strip(), "sudoku")[:3])
               for method, changes in ABLATIONS.items() for change in ["", *changes]]
    return {
        "main": tables.main_table(runs),
        **{f"budget {task}": tables.budget_table(runs[task], MAIN, PAPER[task]) for task in TINY},
        "long": tables.long_table([there[c] for c in commands(Args("long")) if c in there]),
        "ablations": tables.ablation_table(changed),
        "earlier": tables.earlier_table(finished(kept=False), list(TINY)),
        **{f"tuning {task}": tables.tuning_table([line for line in tuned if line["task"] == task])
           for task in TINY},
        "tree": tables.tree_table(lines("tree.jsonl")),
        "nats": tables.nats_table(lines("tree.jsonl")),
        "gradients": tables.gradients_table(lines("gradients.jsonl")),
    }


def report():
    """Rebuild every table, and the figures of the runs."""
    made, there = every_table(), finished()
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        file.write_text(tables.fill(file.read_text(), made))
    curves = {task: {method: np.array([row["curve"] for row in found]) for method, found in methods.items()}
              for task, methods in main_runs(there).items()}
    plot_methods(curves, ROOT / "results" / "methods.png")
    curves = {method: np.array([there[c]["curve"]]) for method, c in LONG.items() if c in there}
    plot_methods({"sudoku": curves}, ROOT / "results" / "long.png")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.seeds < 1 or args.jobs < 1:
        refuse("--seeds and --jobs must be at least 1")
    report() if args.report else make(args)
