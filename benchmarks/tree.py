"""What it saves to evaluate each distinct canvas once: seconds, forwards and memory, without and with.

Six updates of each method's defaults from the base, then six from the model that a run of them ended with
(`python benchmarks/compare.py --study main --task sudoku --seeds 1` first); both ways by turns, each in a
process of its own, medians. Without: every row and every pair with an advantage is evaluated (what has none
is left out in both).

python benchmarks/tree.py            a minute or two a line; adds them to results/tree.jsonl
python benchmarks/tree.py entropy    the share of canvases that are distinct by step, at several temperatures,
                                     and the entropy of what was drawn before it
"""

import contextlib
import io
import json
import multiprocessing
import resource
import runpy
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from benchmarks.compare import BASES, MAIN, command_of, json_lines, processor, run_folder  # noqa: E402
from plumbing import run  # noqa: E402
from plumbing.models import load_model  # noqa: E402
from tasks import load  # noqa: E402


def every_row(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Instead of common.distinct: no two rows are the same."""
    everything = torch.arange(len(rows), device=rows.device)
    return everything, everything


def updates(command: str, model: str, way: str) -> tuple[list[dict], float]:
    """The log of six updates, and the most GiB this process has held."""
    script, *flags = command.split()
    if way == "without":
        common.distinct = every_row
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [script, *flags, *"--updates 6 --eval_rows 1 --eval_threshold 0 --seed 5".split(),
                    "--model", model, "--out", f"{out}/run"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        lines = json_lines(Path(out, "run", "metrics.jsonl"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [line for line in lines if "loss" in line], peak


def add(row: dict):
    with open(ROOT / "results" / "tree.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def compare(method: str, model: str, where: str):
    """A line for one method from one model."""
    logs, peaks = {"without": [], "with": []}, {"without": 0.0, "with": 0.0}
    for way in list(logs) * 2:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            log, peak = pool.submit(updates, MAIN[method], model, way).result()
        logs[way].append(log)
        peaks[way] = max(peaks[way], peak)
    row = {"method": method, "from": where, "threads": torch.get_num_threads(), "commit": run.git_commit(),
           "machine": processor()}
    for way, runs in logs.items():
        took = [sum(line[f"seconds_{phase}"] for phase in ("rollout", "reward", "update"))
                for lines in runs for line in lines]
        row[f"seconds_{way}"] = round(statistics.median(took), 2)
        row[f"forwards_{way}"] = round((runs[0][-1]["nfe_rollout"] + runs[0][-1]["nfe_update"]) / 6)
        row[f"peak_gib_{way}"] = round(peaks[way], 2)
    row["speedup"] = round(row["seconds_without"] / row["seconds_with"], 2)
    row["equal_groups"] = round(statistics.mean(line["equal_groups"] for line in logs["with"][0]), 3)
    add(row)


def by_entropy(prompts: int = 32, G: int = 16, S: int = 8):
    """Lines of the base's rollouts, from cold to hot."""
    model, rows = load_model(str(BASES / "sudoku-0")), load("sudoku", chat=False).train[:prompts]
    tokens, mask = common.encode(model, [row["prompt"] for row in rows for _ in range(G)])
    for temperature in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        gens = [common.generator("cpu", 5, "tree", i) for i in range(prompts)]
        roll = common.denoise(model, tokens, mask, gens, L=16, S=S, block=16, temperature=temperature)
        drawn = common.per_step(roll.entropy, roll.revealed_at, S).mean(0)  # nats of a row, at each step
        states = [common.canvas(roll, roll.revealed_at >= s) for s in range(S)]
        add({"temperature": temperature, "G": G, "commit": run.git_commit(),
             "nats_before": [round(nats, 2) for nats in (drawn.cumsum(0) - drawn).tolist()],
             "distinct": [round(len(common.distinct(x)[0]) / len(x), 3) for x in states]})


if __name__ == "__main__":
    if sys.argv[1:] == ["entropy"]:
        by_entropy()
        sys.exit()
    for method in ("EGSPO-SA", "RLDF", "wd1", "wd1++", "GDSD"):
        compare(method, str(BASES / "sudoku-0"), "the base")
        trained = run_folder(command_of(method, "sudoku", 0, 1)) / "model"
        if trained.is_dir():
            compare(method, str(trained), "the end of a default run")
