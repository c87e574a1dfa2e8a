"""A run and its folder: what is damaged, missing, locked or full is told in one line, and nothing is lost."""

import fcntl
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, launch, lines, same_run, start, wait_for_update, weights

import egspo
from common import Denoiser
from plumbing import flags, models, pretrain, run


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory) -> Path:
    """A run of two updates."""
    out = tmp_path_factory.mktemp("runs") / "done"
    launch("egspo", "--model", folder, *SMALL, "--updates", 2, "--beta", 1, "--out", out)  # the KL moves it
    return out


def refused(capfd, *argv) -> str:
    """The one line that the command is refused with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        launch("egspo", *argv)
    message = capfd.readouterr().err.split("\r")[-1].strip()
    assert stopped.value.code == 2 and message.startswith("error: ") and "\n" not in message, message
    return message


def cut(file: Path, share: float = 0.5):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def without(key: str):
    def damage(file: Path):
        state = torch.load(file, weights_only=True)
        del state[key]
        torch.save(state, file)

    return damage


def setting(name: str, value):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))


DAMAGE = {
    "state.pt, cut": ("state.pt", cut, "cannot be used"),
    "state.pt, empty": ("state.pt", lambda file: file.write_bytes(b""), "cannot be used"),
    "state.pt, text": ("state.pt", lambda file: file.write_text("what?"), "cannot be used"),
    "state.pt, no network": ("state.pt", without("network"), "KeyError: 'network'"),
    "state.pt, no optimizer": ("state.pt", without("optimizer"), "KeyError: 'optimizer'"),
    "state.pt, no counters": ("state.pt", without("counters"), "KeyError: 'counters'"),
    "args.json, cut": ("args.json", cut, "cannot be read"),
    "args.json, a list": ("args.json", lambda file: file.write_text("[1]"), "cannot be read"),
    "args.json, binary": ("args.json", lambda file: file.write_bytes(b"\xff\xfe"), "cannot be read"),
    "args.json, a setting nobody knows": ("args.json", setting("steps", 3), "'steps'"),
    "args.json, gone": ("args.json", Path.unlink, "no run to resume"),
    "metrics.jsonl, cut": ("metrics.jsonl", cut, "shorter than it was at the checkpoint"),
    "metrics.jsonl, gone": ("metrics.jsonl", Path.unlink, "shorter than it was at the checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_told_in_one_line_and_left_alone(name, done, tmp_path, capfd):
    file, damage, said = DAMAGE[name]
    out = tmp_path / "run"
    shutil.copytree(done, out)
    damage(out / file)
    kept = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert said in refused(capfd, "--resume", out, "--updates", 3)
    assert all(path.read_bytes() == held for path, held in kept.items())


def test_to_evaluate_a_run_the_optimizer_is_not_read(done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    without("optimizer")(out / "state.pt")
    assert launch("egspo", "--resume", out, "--eval_only") == lines(done)[-1]["eval_accuracy"]


def test_a_run_that_ended_before_its_first_checkpoint_goes_on(folder, tmp_path, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["--model", folder, *SMALL, "--updates", 4, "--save_every", 100, "--beta", 1]
    launch("egspo", *argv, "--out", whole)
    process = start("egspo", *argv, "--updates", 1000, "--out", killed)
    wait_for_update(killed, 2, process)
    process.kill()
    process.communicate()
    assert not (killed / "state.pt").exists()
    assert "--resume" in refused(capfd, *argv, "--out", killed)
    launch("egspo", "--resume", killed, "--updates", 4)
    same_run(whole, killed)


def test_no_checkpoint_of_the_base(folder, tmp_path, monkeypatch):
    saved, save = [], run.FolderRun.save
    monkeypatch.setattr(run.FolderRun, "save", lambda self: saved.append(self.update) or save(self))
    launch("egspo", "--model", folder, *SMALL, "--updates", 3, "--save_every", 2, "--out", tmp_path / "run")
    assert saved == [2, 3]


def test_two_processes_do_not_share_a_folder(done, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "another process" in refused(capfd, "--resume", out, "--updates", 3)
    os.close(other)
    launch("egspo", "--resume", out, "--updates", 3)
    assert lines(out)[-1]["update"] == 3


def test_a_full_disk_is_told_and_half_a_checkpoint_removed(done, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    before = (out / "state.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        launch("egspo", "--resume", out, "--updates", 3)
    assert "No space left" in stopped.value.code and "keeps the last good checkpoint" in stopped.value.code
    assert (out / "state.pt").read_bytes() == before and not (out / "state.new").exists()


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run"])
def test_an_out_that_cannot_be_written_is_found_before_the_model_is_loaded(out, folder, capfd, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    assert "cannot be written" in refused(capfd, "--model", folder, "--out", out)


@pytest.mark.parametrize("task, other", [("sudoku", "countdown"), ("countdown", "sudoku")])
def test_a_tiny_model_is_refused_another_task(task, other, tmp_path, capfd, monkeypatch):
    """Its words are no others. In one line, before the model is loaded."""
    models.save_model(pretrain.tiny_model(1, 32, task=task), tmp_path / "model")
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    for wrong in (other, "gsm8k"):
        said = refused(capfd, "--model", tmp_path / "model", "--task", wrong, "--out", tmp_path / "run")
        assert f"{tmp_path}/model is a tiny model of --task {task}" in said
    assert not (tmp_path / "run").exists()


def test_model_tiny_is_refused_a_task_in_words_before_it_is_built(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pretrain, "base_folder", lambda *_: pytest.fail("built"))
    said = refused(capfd, "--task", "gsm8k", "--out", tmp_path / "run")
    assert said == "error: --model tiny knows countdown and sudoku: gsm8k needs another --model"
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_finite_and_led_to_a_finite_update(folder, tmp_path):
    """One enormous step: the weights are finite, what is computed with them is not."""
    out = tmp_path / "run"
    argv = "--lr 1e30 --beta 1 --minibatches 1 --save_every 1 --updates 9 --eval_every 100".split()
    with pytest.raises(SystemExit) as stopped:
        launch("egspo", "--model", folder, *SMALL, *argv, "--out", out)
    assert "not finite" in stopped.value.code
    if (out / "state.pt").exists():
        assert all(v.isfinite().all() for v in weights(out).values())
        model = models.load_model(folder)
        run.load_state(out, model)
        h = model.body(torch.full((1, 8), model.mask_id), None)
        assert model.head(h)[..., : model.mask_id].isfinite().all()


def test_a_run_without_one_finite_step_fails(folder, tmp_path, monkeypatch):
    honest = egspo.reward_rows

    def broken(*inputs):
        reward, parts, texts = honest(*inputs)
        return reward * math.nan, parts, texts

    monkeypatch.setattr(egspo, "reward_rows", broken)
    argv = "--lam 0 --minibatches 1 --updates 2".split()
    with pytest.raises(SystemExit) as stopped:
        launch("egspo", "--model", folder, *SMALL, *argv, "--out", tmp_path / "run")
    assert "no optimizer step was finite" in stopped.value.code and "no checkpoint" in stopped.value.code


def test_help_shows_the_defaults_of_the_model_and_of_the_run(done, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 151936}))
    for argv, shown in ((["--model", tmp_path], "default: 256"), (["--resume", done], "default: 2"),
                        ([], "default: 16")):
        with pytest.raises(SystemExit) as stopped:
            launch("egspo", *argv, "--help")
        assert stopped.value.code == 0
        flag = "--updates INT" if argv[:1] == ["--resume"] else "--L INT"
        assert shown in " ".join(capsys.readouterr().out.split()).partition(flag)[2][:200]


def test_the_reference_is_the_model_before_training_wherever_it_is_copied(done):
    """Run reads no weights before the loop begins."""
    settings = SimpleNamespace(**flags.saved_settings(egspo.Args, "egspo", done))
    settings.out = str(done)
    model = models.load_model(settings.model)
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    optimizer = torch.optim.AdamW(model.network.parameters())
    this = run.FolderRun(settings, "egspo", None)
    reference = model.frozen()
    assert isinstance(reference, Denoiser)
    assert all(torch.equal(v, before[k]) for k, v in reference.network.state_dict().items())
    run.load_state(done, model, optimizer)
    assert not all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())
    os.close(this.lock)
