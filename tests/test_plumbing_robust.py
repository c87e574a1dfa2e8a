"""What the plumbing does with a changed world: files that moved or changed, damaged folders, signals, odd
terminals and environments. One clear line, and nothing is lost."""

import ast
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, lines, same_run

import tasks
from plumbing import flags, folder, models, parallel, pretrain, report, run, surroundings

SMALL = "--prompts 8 --G 2 --S 4 --eval_every 2 --eval_rows 16 --save_every 1 --seed 3 --beta 1".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An untrained tiny model. --beta moves it: it earns nothing, so its gradient is the KL's alone."""
    path = tmp_path_factory.mktemp("model") / "untrained"
    models.save_model(pretrain.tiny_model(layers=1, width=32), path)
    return path


def launch(*argv, method: str = "egspo") -> float:
    """`python method.py argv`, in this process."""
    module = importlib.import_module(method)
    old, sys.argv = sys.argv, [str(ROOT / f"{method}.py"), *map(str, argv)]
    try:
        return run.main(module.train, module.Args, module.SUDOKU, module.COUNTDOWN, module.LLM)
    finally:
        sys.argv = old


def command(*argv, method: str = "egspo") -> list[str]:
    return [sys.executable, str(ROOT / f"{method}.py"), *map(str, argv)]


def refused(capfd, *argv, status: int = 2, method: str = "egspo") -> str:
    """The one line on standard error that a command ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        launch(*argv, method=method)
    message = capfd.readouterr().err
    if isinstance(stopped.value.code, str):  # sys.exit(text) prints it when Python ends: status 1
        assert status == 1 and "\n" not in stopped.value.code
        assert message.endswith("\n") or not message  # else it would stand behind the progress bar
        return stopped.value.code
    message = message.split("\r")[-1].strip()
    assert stopped.value.code == status and message.startswith("error: ") and "\n" not in message, message
    return message


@pytest.fixture(scope="module")
def done(base, tmp_path_factory) -> Path:
    """A run of two updates."""
    out = tmp_path_factory.mktemp("runs") / "done"
    launch("--model", base, *SMALL, "--updates", 2, "--out", out)
    return out


def held(out: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


# ----------------------------------------------------------------------------------- what is compared


def test_before_and_after_are_of_the_same_rows(base, tmp_path, capfd):
    out = tmp_path / "run"
    launch("--model", base, *SMALL, "--updates", 1, "--out", out)
    before, after = columns(capfd)
    assert set(before) == set(after) and "solved, %, adaptive" in before
    launch("--resume", out, "--updates", 2, "--eval_rows", 8)
    text = capfd.readouterr().out
    assert "8 held-out rows" in text and "before " not in text.split("other rows")[0].split("after")[0]
    assert "not comparable" in text
    launch("--resume", out, "--updates", 3, "--eval_rows", 16, "--eval_threshold", 0.5)
    before, after = columns(capfd)
    assert "solved, %" in before and "solved, %, adaptive" not in before
    assert "solved, %, adaptive" in after
    launch("--resume", out, "--updates", 4, "--eval_threshold", 0.9)
    before, after = columns(capfd)
    assert set(before) == set(after) and "solved, %, adaptive" in before


def columns(capfd) -> tuple[dict, dict]:
    """The two columns of the printed table, by label."""
    text = capfd.readouterr().out
    table = text[text.index("held-out rows, greedy") :].split("\n")[1:]
    assert table[0].split() == ["before", "after"]
    rows = {line[:26].strip(): (line[26:36].strip(), line[36:46].strip()) for line in table[1:9]}
    return tuple({k: v[i] for k, v in rows.items() if v[i]} for i in (0, 1))


def test_a_curve_of_the_same_rows_alone():
    def evaluation(update, rows, threshold=None):
        line = {"update": update, "eval_accuracy": 0.5, "eval_rows": rows}
        return line | ({"threshold_accuracy": 0.1, "eval_threshold": threshold} if threshold else {})

    log = [evaluation(0, 8, 0.9), {"update": 1, "reward": 1.0}, evaluation(1, 512), evaluation(2, 8, 0.5)]
    assert report.comparable(log) == [
        {k: v for k, v in log[0].items() if k != "threshold_accuracy"}, log[1], log[3]]


# ------------------------------------------------------------------------- the files that a run reads


def boards(count: int, first: int = 0) -> str:
    rows = tasks.load("sudoku", chat=False).train[first : first + count]
    return "".join(json.dumps({k: row[k] for k in ("puzzle", "solution")}) + "\n" for row in rows)


@pytest.fixture
def own(base, tmp_path, monkeypatch) -> Path:
    """A run on files of its own, all given as relative paths; the folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(boards(64))
    Path("test.jsonl").write_text(boards(16, 1000))
    shutil.copytree(base, "model")
    launch("--model", "model", "--data", "train.jsonl", "--test_data", "test.jsonl", *SMALL, "--updates", 1,
           "--out", "run")
    return tmp_path


def test_a_resumed_run_finds_its_files_from_anywhere(own, tmp_path_factory, monkeypatch):
    whole = own / "whole"
    launch("--model", "model", "--data", "train.jsonl", "--test_data", "test.jsonl", *SMALL, "--updates", 2,
           "--out", whole)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    Path("train.jsonl").write_text(boards(64, 2000))  # what the relative names mean here
    Path("test.jsonl").write_text(boards(16, 3000))
    launch("--resume", own / "run", "--updates", 2)
    same_run(own / "run", whole)


def append(file: str):
    """One more board in a file of rows, one bit less in a file of a model."""
    path = Path(file)
    if path.suffix == ".jsonl":
        path.write_text(path.read_text() + boards(1, 5000))
    else:
        data = bytearray(path.read_bytes())
        data[-8] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name, file", [
    ("data", "train.jsonl"), ("test_data", "test.jsonl"), ("model", "model/model.safetensors")])
def test_a_file_that_changed_is_refused(name, file, own, capfd):
    append(file)
    before = held(own / "run")
    message = refused(capfd, "--resume", "run", "--updates", 2)
    assert f"--{name}" in message and "not what the run began with" in message
    assert held(own / "run") == before
    if name != "data":  # which an evaluation on --test_data does not read
        assert f"--{name}" in refused(capfd, "--resume", "run", "--eval_only")


@pytest.mark.parametrize("name, file", [("data", "train.jsonl"), ("test_data", "test.jsonl"),
                                        ("model", "model")])
def test_a_file_that_moved_may_be_named_anew(name, file, own, capfd):
    Path(file).rename(new := f"moved-{file}")
    refused(capfd, "--resume", "run", "--updates", 2)
    launch("--resume", "run", "--updates", 2, f"--{name}", new)
    assert lines(own / "run")[-1]["update"] == 2
    assert json.loads(Path("run/args.json").read_text())[name] == str(own / new)


def test_another_file_is_refused_and_so_is_none(own, capfd):
    Path("other.jsonl").write_text(boards(64, 64))
    assert "data" in refused(capfd, "--resume", "run", "--updates", 2, "--data", "other.jsonl")
    assert "data" in refused(capfd, "--resume", "run", "--updates", 2, "--data", "")


def test_a_tiny_base_that_was_made_anew_is_refused(base, tmp_path, monkeypatch, capfd):
    folder_of_base = tmp_path / "base"
    shutil.copytree(base, folder_of_base)
    monkeypatch.setattr(pretrain, "kept_base", lambda task: folder_of_base)
    launch(*SMALL, "--updates", 1, "--out", tmp_path / "run")
    append(folder_of_base / "model.safetensors")
    assert "--model" in refused(capfd, "--resume", tmp_path / "run", "--updates", 2)


def test_weights_that_are_no_safetensors_have_a_fingerprint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    before = folder.fingerprint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"weightz")
    assert folder.fingerprint(str(tmp_path)) != before


def test_a_pipe_is_no_file_of_rows(base, tmp_path, capfd):
    os.mkfifo(tmp_path / "data.jsonl")
    os.mkfifo(tmp_path / "task.py")
    for flag, name in (("--data", "data.jsonl"), ("--test_data", "data.jsonl"), ("--task", "task.py")):
        said = refused(capfd, "--model", base, flag, tmp_path / name, "--out", tmp_path / "run")
        assert "is no file" in said


OWN = """from tasks import Recipe, written
def row(raw):
    return {"prompt": written(raw, "puzzle") + "=", "answer": written(raw, "solution")}
def reward(text, row):
    BODY
TINY = TASK = Recipe(row, reward)
"""


@pytest.mark.parametrize("body", [
    "return len(text) % 2, {'correct': 1, 'parse_fail': 0}",
    "return bool(text), dict(correct=True, parse_fail=False)",
    "import numpy as np; return np.float64(1), {'correct': np.bool_(True), 'parse_fail': np.int64(0)}",
    "return (1 if '1' in text else .5), {'correct': .5, 'parse_fail': 0}",
    "row.clear(); return 0.0, {'correct': 0.0, 'parse_fail': 0.0}",
    "return 1.0, dict(correct=0.0, parse_fail=0.0, entropy=0.5, completion=1.0)"])
def test_rewards_of_any_numbers(body, base, tmp_path, monkeypatch):
    """And a row is not the reward's to change: a resumed run would find it as it was."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN.replace("BODY", body))
    Path("rows.jsonl").write_text(boards(64))
    launch("--model", base, *SMALL, "--updates", 1, "--task", "mine.py", "--data", "rows.jsonl", "--out",
           "run")
    assert lines(tmp_path / "run")[-1]["update"] == 1 and Path("run/trace.html").exists()


@pytest.mark.parametrize("body, said", [
    ("return text[0] and 1 / 0 if text else (0., dict(correct=0., parse_fail=0.))", "ZeroDivision"),
    ("return None if text else (0., dict(correct=0., parse_fail=0.))", "TypeError"),
    ("return float('nan' if text else 0), dict(correct=0., parse_fail=0.)", "nan"),
    ("return 0., dict(correct=0., parse_fail=0., **({'x': 1} if text else {}))", "parts"),
    ("exit(0) if text else None; return 0., dict(correct=0., parse_fail=0.)", "SystemExit")])
def test_a_reward_of_ones_own_that_falls_midway_is_one_line(body, said, base, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN.replace("BODY", body))
    Path("rows.jsonl").write_text(boards(64))
    line = refused(capfd, "--model", base, *SMALL, "--updates", 1, "--task", "mine.py", "--data",
                   "rows.jsonl", "--out", "run", status=1)
    assert re.search(f"mine.py.*: a reward is .*{said}", line)
    assert ("mine.py, line 5: " in line) == (said in ("ZeroDivision", "SystemExit"))


def test_a_fingerprint_is_of_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert folder.fingerprint(a) == folder.fingerprint(b)
    (tmp_path / "a" / "README.md").write_text("nothing a model reads")
    os.utime(tmp_path / "a" / "config.json", (1, 1))
    assert folder.fingerprint(a) == folder.fingerprint(b)
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "tokenizer.json")
    assert folder.fingerprint(a) != folder.fingerprint(b)
    commit = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    commit.mkdir(parents=True)
    assert folder.fingerprint(str(commit)) == "0123abcd"


def test_a_task_of_ones_own_from_the_command_line(base, tmp_path, monkeypatch, capfd):
    """find() of the tasks reads the file; here is that the command line goes along with a path."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/echo task.py").write_text("# rows, reward and drawing\n")
    real = tasks.load("sudoku", chat=False)
    asked = []
    find = tasks.find
    monkeypatch.setattr(tasks, "find", lambda name: find("sudoku") if name.endswith(".py") else find(name))
    monkeypatch.setattr(tasks, "load", lambda name, **_: asked.append(name) or real)
    launch("--model", base, *SMALL, "--updates", 1, "--task", "mine/echo task.py")
    out, where = tmp_path / "runs/egspo-echo task-3", str(tmp_path / "mine/echo task.py")
    saved = json.loads((out / "args.json").read_text())
    assert saved["task"] == where and asked == [where] and "task" in saved["fingerprints"]
    assert f"--resume '{'runs/egspo-echo task-3'}'" in capfd.readouterr().out
    monkeypatch.chdir("/")
    launch("--resume", out, "--updates", 2)
    assert "keeps its task" in refused(capfd, "--resume", out, "--updates", 3, "--task", "sudoku")
    assert "tiny knows" in refused(capfd, "--task", where, "--out", tmp_path / "new")
    Path(where).write_text("# another reward\n")
    assert "--task" in refused(capfd, "--resume", out, "--updates", 3)


def test_all_prompts_are_measured():
    """The longest in tokens is the shortest in characters."""
    def tokenizer(texts, add_special_tokens):
        return {"input_ids": [[0] * (700 if "\u5b57" in text else len(text) // 4) for text in texts]}

    tokenizer.chat_template = None
    texts = ["x" * 400] * 3000 + ["\u5b57" * 380] + ["x" * 500] * 3000
    assert run.longest_prompt(SimpleNamespace(tokenizer=tokenizer), texts) == 700


def test_a_prompt_without_tokens_is_told(base, capfd):
    model = models.load_model(str(base))
    with pytest.raises(SystemExit) as stopped:
        run.longest_prompt(model, ["0123=", "word"])
    assert stopped.value.code == 2 and "cannot be read" in capfd.readouterr().err


def test_a_wrong_path_is_told_before_the_model_is_loaded(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text('{"puzzle": ')
    (tmp_path / "dir.jsonl").mkdir()
    for name in ("nowhere.jsonl", "bad.jsonl", "dir.jsonl", "x" * 300 + ".jsonl", "what.exe"):
        for flag in ("--data", "--test_data"):
            for model in ([], ["--model", base]):
                said = refused(capfd, *model, flag, tmp_path / name, "--out", tmp_path / "run")
                assert "cannot read" in said


# ---------------------------------------------------------------------------------------- where it writes


def test_an_evaluation_does_not_write_into_a_run(base, done, capfd):
    before = held(done)
    assert "holds a run" in refused(capfd, "--model", base, "--eval_only", "--out", done)
    assert held(done) == before


def test_an_empty_folder_is_a_place_for_a_run(base, tmp_path, capfd):
    mounted, other = tmp_path / "mounted", tmp_path / "other"
    (mounted / "lost+found").mkdir(parents=True)
    other.mkdir()
    launch("--model", base, *SMALL, "--updates", 1, "--out", mounted)
    assert (mounted / "model").is_dir()
    (other / "thesis.txt").write_text("no run")
    message = refused(capfd, "--model", base, "--out", other)
    assert "holds no run" in message and "--resume" not in message
    assert "--resume" in refused(capfd, "--model", base, "--out", mounted)


def test_fewer_updates_than_done_are_refused(done, tmp_path, capfd, monkeypatch):
    before = held(done)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    assert "has made 2 updates" in refused(capfd, "--resume", done, "--updates", 1)
    assert held(done) == before


def test_a_run_of_another_method_is_refused(done, capfd):
    for method in ("wd1", "rldf", "gdsd"):
        assert "another method" in refused(capfd, "--resume", done, method=method)


def test_printed_commands_can_be_pasted(base, tmp_path, capfd):
    out = tmp_path / "my run's $HOME"
    launch("--model", base, *SMALL, "--updates", 1, "--out", out)
    printed = capfd.readouterr().out
    said = refused(capfd, "--model", base, "--out", out)
    for text in (printed, said):
        place = subprocess.run(["bash", "-c", "printf %s " + text.split("--resume ")[1].split(" --upd")[0]
                                .split(", or")[0]], capture_output=True, text=True, check=True).stdout
        assert place == str(out)


# ------------------------------------------------------------------------------------- a damaged folder


def cut(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(share: float):
    def flip(file: Path):
        data = bytearray(file.read_bytes())
        data[int(share * len(data))] ^= 8
        file.write_bytes(data)

    return flip


def a_folder(file: Path):
    if file.exists():
        file.unlink()
    file.mkdir()
    (file / "kept").write_text("somebody's")


def setting(name: str, value):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))


def without(key: str):
    def damage(file: Path):
        state = torch.load(file, weights_only=True)
        del state[key]
        torch.save(state, file)

    return damage


def changed(**entries):
    def damage(file: Path):
        torch.save(torch.load(file, weights_only=True) | entries, file)

    return damage


def bad_line(text: bytes, at: int = 0):
    def damage(file: Path):  # as long as before, as the checkpoint counts the bytes
        rows = file.read_bytes().split(b"\n")
        rows[at] = text.ljust(len(rows[at]))
        file.write_bytes(b"\n".join(rows))

    return damage


def joined(file: Path):
    file.write_bytes(file.read_bytes().replace(b"\n", b" "))


def a_pipe(file: Path):
    """To read it waits for a writer."""
    file.unlink()
    os.mkfifo(file)


def moments(change):
    def damage(file: Path):
        state = torch.load(file, weights_only=True)
        change(state["optimizer"]["state"])
        torch.save(state, file)

    return damage


def counted(name: str, value):
    def damage(file: Path):
        state = torch.load(file, weights_only=True)
        torch.save(state | {"counters": state["counters"] | {name: value}}, file)

    return damage


def not_finite(file: Path):
    state = torch.load(file, weights_only=True)
    next(iter(state["network"].values())).fill_(math.nan)
    torch.save(state, file)


def rounded(file: Path):
    state = torch.load(file, weights_only=True)
    state["network"] = {k: v.bfloat16() for k, v in state["network"].items()}
    torch.save(state, file)


DAMAGE = {
    "state.pt, weights of another precision": ("state.pt", rounded),
    "evals.jsonl, a pipe": ("evals.jsonl", a_pipe),
    "trace.html, a pipe": ("trace.html", a_pipe),
    "state.pt, a pipe": ("state.pt", a_pipe),
    "state.pt, weights NaN": ("state.pt", not_finite),
    "state.pt, seconds inf": ("state.pt", counted("seconds", math.inf)),
    "state.pt, bytes a fraction": ("state.pt", changed(metrics_bytes=100.0)),
    "metrics.jsonl, a pipe": ("metrics.jsonl", a_pipe),
    "metrics.jsonl, half an evaluation": ("metrics.jsonl", bad_line(b'{"update": 0, "eval_accuracy": 0.5}')),
    "metrics.jsonl, an evaluation of nothing": (
        "metrics.jsonl", bad_line(b'{"update": 0, "eval_accuracy": null}')),
    "metrics.jsonl, a number no float can be": (
        "metrics.jsonl", bad_line(b'{"update": 1, "reward": 1' + b"0" * 330 + b"}", 1)),
    "args.json, fingerprints of what is none": ("args.json", setting("fingerprints", {"nothing": "a"})),
    "args.json, a fingerprint that is a number": ("args.json", setting("fingerprints", {"model": 5})),
    "state.pt, gone": ("state.pt", Path.unlink),
    "state.pt, a folder": ("state.pt", a_folder),
    "state.pt, cut": ("state.pt", cut),
    "state.pt, empty": ("state.pt", lambda file: file.write_bytes(b"")),
    "state.pt, a bit, early": ("state.pt", flipped(0.3)),
    "state.pt, a bit, middle": ("state.pt", flipped(0.5)),
    "state.pt, a bit, late": ("state.pt", flipped(0.7)),
    "state.pt, no network": ("state.pt", without("network")),
    "state.pt, no counters": ("state.pt", without("counters")),
    "state.pt, counters empty": ("state.pt", changed(counters={})),
    "state.pt, counters a text": ("state.pt", changed(counters="none")),
    "state.pt, update a text": ("state.pt", changed(update="2")),
    "state.pt, of an earlier update": ("state.pt", changed(update=1)),
    "state.pt, of a later update": ("state.pt", changed(update=3)),
    "metrics.jsonl, gone": ("metrics.jsonl", Path.unlink),
    "metrics.jsonl, cut": ("metrics.jsonl", cut),
    "metrics.jsonl, a folder": ("metrics.jsonl", a_folder),
    "metrics.jsonl, no JSON": ("metrics.jsonl", bad_line(b"what")),
    "metrics.jsonl, not UTF-8": ("metrics.jsonl", bad_line(b"\xff\xfe", 1)),
    "metrics.jsonl, a list": ("metrics.jsonl", bad_line(b"[1]")),
    "metrics.jsonl, no update": ("metrics.jsonl", bad_line(b'{"reward": 1.0}')),
    "metrics.jsonl, a text": ("metrics.jsonl", bad_line(b'{"update": 0, "eval_accuracy": "all"}')),
    "metrics.jsonl, no newline": ("metrics.jsonl", joined),
    "args.json, a folder": ("args.json", a_folder),
    "args.json, gone": ("args.json", Path.unlink),
    "args.json, cut": ("args.json", cut),
    "args.json, a list": ("args.json", lambda file: file.write_text("[1]")),
    "args.json, null": ("args.json", lambda file: file.write_text("null")),
    "args.json, deep": ("args.json", lambda file: file.write_text("[" * 100_000)),
    "args.json, a text for a number": ("args.json", setting("L", "16")),
    "args.json, null for a number": ("args.json", setting("lr", None)),
    "args.json, a number for a text": ("args.json", setting("task", 5)),
    "args.json, a list for a text": ("args.json", setting("model", ["tiny"])),
    "args.json, an object": ("args.json", setting("seed", {"a": 1})),
    "args.json, a share for a count": ("args.json", setting("G", 2.5)),
    "args.json, true for a count": ("args.json", setting("prompts", True)),
    "args.json, one number of two": ("args.json", setting("betas", [0.9])),
    "args.json, NaN": ("args.json", setting("lr", math.nan)),
    "args.json, no such choice": ("args.json", setting("order", "sideways")),
    "args.json, a method that is a list": ("args.json", setting("method", [1])),
    "args.json, fingerprints a list": ("args.json", setting("fingerprints", [1])),
    "args.json, saved a text": ("args.json", setting("saved", "2")),
    "state.new, a folder": ("state.new", a_folder),
    "args.json.new, a folder": ("args.json.new", a_folder),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line_and_left_alone(name, done, tmp_path, capfd):
    file, damage = DAMAGE[name]
    out = tmp_path / "run"
    shutil.copytree(done, out)
    damage(out / file)
    before = held(out)
    refused(capfd, "--resume", out, "--updates", 3)
    assert held(out) == before


def test_moments_that_lack_and_a_log_that_was_forgotten(done, tmp_path, capfd):
    """A run would go on, with other numbers or with no log of what was. (An evaluation needs neither.)"""
    for number, damage in enumerate([moments(lambda held: held[0].update(exp_avg=torch.zeros(3))),
                                     moments(lambda held: held[0].pop("exp_avg_sq")),
                                     moments(lambda held: held[0].update(exp_avg=held[0]["exp_avg"].half())),
                                     moments(dict.clear), changed(metrics_bytes=0)]):
        out = tmp_path / str(number)
        shutil.copytree(done, out)
        damage(out / "state.pt")
        before = held(out)
        refused(capfd, "--resume", out, "--updates", 3)
        assert held(out) == before


@pytest.mark.parametrize("name", [name for name in DAMAGE if name.startswith("state.pt")])
def test_nor_is_a_damaged_checkpoint_evaluated(name, done, tmp_path, capfd):
    if name == "state.pt, of a later update":
        return  # an evaluation reads no log that could contradict it
    out = tmp_path / "run"
    shutil.copytree(done, out)
    DAMAGE[name][1](out / "state.pt")
    before = held(out)
    refused(capfd, "--resume", out, "--eval_only")
    assert held(out) == before


def test_no_flipped_bit_changes_a_checkpoint(tmp_path):
    """Wherever it is: either it is noticed, or it is in bytes that mean nothing."""
    tensors = {"a": torch.arange(40.0), "b": torch.ones(3, dtype=torch.long)}
    torch.save(tensors, tmp_path / "state.pt")
    data, seen = (tmp_path / "state.pt").read_bytes(), 0
    for place in range(0, len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            loaded = folder.load_checked(tmp_path / "changed.pt")
        except Exception:
            seen += 1
            continue
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], v) for k, v in tensors.items())
    assert seen > 300


def test_an_evaluation_behind_a_line_that_was_cut_off(done, tmp_path):
    """By a kill, or a full disk. What was whole before it stays whole, and so is what comes after."""
    out = tmp_path / "run"
    shutil.copytree(done, out)
    first = (out / "evals.jsonl").read_text()
    (out / "evals.jsonl").write_text(first + first[:100])
    launch("--resume", out, "--eval_only")
    kept = (out / "evals.jsonl").read_text().split("\n")
    assert kept[0] + "\n" == first and len(kept) == 4 and json.loads(kept[2])["update"] == 2


def test_what_is_linked_to_another_disk_stays_there(done, tmp_path):
    """model/ of a run; three times, since a save leaves the one before for the next to remove."""
    out, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(done, out)
    disk.mkdir()
    shutil.move(out / "model", disk / "model")
    (out / "model").symlink_to(disk / "model")
    before = held(disk)
    for updates in (3, 4, 5):
        launch("--resume", out, "--updates", updates)
    assert (out / "model").is_symlink() and os.listdir(disk) == ["model"] and held(disk) != before
    models.load_model(str(out / "model"))


def test_a_file_where_a_model_is_to_be_saved(done, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / "model.new").write_text("somebody's")
    before = held(out / "model")
    assert "cannot be written" in refused(capfd, "--resume", out, "--updates", 3, status=1)
    assert held(out / "model") == before


BEFORE = {
    "gone": Path.unlink, "a folder": a_folder, "cut": cut, "a bit": flipped(0.5),
    "a list": lambda file: torch.save([1], file),
    "other shapes": changed(completion=torch.zeros(16, 4, dtype=torch.long)),
    "fewer rows in one": changed(reward=torch.zeros(2)),
    "a number": changed(correct=1.0),
    "tokens that are none": changed(completion=torch.full((16, 16), -7)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_damaged_before_is_told_and_left_out(name, done, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    BEFORE[name](out / "before.pt")
    launch("--resume", out, "--updates", 3)
    text = capfd.readouterr().out
    assert (out / "trace.html").stat().st_size > 10_000
    assert ("before.pt cannot be read" in text) == (name != "gone")


LATE = ["evals.jsonl", "curve.png", "trace.html", "model", "metrics.jsonl", "state.new", "args.json.new", "."]


@pytest.mark.parametrize("name", LATE)
def test_what_goes_wrong_midway_ends_in_one_line(name, base, tmp_path, monkeypatch, capfd):
    """A folder in the place of a file, or the run's folder gone; after the first update."""
    out, log = tmp_path / "run", run.FolderRun.log

    def read_only(*_):
        raise PermissionError("read-only")

    def damage(self, *inputs):
        log(self, *inputs)
        if name == ".":
            shutil.move(out, tmp_path / "moved")
        elif name == "model":
            monkeypatch.setattr(Path, "rename", read_only)
        else:
            a_folder(out / name)

    monkeypatch.setattr(run.FolderRun, "log", damage)
    said = refused(capfd, "--model", base, *SMALL, "--updates", 1, "--out", out, status=1)
    assert "cannot be written" in said


NAMES = ["x" * 300, "x" * 200 + "/" + "y" * 300, "x/" * 3000, "\udcff", "caf\udce9/x"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_no_file_can_have(name, base, tmp_path, capfd):
    place = tmp_path / name
    for flag in ("--out", "--resume", "--model", "--data", "--test_data", "--task"):
        value = f"{place}.jsonl" if "data" in flag else f"{place}.py" if flag == "--task" else place
        model = [] if flag == "--model" else ["--model", base]
        refused(capfd, *model, *SMALL, "--updates", 1, flag, value)


# ------------------------------------------------------------------------- what must not be believed


def test_a_last_update_that_is_not_finite_keeps_the_model(done, tmp_path, monkeypatch):
    """Its weights are finite or not, but what they predict is not. Exit status 1."""
    for number, huge in enumerate((math.nan, math.inf, 1e38)):
        out = tmp_path / str(number)
        shutil.copytree(done, out)
        before = held(out / "model") | {"state.pt": (out / "state.pt").read_bytes()}
        log = run.FolderRun.log

        def break_it(self, *inputs, value=huge, log=log):
            log(self, *inputs)
            with torch.no_grad():
                for p in self.model.network.parameters():
                    p.fill_(value)

        monkeypatch.setattr(run.FolderRun, "log", break_it)
        with pytest.raises(SystemExit) as stopped:
            launch("--resume", out, "--updates", 3)
        assert "NaN or inf" in stopped.value.code and "keeps the last good checkpoint" in stopped.value.code
        assert held(out / "model") | {"state.pt": (out / "state.pt").read_bytes()} == before
        assert not (out / "state.new").exists()
        monkeypatch.setattr(run.FolderRun, "log", log)
        launch("--resume", out, "--updates", 3)
        assert lines(out)[-1]["update"] == 3


# --------------------------------------------------------------------------------- the clock and signals


def test_minutes_are_a_limit_and_resume_goes_on(base, tmp_path, capfd):
    whole, timed = tmp_path / "whole", tmp_path / "timed"
    argv = ["--model", base, *SMALL, "--updates", 3]
    launch(*argv, "--out", whole)
    capfd.readouterr()
    launch(*argv, "--out", timed, "--minutes", 1e-6)  # over after the first update
    text = capfd.readouterr().out
    assert "over after 1 of 3 updates" in text and f"--resume {timed} goes on" in text
    assert (timed / "model").is_dir() and lines(timed)[-1]["update"] == 1
    launch("--resume", timed)  # each time so many minutes
    assert lines(timed)[-1]["update"] == 2
    launch("--resume", timed, "--minutes", 0)
    same_run(whole, timed)
    assert "minutes" in refused(capfd, *argv, "--minutes", -1)


def start(*argv, **environment) -> subprocess.Popen:
    """As from a terminal: the tests themselves may run under nohup, which children inherit."""
    return subprocess.Popen(command(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | environment,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


def wait_for_update(out: Path, step: int, process: subprocess.Popen):
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        log = out / "metrics.jsonl"
        if log.exists() and f'"update": {step}, "reward"' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no update {step}: {process.communicate()}")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM", "SIGUSR2", "SIGXCPU", "SIGINT"])
def test_signals_save(name, base, tmp_path):
    out = tmp_path / "run"
    process = start("--model", base, *SMALL, "--updates", 100_000, "--save_every", 100_000, "--out", out)
    wait_for_update(out, 2, process)
    for _ in range(2):  # a terminal that closes, and `timeout`, send it twice
        process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and f"--resume {out}" in stdout
    update = torch.load(out / "state.pt", weights_only=True)["update"]
    assert update >= 2 and lines(out)[-1]["update"] == update


def test_a_terminal_that_has_gone_ends_no_run(base, tmp_path):
    """Nobody reads what it prints: all that it was to leave is there."""
    out = tmp_path / "run"
    process = start("--model", base, *SMALL, "--updates", 2, "--out", out)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (out / "model").is_dir() and (out / "trace.html").exists()


def test_nohup_stays(base, tmp_path):
    out = tmp_path / "run"
    argv = command("--model", base, *SMALL, "--updates", 3, "--out", out)
    code = ("import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
            "os.execv(sys.argv[1], sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for_update(out, 1, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    process.communicate()


def test_ctrl_c_before_the_first_update_is_one_line(base, tmp_path, monkeypatch, capfd):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    for place in ((models, "load_model"), (tasks, "load"), (flags, "check"), (report, "print_report")):
        monkeypatch.setattr(*place, pressed)
        if place[0] is report:
            monkeypatch.setattr(run, "print_report", pressed)
        with pytest.raises(SystemExit) as stopped:
            launch("--model", base, *SMALL, "--updates", 1, "--out", tmp_path / "run")
        assert stopped.value.code == 130
        said = capfd.readouterr().err
        assert said.endswith("\nstopped by ctrl-C\n") and "Traceback" not in said
        monkeypatch.undo()
    assert (tmp_path / "run" / "model").is_dir()  # the last: all is written before it is printed


# -------------------------------------------------------------------------------- terminal and environment


def test_what_a_terminal_cannot_show_is_replaced(base, done, tmp_path):
    for encoding, extra, left in (("ascii", ["--updates", 1], "curve.png"),
                                  ("latin-1", ["--eval_only"], "evals.jsonl")):
        out = tmp_path / encoding
        environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "MPLBACKEND": "junk"}
        argv = command("--model", base, *SMALL, *extra, "--out", out)
        process = subprocess.run(argv, capture_output=True, env=environment)
        assert process.returncode == 0, process.stderr
        assert (out / left).exists() and b"solved" in process.stdout


def test_an_evaluation_is_written_before_it_is_printed(base, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no terminal at all")

    monkeypatch.setattr(run, "print_report", broken)
    with pytest.raises(ValueError):
        launch("--model", base, *SMALL, "--eval_only", "--out", tmp_path / "only")
    assert (tmp_path / "only" / "evals.jsonl").exists() and (tmp_path / "only" / "trace.html").exists()


def test_any_width_of_a_terminal(monkeypatch, capfd):
    for width in ("1", "2", "5", "6", "0", "-1", "x", "", "10000000000"):
        monkeypatch.setenv("COLUMNS", width)
        with pytest.raises(SystemExit) as stopped:
            launch("--help")
        assert stopped.value.code == 0
        assert 0 < len(capfd.readouterr().out) < 100_000


TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@pytest.mark.parametrize("name, value", [(name, value) for name in TORCHRUN for value in (None, "", "x")
                                         if (name, value) not in {("WORLD_SIZE", None), ("MASTER_ADDR", "x")}]
                         + [("RANK", "1"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "0")])
def test_half_of_torchruns_variables_are_refused(name, value, base, tmp_path, monkeypatch, capfd):
    for key, right in TORCHRUN.items():
        monkeypatch.setenv(key, right)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    message = refused(capfd, "--model", base, "--out", tmp_path / "run")
    assert "WORLD_SIZE" in message and name in message and "torchrun" in message


@pytest.mark.parametrize("left", [{"LOCAL_RANK": "1"}, {"RANK": "3", "LOCAL_RANK": ""},
                                  {"LOCAL_WORLD_SIZE": ""}, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "x"}])
def test_what_torchrun_left_over_is_ignored(left, base, tmp_path, monkeypatch):
    for key in TORCHRUN:
        monkeypatch.delenv(key, raising=False)
    for key, value in left.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(pretrain, "kept_base", lambda task: base)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    launch(*SMALL, "--updates", 0, "--out", tmp_path / "run")
    assert parallel.rank() == 0 and parallel.on_this_machine() == 1


def test_an_output_folder_is_no_package(base, tmp_path, monkeypatch, capfd):
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["--model", base, "--track", "wandb", "--out", tmp_path / "run"]
    assert "pip install wandb" in refused(capfd, *argv)


def test_an_older_python_is_told():
    """What a script imports before plumbing can be parsed by it, and plumbing begins by telling."""
    for file in ("common.py", "egspo.py", "wd1.py", "rldf.py", "gdsd.py", "plumbing/__init__.py",
                 *(str(path.relative_to(ROOT)) for path in (ROOT / "baselines").glob("*.py"))):
        ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 10))
    code = "import sys; sys.version_info = (3, 10, 0); sys.version = '3.10.0 (main)'; import plumbing.run"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "error: Python 3.11 or newer is needed, this is 3.10.0\n"


def test_a_stream_outlasts_its_reader():
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    stream = surroundings.Lasting(Gone())
    print("text", file=stream, flush=False)
    assert stream.write("four") == 4
