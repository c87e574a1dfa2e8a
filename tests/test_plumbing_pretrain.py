"""The tiny bases, their demonstrations and their cache; models on disk and what load_model refuses."""

import dataclasses
import json
import math
import logging
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import global_random_states, padded_prompts, recording, sharp_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from plumbing import pretrain
from plumbing import run
import wd1
from common import Denoiser, countdown_reward
from plumbing.models import is_bidirectional, load_model, save_model
from plumbing.pretrain import (TINY, Settings, base_folder, countdown_demonstrations, sudoku_demonstrations,
                      tiny_model, train)
from tasks import load
from tasks.countdown import countdown_split, countdown_tiny_row
from tasks.sudoku import sudoku_puzzles, sudoku_split

SMALL = {"steps": 3, "batch": 8, "layers": 1, "width": 32}


def weights(model: Denoiser) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


# ----------------------------------------------------------------------------------------------- pretraining


def a_share_is_wrong(wrong: float, careless: float):
    """Chance of a false alarm with another seed: below 1e-4 (it is fixed)."""
    assert wrong == 0 if careless == 0 else 0.75 * careless < wrong <= careless + 0.05


@pytest.mark.parametrize("careless", [0.0, 0.6, 1.0])
def test_sudoku_demonstrations(careless):
    """Of training boards alone; careless ones are wrong in the order of a row's missing digits."""
    count, grids = 400, sudoku_split()["train"]
    prompts, answers = sudoku_demonstrations(count, careless, np.random.default_rng(0))
    puzzles, solutions = sudoku_puzzles(grids, count, np.random.default_rng(0))
    assert prompts == ["".join(map(str, puzzle)) + "=" for puzzle in puzzles]
    answers = np.array([list(map(int, answer)) for answer in answers])
    assert (answers == puzzles)[puzzles > 0].all()  # clues are kept
    assert (np.sort(answers.reshape(count, 4, 4), 2) == [1, 2, 3, 4]).all()  # rows are right
    a_share_is_wrong((answers != solutions).any(1).mean(), careless)


@pytest.mark.parametrize("careless", [0.0, 0.6, 1.0])
def test_countdown_demonstrations(careless):
    """Of training problems alone, the numbers of prompt and answer in any order; careless ones miss it."""
    train = {(row["target"], *sorted(row["numbers"])): row["numbers"] for row in countdown_split()["train"]}
    rewards, asked, answered = [], 0, 0
    demonstrations = countdown_demonstrations(400, careless, np.random.default_rng(0))
    for prompt, answer in zip(*demonstrations, strict=True):
        *numbers, _, target, _ = prompt.split()
        numbers, target = list(map(int, numbers)), int(target)
        row = countdown_tiny_row({"numbers": numbers, "target": target})
        assert row["prompt"] == prompt and (target, *sorted(numbers)) in train
        asked += train[target, *sorted(numbers)] != numbers
        answered += list(map(int, re.findall(r"\d+", answer))) != numbers
        rewards.append(countdown_reward(answer, row)[0])
    assert asked > 100 and answered > 100 and set(rewards) <= {0.1, 1.0}
    a_share_is_wrong(rewards.count(0.1) / 400, careless)


def sudoku_checks(monkeypatch, shares: dict[str, list[float]]) -> list[tuple]:
    """Let solved_share say, one after another, what it finds of all rows and of a part. Returns the list that
    it adds (all or part, optimizer steps so far, the weights asked) to."""
    asked, steps = [], []
    whole = len(load("sudoku", chat=False, train=False, held_out="validation").test)
    validation = {"".join(map(str, grid)) for grid in sudoku_split()["validation"]}

    def solved_share(model, task, rows, tiny):
        assert (tiny.L, tiny.block) == (16, 16) and {row["solution"] for row in rows} <= validation
        kind = "all" if len(rows) == whole else "part"
        asked.append((kind, len(steps), weights(model)))
        return shares[kind].pop(0)

    monkeypatch.setattr("plumbing.pretrain.loss_of", recording(pretrain.loss_of, steps))
    monkeypatch.setattr("plumbing.pretrain.solved_share", solved_share)
    return asked


def test_a_base_stops_when_it_solves_enough_of_all_validation_rows(monkeypatch):
    """A part that is good enough is not: it says when all are asked."""
    asked = sudoku_checks(monkeypatch, {"part": [0.1, 0.9, 0.9, 0.49], "all": [0.2, 0.49, 0.5]})
    base = train(Settings(batch=1, layers=1, width=32, solved=0.5))
    assert [(kind, step) for kind, step, _ in asked] == [
        ("part", 20), ("part", 40), ("all", 40), ("part", 60), ("all", 60), ("part", 80), ("all", 80)]
    assert torch.equal(weights(base), asked[-1][2])  # what was asked is what comes back


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(monkeypatch):
    moved = {}
    for kind in (torch.optim.AdamW, torch.optim.Muon):
        def step(self, *_, kind=kind, **__):
            moved[kind] = [p.shape for group in self.param_groups for p in group["params"]]
        monkeypatch.setattr(kind, "step", step)
    model = train(Settings(steps=1, batch=1, layers=3, width=32, muon=True))
    network, layers = model.network, model.network.model.layers
    assert len(moved[torch.optim.Muon]) == 3 * 4  # Wqkv, Wo and two of the MLP
    assert sum(map(math.prod, moved[torch.optim.Muon])) == sum(p.numel() for p in layers.parameters()
                                                               if p.dim() == 2)
    assert len(moved[torch.optim.Muon] + moved[torch.optim.AdamW]) == len(list(network.parameters()))


def test_a_base_that_does_not_learn_enough_ends_and_says_so(monkeypatch, capsys):
    asked = sudoku_checks(monkeypatch, {"part": [0.0], "all": []})
    train(Settings(steps=20, batch=1, layers=1, width=32, solved=0.5))
    assert [step for _, step, _ in asked] == [20]
    assert "stopped after 20 steps: the base solves less than 50%" in capsys.readouterr().out


def test_the_base_has_the_averaged_weights(monkeypatch):
    """Those after step k count k (k + 1) (k + 2) times: 83 % of the weight is that of the last third."""
    seen, step = [], torch.optim.AdamW.step

    def recorded(self, *inputs, **options):
        out = step(self, *inputs, **options)
        seen.append(torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]]))
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    base = weights(train(Settings(steps=12, batch=2, layers=1, width=32)))
    times = [k * (k + 1) * (k + 2) for k in range(1, 13)]
    average = sum(k * raw.double() for k, raw in zip(times, seen, strict=True)) / sum(times)
    assert torch.allclose(base.double(), average, rtol=0, atol=1e-6)
    assert (base - seen[-1]).abs().max() > 1e-4  # those of the last step are others


@pytest.mark.parametrize("flags, task, said", [
    ("", "sudoku", {}), ("--task countdown", "countdown", {}),
    ("--careless 0.4 --task=countdown", "countdown", {"careless": 0.4})])
def test_the_command_line_has_defaults_for_each_task(flags, task, said, cache, monkeypatch, capsys):
    built = []
    monkeypatch.setattr("plumbing.pretrain.train", lambda settings: built.append(settings) or train(settings))
    small = "--steps 1 --batch 8 --layers 1 --width 32".split()
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags.split(), *small])
    pretrain.main()
    folder = Path(capsys.readouterr().out.splitlines()[-1].rpartition(" (")[0])
    assert built == [dataclasses.replace(TINY[task].settings, **SMALL | {"steps": 1} | said)]
    assert json.loads((folder / "config.json").read_text())["tiny_task"] == task
    assert dataclasses.replace(TINY["sudoku"].settings, task="countdown") != TINY["countdown"].settings


def test_an_unknown_task_is_refused_in_one_line(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--task", "chess"])
    with pytest.raises(SystemExit) as stopped:
        pretrain.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1, err
    assert "chess" in err and "sudoku, countdown" in err and not any(tmp_path.iterdir())


def test_the_base_is_built_once_and_loads(cache, monkeypatch):
    before = global_random_states()
    folder = base_folder(Settings(**SMALL))
    assert global_random_states() == before
    assert list(folder.parent.iterdir()) == [folder]  # no scratch folder is left
    with monkeypatch.context() as patch:
        patch.setattr("plumbing.pretrain.train", lambda settings: pytest.fail("built a second time"))
        assert base_folder(Settings(**SMALL)) == folder
    others = [base_folder(Settings(**SMALL | change)) for change in ({"seed": 1}, {"careless": 0.4})]
    assert len({folder, *others}) == 3
    base, other = load_model(str(folder)), load_model(str(others[0]))
    assert not torch.equal(weights(base), weights(other))
    assert not torch.equal(weights(base), weights(tiny_model(layers=1, width=32)))  # trained


def test_model_tiny_is_the_base(cache, monkeypatch):
    """Of the task of the command line."""
    for task in TINY:
        small = Settings(**SMALL, task=task)
        monkeypatch.setitem(TINY, task, dataclasses.replace(TINY[task], settings=small))
        monkeypatch.setattr("sys.argv", ["wd1.py", "--task", task, "--eval_rows", "8"])
        model, _ = run.setup(run.parse_args(wd1.Args, "wd1", wd1.SUDOKU, wd1.COUNTDOWN, wd1.LLM)[1])
        assert torch.equal(weights(model), weights(load_model(str(base_folder(small)))))
        assert model.network.config.tiny_task == task


@pytest.mark.parametrize("change", [
    {"steps": 0}, {"batch": 0}, {"layers": 0}, {"width": 33}, {"width": 0}, {"width": 16}, {"seed": -1},
    {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"careless": 1.5}, {"careless": float("nan")},
    {"solved": 1.5}, {"solved": -0.1}, {"solved": float("nan")}, {"task": "chess"}])
def test_refused_settings(cache, tmp_path, capsys, change):
    """One line and exit status 2, before anything is built."""
    with pytest.raises(SystemExit) as stopped:
        base_folder(Settings(**SMALL | change))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("error: --") and err.count("\n") == 1
    assert f"--{next(iter(change))}" in err and not any(tmp_path.iterdir())


def test_a_failed_build_leaves_no_base(cache, monkeypatch):
    def disk_full(model, folder):
        folder.mkdir()
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("plumbing.pretrain.save_model", disk_full)
        with pytest.raises(OSError, match="disk full"):
            base_folder(Settings(**SMALL))
    load_model(str(base_folder(Settings(**SMALL))))


def test_the_base_does_not_depend_on_the_global_generators():
    bases = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = global_random_states()
        bases.append(weights(train(Settings(**SMALL))))
        assert global_random_states() == before
    assert torch.equal(*bases)


@pytest.mark.parametrize("task, start, end", [("sudoku", 10, 5), ("countdown", 50, 25)])
def test_pretraining_lowers_the_loss(task, start, end, monkeypatch):
    """60 steps: from a guess among the whole vocabulary to a better one than among 5 (25) tokens."""
    monkeypatch.setattr("plumbing.pretrain.solved_share", lambda *_: 0.0)
    base = train(Settings(task=task, steps=60, batch=32, layers=1, width=32, lr=1e-2))
    pairs = TINY[task].demonstrations(256, 0.0, np.random.default_rng(9))

    def loss(model):
        with torch.no_grad():
            return pretrain.loss_of(model, *pairs, TINY[task].L, np.random.default_rng(8)).item()

    assert loss(tiny_model(1, 32, task=task)) > np.log(start)
    assert loss(base) < np.log(end)


# -------------------------------------------------------------------------------------------- models on disk


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(sharp_model(), tmp_path / "model")
    return tmp_path / "model"


def test_save_and_load(folder, monkeypatch):
    """The same logits, bit for bit, the same ids, and nobody is asked over the network."""
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda *address: calls.append(address))
    model, loaded = sharp_model(), load_model(str(folder))
    assert calls == []
    assert (loaded.mask_id, loaded.eos_id, loaded.pad_id) == (model.mask_id, model.eos_id, model.pad_id)
    assert not loaded.shift and not loaded.network.training
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    prompt, mask = padded_prompts(model, 1)
    again, again_mask = padded_prompts(loaded, 1)
    assert torch.equal(prompt, again) and torch.equal(mask, again_mask)
    assert torch.equal(model.head(model.body(prompt, mask)), loaded.head(loaded.body(prompt, mask)))


def test_saving_replaces_what_was_there(folder):
    (folder / "stale.txt").write_text("of an older save")
    save_model(tiny_model(layers=1, width=32), folder)
    assert torch.equal(weights(load_model(str(folder))), weights(tiny_model(layers=1, width=32)))
    assert not (folder / "stale.txt").exists()
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("left", ["model.new", "model.old"])
def test_saving_after_a_save_that_was_killed(left, folder):
    """Killed before the new folder was complete, or before the old one was removed."""
    shutil.copytree(folder, folder.with_name(left))
    (folder.with_name(left) / "stale.txt").write_text("of the save that was killed")
    save_model(tiny_model(layers=1, width=32), folder)
    assert torch.equal(weights(load_model(str(folder))), weights(tiny_model(layers=1, width=32)))
    assert not (folder / "stale.txt").exists()
    assert list(folder.parent.iterdir()) == [folder]


def causal_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=14, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)
    return LlamaForCausalLM(config).eval()


def test_is_bidirectional():
    assert is_bidirectional(sharp_model())
    assert is_bidirectional(tiny_model(layers=1, width=32))
    for shift in (False, True):
        ids = {"mask_id": 2, "eos_id": 1, "pad_id": 0, "end_ids": (1,)}
        assert not is_bidirectional(Denoiser(causal_llama(), None, **ids, shift=shift))


def edit_config(**changes):
    def edit(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return edit


def edit_weights(change):
    def edit(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return edit


def no_mask_token(folder: Path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def a_llama(folder: Path):
    causal_llama().save_pretrained(folder)


def without(pattern: str):
    def edit(folder: Path):
        for file in folder.glob(pattern):
            file.unlink()
    return edit


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:1000])


LLADA_CODE = {"AutoConfig": "configuration_llada.LLaDAConfig"}  # transformers asks whether to run this


@pytest.mark.parametrize("edit, reason", [
    (shutil.rmtree, "unknown model"),
    (a_llama, "is a causal 'llama' model"),
    (edit_config(model_type="bert"), "is a 'bert' model; the kinds that can be loaded are: llada, Dream"),
    (edit_config(model_type="llada", auto_map=LLADA_CODE), "cannot be loaded: KeyError: 'd_model'"),
    (no_mask_token, "does not say which token is its mask"),
    (without("*token*"), "cannot be loaded"),
    (without("*.safetensors"), "cannot be loaded"),
    (edit_weights(lambda tensors: tensors.pop("decoder.bias")), "does not hold the weights"),
    (edit_weights(lambda tensors: tensors.update(extra=torch.ones(2))), "does not hold the weights"),
    (edit_config(intermediate_size=48), "does not hold the weights"),
    (edit_config(is_causal=True), "is a causal 'modernbert' model"),
    (lambda folder: (folder / "config.json").write_text("{half"), "cannot be loaded"),
    (lambda folder: truncate(folder / "model.safetensors"), "cannot be loaded"),
])
def test_load_model_refuses(edit, reason, folder, capsys, monkeypatch):
    """Exit status 2 and one line, ours; no traceback, no report by transformers before it."""
    monkeypatch.setattr(logging.getLogger("transformers").handlers[0], "stream", sys.stderr)
    edit(folder)
    with pytest.raises(SystemExit) as stopped:
        load_model(str(folder))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert reason in err and str(folder) in err
