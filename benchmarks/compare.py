"""Which method, at what cost: methods x variants x tasks x bases x seeds, and the tables and figures of them.

One run for each process, as many at a time as there are cores, one thread each, from the bases that are kept
in plumbing/bases. A finished run is a line of results/runs.jsonl and is never repeated. Stopped and started
again, the others go on from their checkpoints.

python benchmarks/compare.py            all runs that are missing; --study main --bases 1 for some of them
python benchmarks/compare.py --report   the tables of README.md and results/README.md, and the figures
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
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
from plumbing.folder import hold  # noqa: E402
from plumbing.parallel import one_line, refuse  # noqa: E402
from plumbing.pretrain import BASES, TINY  # noqa: E402
from plumbing.report import plot_methods  # noqa: E402
from plumbing.run import git_commit  # noqa: E402

RUNS = ROOT / "results" / "runs.jsonl"
MAIN = {
    "EGSPO": "egspo.py --lam 0", "EGSPO-SA": "egspo.py", "RLDF": "rldf.py", "wd1": "wd1.py",
    "wd1++": "wd1.py --plusplus", "GDSD": "gdsd.py", "GDSD-TLC": "gdsd.py --match tlc",
    "diffu-GRPO": "baselines/diffu_grpo.py", "ESPO": "baselines/espo.py",
    "JustGRPO": "baselines/just_grpo.py",
}
ABLATIONS = {  # each differs from its method's line in MAIN by what is added; on Sudoku alone
    "EGSPO-SA": ["--select uniform", "--select importance", "--select all", "--baseline rank",
                 "--lam_schedule linear", "--order top_prob", "--order random"],
    "RLDF": ["--select uniform", "--p_min 0.6", "--masks random"],
    "wd1": ["--positive_only", "--order top_prob"],
    "wd1++": ["--positive_only", "--y greedy", "--order confidence"],
    "GDSD": ["--psi 0.2", "--psi 2", "--num_mc 2", "--passes 2", "--weights elbo", "--order top_prob"],
}
LONG = {  # ten times the default updates (wd1++ twenty), on one base, rarely evaluated: that takes its time
    "EGSPO-SA": "--updates 1600 --eval_every 80", "RLDF": "--updates 1000 --eval_every 50",
    "wd1++": "--lr 2e-4 --updates 2000 --eval_every 100",
    # a quarter of their default rates, at which both fall again
    "wd1": "--lr 7.5e-6 --updates 850 --eval_every 42", "GDSD": "--lr 5e-5 --updates 320 --eval_every 16",
    "diffu-GRPO": "--updates 750 --eval_every 37", "ESPO": "--updates 120 --eval_every 10",
    "JustGRPO": "--updates 280 --eval_every 14"}
WHEN = {  # which to take when, for the README
    "EGSPO": "if guesses cannot be rewarded", "EGSPO-SA": "first", "RLDF": "to decode adaptively",
    "wd1": "for the simplest likelihood: one step from an empty canvas",
    "wd1++": "for the quickest start on Sudoku; no ratio, no clip",
    "GDSD": "to see regression in place of policy gradients", "GDSD-TLC": "to see it without a softmax",
    "diffu-GRPO": "as a baseline: d1", "ESPO": "as a baseline: sequence-level ratio",
    "JustGRPO": "as a baseline: left to right",
}
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
    bases: int = 3  # how many, from 0; at most two in the ablations, one in the long runs
    seeds: int = 2  # RL seeds on each base, from 1; the long runs have three
    jobs: int = os.cpu_count() or 1  # runs at a time, one thread each
    report: bool = False  # run nothing, rebuild tables and figures


# ------------------------------------------------------------------------------------------------- the runs


def command_of(method: str, task: str, base: int, seed: int, change: str = "") -> str:
    """The command line of a run, as a user would type it in the root."""
    words = f"{MAIN[method]} {change}".split()
    return " ".join([*words, f"--task {task} --model plumbing/bases/{task}-{base} --seed {seed}"])


def commands(args: Args) -> list[str]:
    """The command lines of a study: seed 1 on base 0, 1, 2, then seed 2, and so on; the long runs last."""
    found = []
    tasks = [task for task in TINY if args.task in (task, "all")]
    for seed in range(1, args.seeds + 1):
        for base in range(args.bases):
            if args.study in ("main", "all"):
                found += [command_of(method, task, base, seed) for task in tasks for method in MAIN]
            if args.study in ("ablations", "all") and base < 2 and "sudoku" in tasks:
                found += [command_of(method, "sudoku", base, seed, change)
                          for method, changes in ABLATIONS.items() for change in changes]
    if args.study in ("long", "all") and "sudoku" in tasks:
        found += [command_of(method, "sudoku", 0, seed, change)
                  for seed in (1, 2, 3) for method, change in LONG.items()]
    return found


def base_of(command: str) -> Path:
    """The folder of the base that a run starts from."""
    return BASES / Path(re.search(r"--model (\S+)", command)[1]).name


def digest(base: Path) -> str:
    """Names the weights of a base."""
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()[:12]


def finished() -> dict[str, dict]:
    """The line of every finished run from the kept bases, by its command."""
    rows = {}
    for number, line in enumerate(RUNS.read_text().splitlines() if RUNS.exists() else [], 1):
        try:
            row = json.loads(line)
            rows[row["command"]] = row
        except (ValueError, KeyError, TypeError) as error:
            refuse(f"{RUNS}, line {number} is not of a run: {one_line(error)}")
    digests = {base: digest(base) for base in set(map(base_of, rows)) if base.is_dir()}
    return {command: row for command, row in rows.items() if row["base"] == digests.get(base_of(command))}


def run_folder(command: str) -> Path:
    return ROOT / "runs" / "compare" / re.sub(r"[^\w.+-]+", "_", command)


def execute(command: str) -> dict:
    """Make a run, or go on with it, and return its line. RuntimeError if it fails, or if another process is
    making it."""
    out = run_folder(command)
    if out.is_dir() and at_work(out):
        raise RuntimeError(f"another process is at work in {out}")
    if not (out / "state.pt").exists():
        shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    script, *flags = command.split()
    flags = ["--resume", out] if out.exists() else [*flags, "--out", out]
    start = time.perf_counter()
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen([sys.executable, script, *flags], cwd=ROOT, stdout=log, stderr=log,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    if process.returncode:
        raise RuntimeError(f"python {command}: exit status {process.returncode}, see {out}.log")
    return line_of(command, out, (used.ru_utime + used.ru_stime) / (time.perf_counter() - start))


def at_work(out: Path) -> bool:
    """Whether a process holds this run folder, as a run does from its start, before it has a checkpoint."""
    try:
        os.close(hold(out))
    except BlockingIOError:
        return True
    return False


def line_of(command: str, out: Path, busy: float) -> dict:
    """The line of the finished run in a folder. busy: the share of a core that its process had, or, if it was
    resumed, its last one. The seconds are multiplied by it: they are about those of a quiet machine."""
    lines = json_lines(out / "metrics.jsonl")
    last = json.loads((out / "evals.jsonl").read_text().splitlines()[-1])
    curve, update = curve_of(lines, busy)
    kept = ("nfe_rollout", "nfe_rollout_full", "nfe_update", "nfe_update_full", "equal_groups", "entropy")
    decoded = [[line["threshold_accuracy"], line["threshold_nfe_per_row"]] for line in (lines[0], lines[-1])]
    correct = np.packbits([int(c) for _, c in last["answers"]]).tobytes().hex()
    return {"command": command, "seconds": round(busy * update["seconds"], 1), **{k: update[k] for k in kept},
            "curve": curve, "adaptive": decoded, "rows": last["rows"], "correct": correct,
            "commit": git_commit(), "torch": last["torch"], "base": digest(base_of(command)),
            "machine": machine()}


def curve_of(lines: list[dict], busy: float = 1.0) -> tuple[list[list], dict]:
    """Of the lines of a metrics.jsonl: at each evaluation the update, the seconds of RL, the forwards that
    the papers count and the share of held-out rows solved; and the line of the last update."""
    curve, update = [], {"seconds": 0, "nfe_rollout_full": 0, "nfe_update_full": 0}
    for line in lines:
        if "eval_accuracy" in line:
            forwards = update["nfe_rollout_full"] + update["nfe_update_full"]
            seconds = round(busy * update["seconds"], 1)
            curve.append([line["update"], seconds, forwards, line["eval_accuracy"]])
        else:
            update = line
    return curve, update


def json_lines(file: Path) -> list[dict]:
    """The lines of a .jsonl file; none if it is missing."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def machine() -> str:
    return f"{processor()}, one thread of {os.cpu_count()}"


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


def runs_of(there: dict[str, dict], method: str, task: str, change: str = "") -> list[list[dict]]:
    """The finished runs of a method, a list for each base."""
    found = [[there[command] for seed in range(1, 10)
              if (command := command_of(method, task, base, seed, change)) in there] for base in range(3)]
    return [of_base for of_base in found if of_base]


def ablation_runs(there: dict[str, dict], method: str, change: str) -> list[list[dict]]:
    """The finished runs of a change; of none ("") those from the bases, and with the seeds, of a change that
    was made: only these can be compared."""
    if change:
        return runs_of(there, method, "sudoku", change)
    same = {command_of(method, "sudoku", base, seed) for base in range(2) for seed in range(1, 10)
            if any(command_of(method, "sudoku", base, seed, c) in there for c in ABLATIONS[method])}
    return runs_of({command: row for command, row in there.items() if command in same}, method, "sudoku")


def base_configs() -> dict[str, dict]:
    """config.json of every kept base, by its name."""
    folders = [BASES / f"{task}-{base}" for task in TINY for base in range(3)]
    return {folder.name: json.loads((folder / "config.json").read_text())
            for folder in folders if folder.is_dir()}


def every_table() -> dict[str, str]:
    """Every generated text, by the name in its marks."""
    def lines(name: str) -> list[dict]:
        return json_lines(ROOT / "results" / name)

    there = finished()
    main = {task: {method: runs_of(there, method, task) for method in MAIN} for task in TINY}
    configs, tuned = base_configs(), {}  # tuned: the lines of each base, by its digest
    for line in lines("tuning.jsonl"):
        tuned.setdefault(line["base"], []).append(line)
    # What the bases of a task knew at the end of their first phase, with one token a step: what RL can bring
    # out.
    known = {task: [config["knows"]["test_one_token"] for config in configs.values()
                    if config["tiny_task"] == task] for task in TINY}
    changed = [(method, change, runs) for method, changes in ABLATIONS.items() for change in ["", *changes]
               if (runs := ablation_runs(there, method, change))]
    bases = max((len(runs) for _, _, runs in changed), default=0)
    long = [there[c] for method, change in LONG.items() for seed in (1, 2, 3)
            if (c := command_of(method, "sudoku", 0, seed, change)) in there]
    return {
        "bases": tables.bases_table(configs),
        "main": tables.main_table(main, known, WHEN),
        **{f"budget {task}": tables.budget_table(main[task], MAIN, PAPER[task], known[task])
           for task in TINY},
        "long": tables.long_table(long, known["sudoku"][0]),
        "ablations": tables.ablation_table(changed, known["sudoku"][:bases]),
        **{f"tuning {name}": tables.tuning_table(tried, configs[name]["knows"]["validation_one_token"])
           for name in configs if (tried := tuned.get(digest(BASES / name)))},
        "smollm2": tables.smollm2_table(lines("smollm2.jsonl")),
        "tree": tables.tree_table(lines("tree.jsonl")),
        "nats": tables.nats_table(lines("tree.jsonl")),
        "gradients": tables.gradients_table(lines("gradients.jsonl")),
    }


def curves(there: dict[str, dict], task: str, changes: dict[str, str]) -> dict[str, np.ndarray]:
    """The curve of every finished run of each of these methods, with its change: (runs, points, 4)."""
    found = {method: sum(runs_of(there, method, task, change), []) for method, change in changes.items()}
    return {method: np.array([row["curve"] for row in rows]) for method, rows in found.items()}


def report():
    """Rebuild every table, and the figures of the runs."""
    made, there = every_table(), finished()
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        file.write_text(tables.fill(file.read_text(), made))
    plot_methods({task: curves(there, task, dict.fromkeys(MAIN, "")) for task in TINY},
                 ROOT / "results" / "methods.png")
    long = curves(there, "sudoku", LONG)
    if any(map(len, long.values())):
        plot_methods({"sudoku": long}, ROOT / "results" / "long.png")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if min(args.seeds, args.jobs, args.bases) < 1:
        refuse("--bases, --seeds and --jobs must be at least 1")
    report() if args.report else make(args)
