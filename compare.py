"""Which method, at what cost: methods x variants x tasks x seeds, and every table and figure made from them.

One run per process, as many at a time as there are cores, one thread each, all from the bases that are kept
in results/bases. A finished run is a line of results/runs.jsonl and is never repeated; stopped and started
again, the others go on from their checkpoints.

python compare.py            all runs that are missing; --study main --seeds 3 for some of them
python compare.py --report   the tables of README.md and results/README.md, between marks, and methods.png
"""

import functools
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

from common import refuse
from pretrain import TINY
from report import plot_methods
from run import git_commit
from tasks import load

ROOT = Path(__file__).parent
RUNS = ROOT / "results" / "runs.jsonl"
BASES = ROOT / "results" / "bases"  # of each task: pretrain.py builds other weights on another CPU
MAIN = {
    "EGSPO": "egspo.py --lam 0", "EGSPO-SA": "egspo.py", "RLDF": "rldf.py", "wd1": "wd1.py",
    "wd1++": "wd1.py --plusplus --K 4 --passes 1 --G 16 --minibatches 2 --lr 2e-4 --updates 60",
    "GDSD": "gdsd.py", "GDSD-TLC": "gdsd.py --match tlc", "diffu-GRPO": "baselines/diffu_grpo.py",
    "ESPO": "baselines/espo.py", "JustGRPO": "baselines/just_grpo.py",
}
ABLATIONS = {  # each differs from its method's line in MAIN by what is added; Sudoku alone, three seeds
    "EGSPO-SA": ["--select uniform", "--select all", "--baseline rank", "--order confidence",
                 "--order random"],
    "RLDF": ["--select uniform", "--p_min 0", "--masks random"],
    "wd1": ["--positive_only"],
    "wd1++": ["--positive_only"],
    "GDSD": ["--psi 0.02", "--psi 0.063", "--psi 0.63", "--psi 2", "--num_mc 1"],
}
LONG = [f"{MAIN['EGSPO-SA']} --task sudoku --seed {seed} --updates 360" for seed in (1, 2, 3)]
LONG += [f"{MAIN[method]} --task sudoku --seed 1 --updates {updates}"  # ten times the default
         for method, updates in (("EGSPO-SA", 1500), ("RLDF", 1000))]
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
        found += LONG
    return found


@functools.cache
def base_digest(task: str) -> str:
    """Names the weights that the runs of a task start from."""
    return hashlib.sha256((BASES / task / "model.safetensors").read_bytes()).hexdigest()[:12]


def finished() -> dict[str, dict]:
    """The line of every finished run from today's bases, by its command."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    bases = set(map(base_digest, TINY))
    return {row["command"]: row for row in map(json.loads, lines) if row["base"] in bases}


def execute(command: str) -> dict:
    """Make a run, or go on with it, and return its line. RuntimeError if it fails."""
    out = ROOT / "runs" / "compare" / re.sub(r"[^\w.+-]+", "_", command)
    if not (out / "state.pt").exists():
        shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    script, base = command.split()[0], BASES / re.search(r"--task (\w+)", command)[1]
    argv = [*command.split(), "--model", str(base), "--out", str(out)]
    argv = [script, "--resume", str(out)] if out.exists() else argv
    with open(f"{out}.log", "w") as log:
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=log, stderr=log,
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
    there = finished()
    missing = [command for command in commands(args) if command not in there]
    failed = []
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


@functools.cache
def clusters(task: str) -> np.ndarray:
    """(rows,) held-out rows that are not independent share a number: one solution grid, the same numbers."""
    rows = load(task, chat=False, train=False).test
    keys = [row.get("solution") or str(sorted(row["numbers"])) for row in rows]
    return np.unique(keys, return_inverse=True)[1]


def interval(runs: list[dict], cluster: np.ndarray) -> str:
    """Mean solved share of the runs, %, and its 95 % interval: seeds and clusters drawn with replacement."""
    if not runs:
        return "not measured"
    packed = np.stack([np.frombuffer(bytes.fromhex(row["correct"]), np.uint8) for row in runs])
    right = np.unpackbits(packed, axis=1)[:, : len(cluster)]  # (seeds, rows)
    sums = np.stack([np.bincount(cluster, row) for row in right])  # (seeds, clusters)
    sizes, rng, means = np.bincount(cluster), np.random.default_rng(0), []
    for _ in range(2000):
        seeds = rng.integers(len(runs), size=len(runs))
        drawn = rng.integers(len(sizes), size=len(sizes))
        means.append(100 * sums[seeds][:, drawn].sum() / sizes[drawn].sum() / len(runs))
    low, high = np.quantile(means, (0.025, 0.975))
    return f"**{100 * right.mean():.1f}** [{low:.0f}, {high:.0f}]"


def of(there: dict[str, dict], command: str, task: str) -> list[dict]:
    """The finished runs of a command, seed by seed."""
    found = [there.get(f"{command} --task {task} --seed {seed}") for seed in range(1, 100)]
    return [row for row in found if row]


def main_runs(there: dict[str, dict], task: str) -> dict[str, list[dict]]:
    """The finished runs of each method."""
    return {method: of(there, command, task) for method, command in MAIN.items()}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def adaptive(runs: list[dict], when: int) -> str:
    """Solved by adaptive decoding before (when = 0) or after (1) training, and the forwards a row it took."""
    share, nfe = np.mean([row["adaptive"][when] for row in runs], 0)
    return f"{100 * share:.1f} ({nfe:.1f})"


def cells(runs: list[dict], cluster: np.ndarray) -> list[str]:
    """What a method reaches and what it takes: solved, minutes, forwards, adaptive decoding."""
    if not runs:
        return ["not measured", "", "", ""]
    made = np.mean([row["nfe_rollout"] + row["nfe_update"] for row in runs]) / 1000
    full = np.mean([row["curve"][-1][2] for row in runs]) / 1000
    minutes = np.median([row["seconds"] for row in runs]) / 60
    return [interval(runs, cluster), f"{minutes:.1f}", f"{made:.0f} of {full:.0f}", adaptive(runs, 1)]


def main_table(there: dict[str, dict]) -> str:
    """The README's: every method on both tasks."""
    columns = []  # of the first task all four, of the second two
    for task, kept in zip(TINY, (4, 2), strict=True):
        every, cluster = main_runs(there, task), clusters(task)
        first = sum(every.values(), [])[:1]
        base = [f"{100 * first[0]['curve'][0][3]:.1f}", "", "", adaptive(first, 0)] if first else [""] * 4
        columns.append([base[:kept], *[cells(runs, cluster)[:kept] for runs in every.values()]])
    names = ["the base", *MAIN]
    rows = [[name, *sum(parts, [])] for name, *parts in zip(names, *columns, strict=True)]
    return table(["method", "Sudoku, %", "minutes", "k forwards made, of", "adaptive: % (forwards a row)",
                  "Countdown, %", "minutes"], rows)


def budget_table(there: dict[str, dict], task: str) -> str:
    """Each seed; solved at the largest budget that every run spent; what half of the rows cost."""
    runs = {method: found for method, found in main_runs(there, task).items() if found}
    if not runs:
        return "not measured"
    least = [min(row["curve"][-1][column] for found in runs.values() for row in found) for column in (2, 1)]
    rows = []
    for method, found in runs.items():
        solved = ", ".join(f"{100 * row['curve'][-1][3]:.1f}" for row in found)
        row = [f"{method}: `{MAIN[method]}`", solved, adaptive(found, 1)]
        for column, budget in zip((2, 1), least, strict=True):
            curves = [np.array(row["curve"])[:, (column, 3)].T for row in found]
            share = np.mean([np.interp(budget, *curve) for curve in curves])
            costs = [np.interp(0.5, *curve[::-1]) for curve in curves if curve[1].max() >= 0.5]
            cost = f"{np.mean(costs) / (1000 if column == 2 else 1):.0f}" if len(costs) == len(found) else "–"
            row += [f"{100 * share:.1f}", cost]
        rows.append([*row, PAPER[task].get(method, "–")])
    return table(["method", "seeds 1, 2, ...: solved, %", "adaptive: % (forwards a row)",
                  f"after {least[0] / 1000:.0f}k forwards", "k forwards to 50 %", f"after {least[1]:.0f} s",
                  "seconds to 50 %", f"paper (from {PAPER[task]['before']})"], rows)


def ablation_table(there: dict[str, dict]) -> str:
    cluster, rows = clusters("sudoku"), []
    for method, change in [(m, c) for m, changes in ABLATIONS.items() for c in ["", *changes]]:
        runs = of(there, f"{MAIN[method]} {change}".strip(), "sudoku")[:3]
        rows.append([method, f"`{change}`" if change else "default", interval(runs, cluster),
                     adaptive(runs, 1) if runs else ""])
    return table(["method", "change", "solved, %", "adaptive: % (forwards a row)"], rows)


def long_table(there: dict[str, dict]) -> str:
    rows = [[f"`python {command}`", ", ".join(f"{point[0]}: {100 * point[3]:.1f}" for point in row["curve"]),
             f"{row['seconds'] / 60:.1f}"] for command in LONG if (row := there.get(command))]
    return table(["run", "update: solved, %", "minutes"], rows)


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with what stands between <!-- name --> and <!-- end --> made anew."""
    def anew(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([\w ]+) -->\n.*?\n<!-- end -->", anew, text, flags=re.DOTALL)


def tables(there: dict[str, dict]) -> dict[str, str]:
    """Every generated text, by the name in its marks."""
    made = {"main": main_table(there), "ablations": ablation_table(there), "long": long_table(there)}
    return made | {f"budget {task}": budget_table(there, task) for task in TINY}


def report():
    there = finished()
    made = tables(there)
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        file.write_text(fill(file.read_text(), made))
    curves = {task: {method: np.array([row["curve"] for row in runs])
                     for method, runs in main_runs(there, task).items()} for task in TINY}
    plot_methods(curves, ROOT / "results" / "methods.png")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.seeds < 1 or args.jobs < 1:
        refuse("--seeds and --jobs must be at least 1")
    report() if args.report else make(args)
