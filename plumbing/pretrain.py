"""The tiny bases the four methods start from: masked-diffusion pretraining on a tiny task (TINY_TASKS).

RL cannot teach new logic in minutes; what it can do is sharpen. So the demonstrations leave it something to
decide: a share of the boards comes from a careless solver that fills each row with its missing digits in any
order, and an expression is any of those that hit the target, while tokens revealed together have to agree.
And the base stops by what it can do, since the same number of steps gives another base on another CPU: at a
constant learning rate, once its weights, averaged over the last steps, solve the wanted share of validation
rows, greedily in 8 steps. Those are in neither its own nor RL's training data, nor held out.

Objective (MDLM / LLaDA): hide k ~ uniform{1..L} of the L answer tokens; mean cross-entropy of the hidden.

python pretrain.py [--task countdown]     minutes on 2 CPU cores; cached; the four scripts run it when missing
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
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
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script of this folder, started from anywhere

from common import Denoiser, Task, attention, encode, reward_rows, roll_out  # noqa: E402
from plumbing.models import release_memory, save_model  # noqa: E402
from plumbing.parallel import refuse  # noqa: E402
from tasks import load  # noqa: E402
from tasks.countdown import TARGETS, countdown_answers, countdown_prompt, countdown_split  # noqa: E402
from tasks.sudoku import sudoku_puzzles, sudoku_split  # noqa: E402

RECIPE = 2  # to be raised when the same settings make another base


@dataclass
class Settings:
    """Every setting of a base; its cache folder is named by their hash."""

    task: str = "sudoku"  # or countdown
    solved: float = 0.32  # stop when this share of validation rows is solved, greedily
    steps: int = 5000  # most optimizer steps
    batch: int = 128  # demonstrations per step
    lr: float = 2e-3  # constant after a warm-up of 50 steps
    muon: bool = False  # the layers' matrices by Muon, which learns arithmetic in half the steps
    careless: float = 0.7  # share of careless demonstrations
    layers: int = 4
    width: int = 128
    seed: int = 0  # the base's own: the --seed of an RL run does not touch it


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


def sudoku_demonstrations(count: int, careless: float, rng: np.random.Generator):
    """(prompts, answers): training boards with the solution or, with probability `careless`, with each row's
    missing digits in any order."""
    puzzles, solutions = sudoku_puzzles(sudoku_split()["train"], count, rng)
    blank = (puzzles == 0).reshape(-1, 4, 4)
    place = (~blank).argsort(2, kind="stable")  # the blanks of each row first, in order
    shuffled = np.where(blank, rng.random(blank.shape), 2.0).argsort(2)  # the blanks first, in any order
    shuffled = np.where(rng.random((count, 1, 1)) < careless, shuffled, place)
    rows = solutions.reshape(-1, 4, 4)
    filled = rows.copy()
    np.put_along_axis(filled, place, np.take_along_axis(rows, shuffled, 2), 2)
    answers = np.where(puzzles == 0, filled.reshape(-1, 16), puzzles)
    return ["".join(map(str, p)) + "=" for p in puzzles], ["".join(map(str, a)) for a in answers]


def countdown_demonstrations(count: int, careless: float, rng: np.random.Generator):
    """(prompts, answers): training problems with any expression that hits the target or, with probability
    `careless`, any at all over the numbers."""
    rows, prompts, answers = countdown_split()["train"], [], []
    for i in rng.integers(len(rows), size=count):
        numbers, target = rows[i]["numbers"], rows[i]["target"]
        by_value = countdown_answers(tuple(sorted(numbers)))
        choice = sum(by_value.values(), []) if rng.random() < careless else by_value[target]
        prompts.append(countdown_prompt(rng.permutation(numbers), target))
        answers.append(choice[rng.integers(len(choice))])
    return prompts, answers


@dataclass
class Tiny:
    """What a tiny model reads and writes, and how its base is made."""

    tokens: list[str]  # after the special ones
    pattern: str  # of one token in a text
    decoder: decoders.Decoder | None  # how tokens become text; None: with spaces between
    L: int  # tokens of an answer, those behind it EOS
    block: int
    demonstrations: Callable
    settings: Settings


TINY = {
    "sudoku": Tiny(["=", *"0123456789"], r"\S", decoders.Fuse(), 16, 16, sudoku_demonstrations, Settings()),
    "countdown": Tiny(["=", *">+-*()", *map(str, TARGETS)], r"\d+|\S", None, 8, 4,
                      countdown_demonstrations,
                      Settings(task="countdown", solved=0.28, batch=64, lr=4e-3, muon=True, careless=0.0)),
}


def loss_of(model: Denoiser, prompts: list[str], answers: list[str], L: int, rng: np.random.Generator):
    """The objective of a batch of demonstrations."""
    prompt, prompt_mask = encode(model, prompts)
    ids = model.tokenizer(answers, add_special_tokens=False)["input_ids"]
    target = torch.tensor([row + [model.eos_id] * (L - len(row)) for row in ids])  # (batch, L)
    k = rng.integers(1, L + 1, size=(len(ids), 1))
    hidden = torch.from_numpy(rng.random((len(ids), L)).argsort(1).argsort(1) < k)
    x = torch.cat([prompt, target.masked_fill(hidden, model.mask_id)], 1)
    logits = model.head(model.body(x, attention(prompt_mask, L))[:, -L:][hidden])  # (hidden tokens, V)
    loss = torch.nn.functional.cross_entropy(logits, target[hidden], reduction="none")
    return (loss / torch.from_numpy(k).expand(-1, L)[hidden]).sum() / len(ids)


def solved_share(model: Denoiser, task: Task, rows: list[dict], tiny: Tiny) -> float:
    """Share of the rows the model solves, greedily."""
    prompt, prompt_mask = encode(model, [row["prompt"] for row in rows])
    roll = roll_out(model, prompt, prompt_mask, [], L=tiny.L, S=8, block=tiny.block, temperature=0,
                    budget=8448)
    return reward_rows(model, task, roll.completion, rows)[1]["correct"].mean().item()


def train(settings: Settings, rng: np.random.Generator | None = None) -> Denoiser:
    """Pretrain a tiny model from scratch. rng draws demonstrations and masks; None: the seed's own."""
    model = tiny_model(settings.layers, settings.width, settings.seed, settings.task)
    tiny = TINY[settings.task]
    task = load(settings.task, chat=False, train=False, held_out="validation")
    rng = rng or np.random.default_rng([2, settings.seed])
    matrices, rest = [], []
    for name, p in model.network.named_parameters():
        (matrices if settings.muon and ".layers." in name and p.dim() == 2 else rest).append(p)
    optimizers = [torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=settings.lr, weight_decay=0.01,
                                           adjust_lr_fn="match_rms_adamw"))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, 1))
                 for optimizer in optimizers]
    average = AveragedModel(  # over the last quarter of the steps, roughly: weight of a step ~ its cube
        model.network, avg_fn=lambda mean, weight, n: mean.lerp(weight, 4 / (n + 4)))
    averaged = dataclasses.replace(model, network=average.module)
    bar = tqdm(range(settings.steps), desc=f"building the tiny {settings.task} base (once)", unit="step",
               dynamic_ncols=True)
    for step in bar:
        loss = loss_of(model, *tiny.demonstrations(settings.batch, settings.careless, rng), tiny.L, rng)
        model.network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        for each in optimizers + schedules:
            each.step()
        average.update_parameters(model.network)
        if step % 20 == 19 or step + 1 == settings.steps:
            # an eighth of the rows tells whether it is worth asking all
            share = solved_share(averaged, task, task.test[step // 20 % 8 :: 8], tiny)
            bar.set_postfix_str(f"solves {share:.0%}, {settings.solved:.0%} are enough")
            release_memory()
            if share < 0.85 * settings.solved:
                continue
            if solved_share(averaged, task, task.test, tiny) >= settings.solved:
                break
    else:
        tqdm.write(f"stopped after {settings.steps} steps: the base solves less than {settings.solved:.0%}")
    bar.close()
    return averaged


def base_path(settings: Settings) -> Path:
    """Where the base with these settings is, or would be."""
    named = json.dumps([RECIPE, dataclasses.asdict(settings)], sort_keys=True)
    key = hashlib.sha256(named.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-rl"
    return cache / f"tiny-{settings.task}-{key}"


def base_folder(settings: Settings) -> Path:
    """The cached base with these settings, built if missing. Of two processes at once one result is kept."""
    if settings.task not in TINY:
        refuse(f"--task {settings.task!r} is not one of {', '.join(TINY)}")
    if min(settings.steps, settings.batch, settings.layers) < 1 or settings.seed < 0:
        refuse("--steps, --batch and --layers must be at least 1, --seed at least 0")
    if settings.width < 32 or settings.width % 32:
        refuse(f"--width {settings.width} must be a multiple of 32, the width of an attention head")
    if not (0 < settings.lr < np.inf and 0 <= settings.careless <= 1 and 0 <= settings.solved <= 1):
        refuse("--lr must be a finite number above 0, --careless and --solved from 0 to 1")
    folder = base_path(settings)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        model = train(settings)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        save_model(model, scratch / "model")
        try:
            (scratch / "model").rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        shutil.rmtree(scratch)
    return folder


def main():
    """Build a base and say where it is."""
    begin, first = time.perf_counter(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="sudoku")  # what the defaults hang on
    task = first.parse_known_args()[0].task
    settings = tyro.cli(Settings, default=TINY[task].settings if task in TINY else Settings(task=task))
    print(f"{base_folder(settings)} ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
