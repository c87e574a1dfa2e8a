"""The command line: the settings of a method, and the flags of the plumbing beside them."""

import argparse
import importlib.util
import json
import math
import os
import shlex
import sys
import tempfile
import typing
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Literal

import tyro

import tasks
from plumbing.folder import pipes
from plumbing.parallel import one_line, refuse


@dataclass
class Flags:
    """What a run needs beside the settings of its method."""

    model: str = "tiny"  # "tiny" (the kept base of the task), a transformers folder or hub id
    revision: str | None = None  # of the hub id; without one a cached copy is used as it is
    mask_id: int | None = None  # for a checkpoint that does not say which token is its mask
    task: str = "sudoku"  # sudoku, countdown, gsm8k, word_problems, math, mbpp, humaneval; or my/task.py
    data: str = ""  # local training rows (.json, .jsonl, .csv, .parquet) in place of the hub's
    test_data: str = ""  # local held-out rows
    updates: int = 200  # rollouts, each with its optimizer steps; of a resumed run: in all
    minutes: float = 0.0  # of RL, then save, evaluate and stop, and --resume goes on; 0: no limit
    out: str = ""  # run folder; empty: runs/<method>-<task>-<seed>, or runs/eval-<task>
    resume: str = ""  # go on with this run folder
    eval_only: bool = False  # evaluate --resume RUN, or the model as it is, and stop
    eval_every: int = 50  # updates between evaluations on the held-out rows
    eval_threshold: float = 0.9  # evaluate adaptive decoding, too, before and after training; 0: do not
    eval_rows: int = 1024  # held-out rows evaluated, at most
    save_every: int = 10  # updates between checkpoints
    track: Literal["wandb", "trackio"] | None = None  # log there, too; after pip install of it
    gradient_checkpointing: bool = False  # less memory for activations, a third more time per update
    shard: bool = False  # torchrun: split weights, gradients and Adam over the GPUs also where one holds them


# What every method changes for an LLM, a model that reads words, beside its own LLM settings.
WORDS = dict(budget=4096, gradient_checkpointing=True, eval_rows=128, eval_threshold=0.0, save_every=50)

# What a resumed run may change.
FREE = {"updates", "minutes", "eval_every", "eval_threshold", "eval_rows", "save_every", "budget",
        "gradient_checkpointing", "shard", "resume", "eval_only", "track"}

# What lies in files. A run keeps their absolute paths and a fingerprint of each, which must stay the same; a
# resumed run may name another place where the same is now.
FILES = ("model", "task", "data", "test_data")


def parse_args(Args: type, method: str, sudoku: dict, countdown: dict, llm: dict, **variants: tuple):
    """Returns args, the settings of the method, and settings, one namespace of those and the flags.

    The defaults are those of Args and Flags, changed by `sudoku` or `countdown` for a tiny model, or by `llm`
    for a model that reads words. variants: for a boolean flag of that name, the three dicts that take the
    place of these when it is given. With --resume RUN the defaults are the settings of that run, and few may
    change."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what the defaults depend on
    first.add_argument("--model", default="tiny")
    first.add_argument("--task", default="sudoku")
    first.add_argument("--resume", default="")
    for name in variants:
        first.add_argument(f"--{name}", action="store_true")
    asked, _ = first.parse_known_args()
    if asked.resume:
        before = saved_settings(Args, method, asked.resume)
    else:
        for name, changes in variants.items():
            if getattr(asked, name):
                sudoku, countdown, llm = changes
        made_for = asked.task if asked.model == "tiny" else tiny_task(asked.model)
        before = WORDS | llm if not made_for else countdown if made_for == "countdown" else sudoku
        before = before | {"saved": 0, "fingerprints": {}}
    args, flags = parse(Args, before)
    for name in FILES:
        setattr(flags, name, absolute(name, getattr(flags, name)))
    settings = SimpleNamespace(**vars(args), **vars(flags))
    kept = FREE | {k for k in before["fingerprints"] if k == "model" or os.path.isabs(getattr(settings, k))}
    changed = [k for k, v in vars(settings).items() if asked.resume and k not in kept and v != before[k]]
    if changed:
        refuse(f"a resumed run keeps its {', '.join(changed)}; free to change: {', '.join(sorted(FREE))}")
    if asked.resume and settings.updates < before["saved"] and not settings.eval_only:
        refuse(f"{asked.resume} has made {before['saved']} updates, and --updates {settings.updates} is the "
               "number in all")
    check(settings, method)
    # the update of the newest checkpoint, and what the files were when the run began
    settings.saved, settings.fingerprints = before["saved"], before["fingerprints"]
    return args, settings


def absolute(name: str, value: str) -> str:
    """A setting of FILES as it is in any working directory: absolute where it names a file or folder."""
    if name == "task" and not value.endswith(".py") or name == "model" and not os.path.isdir(value):
        return value
    return str(Path(value).absolute()) if value and value != "tiny" else value


def parse(Args: type, defaults: dict) -> tuple:
    """The command line as an Args and Flags, with these defaults."""
    def of(kind: type):
        return kind(**{k: v for k, v in defaults.items() if k in {f.name for f in fields(kind)}})

    both = make_dataclass("Settings", [("method", tyro.conf.OmitArgPrefixes[Args]),
                                       ("run", tyro.conf.OmitArgPrefixes[Flags])])
    try:
        found = tyro.cli(both, default=both(of(Args), of(Flags)))
    except AssertionError as error:  # of Args: settings that do not go together
        refuse(str(error))
    return found.method, found.run


def saved_settings(Args: type, method: str, folder: str) -> dict:
    """The settings of the run in `folder`, with `saved` and `fingerprints`."""
    file = os.path.join(folder, "args.json")
    if not os.path.isfile(file):
        refuse(f"{folder} holds no run to resume (no args.json)")
    try:
        saved = json.loads(Path(file).read_bytes())
        made_by = saved.pop("method")
        saved.pop("commit")
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse(f"{file} cannot be read: {one_line(error)}")
    if made_by != method:
        refuse(f"{folder} is a run of another method: resume it with the script that made it")
    kinds = typing.get_type_hints(Args) | typing.get_type_hints(Flags) | {
        "saved": int, "fingerprints": dict[Literal[FILES], str]}
    if saved.keys() != kinds.keys():
        refuse(f"{file} cannot be read: it lacks or has too many of {sorted(saved.keys() ^ kinds.keys())}")
    wrong = [k for k, v in saved.items() if not is_of(v, kinds[k])]
    if wrong:
        refuse(f"{file} cannot be read: {', '.join(f'{k} is {saved[k]!r:.80}' for k in wrong)}")
    return saved | {"resume": folder, "shard": False}  # there may be another number of processes now


def is_of(value, kind) -> bool:
    """Is it a value that a setting of this type can have?"""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) in (UnionType, typing.Union):
        return any(is_of(value, part) for part in parts)
    if typing.get_origin(kind) is Literal:
        return value in parts
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and len(value) == len(parts) and all(map(is_of, value, parts))
    if typing.get_origin(kind) is dict:
        return type(value) is dict and all(all(map(is_of, pair, parts)) for pair in value.items())
    return type(value) in ((int, float) if kind is float else (kind,))


def tiny_task(name: str) -> str | None:
    """The task of a tiny base or of a folder trained from one, as its config says; None: another model."""
    try:
        return json.loads((Path(name) / "config.json").read_bytes()).get("tiny_task")
    except (OSError, ValueError, AttributeError, RecursionError):  # not such a folder: load_model tells
        return None


def check_shape(L: int, S: int, block: int):
    """Refuse a completion length, steps and block length unless all steps reveal equally many tokens."""
    if L % block:
        refuse(f"--L {L} is not a multiple of --block {block}")
    if L % S or S % (L // block):
        refuse(f"--S {S} does not fit: it must divide --L {L} and be a multiple of its {L // block} blocks")


def check(settings: SimpleNamespace, method: str):
    """Stop early on settings that cannot work; fill in the default --out."""
    for name in ("out", "resume", *FILES):
        try:
            os.fsencode(getattr(settings, name)).decode()
        except ValueError:
            refuse(f"--{name} has a name that is not UTF-8: a model cannot be written or read there")
    try:
        module = tasks.find(settings.task)
        for file in (settings.test_data, settings.data if reads_data(settings) else ""):
            if file:  # now, since a model may take minutes to load
                tasks.read_file(file)
    except (ValueError, OSError) as error:
        refuse(str(error))
    own = settings.task.endswith(".py")
    known = tasks.names("TINY")
    if settings.model == "tiny" and settings.task not in known:
        refuse(f"--model tiny knows {' and '.join(known)}: {settings.task} needs another --model")
    made_for = tiny_task(settings.model)
    if made_for not in (None, settings.task) and not (own and hasattr(module, "TINY")):
        refuse(f"{settings.model} is a tiny model of --task {made_for}")
    if settings.track and not installed(settings.track):
        refuse(f"--track {settings.track} needs it: pip install {settings.track}")
    if settings.shard and "WORLD_SIZE" not in os.environ:
        refuse(f"--shard is for several processes: torchrun --nproc_per_node 2 {sys.argv[0]} ...")
    for name in ("prompts", "minibatches", "passes", "L", "S", "block", "eval_every", "eval_rows",
                 "save_every", "budget"):
        if getattr(settings, name) < 1:
            refuse(f"--{name} must be at least 1")
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, float) and not 0 <= v < math.inf for v in numbers):
            refuse(f"--{name} must be a finite number, at least 0")
    if max(settings.betas) >= 1:
        refuse("--betas must be below 1")
    if settings.G < 2:
        refuse("--G must be at least 2: an advantage compares the samples of one prompt")
    if settings.updates < 0 or not 0.01 <= settings.temperature <= 100:
        refuse("--updates must be at least 0 and --temperature from 0.01 to 100: rollouts have to explore")
    if settings.grad_norm == 0 or settings.eval_threshold > 1:
        refuse("--grad_norm must be above 0, and --eval_threshold is a probability, at most 1")
    if settings.prompts % settings.minibatches:
        refuse(f"--minibatches {settings.minibatches} must divide --prompts {settings.prompts}: "
               "groups stay whole")
    check_shape(settings.L, settings.S, settings.block)
    task = Path(settings.task).stem
    default = f"eval-{task}" if settings.eval_only else f"{method}-{task}-{settings.seed}"
    settings.out = settings.resume or settings.out or f"runs/{default}"
    try:
        check_out(settings)
    except OSError as error:
        refuse(f"--out {settings.out} cannot be written to: {one_line(error)}")


def check_out(settings: SimpleNamespace):
    """Refuse to write where something else lies. OSError if nothing can be written there."""
    out = Path(settings.out)
    go_on = f"go on with --resume {shlex.quote(settings.out)}"
    if (out / "args.json").exists() and not settings.resume:
        other = "evaluate it with --resume" if settings.eval_only else go_on
        refuse(f"{out} exists and holds a run: {other}, or choose another --out")
    if found := pipes(out):
        refuse(f"{found[0]} is no file")
    free = settings.resume or not os.path.lexists(out) or out.is_dir() and settings.eval_only
    if not free and not (out.is_dir() and set(os.listdir(out)) <= {"lost+found"}):  # of a mounted volume
        refuse(f"{out} exists and holds no run to go on with: choose another --out")
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    with tempfile.TemporaryDirectory(dir=there) as trial:  # also its name may be too long
        Path(trial, out.absolute().relative_to(there)).mkdir(parents=True, exist_ok=True)


def reads_data(settings: SimpleNamespace) -> bool:
    """To evaluate on --test_data nobody reads --data."""
    return not (settings.eval_only and settings.test_data)


def installed(package: str) -> bool:
    """Is it a package, and not the folder of that name in which wandb leaves its runs?"""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
