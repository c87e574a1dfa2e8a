"""--track: a tracker gets what metrics.jsonl gets, and never ends a run. The trackers here are modules that
write their calls down."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from helpers import SMALL, complete_lines, launch, lines

from plumbing import models

FAKE = """
calls = []
fails = {fails!r}

def record(name):
    def call(*inputs, **options):
        calls.append((name, inputs, options))
        if name == fails:
            raise {error}("no network")
    return call

init, log, finish, Image = map(record, ("init", "log", "finish", "Image"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, fails): a module `name` whose function `fails` raises; returns its calls."""
    def install(name: str, fails: str = "", error: str = "ValueError") -> list[tuple]:
        folder = tmp_path / f"{name}-{fails}-{error}"
        folder.mkdir()
        (folder / f"{name}.py").write_text(FAKE.format(fails=fails, error=error))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name).calls

    yield install
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def run(folder: str, out: Path, updates: int, *flags) -> float:
    return launch("egspo", "--model", folder, *SMALL, "--updates", updates, "--out", out, *flags)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_what_is_logged_and_resume_goes_on_in_its_run(name, folder, tmp_path, fake):
    out, calls = tmp_path / "run", fake(name)
    run(folder, out, 2, "--track", name)
    assert [call for call, *_ in calls if call != "log"] == ["init", "Image", "finish"]
    start = calls[0][2]
    as_json = json.loads(json.dumps(start["config"]))  # a tuple is a list there
    kept = json.loads((out / "args.json").read_text())
    assert kept.pop("saved") == 2 and as_json == kept
    assert start["name"].startswith("run-") and ("id" in start) == (name == "wandb")
    logged = [(inputs[0], options["step"]) for call, inputs, options in calls if call == "log"]
    assert logged[-1] == ({"curve": None}, 2) and (out / "curve.png").is_file()
    written = complete_lines(out / "metrics.jsonl")
    assert logged[:-1] == [(line, line["update"]) for line in written]
    calls.clear()
    launch("egspo", "--resume", out, "--updates", 3)
    again = calls[0][2]
    assert again | {"config": start["config"]} == start and again["resume"] == "allow"
    assert again["config"]["updates"] == 3
    new = complete_lines(out / "metrics.jsonl")[len(written) :]
    assert [line for line in new if "reward" in line][0]["update"] == 3
    assert all((line, ) in [inputs for call, inputs, _ in calls if call == "log"] for line in new)
    calls.clear()
    run(folder, tmp_path / "elsewhere" / "run", 1, "--track", name)
    assert calls[0][2]["name"] != start["name"]  # a folder of the same name is another run


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> tuple[float, list[dict]]:
    """The accuracy and the log of a run without a tracker."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return run(folder, out, 1), lines(out)


@pytest.mark.parametrize("fails, error", [("init", "SystemExit"), ("log", "ValueError"),
                                          ("Image", "TypeError"), ("finish", "SystemExit")])
def test_a_tracker_that_fails_never_ends_a_run(fails, error, folder, alone, tmp_path, fake, capfd):
    out, calls = tmp_path / "tracked", fake("wandb", fails, error)
    assert run(folder, out, 1, "--track", "wandb") == alone[0]
    said = capfd.readouterr()
    assert (said.out + said.err).count("the run goes on without it") == 1
    assert calls[-1][0] == fails  # and it was left alone from then on
    assert lines(out) == alone[1]
    assert json.loads((out / "args.json").read_text())["track"] == "wandb"  # a resumed run tries again


def test_a_tracker_that_is_not_there_is_told_before_anything_is_loaded(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        run(folder, tmp_path / "run", 1, "--track", "trackio")
    assert stopped.value.code == 2 and "pip install trackio" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
