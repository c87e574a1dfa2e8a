"""The tiny bases the four methods start from: masked-diffusion pretraining on a tiny task, in two phases.

RL cannot teach new logic in minutes. It brings out what a model knows and does not show. So a base first
learns to KNOW its task, from right demonstrations: every board is the solution, every expression hits the
target. Then it learns to be CARELESS, from demonstrations of a solver that fills each row with its missing
digits in any order, or writes any expression over the numbers. This stops the first time it SHOWS no more
than about a quarter of the answers: for longer, it would learn carelessness as if that were the task.

What a base knows is the ceiling of RL, so it is measured at the end of phase one and written, with what the
base shows, into its config.json. Validation rows alone decide when a phase stops. They are neither in the
demonstrations, nor in RL's training data, nor held out; the held-out rows are only measured.

Objective (MDLM / LLaDA): hide k ~ uniform{1..L} of the L answer tokens; mean cross-entropy of the hidden.

Bases are kept in plumbing/bases, because another CPU would build other weights.
python plumbing/pretrain.py [--task countdown] [--seed 1]     builds one anew in runs/: minutes on one core
"""

import argparse
import copy
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script of this folder, started from anywhere

from common import Denoiser, Task, attention, encode, reward_rows, roll_out  # noqa: E402
from plumbing.models import release_memory, save_model  # noqa: E402
from plumbing.parallel import one_line, refuse  # noqa: E402
from tasks import countdown, load, sudoku  # noqa: E402

BASES = Path(__file__).parent / "bases"


@dataclass
class Settings:
    """Every setting of a base. Each phase has its own learning rate and its own limit of optimizer steps."""

    task: str = "sudoku"  # or countdown
    seed: int = 0  # the base's own: the --seed of an RL run does not touch it
    out: str = ""  # folder of the base; empty: runs/base-<task>-<seed>
    layers: int = 4
    width: int = 128
    batch: int = 128  # demonstrations per step

    # Phase one: right demonstrations. The rate rises over 50 steps, then falls to 0 as a cosine.
    know: float = 0.99  # stop when this share of the validation rows is solved
    know_steps: int = 600  # at most
    know_lr: float = 4e-3  # the highest

    # Phase two: careless demonstrations at a constant rate.
    show: float = 0.25  # stop when no more than this share of the validation rows is solved
    show_steps: int = 400  # at most
    show_lr: float = 1e-3
    careless: float = 0.95  # share of careless demonstrations


def tiny_model(layers: int, width: int, seed: int = 0, task: str = "sudoku") -> Denoiser:
    """An untrained ModernBERT with the tokens of a tiny task, which its config names as `tiny_task`."""
    tiny = TINY[task]
    vocab = {token: i for i, token in enumerate(["[PAD]", "[EOS]", "[MASK]", *tiny.tokens])}
    words = Tokenizer(models.WordLevel(vocab))  # no unknown token: anything else raises
    words.decoder = tiny.decoder
    words.pre_tokenizer = pre_tokenizers.Split(Regex(tiny.pattern), "removed", invert=True)
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    config = ModernBertConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=64, global_attn_every_n_layers=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, cls_token_id=None, sep_token_id=None,
        tiny_task=task,
    )
    with torch.random.fork_rng():  # weights are drawn from the global generator, which is put back afterwards
        torch.manual_seed(seed)
        network = ModernBertForMaskedLM(config).eval()
    return Denoiser(network, tokenizer, mask_id=2, eos_id=1, pad_id=0, end_ids=(1,), shift=False)


@dataclass
class Tiny:
    """What a tiny model reads and writes, how a run decodes it, and how its base is made."""

    tokens: list[str]  # after the special ones
    pattern: str  # of one token in a text
    decoder: decoders.Decoder | None  # how tokens become text; None: with spaces between
    L: int  # tokens of an answer, those behind it EOS
    S: int  # denoising steps of an RL run
    block: int
    demonstrations: Callable
    settings: Settings


TINY = {
    "sudoku": Tiny(["=", *"0123456789"], r"\S", decoders.Fuse(), 16, 8, 16, sudoku.demonstrations,
                   Settings()),
    "countdown": Tiny(["=", *">+-*()", *map(str, countdown.TARGETS)], r"\d+|\S", None, 8, 4, 4,
                      countdown.demonstrations,
                      Settings(task="countdown", know_steps=3000, show=0.2, show_lr=4e-4, careless=0.9)),
}


def loss_of(model: Denoiser, prompts: list[str], answers: list[str], L: int, rng: np.random.Generator):
    """The objective of a batch of demonstrations."""
    prompt, prompt_mask = encode(model, prompts)
    ids = model.tokenizer(answers, add_special_tokens=False)["input_ids"]
    target = [row + [model.eos_id] * (L - len(row)) for row in ids]
    target = torch.tensor(target, device=model.device)  # (batch, L)
    k = torch.from_numpy(rng.integers(1, L + 1, size=(len(ids), 1)))
    hidden = (torch.from_numpy(rng.random((len(ids), L)).argsort(1).argsort(1)) < k).to(model.device)
    x = torch.cat([prompt, target.masked_fill(hidden, model.mask_id)], 1)
    logits = model.head(model.body(x, attention(prompt_mask, L))[:, -L:][hidden])  # (hidden tokens, V)
    loss = torch.nn.functional.cross_entropy(logits, target[hidden], reduction="none")
    return (loss / k.to(model.device).expand(-1, L)[hidden]).sum() / len(ids)


def solved_share(model: Denoiser, task: Task, S: int) -> float:
    """Share of the rows task.test that the model solves in S steps, decoded as an RL run evaluates."""
    tiny = TINY[model.network.config.tiny_task]
    prompt, prompt_mask = encode(model, [row["prompt"] for row in task.test])
    roll = roll_out(model, prompt, prompt_mask, [], L=tiny.L, S=S, block=tiny.block, temperature=0,
                    budget=8448)
    release_memory()
    return reward_rows(model, task, roll.completion, task.test)[1]["correct"].mean().item()


def measure(model: Denoiser) -> dict[str, float]:
    """Shares of validation and test rows solved, with the tokens a step of an RL run and with one token a
    step."""
    name = model.network.config.tiny_task
    tiny, found = TINY[name], {}
    for part in ("validation", "test"):
        task = load(name, chat=False, train=False, held_out=part)
        found[part] = round(solved_share(model, task, tiny.S), 4)
        found[f"{part}_one_token"] = round(solved_share(model, task, tiny.L), 4)
    return found


def optimizers_of(model: Denoiser, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns arithmetic in half the steps; AdamW for the rest."""
    matrices, rest = [], []
    for name, p in model.network.named_parameters():
        (matrices if ".layers." in name and p.dim() == 2 else rest).append(p)
    return [torch.optim.AdamW(rest, lr=lr, weight_decay=0.01),
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def fit(model: Denoiser, optimizers: list, settings: Settings, careless: float, rng: np.random.Generator):
    """One optimizer step on a batch of demonstrations."""
    tiny = TINY[settings.task]
    loss = loss_of(model, *tiny.demonstrations(settings.batch, careless, rng), tiny.L, rng)
    model.network.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def learn(model: Denoiser, settings: Settings) -> int:
    """Phase one: right demonstrations until the model knows its task. It is left with the best weights of
    those that were asked about the validation rows. Returns the optimizer steps taken."""
    rng = np.random.default_rng([2, settings.seed])  # of demonstrations and masks
    task = load(settings.task, chat=False, train=False, held_out="validation")
    optimizers, steps = optimizers_of(model, settings.know_lr), settings.know_steps
    best, weights = -1.0, {}
    bar = tqdm(range(1, steps + 1), desc=f"{settings.task}, phase one", unit="step", dynamic_ncols=True)
    for step in bar:
        rate = settings.know_lr * min(step / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = rate
        fit(model, optimizers, settings, 0.0, rng)
        if step % 100 == 0 or step == steps:
            share = solved_share(model, task, TINY[settings.task].S)
            if share > best:
                best, weights = share, copy.deepcopy(model.network.state_dict())
            bar.set_postfix_str(f"knows {share:.1%}, enough: {settings.know:.0%}")
            if share >= settings.know:
                break
    bar.close()
    model.network.load_state_dict(weights)
    return step


def grow_careless(model: Denoiser, settings: Settings) -> int:
    """Phase two: careless demonstrations until the model shows no more than settings.show, for the first
    time. Returns the optimizer steps taken."""
    rng = np.random.default_rng([3, settings.seed])  # of demonstrations and masks
    task = load(settings.task, chat=False, train=False, held_out="validation")
    optimizers, steps = optimizers_of(model, settings.show_lr), settings.show_steps
    bar = tqdm(range(1, steps + 1), desc=f"{settings.task}, phase two", unit="step", dynamic_ncols=True)
    share = 1.0
    for step in bar:
        fit(model, optimizers, settings, settings.careless, rng)
        # Five steps can lead from above the wanted share to half of it, so all are looked at near it.
        if step % 5 == 0 or share < 2 * settings.show or step == steps:
            share = solved_share(model, task, TINY[settings.task].S)
            bar.set_postfix_str(f"shows {share:.1%}, wanted: {settings.show:.0%}")
            if share <= settings.show:
                break
    else:
        tqdm.write(f"stopped after {steps} careless steps: the base shows more than {settings.show:.0%}")
    bar.close()
    return step


def train(settings: Settings) -> Denoiser:
    """A new base. Its config tells its settings, the steps of each phase, what it knows and shows."""
    model = tiny_model(settings.layers, settings.width, settings.seed, settings.task)
    config = model.network.config
    config.base_settings = {k: v for k, v in vars(settings).items() if k != "out"}
    know_steps = learn(model, settings)
    config.knows = measure(model)
    show_steps = grow_careless(model, settings)
    config.base_steps = {"know": know_steps, "show": show_steps}
    model.network.half().float()  # the weights as they will be on disk
    config.shows = measure(model)
    return model


def kept_base(task: str, seed: int = 0) -> Path:
    """The folder of a base that is kept in the repository; --model tiny is that of seed 0."""
    folder = BASES / f"{task}-{seed}"
    if not (folder / "config.json").is_file():
        refuse(f"no base is kept in {folder}")
    return folder


def check(settings: Settings):
    """Stop early on settings that cannot work."""
    if settings.task not in TINY:
        refuse(f"--task {settings.task!r} is not one of {', '.join(TINY)}")
    for name in ("know_steps", "show_steps", "batch", "layers"):
        if getattr(settings, name) < 1:
            refuse(f"--{name} must be at least 1")
    if settings.seed < 0:
        refuse("--seed must be at least 0")
    if settings.width < 32 or settings.width % 32:
        refuse(f"--width {settings.width} must be a multiple of 32, the width of an attention head")
    for name in ("know_lr", "show_lr"):
        if not 0 < getattr(settings, name) < math.inf:
            refuse(f"--{name} must be a finite number above 0")
    for name in ("know", "show", "careless"):
        if not 0 <= getattr(settings, name) <= 1:
            refuse(f"--{name} must be from 0 to 1")


def main():
    """Build a base and say where it is, what it knows and what it shows."""
    begin, first = time.perf_counter(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="sudoku")  # what the defaults hang on
    task = first.parse_known_args()[0].task
    settings = tyro.cli(Settings, default=TINY[task].settings if task in TINY else Settings(task=task))
    check(settings)
    out = Path(settings.out or f"runs/base-{settings.task}-{settings.seed}")
    if out.exists():
        refuse(f"{out} exists: choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=out.parent))
    except OSError as error:
        refuse(f"--out {out} cannot be made: {one_line(error)}")
    model = train(settings)
    model.network.half()
    save_model(model, out)
    (out / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read it
    config = model.network.config
    for name, found in (("knows", config.knows), ("shows", config.shows)):
        print(f"the base {name} {found['test']:.1%} of the held-out rows, as an RL run decodes; "
              f"{found['test_one_token']:.1%} with one token a step")
    print(f"{(time.perf_counter() - begin) / 60:.0f} minutes; to start from it: "
          f"python egspo.py --task {settings.task} --model {out}")


if __name__ == "__main__":
    main()
