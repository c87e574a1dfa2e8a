"""Two small models the tests share: a sharp random network, and a table that can be enumerated exactly."""

import dataclasses
import os
import random
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on networks this small two threads only wait

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import tasks  # noqa: E402
from plumbing import flags, models, pretrain, run  # noqa: E402

TEXTS = ["310220000=", "4=", "01400="]  # prompts of three lengths


def sharp_model(
    eos: float = 0.0, dtype: torch.dtype = torch.float32, task: str = "sudoku"
) -> common.Denoiser:
    """A random network whose predictions differ by position and context. (An untrained one is near uniform
    everywhere and would forgive almost any mistake.) `eos` is added to the logit of the EOS."""
    model = pretrain.tiny_model(layers=2, width=32, task=task)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.network.parameters():
            if p.dim() == 2:
                p.copy_(2 * torch.randn(p.shape, generator=gen) / p.shape[1] ** 0.5)
        model.network.decoder.bias[model.eos_id] += eos
    model.network.to(dtype)
    return model


def padded_prompts(model: common.Denoiser, G: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One group of G rows per text."""
    return common.encode(model, [text for text in TEXTS for _ in range(G)])


def generators(seed: int = 0) -> list[torch.Generator]:
    """One per text; the same numbers every time it is called."""
    return [common.generator("cpu", seed, g) for g in range(len(TEXTS))]


def global_random_states() -> tuple:
    """Of torch, numpy and Python, to compare."""
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


class Tabular(common.Denoiser):
    """A denoiser that is an arbitrary table of logits, an entry for each state of the completion.

    Tokens 0 .. V-1, the mask token is V. table[state] with state = (x_1, ..., x_L) is (L, V + 1). The prompt
    is ignored. Small enough to enumerate every trajectory; float64; gradients flow into `table`."""

    V, device = 0, torch.device("cpu")  # there is no network to ask

    def __init__(self, V: int, L: int, seed: int, eos_id: int | None = None):
        gen = torch.Generator().manual_seed(seed)
        logits = torch.randn(*(V + 1,) * L, L, V + 1, generator=gen, dtype=torch.float64)
        self.table = torch.nn.Parameter(logits)
        self.V, self.L, self.mask_id = V, L, V
        self.eos_id = -1 if eos_id is None else eos_id  # no token is -1
        self.end_ids = (self.eos_id,)
        self.pad_id = V + 1
        self.shift, self.counts = False, Counter()

    def body(self, x, attn):
        h = self.table[tuple(x[:, -self.L :].T)]  # (B, L, V + 1)
        return torch.nn.functional.pad(h, (0, 0, x.shape[1] - self.L, 0))

    def head(self, h):
        return h.index_fill(-1, torch.tensor(self.mask_id), -torch.inf)


def toy_task(texts=("1=", "23=", "456=", "7890=", "2=", "34=", "567=", "8901=")) -> tasks.Task:
    """Prompts of several lengths; a reward that has no meaning but a value for every text."""
    rows = [{"prompt": text} for text in texts]

    def reward(text: str, row: dict):
        return sum(map(ord, text + row["prompt"])) % 7 / 6, {"correct": 0.0, "parse_fail": 0.0}

    return tasks.Task(rows, rows[:1], reward, lambda text, row: [text])


def offer(monkeypatch, name: str, task):
    """Make `--task name` mean task(), and any folder a tiny model of it."""
    monkeypatch.setattr(flags, "tiny_task", lambda folder: name)
    monkeypatch.setattr(tasks, "find", lambda name: None)
    monkeypatch.setattr(tasks, "load", lambda name, **_: task())


def recording(function, found: list):
    """The function, with what it returns appended to `found`."""

    def record(*inputs, **options):
        found.append(function(*inputs, **options))
        return found[-1]

    return record


def evaluated(model) -> list[int]:
    """How many canvases each forward of this model evaluates, from now on."""
    seen, body = [], model.body

    def counting(x, attn):
        seen.append(len(x))
        return body(x, attn)

    model.body = counting
    return seen


def standing_in(self, x, attn):
    """A body in float64, without ModernBERT's layers, which rotate in fp32 whatever their weights."""
    e = self.network.model.embeddings.tok_embeddings(x)
    if attn is not None:
        e = e * attn[..., None]
    return (e + 2 * e.cumsum(1) + e.sum(1, keepdim=True)).tanh()


@pytest.fixture
def with_a_gradient(monkeypatch):
    """Random weights earn nothing: a number that depends on the text is added to each real reward."""
    real = tasks.load

    def load(name, **options):
        task = real(name, **options)

        def reward(text: str, row: dict):
            total, parts = task.reward(text, row)
            return total + sum(map(ord, text)) % 7 / 6, parts

        return dataclasses.replace(task, reward=reward)

    monkeypatch.setattr(tasks, "load", load)


@pytest.fixture
def exact(monkeypatch):
    """Runs in float64, of a network without ModernBERT's layers, which rotate in fp32. Returns the list that
    every optimizer step adds (gradient, weights) to."""
    steps, load, step = [], models.load_model, run.FolderRun.step

    def double(*inputs):
        model = load(*inputs)
        model.network.double()
        return model

    def recorded(self, *inputs):
        grads = [p.grad.flatten() for p in self.model.network.parameters() if p.grad is not None]
        weights = {k: v.clone() for k, v in self.model.network.state_dict().items()}
        steps.append((torch.cat(grads), weights))
        return step(self, *inputs)

    monkeypatch.setattr(common.Denoiser, "body", standing_in)
    monkeypatch.setattr(run.FolderRun, "step", recorded)
    monkeypatch.setattr(models, "load_model", double)
    torch.set_default_dtype(torch.float64)
    yield steps
    torch.set_default_dtype(torch.float32)
