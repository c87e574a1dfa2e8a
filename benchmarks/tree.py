"""What it saves to evaluate each distinct canvas once: seconds and forwards of an update, without and with.

Six updates of each method's defaults from the base, then six from the model that a default run ended with
(runs/<method>-sudoku-1: run `python <method>.py` first); both ways in one process by turns, medians. Without:
every row and every pair with an advantage is evaluated (what has none is left out in both).

python benchmarks/tree.py        a minute a line; adds them to results/tree.jsonl
"""

import contextlib
import importlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import run  # noqa: E402

WAYS = {"EGSPO-SA": "egspo", "RLDF": "rldf", "wd1": "wd1", "GDSD logp": "gdsd",
        "wd1++": "wd1 --plusplus --K 4 --passes 1 --G 16 --minibatches 2 --lr 2e-4"}
shared = common.distinct


def every_row(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Instead of common.distinct: no two rows are the same."""
    everything = torch.arange(len(rows), device=rows.device)
    return everything, everything


def updates(command: str, model: str, distinct, folder: str) -> list[dict]:
    """The log of six updates."""
    name, *flags = command.split()
    module, common.distinct = importlib.import_module(name), distinct
    with tempfile.TemporaryDirectory(dir=folder) as out:
        sys.argv = [f"{name}.py", *flags, *"--updates 6 --eval_rows 1 --eval_threshold 0 --seed 5".split(),
                    "--model", model, "--out", f"{out}/run"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.train(run.parse_args(module.Args, name, module.COUNTDOWN, module.LLM))
        lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def compare(method: str, model: str, where: str, folder: str):
    """A line for one method from one model."""
    logs = {"without": [], "with": []}
    for _ in range(2):  # by turns
        logs["without"].append(updates(WAYS[method], model, every_row, folder))
        logs["with"].append(updates(WAYS[method], model, shared, folder))
    row = {"method": method, "from": where, "threads": torch.get_num_threads(), "commit": run.git_commit()}
    for way, runs in logs.items():
        took = [sum(line[f"seconds_{phase}"] for phase in ("rollout", "reward", "update"))
                for lines in runs for line in lines]
        row[f"seconds_{way}"] = round(statistics.median(took), 3)
        row[f"forwards_{way}"] = round((runs[0][-1]["nfe_rollout"] + runs[0][-1]["nfe_update"]) / 6)
    row["speedup"] = round(row["seconds_without"] / row["seconds_with"], 2)
    row["equal_groups"] = round(statistics.mean(line["equal_groups"] for line in logs["with"][0]), 3)
    with open(ROOT / "results" / "tree.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for method, command in WAYS.items():
            compare(method, "tiny", "the base", folder)
            name = "wd1pp" if "plusplus" in command else command.split()[0]
            trained = ROOT / "runs" / f"{name}-sudoku-1" / "model"
            if trained.is_dir():
                compare(method, str(trained), "the end of a default run", folder)
