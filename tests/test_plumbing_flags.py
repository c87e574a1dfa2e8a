"""The command line: where the settings of a run come from."""

import dataclasses
import importlib
import json
import runpy
import sys

import pytest
from checkpoints import write
from helpers import METHODS, ROOT, settings

from plumbing import models, pretrain, run
from plumbing.flags import WORDS, Flags


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_reads_words_starts_from_the_papers_settings(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no earlier run has the default --out
    write("a2d-qwen3", tmp_path / "real")
    assert "tiny_task" not in json.loads((tmp_path / "real" / "config.json").read_text())
    llm = WORDS | importlib.import_module(method).LLM
    for task in ("gsm8k", "sudoku", "countdown"):
        paper = settings(monkeypatch, method, "--model", tmp_path / "real", "--task", task, "--seed", 5)
        assert {k: vars(paper)[k] for k in llm} == llm and (paper.seed, paper.task) == (5, task)
        assert settings(monkeypatch, method, "--model", "someone/some-hub-id", "--task", task).L == 256
    assert settings(monkeypatch, method, "--model", tmp_path / "real", "--G", 3).G == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_model_starts_from_the_settings_of_its_task(method, tmp_path, monkeypatch):
    """By name, and as a folder that its config says is one."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(method)
    assert (module.COUNTDOWN["L"], module.COUNTDOWN["block"]) == (8, 4)  # as its base was made
    own = {field.name for field in dataclasses.fields(module.Args)}
    for task, own_changes in (("sudoku", module.SUDOKU), ("countdown", module.COUNTDOWN)):
        models.save_model(pretrain.tiny_model(1, 32, task=task), tmp_path / task)
        tiny = settings(monkeypatch, method, "--task", task)
        changed = own_changes | {"task": task, "out": f"runs/{method}-{task}-1"}
        expected = vars(module.Args(**{k: v for k, v in changed.items() if k in own}))
        expected = expected | vars(Flags(**{k: v for k, v in changed.items() if k not in own}))
        expected |= {"saved": 0, "fingerprints": {}}  # of a run that has not begun
        assert vars(tiny) == expected
        folder = settings(monkeypatch, method, "--model", tmp_path / task, "--task", task)
        assert vars(folder) == expected | {"model": str(tmp_path / task)}
        assert settings(monkeypatch, method, f"--task={task}", "--L", 32, "--S", 8).L == 32


def test_wd1_plus_plus_starts_from_settings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("wd1")
    parse, seen = run.parse_args, []

    def parse_and_stop(*given, **variants):
        seen.append(vars(parse(*given, **variants)[1]))
        raise LookupError

    monkeypatch.setattr(run, "parse_args", parse_and_stop)
    sudoku, countdown, llm = module.PLUSPLUS
    cases = {"--task sudoku": sudoku, "--task countdown": countdown,
             "--model someone/some-hub-id --task gsm8k": llm, "--lr 1": {"lr": 1.0}}
    cases = {f"--plusplus {flags}": changed | {"plusplus": True} for flags, changed in cases.items()}
    for flags, changed in (cases | {"": {"passes": 8, "plusplus": False}}).items():
        monkeypatch.setattr(sys, "argv", ["wd1.py", *flags.split()])
        with pytest.raises(LookupError):
            runpy.run_path(str(ROOT / "wd1.py"), run_name="__main__")
        assert {k: seen[-1][k] for k in changed} == changed
