"""Tasks and their rewards: what is asked, what an answer earns, how it is drawn for a person.

Each file here that defines a TASK is a task; to add one is to add a file. A reward prints nothing, draws no
random numbers and survives any text; what cannot be read scores 0 and counts as parse_fail. Here: load(),
which makes a Task of a recipe, and where rows come from. What answers have in common is in answers.py.
"""

import ast
import contextlib
import copy
import csv
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from math import isfinite  # not math, which is a task of this folder
from pathlib import Path
from types import ModuleType

import torch

from common import Task


@dataclass
class Recipe:
    """What load() makes a Task of."""

    row: Callable[[dict], dict]  # from the columns of the hub or of a file; ValueError if they cannot be used
    reward: Callable  # (text, row) -> total, {"correct": 0.0 or 1.0, "parse_fail": 0.0 or 1.0, ...}
    draw: Callable = lambda text, row: text.splitlines()[:8]  # (text, row) -> lines for a person
    # "train", "test" and "validation". Where there is "train" alone, load() splits it.
    sources: dict[str, Callable[[], list[dict]]] = field(default_factory=dict)
    # No row of "train" has the key of a row of "test".
    key: Callable[[dict], object] = lambda row: " ".join(row.get("question", row["prompt"]).split())
    parallel: bool = False  # the reward waits for other processes
    flawed: Callable[[list[dict]], list[str]] = lambda rows: [""] * len(rows)  # why a row teaches nothing
    right: Callable[[dict], str | None] = lambda row: None  # a right answer, None if none is known


def find(name: str) -> ModuleType:
    """The file tasks/<name>.py, or one of your own if `name` ends in .py, imported now, since not every task
    needs what another imports. It has a TASK and, for models that know a few tokens alone, perhaps a TINY.
    ValueError, in one line, if there is none."""
    if not name.endswith(".py"):
        if name not in names():
            raise ValueError(f"unknown task {name!r}: choose from {', '.join(names())}")
        return importlib.import_module(f"tasks.{name}")
    try:
        check_is_file(name)
        with left_as_found():
            module = imported(Path(name).resolve(strict=True))
    except (Exception, SystemExit) as error:  # it may hold anything
        raise ValueError(textwrap.shorten(f"cannot load {name}: {type(error).__name__}: {error}",
                                          300)) from error
    for made in (getattr(module, "TASK", None), getattr(module, "TINY", None)):
        if not isinstance(made, Recipe | None):
            raise ValueError(f"{name}: TASK and TINY must be a tasks.Recipe, not a {type(made).__name__}")
    if not hasattr(module, "TASK"):
        raise ValueError(f"{name} defines no TASK = Recipe(...)")
    return module


@functools.cache
def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"task_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def names(of: str = "TASK") -> list[str]:
    """The tasks there are: the files of this folder that define a TASK, or a TINY."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(rf"^{of} = ", file.read_text(encoding="utf-8"), re.M)]


def load(
    name: str, *, chat: bool, data: str = "", test_data: str = "", train: bool = True, held_out: str = "test"
) -> Task:
    """The task `name`. `chat`: has the model a chat template? Without one a task needs a TINY.

    `data` is a local training file in place of the published rows, `test_data` a held-out one. Where there is
    "train" alone, the last tenth of its distinct keys (questions; Sudoku: solutions) is held out; without
    `data` 1024 keys at most. Training rows whose key is held out are dropped: a published training set holds
    half of its test set. With train=False there are no training rows. held_out="validation": rows to stop a
    base by and to tune on; of a task without such rows, those that "train" alone would hold out. Raises
    ValueError, in one line, for what cannot be used."""
    module = find(name)
    if not chat and not hasattr(module, "TINY"):
        raise ValueError(f"{name} needs a model with a chat template")
    recipe = module.TASK if chat else module.TINY
    if not name.endswith(".py"):
        return load_recipe(recipe, name, data, test_data, train, held_out)
    rewards = 'a reward is (total, {"correct": ..., "parse_fail": ...}): '
    recipe = replace(recipe, reward=guarded(recipe.reward, name, rewards, reward_form()),
                     draw=guarded(recipe.draw, name, "a drawing is a list of lines: ", drawing_form))
    try:
        with left_as_found():
            return load_recipe(recipe, name, data, test_data, train, held_out)
    except (Exception, SystemExit) as error:  # its functions may do anything
        if isinstance(error, ValueError) and not lines_of(name, error):
            raise  # one of ours, which says what is wrong
        raise ValueError(where_it_fell(name, error)) from error


def load_recipe(
    recipe: Recipe, name: str, data: str, test_data: str, train: bool, held_out: str
) -> Task:
    """The Task of a recipe; the rest is as for load()."""
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
        tenth = max(1, len(keys) // 10)
        held = set(keys[-(tenth if data else min(1024, tenth)) :])
    kept = [row for row in rows if recipe.key(row) not in held]
    if test and len(kept) < len(rows):
        print(f"{name}: {len(rows) - len(kept)} of {len(rows)} training rows dropped, they are held out")
    test = test or [row for row in rows if recipe.key(row) in held]
    if not test or train and not kept:
        raise ValueError(f"{data or name}: no {'training' if test else 'held-out'} rows are left")
    check_reward(recipe, [*test, *kept], name)
    return Task(kept if train else [], test, recipe.reward, recipe.draw, recipe.parallel)


class OwnError(ValueError):
    """What a reward or a drawing of a file of one's own raised, or gave that is none, in one line."""


def lines_of(name: str, error: BaseException) -> list[int]:
    """The lines of the file that were at work when the error was raised, the last called last."""
    return [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(Path(name).resolve())]


def where_it_fell(name: str, error: BaseException, what: str = "") -> str:
    """One line: the file, the line of it that was at work, and the error."""
    at_work = lines_of(name, error)
    place = f"{name}, line {at_work[-1]}" if at_work else name
    return f"{place}: {what}" + textwrap.shorten(f"{type(error).__name__}: {error}", 160)


def guarded(function: Callable, name: str, what: str, form: Callable) -> Callable:
    """The reward or drawing of the file `name`, with its result as form() makes it; OwnError for whatever it
    raises. It gets a copy of the row: what it wrote there, a resumed run would not know."""
    def call(text: str, row: dict):
        try:
            with left_as_found():
                return form(function(text, copy.deepcopy(row)))
        except (Exception, SystemExit) as error:
            raise OwnError(where_it_fell(name, error, what)) from error
    return call


@contextlib.contextmanager
def left_as_found():
    """Code of one's own may leave another working directory, torch without gradients (a reward model does)
    or another default dtype behind; the run, its folder and its update need theirs."""
    here, dtype = os.open(".", os.O_RDONLY), torch.get_default_dtype()  # open: "." may be a deleted folder
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        os.fchdir(here)
        os.close(here)
        torch.set_default_dtype(dtype)


def reward_form() -> Callable:
    """Makes (float, dict of floats) of what rewards returned, all with parts of the same names."""
    names = set()

    def form(found) -> tuple[float, dict[str, float]]:
        total, parts = found
        total, parts = float(total), {name: float(part) for name, part in parts.items()}
        names.update(names or parts)
        if parts.keys() != names:
            raise ValueError(f"its parts were {sorted(names)} before, and here are {sorted(parts)}")
        if not (isfinite(sum(parts.values(), total))
                and all(0 <= parts[name] <= 1 for name in ("correct", "parse_fail"))):
            raise ValueError(f"{total}, {parts}: all are finite, and those two from 0 to 1")
        return total, parts
    return form


def drawing_form(found) -> list[str]:
    if not isinstance(found, (list, tuple)) or not all(isinstance(line, str) for line in found):
        raise TypeError(f"it is {found!r:.80}")
    return list(found)


def check_reward(recipe: Recipe, rows: list[dict], name: str):
    """ValueError unless a right answer earns its reward: what it needs must work before anything costly."""
    known = ((row, answer) for row in rows[:20] if (answer := recipe.right(row)) is not None)
    row, answer = next(known, (rows[0], None))
    try:
        text = "" if answer is None else answer
        found = recipe.reward(text, row)
        recipe.draw(text, row)
    except RuntimeError as error:
        raise ValueError(textwrap.shorten(f"{name}: {error}", 300)) from error
    if answer is not None and found[1]["correct"] != 1:
        shown = textwrap.shorten(str(answer), 100)
        raise ValueError(f"{name}: a right answer earns {found[0]}, so something does not work here: {shown}")


def make_rows(recipe: Recipe, raws: list[dict], where: str) -> list[dict]:
    """Rows of a task from published ones. What cannot be used is dropped and told; above 1 %, ValueError."""
    rows, wrong = {}, {}
    for number, raw in enumerate(raws, 1):
        try:
            row = recipe.row(raw)
            if not isinstance(row["prompt"], str) or not row["prompt"]:
                raise ValueError("its prompt is no text")
            hash(recipe.key(row))
            json.dumps(row, ensure_ascii=False).encode()  # no tokenizer takes half a character
            rows[number] = row
        except (Exception, SystemExit) as error:  # a row may hold anything
            missing = "it lacks " if isinstance(error, KeyError) else ""
            wrong[number] = textwrap.shorten(f"{missing}{str(error) or type(error).__name__}", 160)
    try:
        flaws = recipe.flawed(list(rows.values()))
        if len(flaws) != len(rows):
            raise ValueError(f"{where}: flawed() gave {len(flaws)} answers for {len(rows)} rows")
    except RuntimeError as error:  # what judges them does not work here
        raise ValueError(textwrap.shorten(f"{where}: {error}", 300)) from error
    wrong |= {number: textwrap.shorten(why, 160) for number, why in zip(rows, flaws, strict=True) if why}
    if wrong:
        first = f"row {min(wrong)}: {wrong[min(wrong)]}"
        if len(wrong) > len(raws) / 100:
            raise ValueError(f"{where}, {first} ({len(wrong)} of {len(raws)} rows cannot be used)")
        print(f"{where}: {len(wrong)} of {len(raws)} rows dropped, the first is {first}")
    return [row for number, row in rows.items() if number not in wrong]


def column(raw: dict, *names: str):
    """What is in the first of these columns that holds something: every publisher has names of its own."""
    empty = ("", "nan", "none", "null")  # NaN: what pandas leaves where nothing was
    filled = {name: value for name, value in raw.items() if str(value).strip().lower() not in empty}
    for name in names:
        if name in filled:
            return filled[name]
    raise ValueError(f"no column {' or '.join(names)}; it has {', '.join(map(str, filled))}")


def written(raw: dict, *names: str) -> str:
    """The text or number in a column, as text. ValueError for a list, an object, true and false, and a number
    too large for a float."""
    value = column(raw, *names)
    endless = isinstance(value, (float, Decimal)) and not isfinite(value)  # 1e999
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)) or endless:
        raise ValueError(f"{' or '.join(names)} holds a {type(value).__name__}, not text: {value}")
    return str(value)


def listed(value) -> list:
    """A list, which a column of text holds as JSON, as Python or without brackets; else what it is, alone."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = read(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read_file(name: str) -> list[dict]:
    """The rows of a local .json (a list of objects), .jsonl, .csv or .parquet file."""
    suffix, number = Path(name).suffix.lower(), 0
    if suffix not in (".json", ".jsonl", ".csv", ".parquet"):
        raise ValueError(f"cannot read {name}: it must be a .json (a list of objects), .jsonl or .csv file, "
                         "or a .parquet file")
    try:
        check_is_file(name)
        text = Path(name).read_text(encoding="utf-8-sig") if suffix != ".parquet" else ""
        if suffix == ".parquet":
            import pyarrow.parquet  # here because it takes a second

            rows = pyarrow.parquet.read_table(name).to_pylist()
        elif suffix == ".csv":  # not load_dataset("csv"): boards become numbers and lose their leading zeros
            rows = read_csv(text)
        elif suffix == ".json":
            rows = json.loads(text if text.strip() else "[]")
        else:
            rows = []
            for line in text.split("\n"):
                number += 1
                rows += [json.loads(line)] if line.strip() else []
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = f"line {number}: {getattr(error, 'msg', error)}" if number else error
        raise ValueError(textwrap.shorten(f"cannot read {name}: {reason}", 400)) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} must hold a list of objects")
    if not rows:
        raise ValueError(f"{name} is empty")
    return rows


def check_is_file(name: str | Path):
    """ValueError for what is there and no file: to read a pipe would wait for a writer, perhaps for ever."""
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError(f"{name} is no file")


def read_csv(text: str) -> list[dict]:
    """Rows of a .csv file. ValueError if one has more cells than there are columns: a comma without quotes,
    which moves a piece of a question into the answer."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # quotes must be closed
    columns = reader.fieldnames or []
    if len(set(columns)) < len(columns):
        raise ValueError(f"two columns have the same name: {', '.join(columns)}")
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more cells than the {len(columns)} columns: "
                             "text with a comma in it needs quotes")
        rows.append(row)
    return rows


def hub(*path: str, split: str) -> list[dict]:
    """The rows of a published data set: its id on the hub and, where it has several, the configuration."""
    import datasets  # here because it takes seconds, and Sudoku does without

    try:
        return datasets.load_dataset(*path, split=split).to_list()
    except Exception as error:  # of a dozen kinds: no network, no such set, no access, a full disk ...
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"cannot load {path[0]}: {reason}; local files: --data, --test_data") from error
