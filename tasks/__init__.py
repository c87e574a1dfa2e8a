"""Tasks and their rewards: what is asked, what an answer earns, how it is drawn for a person.

Each file here that defines a TASK is a task; to add one is to add a file. A reward prints nothing, draws no
random numbers and survives any text; what cannot be read scores 0 and counts as parse_fail. Here: load(),
which makes a Task of a recipe, and where rows come from. What answers have in common is in answers.py.
"""

import ast
import contextlib
import csv
import importlib
import io
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from common import Task


@dataclass
class Recipe:
    """What load() makes a Task of."""

    row: Callable[[dict], dict]  # from the columns of the hub or of a file; ValueError if they cannot be used
    reward: Callable
    draw: Callable
    sources: dict[str, Callable[[], list[dict]]]  # "train", "test", "validation"; "train" alone is split here
    key: Callable[[dict], object] = lambda row: " ".join(row["question"].split())  # train and test share none
    parallel: bool = False
    free: Callable[[list[dict]], list[bool]] = lambda rows: [False] * len(rows)  # rewards any answer


def find(name: str) -> ModuleType:
    """The file tasks/<name>.py, imported now, since not every task needs what another imports. It has a TASK
    and, for models that know a few tokens alone, perhaps a TINY. ValueError if there is none."""
    if name not in names():
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(names())}")
    return importlib.import_module(f"tasks.{name}")


def names(of: str = "TASK") -> list[str]:
    """The tasks there are: the files of this folder that define a TASK, or a TINY."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(rf"^{of} = ", file.read_text(encoding="utf-8"), re.M)]


def load(
    name: str, *, chat: bool, data: str = "", test_data: str = "", train: bool = True, held_out: str = "test"
) -> Task:
    """The task `name`. `chat`: the model has a chat template; without one there are those with a TINY.

    `data` is a local training file in place of the published rows, `test_data` a held-out one. With `data`
    alone, the last tenth of its distinct keys (questions; Sudoku: solutions) is held out. Training rows whose
    key is held out are dropped: a published training set contains half of its test set. With train=False
    there are no training rows. held_out="validation": the rows of a tiny task to stop a base by and to tune
    on. Raises ValueError, in one line, for what cannot be used."""
    module = find(name)
    if not chat and not hasattr(module, "TINY"):
        raise ValueError(f"{name} needs a model with a chat template")
    recipe = module.TASK if chat else module.TINY
    if train and not data and "train" not in recipe.sources:
        raise ValueError(f"{name} has no training rows: use --eval_only, or give --data")
    rows, test = [], []
    if test_data:
        test = make_rows(recipe, read_file(test_data), test_data)
    elif not data and held_out in recipe.sources:
        test = make_rows(recipe, recipe.sources[held_out](), f"{name}, {held_out}")
    if train or not test:
        raws = read_file(data) if data else recipe.sources["train"]()
        rows = make_rows(recipe, raws, data or f"{name}, train")
    if test:
        held = set(map(recipe.key, test))
    else:
        keys = list(dict.fromkeys(map(recipe.key, rows)))
        held = set(keys[-max(1, len(keys) // 10) :] if data else keys[-1024:])
    kept = [row for row in rows if recipe.key(row) not in held]
    if test and len(kept) < len(rows):
        print(f"{name}: {len(rows) - len(kept)} of {len(rows)} training rows dropped, they are held out")
    test = test or [row for row in rows if recipe.key(row) in held]
    if not test or train and not kept:
        raise ValueError(f"{data or name}: no {'training' if test else 'held-out'} rows are left")
    recipe.reward("\\boxed{0} ```python\n0", test[0])  # what it needs must work before anything costly
    return Task(kept if train else [], test, recipe.reward, recipe.draw, recipe.parallel)


def make_rows(recipe: Recipe, raws: list[dict], where: str) -> list[dict]:
    """Rows of a task from published ones. What cannot be used is dropped and told; above 1 %, ValueError."""
    rows, wrong = {}, {}
    for number, raw in enumerate(raws, 1):
        try:
            rows[number] = recipe.row(raw)
            json.dumps(rows[number], ensure_ascii=False).encode()  # no tokenizer takes half a character
        except Exception as error:  # a row may hold anything
            wrong[number] = textwrap.shorten(str(error), 160)
    for number, free in zip(rows, recipe.free(list(rows.values())), strict=True):
        wrong |= {number: "its tests pass for a program that does nothing"} if free else {}
    if wrong:
        first = f"row {min(wrong)}: {wrong[min(wrong)]}"
        if len(wrong) > len(raws) / 100:
            raise ValueError(f"{where}, {first} ({len(wrong)} of {len(raws)} rows cannot be used)")
        print(f"{where}: {len(wrong)} of {len(raws)} rows dropped, the first is {first}")
    return [row for number, row in rows.items() if number not in wrong]


def column(raw: dict, *names: str):
    """What is in the first of these columns that holds something: every publisher has names of its own."""
    filled = {name: value for name, value in raw.items() if value is not None and str(value).strip()}
    for name in names:
        if name in filled:
            return filled[name]
    raise ValueError(f"no column {' or '.join(names)}; it has {', '.join(map(str, filled))}")


def listed(value) -> list:
    """A list, which a column of text holds as JSON, as Python or without brackets; else what it is, alone."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = read(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read_file(name: str) -> list[dict]:
    """The rows of a local .json (a list of objects), .jsonl or .csv file."""
    suffix, number = Path(name).suffix, 0
    if suffix not in (".json", ".jsonl", ".csv"):
        raise ValueError(f"cannot read {name}: it must be a .json (a list of objects), .jsonl or .csv file")
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
        if suffix == ".csv":  # not load_dataset("csv"): boards become numbers and lose their leading zeros
            rows = list(csv.DictReader(io.StringIO(text)))
        elif suffix == ".json":
            rows = json.loads(text if text.strip() else "[]")
        else:
            rows = []
            for line in text.split("\n"):
                number += 1
                rows += [json.loads(line)] if line.strip() else []
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = f"line {number}: {getattr(error, 'msg', error)}" if number else error
        raise ValueError(f"cannot read {name}: {reason}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} must hold a list of objects")
    if not rows:
        raise ValueError(f"{name} is empty")
    return rows


def hub(*path: str, split: str) -> list[dict]:
    """The rows of a published data set: its id on the hub and, where it has several, the configuration."""
    import datasets  # here because it takes seconds, and Sudoku does without

    try:
        return datasets.load_dataset(*path, split=split).to_list()
    except Exception as error:  # of a dozen kinds: no network, no such set, no access, a full disk ...
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"cannot load {path[0]}: {reason}; local files: --data, --test_data") from error
