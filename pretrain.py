"""The tiny base model the four methods start from: masked-diffusion pretraining on 4x4 Sudoku boards.

A base trained on correct boards alone is too good to need RL, and RL cannot teach new logic in minutes; what
it can do is sharpen. So, as in real pretraining data, the demonstrations are of mixed quality: 60 % come from
a sloppy solver that only fills each row with its missing digits, in any order.

Objective (MDLM / LLaDA): hide k ~ uniform{1..16} of the 16 answer tokens; mean cross-entropy of the hidden
ones.

python pretrain.py        two minutes on 2 CPU cores; cached; the four scripts run it when it is missing
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from common import Denoiser, refuse
from models import release_memory, save_model
from tasks import sudoku_puzzles, sudoku_split


@dataclass
class Settings:
    """Every setting of the base; its cache folder is named by their hash."""

    steps: int = 700  # optimizer steps
    batch: int = 128  # boards per step
    lr: float = 3e-3  # peak learning rate: warm-up over 50 steps, then linear decay to zero
    sloppy: float = 0.6  # share of demonstrations by the sloppy solver
    layers: int = 4
    width: int = 128
    seed: int = 0  # the base's own: the --seed of an RL run does not touch it


def tiny_model(layers: int, width: int, seed: int = 0) -> Denoiser:
    """An untrained ModernBERT with a character tokenizer: digits, "=" and three special tokens."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[EOS]", "[MASK]", "=", *"0123456789"])}
    characters = Tokenizer(models.WordLevel(vocab))  # no unknown token: another character raises
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, **special)
    config = ModernBertConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=64, global_attn_every_n_layers=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, cls_token_id=None, sep_token_id=None,
    )
    with torch.random.fork_rng():  # weights are drawn from the global generator, which is put back afterwards
        torch.manual_seed(seed)
        network = ModernBertForMaskedLM(config).eval()
    return Denoiser(network, tokenizer, mask_id=2, eos_id=1, pad_id=0, end_ids=(1,), shift=False)


def demonstrations(grids: np.ndarray, count: int, sloppy: float, rng: np.random.Generator):
    """(puzzles, answers), each (count, 16): the solution, or with probability `sloppy` a careless answer."""
    puzzles, answers = sudoku_puzzles(grids, count, rng)
    blank = (puzzles == 0).reshape(-1, 4, 4)
    place = (~blank).argsort(2, kind="stable")  # the blanks of each row first, in order
    shuffled = np.where(blank, rng.random(blank.shape), 2.0).argsort(2)  # the blanks first, in any order
    shuffled = np.where(rng.random((count, 1, 1)) < sloppy, shuffled, place)
    rows = answers.reshape(-1, 4, 4)
    filled = rows.copy()
    np.put_along_axis(filled, place, np.take_along_axis(rows, shuffled, 2), 2)
    return puzzles, np.where(puzzles == 0, filled.reshape(-1, 16), puzzles)


def train(settings: Settings) -> Denoiser:
    """Pretrain a tiny model from scratch."""
    model = tiny_model(settings.layers, settings.width, settings.seed)
    grids, rng = sudoku_split()[0], np.random.default_rng([2, settings.seed])
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, 1) * (1 - i / settings.steps))
    digit = torch.tensor(model.tokenizer.convert_tokens_to_ids(list("0123456789")))
    equals = model.tokenizer.convert_tokens_to_ids("=")
    bar = tqdm(range(settings.steps), desc="building the tiny base (once)", dynamic_ncols=True)
    for step in bar:
        puzzles, answers = demonstrations(grids, settings.batch, settings.sloppy, rng)
        prompt = torch.nn.functional.pad(digit[torch.from_numpy(puzzles)], (0, 1), value=equals)
        target = digit[torch.from_numpy(answers)]  # (batch, 16)
        k = rng.integers(1, 17, size=(settings.batch, 1))
        hidden = torch.from_numpy(rng.random((settings.batch, 16)).argsort(1).argsort(1) < k)
        x = torch.cat([prompt, target.masked_fill(hidden, model.mask_id)], 1)
        logits = model.head(model.body(x, None)[:, -16:][hidden])  # (hidden tokens, V)
        loss = torch.nn.functional.cross_entropy(logits, target[hidden], reduction="none")
        per_board = loss / torch.from_numpy(k).expand(-1, 16)[hidden]  # mean over a board's hidden tokens
        loss = per_board.sum() / settings.batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % 50 == 0:
            release_memory()
    return model


def base_folder(settings: Settings | None = None) -> Path:
    """The cached base with these settings, built if missing. Of two processes at once one result is kept."""
    settings = settings or Settings()
    if min(settings.steps, settings.batch, settings.layers) < 1 or settings.seed < 0:
        refuse("--steps, --batch and --layers must be at least 1, --seed at least 0")
    if settings.width < 32 or settings.width % 32:
        refuse(f"--width {settings.width} must be a multiple of 32, the width of an attention head")
    if not (0 < settings.lr < np.inf and 0 <= settings.sloppy <= 1):
        refuse("--lr must be a finite number above 0, --sloppy from 0 to 1")
    key = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-rl"
    folder = cache / f"tiny-sudoku-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        model = train(settings)
        scratch = Path(tempfile.mkdtemp(dir=cache))
        save_model(model, scratch / "model")
        try:
            (scratch / "model").rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        shutil.rmtree(scratch)
    return folder


if __name__ == "__main__":
    begin = time.perf_counter()
    print(f"{base_folder(tyro.cli(Settings))} ({time.perf_counter() - begin:.0f} s)")
