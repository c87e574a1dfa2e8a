"""Denoisers small enough to enumerate, V 3 and L = S 3, and every path of the real sampler on them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402

V = L = S = 3
STATE = (V + 1) ** torch.arange(L)  # canvas @ STATE is its number
SHAPES = {"own": (1, (V + 1) ** L), "shared": (L, V + 1)}


class Table(torch.nn.Module):
    """A network that is a table of random logits (J, entries, L, V), of standard deviation 1, in float64.

    "own": each state has an entry. "shared": a state's logits are a sum over its L positions, of one entry
    for the token shown there, divided by sqrt(L)."""

    device, config = torch.device("cpu"), SimpleNamespace(vocab_size=V + 1)  # the mask token is V

    def __init__(self, kind: str, gen: torch.Generator):
        super().__init__()
        logits = torch.randn(*SHAPES[kind], L, V, generator=gen, dtype=torch.float64)
        self.table = torch.nn.Parameter(logits / len(logits) ** 0.5)

    def model(self, x, **_):
        entry = x if len(self.table) > 1 else (x @ STATE)[:, None]  # (M, J)
        return SimpleNamespace(last_hidden_state=sum(self.table[j, e] for j, e in enumerate(entry.T)))

    def lm_head(self, h):
        return torch.nn.functional.pad(h, (0, 1))


def random_model(kind: str, gen: torch.Generator) -> common.Denoiser:
    """No prompt is needed, and no token is an EOS."""
    ids = dict(mask_id=V, eos_id=-1, pad_id=-1, end_ids=(-1,))
    return common.Denoiser(Table(kind, gen), tokenizer=None, shift=False, **ids)


def every_rollout(
    model: common.Denoiser, order: str, threshold: float | None, block: int = L
) -> tuple[common.Rollout, Tensor]:
    """All N trajectories the sampler can take, and their probabilities (N,) with their graph.

    The noise is such that a row samples given tokens, one for each step and position of its block (of all, or
    of one, left to right); a row for each choice of them. A choice where the position is not hidden any more
    changes nothing, and one of them is kept."""
    tokens = torch.cartesian_prod(*[torch.arange(V)] * (S * block)).view(-1, S, block)
    noise = iter(torch.nn.functional.one_hot(tokens, V + 1).double().mul(0.5).unbind(1))  # 0 never wins
    none = tokens[:, 0, :0]
    with mock.patch.object(common, "group_noise", lambda *_: next(noise)):
        roll = common.denoise(model, none, none.bool(), [None], L=L, S=S, block=block, order=order,
                              threshold=threshold, guess="greedy")
    hidden = roll.revealed_at[:, None] >= torch.arange(S)[:, None]  # (rows, S, L)
    inside = torch.arange(L) // block == torch.arange(S)[:, None] // block  # (S, L) step s is in this block
    target = torch.zeros_like(hidden, dtype=torch.long)
    target[:, inside] = tokens.flatten(1)
    sampled = hidden & inside
    once = (sampled | (target == 0)).flatten(1).all(1)
    roll, target, hidden, sampled = roll[once], target[once].flatten(0, 1), hidden[once], sampled[once]
    x = common.canvas(roll, hidden).flatten(0, 1)
    logp = common.score(model, x, x[:, :0].bool(), target, sampled.flatten(0, 1), 1.0)  # of all it samples
    first, which = common.distinct(torch.cat([roll.completion, roll.revealed_at], 1))
    p = logp.view(-1, S * L).sum(1).exp()
    return roll[first], p.new_zeros(len(first)).index_add(0, which, p)
