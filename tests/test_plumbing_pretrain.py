"""The tiny bases, their demonstrations and the kept ones; models on disk and what load_model refuses."""

import dataclasses
import json
import logging
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import global_random_states, padded_prompts, sharp_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import wd1
from common import Denoiser, countdown_reward
from plumbing import pretrain, run
from plumbing.flags import parse_args
from plumbing.models import is_bidirectional, load_model, save_model
from plumbing.pretrain import TINY, Settings, kept_base, tiny_model, train
from tasks import countdown, load, sudoku
from tasks.countdown import countdown_split, countdown_tiny_row
from tasks.sudoku import sudoku_puzzles, sudoku_split

SMALL = {"know_steps": 3, "show_steps": 3, "batch": 8, "layers": 1, "width": 32}


def weights(model: Denoiser) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


# ----------------------------------------------------------------------------------------------- pretraining


def a_share_is_wrong(wrong: float, careless: float):
    """Chance of a false alarm with another seed: below 1e-4 (it is fixed)."""
    assert wrong == 0 if careless == 0 else 0.75 * careless < wrong <= careless + 0.05


@pytest.mark.parametrize("careless", [0.0, 0.6, 1.0])
def test_sudoku_demonstrations(careless):
    """Of training boards alone; careless ones are wrong in the order of a row's missing digits."""
    count, grids = 400, sudoku_split()["train"]
    prompts, answers = sudoku.demonstrations(count, careless, np.random.default_rng(0))
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
    demonstrations = countdown.demonstrations(400, careless, np.random.default_rng(0))
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


@pytest.fixture
def asked(monkeypatch) -> tuple[dict[str, list[float]], list[tuple], list[float]]:
    """Let solved_share answer from the first list, by the rows it is asked about ("validation" or "test").
    The second list gets (which rows, S, optimizer steps so far, the weights asked), the third the share of
    careless demonstrations of each optimizer step, which does no more than move the weights."""
    answers, questions, steps = {"validation": [], "test": []}, [], []
    of = {row["prompt"]: part for part in answers for task in TINY
          for row in load(task, chat=False, train=False, held_out=part).test}

    def solved_share(model, task, S):
        part, = {of[row["prompt"]] for row in task.test}
        questions.append((part, S, len(steps), weights(model)))
        return answers[part].pop(0)

    def fit(model, optimizers, settings, careless, rng):
        steps.append(careless)
        with torch.no_grad():
            next(model.network.parameters()).add_(0.01)

    monkeypatch.setattr("plumbing.pretrain.fit", fit)
    monkeypatch.setattr("plumbing.pretrain.solved_share", solved_share)
    return answers, questions, steps


def test_each_phase_stops_by_validation_rows(asked):
    """Phase one at the first share that is enough; phase two at the first that is low enough, each step
    looked at once it is near."""
    answers, questions, steps = asked
    answers["validation"] = [0.1, 0.7, 0.95, 0.951, 0.99, 0.5, 0.26, 0.25, 0.251, 0.3]
    answers["test"] = [0.94, 0.98, 0.24, 0.31]
    limits = {"know_steps": 500, "show_steps": 500}
    base = train(Settings(**SMALL | limits, know=0.95, show=0.25, careless=0.7))
    phases = [("validation", 8, done) for done in (100, 200, 300)]
    measured = [(part, S) for part in ("validation", "test") for S in (8, 16)]
    phases += [(*question, 300) for question in measured]
    phases += [("validation", 8, done) for done in (305, 310, 311)]
    phases += [(*question, 311) for question in measured]
    assert [question[:3] for question in questions] == phases
    assert steps == [0.0] * 300 + [0.7] * 11  # right demonstrations, then careless ones
    config = base.network.config
    assert config.base_steps == {"know": 300, "show": 11}
    assert config.knows == {"validation": 0.951, "validation_one_token": 0.99, "test": 0.94,
                            "test_one_token": 0.98}
    assert config.shows == {"validation": 0.251, "validation_one_token": 0.3, "test": 0.24,
                            "test_one_token": 0.31}


def test_phase_two_starts_from_the_best_weights_of_phase_one(asked):
    answers, questions, _ = asked
    answers["validation"] = [0.1, 0.7, 0.6, 0.7, 0.8, 0.2, 0.2, 0.3]
    answers["test"] = [0.0] * 4
    train(Settings(**SMALL | {"know_steps": 230}, show=0.25))
    shares = [found for *_, found in questions]
    assert [steps for _, _, steps, _ in questions[:4]] == [100, 200, 230, 230]
    assert torch.equal(shares[3], shares[1]) and not torch.equal(shares[3], shares[2])


def test_a_base_that_stays_careful_ends_and_says_so(asked, capsys):
    answers, _, _ = asked
    answers["validation"], answers["test"] = [0.9] * 8, [0.9] * 4
    base = train(Settings(**SMALL | {"show_steps": 7}, show=0.25))
    assert base.network.config.base_steps["show"] == 7
    assert "stopped after 7 careless steps: the base shows more than 25%" in capsys.readouterr().out


def test_a_step_asks_for_the_demonstrations_of_its_phase(monkeypatch):
    asked, tiny = [], TINY["sudoku"]

    def demonstrations(count, careless, rng):
        asked.append((count, careless))
        return tiny.demonstrations(count, careless, rng)

    monkeypatch.setitem(TINY, "sudoku", dataclasses.replace(tiny, demonstrations=demonstrations))
    model = tiny_model(1, 32)
    before, optimizers = weights(model), pretrain.optimizers_of(model, 1e-3)
    pretrain.fit(model, optimizers, Settings(batch=8), 0.7, np.random.default_rng(0))
    assert asked == [(8, 0.7)] and not torch.equal(weights(model), before)


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest():
    model = tiny_model(layers=3, width=32)
    moved = {type(optimizer): [p for group in optimizer.param_groups for p in group["params"]]
             for optimizer in pretrain.optimizers_of(model, 1e-3)}
    matrices = [p for p in model.network.model.layers.parameters() if p.dim() == 2]
    assert len(matrices) == 3 * 4  # Wqkv, Wo and two of the MLP
    assert {id(p) for p in moved[torch.optim.Muon]} == {id(p) for p in matrices}
    everything = [id(p) for ps in moved.values() for p in ps]
    assert sorted(everything) == sorted(id(p) for p in model.network.parameters())


def test_the_rate_of_phase_one_rises_then_falls_to_0(monkeypatch):
    rates = []
    monkeypatch.setattr("plumbing.pretrain.solved_share", lambda *_: 0.0)
    monkeypatch.setattr("plumbing.pretrain.fit", lambda model, optimizers, *_: rates.append(
        [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]))
    pretrain.learn(tiny_model(1, 32), Settings(**SMALL | {"know_steps": 150}, know_lr=1.0))
    assert all(adamw == muon for adamw, muon in rates)
    rates = [rate for rate, _ in rates]
    assert rates[:3] == [0.02, 0.04, 0.06] and 0.7 < max(rates) < 1  # the cosine has begun by then
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True) and rates[-1] < 1e-9


def built(monkeypatch, *flags: str) -> Settings:
    """The settings that the command line asks train for."""
    found = []

    def small(settings):
        found.append(settings)
        model = tiny_model(1, 32, task=settings.task)
        model.network.config.knows = model.network.config.shows = {"test": 0.5, "test_one_token": 0.75}
        return model

    monkeypatch.setattr("plumbing.pretrain.train", small)
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags])
    pretrain.main()
    return found[0]


@pytest.mark.parametrize("flags, task, said", [
    ("", "sudoku", {}), ("--task countdown", "countdown", {}),
    ("--careless 0.4 --task=countdown --seed 2", "countdown", {"careless": 0.4, "seed": 2})])
def test_the_command_line_has_defaults_for_each_task(flags, task, said, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "new" / "base")
    settings = built(monkeypatch, *flags.split(), "--out", out)
    assert settings == dataclasses.replace(TINY[task].settings, **said, out=out)
    base = load_model(out)
    assert base.network.config.tiny_task == task and base.network.config.knows["test"] == 0.5
    assert load_file(f"{out}/model.safetensors")["decoder.bias"].dtype == torch.float16
    lines = capsys.readouterr().out
    assert "knows 50.0%" in lines and f"python egspo.py --task {task} --model {out}" in lines
    assert dataclasses.replace(TINY["sudoku"].settings, task="countdown") != TINY["countdown"].settings


def test_a_base_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """Under runs/, where git does not look: not the kept one, which other runs start from."""
    monkeypatch.chdir(tmp_path)
    built(monkeypatch, "--seed", "3")
    built(monkeypatch, "--seed", "3", "--task", "countdown")
    assert {str(path.parent) for path in Path().rglob("config.json")} == {
        "runs/base-sudoku-3", "runs/base-countdown-3"}


@pytest.mark.parametrize("flags, said", [
    ("--task chess", "--task 'chess' is not one of sudoku, countdown"),
    ("--know_steps 0", "--know_steps"), ("--show_steps 0", "--show_steps"), ("--batch 0", "--batch"),
    ("--layers 0", "--layers"), ("--width 33", "--width 33"), ("--width 0", "--width 0"),
    ("--width 16", "--width 16"), ("--seed -1", "--seed"), ("--know_lr 0", "--know_lr"),
    ("--know_lr nan", "--know_lr"), ("--show_lr inf", "--show_lr"), ("--careless 1.5", "--careless"),
    ("--careless nan", "--careless"), ("--know 1.5", "--know"), ("--show -0.1", "--show"),
    ("--out .", ". exists: choose another --out"), ("--out there/base", "--out there/base cannot be made: "),
])
def test_refused_settings(flags, said, tmp_path, monkeypatch, capsys):
    """One line and exit status 2, before anything is built."""
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    monkeypatch.setattr("plumbing.pretrain.train", lambda settings: pytest.fail("built"))
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        pretrain.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert said in err and [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_base_depends_on_its_seed_and_on_no_global_generator():
    bases = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        before = global_random_states()
        model = tiny_model(1, 32, seed)
        optimizers, rng = pretrain.optimizers_of(model, 1e-3), np.random.default_rng(seed)
        for careless in (0.0, 0.9):
            pretrain.fit(model, optimizers, Settings(**SMALL), careless, rng)
        bases.append(weights(model))
        assert global_random_states() == before
    assert torch.equal(bases[0], bases[1]) and not torch.equal(bases[0], bases[2])
    assert not torch.equal(bases[0], weights(tiny_model(1, 32)))


@pytest.mark.parametrize("task, start, end", [("sudoku", 10, 5), ("countdown", 50, 25)])
def test_pretraining_lowers_the_loss(task, start, end, monkeypatch):
    """60 steps: from a guess among the whole vocabulary to a better one than among 5 (25) tokens."""
    monkeypatch.setattr("plumbing.pretrain.solved_share", lambda *_: 0.0)
    pairs = TINY[task].demonstrations(256, 0.0, np.random.default_rng(9))

    def loss(model):
        with torch.no_grad():
            return pretrain.loss_of(model, *pairs, TINY[task].L, np.random.default_rng(8)).item()

    base = tiny_model(1, 32, task=task)
    assert loss(base) > np.log(start)
    optimizers, rng = pretrain.optimizers_of(base, 1e-2), np.random.default_rng(0)
    for _ in range(60):
        pretrain.fit(base, optimizers, Settings(task=task, batch=32), 0.0, rng)
    assert loss(base) < np.log(end)


# ------------------------------------------------------------------------------------------- the kept bases


KEPT = [(task, seed) for task in TINY for seed in range(3)]


@pytest.mark.parametrize("task, seed", KEPT)
def test_a_kept_base_shows_what_its_config_says(task, seed):
    """Of a quarter of the validation rows. Their standard error is 0.027 for a share of a quarter."""
    folder = kept_base(task, seed)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    base = load_model(str(folder))
    config = base.network.config
    assert {p.dtype for p in base.network.parameters()} == {torch.float32}
    assert config.tiny_task == config.base_settings["task"] == task and config.base_settings["seed"] == seed
    rows = load(task, chat=False, train=False, held_out="validation")
    rows.test = rows.test[::4]
    share = pretrain.solved_share(base, rows, TINY[task].S)
    print(task, seed, share, config.shows)
    assert abs(share - config.shows["validation"]) < 0.08
    assert 0.12 < config.shows["validation"] <= config.base_settings["show"] + 0.01  # half precision rounds
    assert all(config.knows[name] > config.shows[name] + 0.1 for name in config.shows)


def test_the_kept_bases_are_those_of_the_settings():
    """What pretrain.py would build now. All kept ones are tested, each has other weights, and all together
    have a few megabytes."""
    assert {folder.name for folder in pretrain.BASES.iterdir()} == {f"{task}-{seed}" for task, seed in KEPT}
    for task, seed in KEPT:
        saved = json.loads((kept_base(task, seed) / "config.json").read_text())["base_settings"]
        now = vars(dataclasses.replace(TINY[task].settings, seed=seed))
        assert saved == {name: value for name, value in now.items() if name != "out"}
    files = [kept_base(*each) / "model.safetensors" for each in KEPT]
    assert len({file.read_bytes() for file in files}) == len(KEPT)
    assert sum(file.stat().st_size for file in files) < 9e6


def test_model_tiny_is_the_first_kept_base(tmp_path, monkeypatch):
    """Of the task of the command line; it looks nowhere else."""
    monkeypatch.chdir(tmp_path)
    for task in TINY:
        monkeypatch.setattr("sys.argv", ["wd1.py", "--task", task, "--eval_rows", "8"])
        model, _ = run.setup(parse_args(wd1.Args, "wd1", wd1.SUDOKU, wd1.COUNTDOWN, wd1.LLM)[1])
        assert torch.equal(weights(model), weights(load_model(str(kept_base(task)))))
        assert model.network.config.tiny_task == task


@pytest.mark.parametrize("task, seed", [("sudoku", 9), ("chess", 0)])
def test_a_base_that_is_not_kept_is_refused(task, seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        kept_base(task, seed)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1
    assert f"no base is kept in {pretrain.BASES / task}-{seed}" in err


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
