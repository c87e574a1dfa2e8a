"""benchmarks/smollm2.py: the base is made once, a finished run is not repeated, and a stopped one goes on."""

import json
from pathlib import Path

import pytest

from benchmarks import smollm2


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[tuple]:
    """What is started, (script, its words), in a project where that only writes the files."""
    found = []

    def call(script, *words, log):
        found.append((script, *map(str, words)))
        out = Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
        (out / "model").mkdir(parents=True, exist_ok=True)
        (out / "model" / "model.safetensors").write_bytes(b"weights")
        (out / "log.jsonl").write_text('{"examples": 8}\n')
        (out / "state.pt").touch()
        counted = ("nfe_rollout", "nfe_rollout_full", "nfe_update", "nfe_update_full", "equal_groups",
                   "entropy", "optimizer_steps")
        update = dict.fromkeys(counted, 1) | {"update": 5, "seconds": 120}
        lines = [{"update": 0, "eval_accuracy": 0.25}, update, {"update": 5, "eval_accuracy": 0.5}]
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        share = 0.2 if out.name == "base-eval" else 0.6
        rows = int(words[words.index("--eval_rows") + 1])
        (out / "evals.jsonl").write_text(json.dumps(
            dict(answers=[["7", 1.0]], rows=rows, torch="", args={}, eval_accuracy=share)))

    monkeypatch.setattr(smollm2, "call", call)
    monkeypatch.setattr(smollm2, "RESULTS", tmp_path / "smollm2.jsonl")
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    return found


def test_what_is_missing_is_made_once(calls, tmp_path):
    args = smollm2.Args(out=str(tmp_path / "out"), methods="EGSPO-SA,GDSD", minutes=2)
    smollm2.main(args)
    base, *runs = calls
    assert base[0] == "plumbing/a2d.py" and str(tmp_path / "package" / "model.gguf") in base
    assert [call[0] for call in runs] == ["egspo.py"] * 3 + ["gdsd.py"] * 2
    assert ["--eval_only" in call for call in runs] == [False, True, True, False, True]
    rows = smollm2.finished()
    assert {(row["before"], row["after"], row["rows"]) for row in rows} == {(0.2, 0.6, 512)}
    assert [row["curve"] for row in rows] == [[[0, 0, 0, 0.25], [5, 120, 2, 0.5]]] * 2
    assert [row["method"] for row in rows] == ["EGSPO-SA", "GDSD"] and (tmp_path / "smollm2.png").exists()
    smollm2.main(args)
    assert len(calls) == 6  # nothing again
    smollm2.main(smollm2.Args(out=args.out, methods="GDSD", minutes=5))  # longer: goes on for the rest
    script, *words = calls[6]
    assert script == "gdsd.py" and "--resume" in words and float(words[words.index("--minutes") + 1]) == 3


def test_without_the_package_one_line_says_what_to_install(calls, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    for changes, said in (({}, "pip install"), ({"methods": "PPO"}, "--methods")):
        with pytest.raises(SystemExit) as stopped:
            smollm2.main(smollm2.Args(out=str(tmp_path / "out"), **changes))
        err = capfd.readouterr().err
        assert stopped.value.code == 2 and said in err and err.count("\n") == 1
