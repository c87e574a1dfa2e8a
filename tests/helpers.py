"""What the tests share: small models and tasks, a launcher of the methods, and slow versions of what they do.

The models: a sharp random network, the same without ModernBERT's layers and so exact in float64, and a table
whose rollouts can be enumerated."""

import importlib
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import tasks  # noqa: E402
from plumbing import flags, pretrain, run  # noqa: E402

BASELINES = ["baselines.diffu_grpo", "baselines.espo", "baselines.just_grpo"]
METHODS = ["egspo", "wd1", "rldf", "gdsd", *BASELINES]
TEXTS = ["310220000=", "4=", "01400="]  # prompts of three lengths

# ---------------------------------------------------------------------------------------- models and prompts


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
                p.copy_(2 * torch.randn(p.shape, generator=gen, dtype=torch.float32) / p.shape[1] ** 0.5)
        model.network.decoder.bias[model.eos_id] += eos
    model.network.to(dtype)
    return model


def standing_in(self, x, attn):
    """A body in float64, without ModernBERT's layers, which rotate in fp32 whatever their weights."""
    e = self.network.model.embeddings.tok_embeddings(x)
    if attn is not None:
        e = e * attn[..., None]
    return (e + 2 * e.cumsum(1) + e.sum(1, keepdim=True)).tanh()


class Exact(common.Denoiser):
    """A denoiser in which nothing is rounded to fp32."""

    body = standing_in


def exact_model(eos: float = 0.0) -> Exact:
    """The weights of sharp_model in float64, always the same."""
    model = sharp_model(eos, torch.float64)
    return Exact(**{field.name: getattr(model, field.name) for field in fields(common.Denoiser)})


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


def padded_prompts(model: common.Denoiser, G: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One group of G rows per text."""
    return common.encode(model, [text for text in TEXTS for _ in range(G)])


def generators(seed: int = 0) -> list[torch.Generator]:
    """One per text; the same numbers every time it is called."""
    return [common.generator("cpu", seed, g) for g in range(len(TEXTS))]


def toy_task(texts=("1=", "23=", "456=", "7890=", "2=", "34=", "567=", "8901=")) -> common.Task:
    """Prompts of several lengths; a reward that has no meaning but a value for every text."""
    rows = [{"prompt": text} for text in texts]

    def reward(text: str, row: dict):
        return sum(map(ord, text + row["prompt"])) % 7 / 6, {"correct": 0.0, "parse_fail": 0.0}

    return common.Task(rows, rows[:1], reward, lambda text, row: [text])


# ----------------------------------------------------------------------------------- what a test looks at


def recording(function: Callable, found: list) -> Callable:
    """The function, with what it returns appended to `found`."""

    def record(*inputs, **options):
        found.append(function(*inputs, **options))
        return found[-1]

    return record


def record_calls(monkeypatch, owner, name: str) -> list[tuple[tuple, object]]:
    """(arguments, result) of each call of owner.name from now on."""
    calls, real = [], getattr(owner, name)

    def record(*inputs, **options):
        calls.append((inputs, real(*inputs, **options)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, record)
    return calls


def evaluated(model: common.Denoiser) -> list[int]:
    """How many canvases each forward of this model evaluates, from now on."""
    seen, body = [], model.body

    def counting(x, attn):
        seen.append(len(x))
        return body(x, attn)

    model.body = counting
    return seen


def global_random_states() -> tuple:
    """Of torch, numpy and Python, to compare."""
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


class NotedRun(common.Run):
    """A plain run that notes each optimizer step (loss, the gradient before clipping, the weights before the
    step) and what is logged of each update."""

    def __init__(self, updates: int = 1):
        super().__init__(updates)
        self.steps, self.logged = [], []

    def step(self, loss: float, max_grad_norm: float, warmup: int = 0) -> float:
        network = self.model.network
        self.steps.append(SimpleNamespace(
            loss=loss,
            gradient=torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]),
            weights={name: value.clone() for name, value in network.state_dict().items()}))
        return super().step(loss, max_grad_norm, warmup)

    def log(self, metrics: dict[str, float], infos: list[dict[str, float]]):
        means = {k: sum(info[k] for info in infos) / len(infos) for k in (infos[0] if infos else ())}
        self.logged.append(metrics | means)
        super().log(metrics, infos)


def gradient(parameters, loss: torch.Tensor) -> torch.Tensor:
    """Of a loss, in one vector; parameters that it does not depend on are left out."""
    grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def relative_error(exact: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


# ----------------------------------------------------------------------------- `python method.py`, from here

SMALL = "--prompts 8 --G 2 --S 4 --eval_every 2 --eval_rows 64 --save_every 1 --seed 3".split()
TIMING = {"seconds", "seconds_rollout", "seconds_reward", "seconds_update", "tokens_per_second",
          "peak_memory_gib"}


def script(method: str) -> Path:
    return ROOT / f"{method.replace('.', '/')}.py"


def variants(module) -> dict[str, tuple]:
    """What a method's own flags change, as its last lines give it to main."""
    return {"plusplus": module.PLUSPLUS} if hasattr(module, "PLUSPLUS") else {}


def launch(method: str, *argv) -> float:
    """`python method.py argv`, in this process."""
    module = importlib.import_module(method)
    old, sys.argv = sys.argv, [str(script(method)), *map(str, argv)]
    try:
        return run.main(module.train, module.Args, module.SUDOKU, module.COUNTDOWN, module.LLM,
                        **variants(module))
    finally:
        sys.argv = old
        signal.signal(signal.SIGINT, signal.default_int_handler)


# config.json of a model too large for any test: what it would take is computed.
LLADA_8B = dict(
    model_type="llada", d_model=4096, mlp_hidden_size=12288, n_layers=32, n_heads=32, n_kv_heads=32,
    rms_norm_eps=1e-5, rope_theta=500000.0, max_sequence_length=4096, include_qkv_bias=False,
    include_bias=False, weight_tying=False, pad_token_id=126081, eos_token_id=126081, vocab_size=126464)


def settings(monkeypatch, method: str, *argv) -> SimpleNamespace:
    """Every setting of `python method.py argv`."""
    module = importlib.import_module(method)
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, argv)])
    return flags.parse_args(module.Args, method, module.SUDOKU, module.COUNTDOWN, module.LLM,
                            **variants(module))[1]


def offer(monkeypatch, name: str, task: Callable[[], common.Task]):
    """Make `--task name` mean task(), and any folder a tiny model of it."""
    monkeypatch.setattr(flags, "tiny_task", lambda folder: name)
    monkeypatch.setattr(tasks, "find", lambda name: None)
    monkeypatch.setattr(tasks, "load", lambda name, **_: task())


def start(method: str, *argv) -> subprocess.Popen:
    """`python method.py argv` as a user starts it."""
    command = [sys.executable, str(script(method)), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_update(out: Path, update: int, process: subprocess.Popen):
    """Until a run has logged this update. AssertionError if it ends before, or after a minute."""
    end = time.time() + 60
    while time.time() < end and process.poll() is None:
        if (out / "metrics.jsonl").exists():
            done = [row["update"] for row in complete_lines(out / "metrics.jsonl")]
            if done and done[-1] >= update:
                return
        time.sleep(0.02)
    raise AssertionError(f"no update {update}: {process.communicate()}")


def complete_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def lines(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "state.pt", weights_only=True)["network"]


def same_run(a: Path, b: Path):
    assert lines(a) == lines(b)
    one, two = weights(a), weights(b)
    assert all(torch.equal(one[k], two[k]) for k in one)


# -------------------------------------------------------------------------------------------- slow versions


def up_to_eos(tokens, eos_id: int) -> range:
    """The positions of one completion (list or tensor) that count."""
    tokens = list(map(int, tokens))
    return range(tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens))


def slow_logits(model, prompt, prompt_mask, shown) -> torch.Tensor:
    """(L, V) of one row alone, its prompt without padding; `shown` (L,) is the completion's part of the
    canvas."""
    x = torch.cat([prompt[prompt_mask], shown])[None]
    return model.head(model.body(x, None))[0, -len(shown) :]


def slow_rewards(model, roll, completions=None) -> list[float]:
    """What toy_task gives each row of a rollout, for its completion or another one."""
    found = []
    for prompt, y in zip(roll.prompt, roll.completion if completions is None else completions, strict=True):
        kept = [token for token in y[list(up_to_eos(y, model.eos_id))].tolist() if token != model.eos_id]
        text = model.tokenizer.decode(kept)  # a [PAD] in it is read, too
        asked = model.tokenizer.decode(prompt, skip_special_tokens=True)
        found.append(toy_task().reward(text, {"prompt": asked})[0])
    return found


# ------------------------------------------------------------------------- every trajectory of a Tabular


def probabilities(model: Tabular, state: list[int]) -> torch.Tensor:
    """(L, V) distribution of every position given a state, a list of tokens with the mask token where
    hidden."""
    return model.head(model.body(torch.tensor([state]), None))[0, :, : model.V].softmax(-1)


def enumerate_rollouts(model: Tabular, L: int, n: int, order: str, block: int):
    """Every trajectory of the sampler as (probability with its graph, completion, step map), written from its
    rules."""
    S, mask = L // n, model.mask_id

    def go(probability, state, steps, s):
        done = [b for b in range(0, L, block) if mask not in state[b : b + block]]
        ended = any(state[i] == model.eos_id for b in done for i in range(b, b + block))
        if s == S or ended:
            yield probability, [model.eos_id if t == mask else t for t in state], steps
            return
        p = probabilities(model, state)
        start = next(b for b in range(0, L, block) if mask in state[b : b + block])
        hidden = [i for i in range(start, start + block) if state[i] == mask]
        for weight, chosen in choices(p, hidden, n, order):
            state2, steps2 = list(state), list(steps)
            for i, token in chosen:
                state2[i], steps2[i] = token, s
            yield from go(probability * weight, state2, steps2, s + 1)

    yield from go(torch.ones((), dtype=torch.float64), [mask] * L, [S] * L, 0)


def choices(p: torch.Tensor, hidden: list[int], n: int, order: str):
    """(probability, [(position, token), ...]) of everything one step can reveal."""
    V = p.shape[1]
    if order == "confidence":  # positions follow from the tokens sampled everywhere
        for tokens in itertools.product(range(V), repeat=len(hidden)):
            sampled = list(zip(hidden, tokens, strict=True))
            sure = sorted(sampled, key=lambda it: -p[it[0], it[1]].item())[:n]
            yield math.prod(p[i, t] for i, t in sampled), sure
        return
    if order == "top_prob":
        subsets = [sorted(hidden, key=lambda i: -p[i].max().item())[:n]]
    else:
        subsets = list(itertools.combinations(hidden, n))
    for subset in subsets:
        for tokens in itertools.product(range(V), repeat=n):
            reveal = list(zip(subset, tokens, strict=True))
            yield math.prod(p[i, t] for i, t in reveal) / len(subsets), reveal


def as_rollout(model: Tabular, completions, steps, S: int) -> common.Rollout:
    """A rollout without prompts, of given completions and step maps; log-probs and entropies are left 0."""
    x, step = torch.tensor(completions), torch.tensor(steps)
    none = torch.zeros(len(x), 0, dtype=torch.long)
    zero = torch.zeros(x.shape, dtype=torch.float64)
    valid = common.until_eos(x, model.end_ids)
    return common.Rollout(none, none.bool(), x, step, zero, zero, valid, None, model.mask_id, S)
