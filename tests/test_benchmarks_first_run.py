"""The script for the first GPU: on a CPU all of it runs, and what fails is told without stopping the rest."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, complete_lines, settings

from benchmarks import first_run, gpu
from plumbing import flags


def test_every_part_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/first_run.py", "small"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == complete_lines(tmp_path / "first_run.jsonl")
    assert [line for line in lines if "error" in line] == []
    assert list(dict.fromkeys(line["part"] for line in lines)) == [*first_run.LIMITS, "all"]
    assert {line["what"] for line in lines if line["part"] == "methods"} == set(first_run.METHODS)
    assert not set(line.get("passed", 0) for line in lines) - {0}  # without a GPU its tests are skipped


def test_a_figure_that_fails_leaves_its_error(capsys, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert first_run.figure("part", "first", lambda: 1 / 0) == {}
    assert first_run.figure("part", "second", lambda: sys.exit("no room")) == {}
    assert first_run.figure("part", "third", lambda: {"seconds": 1.23456}) == {"seconds": 1.23456}
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["error"].startswith("ZeroDivisionError") and second["error"] == "SystemExit: no room"
    assert third == {"part": "part", "what": "third", "seconds": 1.235}


@pytest.mark.parametrize("command, said", [
    ("import time; time.sleep(60)", "not done after 0.5 seconds"),
    ("raise SystemExit(3)", "ended with status 3"),
])
def test_a_part_that_ends_badly_does_not_stop_the_others(command, said, tmp_path, monkeypatch):
    (tmp_path / "part.py").write_text(command)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(first_run, "__file__", str(tmp_path / "part.py"))
    monkeypatch.setattr(first_run, "LIMITS", {"methods": 0.5 if "time" in command else 60, "tests": 0.5})
    first_run.start_parts()
    lines = complete_lines(tmp_path / "first_run.jsonl")
    assert [line["part"] for line in lines] == ["methods", "tests", "all"] and lines[0]["error"] == said


def test_all_parts_are_done_in_eight_minutes():
    assert sum(first_run.LIMITS.values()) <= 8 * 60


def test_flags_are_read_as_tyro_reads_them(tmp_path, monkeypatch):
    argv = ["--model", "someone/model", "--task", "gsm8k", "--beta", 0.1, "--K", 2, "--L", 8, "--S", 4,
            "--block", 4, "--out", tmp_path / "run", "--gradient_checkpointing"]
    expected = settings(monkeypatch, "egspo", *argv)
    here = SimpleNamespace(cli=first_run.cli, conf=SimpleNamespace(OmitArgPrefixes=first_run.Whole))
    monkeypatch.setattr(flags, "tyro", here)
    assert settings(monkeypatch, "egspo", *argv) == expected


def test_the_head_alone_is_in_tf32(monkeypatch):
    """Forward and backward are what they are without; at other matrix products nothing is set."""
    monkeypatch.setattr(gpu, "P", 5)
    monkeypatch.setattr(gpu, "L", 4)
    model = gpu.build(gpu.SMALL)
    x = torch.randint(9, (2, 9))

    def gradients():
        model.network.zero_grad()
        model.head(model.body(x, None))[..., :5].square().sum().backward()
        return [p.grad.clone() for p in model.network.parameters()]

    expected = gradients()
    kinds, real = [], torch.Tensor.__matmul__

    def spy(a, b):
        kinds.append(torch.backends.cuda.matmul.fp32_precision)
        return real(a, b)

    with first_run.tf32_head(model):
        monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
        found = gradients()
        monkeypatch.undo()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert kinds.count("tf32") == 3 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert "forward" not in vars(model.network.lm_head)
