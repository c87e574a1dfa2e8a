"""Padding, blocks and ends of answers as a run on Countdown meets them: what the network is shown by the
sampler and by score(), and that a base learns.

Weights are random and sharp, so that answers end in the first block, in the second and never; half of the
prompts are padded."""

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import sharp_model
from test_methods import launch, lines

import common
import models
import pretrain
import tasks

L, BLOCK, PAD, EOS, MASK = 8, 4, 0, 1, 2
TRAIN = [([3, 7, 2], 13), ([20, 4], 5), ([6, 6], 36), ([12, 5, 1], 8)]
TEST = [([9, 2], 18), ([1, 2, 3], 6)]
RUNS = ["egspo", "rldf", "rldf --masks random", "wd1", "wd1 --plusplus", "gdsd", "gdsd --match tlc"]


def problems(pairs) -> list[dict]:
    return [{"numbers": numbers, "target": target} for numbers, target in pairs]


def logits_alone(model, body, prompt, completion) -> torch.Tensor:
    """(L, V) of one canvas, its prompt without the padding."""
    x = torch.cat([prompt[prompt != PAD], completion])[None]
    return model.head(body(model, x, None)[0, -L:])


def canvases(x) -> set[tuple]:
    return {(tuple(prompt[prompt != PAD].tolist()), *row.tolist()) for prompt, row in zip(x[:, :-L], x[:, -L:])}


@pytest.fixture
def watched(monkeypatch, tmp_path, with_a_gradient):
    """A run of a method, every forward of which is looked at. Returns what it has met."""
    body, inputs = common.Denoiser.body, []
    met = SimpleNamespace(ends=set(), padded=0, scored=0)

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

        def denoise(model, prompt, prompt_mask, gens, **options):
            denoise = wrong.get("denoise", common.denoise)
            inputs.clear()
            with monkeypatch.context() as patch:
                patch.setattr(common.Denoiser, "body", looked_at)
                roll = denoise(model, prompt, prompt_mask, gens, **options)
            states.clear()
            states.update(*map(canvases, inputs))
            opened = [row for _, *row in states if row[BLOCK:] != [MASK] * BLOCK]
            assert not any(MASK in row[:BLOCK] for row in opened), "block 2 before block 1 is whole"
            assert not any(EOS in row[:BLOCK] for row in opened), "shown behind an EOS"
            for b, row in enumerate(roll.completion.tolist()):
                padded = PAD in roll.prompt[b]
                met.ends.add((padded, row.index(EOS) // BLOCK if EOS in row else None))
                for s in range(roll.S) if padded and b % 8 == 0 else ():
                    before = roll.completion[b].masked_fill(roll.step[b] >= s, MASK)
                    found = logits_alone(model, body, roll.prompt[b], before).log_softmax(1)
                    at = roll.step[b] == s
                    right = found[at, roll.completion[b][at]]
                    assert torch.allclose(roll.logp[b][at].float(), right, atol=1e-3), "padding in a rollout"
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
            for m, row in enumerate(target.tolist()):
                end = BLOCK if EOS in row[:BLOCK] else L
                assert own_states or (x[m, -L:][end:] == MASK).all(), "shown behind an EOS"
                met.scored += 1
                if PAD in x[m, :-L] and m % 4 == 0:
                    at = where[m].nonzero()[:, 0]
                    with torch.no_grad():
                        logits = logits_alone(model, body, x[m, :-L], x[m, -L:])
                        right = read(logits, at, target[m][at])
                    assert torch.allclose(found[m][at], right, atol=1e-3), "padding in an update"
                    met.padded += 1
            return found

        for name, function in dict(denoise=denoise, score=score, canvas=wrong.get("canvas")).items():
            if function:
                monkeypatch.setattr(module, name, function)
        parts = {"train": problems(TRAIN), "test": problems(TEST)}
        monkeypatch.setattr(tasks, "countdown_split", lambda: parts)
        monkeypatch.setattr("run.plot", lambda *_: None)
        models.save_model(sharp_model(eos=-0.5, task="countdown"), tmp_path / "model")
        small = "--task countdown --prompts 4 --G 8 --minibatches 2 --eval_threshold 0".split()
        launch(method, "--model", tmp_path / "model", *small, *flags, "--updates", updates,
               "--out", tmp_path / "run")
        return met

    return run


@pytest.mark.parametrize("command", RUNS)
def test_what_the_network_is_shown(command, watched):
    met = watched(command, {})
    print(command, met)
    assert met.ends == {(padded, end) for padded in (True, False) for end in (0, 1, None)}
    assert met.padded > 8 and met.scored > 2 * met.padded


def tail_shown(roll, hidden):
    tail = roll.step == roll.S
    return common.canvas(roll, hidden & ~(tail[:, None] if hidden.dim() == 3 else tail))


def deaf_to_eos(model, *inputs, **options):
    return common.denoise(dataclasses.replace(model, end_ids=(99,)), *inputs, **options)


def in_one_block(*inputs, **options):
    return common.denoise(*inputs, **options | {"block": L})


def unmasked(x, prompt_mask, target, where):
    return x, torch.ones_like(prompt_mask)


def revealed_too_early(x, prompt_mask, target, where):
    return torch.cat([x[:, :-L], torch.where(where, target, x[:, -L:])], 1), prompt_mask


@pytest.mark.parametrize("command", ["egspo", "rldf --masks random", "wd1", "wd1 --plusplus", "gdsd"])
@pytest.mark.parametrize("wrong, said", [
    ({"canvas": tail_shown}, "not a state of the sampler|shown behind an EOS|shown and scored"),
    ({"denoise": deaf_to_eos}, "shown behind an EOS"),
    ({"denoise": in_one_block}, "block 2 before block 1 is whole"),
    ({"score": unmasked}, "attention mask"),
    ({"score": revealed_too_early}, "shown and scored"),
])
def test_a_wrong_one_would_be_found(wrong, said, command, watched):
    with pytest.raises(AssertionError, match=f"^({said})"):
        watched(command, wrong, updates=1)
