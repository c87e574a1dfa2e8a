"""Several processes compute what one does: the same weights, metrics and answers, whatever is shared out."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from conftest import ROOT, sharp_model
from safetensors.torch import load_file
from test_methods import TIMING, complete_lines, wait_for_update
from test_real import LLADA_8B, settings

import models
import parallel
from common import micro_batches, score
from run import Flags

# 5 groups of 3 rows and 7 held-out rows: neither two nor three processes divide them. Padding, EOS, two blocks.
SMALL = ("--task toy --prompts 5 --G 3 --L 8 --S 4 --block 4 --updates 3 --budget 200 --minibatches 1 "
         "--eval_every 3 --save_every 1 --lr 1e-3").split()
CASES = {
    "egspo": ("modernbert", "--beta 0.1 --K 2 --passes 2 --minibatches 5"),  # a group an optimizer step
    "rldf": ("modernbert", "--K 2 --threshold 0.5 --passes 2"),  # adaptive; tied embeddings, no reference
    "gdsd": ("a2d-qwen3", "--beta 0.1 --passes 2 --num_mc 2 --gradient_checkpointing"),
    "wd1": ("dream", "--plusplus --K 2 --passes 2"),  # a shifted network
}
NODES = {2: ["replicated", "whole"], 3: ["replicated", "in step"]}


def ranks(jobs: list, count: int = 0):
    """Run jobs in so many processes; 0: in one, without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)] if count else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "ranks.py"), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """All runs: folders MODE-METHOD-PROCESSES."""
    out, alone, by_count = tmp_path_factory.mktemp("runs"), [], {}
    models.save_model(sharp_model(eos=2.0), out / "modernbert")
    for layout in ("a2d-qwen3", "dream"):
        checkpoints.write(layout, out / layout)
    for method, (layout, flags) in CASES.items():
        argv = ["--model", str(out / layout), *SMALL, *flags.split()]
        alone.append(("alone", method, [*argv, "--out", str(out / f"alone-{method}-1")]))
        for count, modes in NODES.items():
            by_count.setdefault(count, []).extend(
                (mode, method, [*argv, "--out", str(out / f"{mode}-{method}-{count}")]) for mode in modes)
    wrong = {"averaged": "egspo", "own scores": "gdsd"}
    for mode, method in wrong.items():
        by_count[2] += [(mode, method, [*alone[list(CASES).index(method)][2][:-1], str(out / f"{mode}-2")])]
    half = [*alone[0][2][:-2], "--updates", "2"]  # EGSPO, to be resumed by one process and by three
    ranks([*alone, ("alone", "egspo", [*half, "--out", str(out / "half-1")])])
    by_count[2].append(("whole", "egspo", [*half, "--out", str(out / "half-2")]))
    ranks(by_count[2], 2)
    for whose, copy in (("half-2", "two-one"), ("half-2", "two-three"), ("half-1", "one-three")):
        shutil.copytree(out / whose, out / copy)
    go_on = {name: ["--resume", str(out / name), "--updates", "3"]
             for name in ("two-one", "two-three", "one-three")}
    ranks([("alone", "egspo", go_on["two-one"])])
    by_count[3] += [("replicated", "egspo", go_on["two-three"]), ("in step", "egspo", go_on["one-three"])]
    ranks(by_count[3], 3)
    return out


def same_run(one: Path, many: Path):
    """Weights to 1e-5, metrics to 1e-4 of their size, the same held-out answers, the same model/ folder."""
    state, other = (torch.load(out / "state.pt", weights_only=True) for out in (one, many))
    assert state["network"].keys() == other["network"].keys()
    for name, value in state["network"].items():
        torch.testing.assert_close(other["network"][name], value, rtol=0, atol=1e-5)
    lines = [[{k: v for k, v in row.items() if k not in TIMING} for row in complete_lines(out / "metrics.jsonl")]
             for out in (one, many)]
    for row, same in zip(*lines, strict=True):
        # canvases that only meet when all pairs of masks are in one forward are not shared among ranks
        few, more = row.pop("nfe_update", 0), same.pop("nfe_update", 0)
        assert few <= more <= 1.1 * few and row.keys() == same.keys()
        for key, value in row.items():
            assert math.isclose(same[key], value, rel_tol=1e-4, abs_tol=1e-5), (key, value, same[key])
    answers = [complete_lines(out / "evals.jsonl")[-1]["answers"] for out in (one, many)]
    assert answers[0] == answers[1] and len(answers[0]) == 7
    kept = [load_file(out / "model" / "model.safetensors") for out in (one, many)]
    assert kept[0].keys() == kept[1].keys()  # tied weights stay one
    configs = [(out / "model" / "config.json").read_text() for out in (one, many)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("count, mode", [(count, mode) for count, modes in NODES.items() for mode in modes])
def test_many_processes_are_one(count, mode, method, done):
    alone = done / f"alone-{method}-1"
    same_run(alone, done / f"{mode}-{method}-{count}")
    metrics = complete_lines(alone / "metrics.jsonl")
    assert max(row.get("grad_norm", 0) for row in metrics) > 0.1
    start = load_file(done / CASES[method][0] / "model.safetensors")
    assert any((load_file(alone / "model" / "model.safetensors")[k] - v).abs().max() > 1e-3
               for k, v in start.items() if k in load_file(alone / "model" / "model.safetensors"))


@pytest.mark.parametrize("mode, method", [("averaged", "egspo"), ("own scores", "gdsd")])
def test_averages_and_unshared_scores_are_told_apart(mode, method, done):
    with pytest.raises(AssertionError):
        same_run(done / f"alone-{method}-1", done / f"{mode}-2")


@pytest.mark.parametrize("resumed", ["two-one", "two-three", "one-three"])
def test_a_checkpoint_does_not_depend_on_the_number_of_processes(resumed, done):
    same_run(done / "alone-egspo-1", done / resumed)
