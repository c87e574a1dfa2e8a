"""Padding, blocks and ends of answers as a run on Countdown meets them: what the sampler and score() show
the network. And that a base learns from them.

Weights are random and sharp, so that answers end in the first block, in the second and never; half of the
prompts are padded."""

import dataclasses
import importlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import launch, lines, sharp_model

import common
from plumbing import models
from plumbing import pretrain
import tasks.countdown

L, BLOCK, T, PAD, EOS, MASK = 8, 4, 2.0, 0, 1, 2
TRAIN = [([3, 7, 2], 13), ([12, 4], 8), ([6, 6], 36), ([12, 5, 1], 8)]
TEST = [([9, 2], 18), ([1, 2, 3], 6)]
RUNS = ["egspo", "rldf", "rldf --masks random", "wd1 --passes 2", "wd1 --plusplus --passes 1", "gdsd",
        "gdsd --match tlc"]


def problems(pairs) -> list[dict]:
    return [{"numbers": list(numbers), "target": target} for numbers, target in pairs]


def logits_unpadded(model, body, x) -> torch.Tensor:
    """(N, L, V) of canvases whose prompts have one padding token, without it."""
    assert (x[:, 0] == PAD).all() and not (x[:, 1:-L] == PAD).any()
    return model.head(body(model, x[:, 1:], None)[:, -L:]) / T


def canvases(x) -> set[tuple]:
    return {tuple(token for token in row[:-L] if token != PAD) + tuple(row[-L:]) for row in x.tolist()}


@pytest.fixture
def watched(monkeypatch, tmp_path, with_a_gradient):
    """Runs a method while every forward, and what a padded row gets, is looked at. Returns what was met."""
    body, inputs = common.Denoiser.body, []
    met = SimpleNamespace(ends=set(), scored=[0, 0])

    def looked_at(self, x, attn):
        inputs.append(x)
        padding = torch.nn.functional.pad(x[:, :-L] == PAD, (0, L))
        real = torch.ones_like(padding) if attn is None else attn
        assert torch.equal(real, ~padding), "attention mask"
        return body(self, x, attn)

    def run(command: str, wrong: dict, updates: int = 2):
        method, *flags = command.split()
        module = importlib.import_module(method)
        own_states = method in ("egspo", "rldf") and "random" not in flags or "--plusplus" in flags
        states = set()

        def roll_out(model, prompt, prompt_mask, gens, **options):
            roll_out = wrong.get("roll_out", common.roll_out)
            inputs.clear()
            with monkeypatch.context() as patch:
                patch.setattr(common.Denoiser, "body", looked_at)
                roll = roll_out(model, prompt, prompt_mask, gens, **options)
            states.clear()
            states.update(*map(canvases, inputs))
            opened = [state[-L:-BLOCK] for state in states if set(state[-BLOCK:]) != {MASK}]
            assert not any(MASK in first for first in opened), "block 2 before block 1 is whole"
            assert not any(EOS in first for first in opened), "shown behind an EOS"
            padded = roll.prompt[:, 0] == PAD
            ends = [row.index(EOS) // BLOCK if EOS in row else None for row in roll.completion.tolist()]
            met.ends |= set(zip(padded.tolist(), ends, strict=True))
            some = roll[padded]
            for s in range(roll.S):
                before, at = common.canvas(some, some.revealed_at >= s), some.revealed_at == s
                right = logits_unpadded(model, body, before).log_softmax(2)[at, some.completion[at]]
                assert torch.allclose(some.logp[at].float(), right, atol=1e-3), "padding in a rollout"
            return roll

        def score(model, x, prompt_mask, target, where, temperature, read=common.log_prob):
            with monkeypatch.context() as patch:
                patch.setattr(common.Denoiser, "body", looked_at)
                if "score" in wrong:
                    x, prompt_mask = wrong["score"](x, prompt_mask, target, where)
                found = common.score(model, x, prompt_mask, target, where, temperature, read)
            assert (x[:, -L:][where] == MASK).all(), "shown and scored"
            if own_states:
                assert canvases(x) <= states, "not a state of the sampler"
            else:
                ended = (target[:, :BLOCK] == EOS).any(1)
                assert (x[ended, -BLOCK:] == MASK).all(), "shown behind an EOS"
            padded = x[:, 0] == PAD
            with torch.no_grad():
                logits = logits_unpadded(model, body, x[padded])[where[padded]]
                right = read(logits, torch.arange(len(logits)), target[padded][where[padded]])
            assert torch.allclose(found[padded][where[padded]], right, atol=1e-3), "padding in an update"
            met.scored[0] += padded.sum().item()
            met.scored[1] += (~padded).sum().item()
            return found

        for name, function in dict(roll_out=roll_out, score=score, canvas=wrong.get("canvas")).items():
            if function:
                monkeypatch.setattr(module, name, function)
        parts = {"train": problems(TRAIN), "test": problems(TEST)}
        monkeypatch.setattr(tasks.countdown, "countdown_split", lambda: parts)
        monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
        models.save_model(sharp_model(eos=4.0, task="countdown"), tmp_path / "model")
        small = f"--task countdown --prompts 4 --G 8 --minibatches 1 --temperature {T} --updates {updates}"
        launch(method, "--model", tmp_path / "model", *small.split(), *flags, "--out", tmp_path / "run")
        return met

    return run


@pytest.mark.parametrize("command", RUNS)
def test_what_the_network_is_shown(command, watched):
    met = watched(command, {})
    assert {end for _, end in met.ends} == {0, 1, None} and {(True, 0), (True, 1)} <= met.ends
    assert min(met.scored) > 40  # canvases with and without padding


def tail_shown(roll, hidden):
    tail = roll.revealed_at == roll.S
    return common.canvas(roll, hidden & ~(tail[:, None] if hidden.dim() == 3 else tail))


def deaf_to_eos(model, *inputs, **options):
    return common.roll_out(dataclasses.replace(model, end_ids=(99,)), *inputs, **options)


def in_one_block(*inputs, **options):
    return common.roll_out(*inputs, **options | {"block": L})


def unmasked(x, prompt_mask, target, where):
    return x, torch.ones_like(prompt_mask)


def revealed_too_early(x, prompt_mask, target, where):
    return torch.cat([x[:, :-L], torch.where(where, target, x[:, -L:])], 1), prompt_mask


@pytest.mark.parametrize("command", [command for command in RUNS if "tlc" not in command])
@pytest.mark.parametrize("name, wrong, said", [
    ("canvas", tail_shown, "not a state of the sampler|shown behind an EOS|shown and scored"),
    ("roll_out", deaf_to_eos, "shown behind an EOS"),
    ("roll_out", in_one_block, "block 2 before block 1 is whole"),
    ("score", unmasked, "attention mask"),
    ("score", revealed_too_early, "shown and scored"),
])
def test_a_wrong_one_would_be_found(name, wrong, said, command, watched):
    with pytest.raises(AssertionError, match=f"^({said})"):
        watched(command, {name: wrong}, updates=1)


def test_a_base_learns(tmp_path, monkeypatch):
    """A base of a few seconds, on two numbers from 1 to 5."""
    pairs = itertools.combinations_with_replacement(range(1, 6), 2)
    train = problems((pair, value) for pair in pairs
                     for value in tasks.countdown.countdown_answers(pair) if value > 0)
    parts = {"train": train, "validation": train, "test": problems(TEST)}
    monkeypatch.setattr(tasks.countdown, "countdown_split", lambda: parts)
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
    settings = pretrain.Settings(task="countdown", batch=32)
    base = pretrain.tiny_model(1, 64, task="countdown")
    optimizers, rng = pretrain.optimizers_of(base, 3e-3), np.random.default_rng(0)
    for _ in range(300):
        pretrain.fit(base, optimizers, settings, 0.0, rng)
    models.save_model(base, tmp_path / "base")
    flags = "--task countdown --prompts 8 --G 16 --minibatches 2 --lr 1e-3 --updates 45 --save_every 99"
    launch("egspo", "--model", tmp_path / "base", *flags.split(), "--out", tmp_path / "run")
    rewards = [line["reward"] for line in lines(tmp_path / "run") if "reward" in line]
    before, after = sum(rewards[:3]) / 3, sum(rewards[-10:]) / 10
    print([round(reward, 2) for reward in rewards])
    assert before < 0.35 and after > before + 0.15
