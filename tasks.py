r"""Tasks and their rewards: what is asked, what an answer earns, how it is drawn for a person.

Apart from common.py because nobody needs it to understand an update, and because it is what grows: a task
adds its rows, reward and drawing here, one entry in TASKS, and nothing elsewhere. A reward prints nothing,
draws no random numbers and survives any text; what cannot be read scores 0 and counts as parse_fail.
In order: load() and where rows come from; what answers have in common (<answer>, \boxed{}, ```python);
sudoku, countdown, gsm8k, math, mbpp with humaneval; the table of them all.
"""

import ast
import atexit
import contextlib
import csv
import dataclasses
import functools
import inspect
import io
import itertools
import json
import operator
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from common import Task
from sandbox import run_tests


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


def load(
    name: str, *, chat: bool, data: str = "", test_data: str = "", train: bool = True, held_out: str = "test"
) -> Task:
    """The task `name`. `chat`: the model has a chat template; without one there are the two of TINY_TASKS.

    `data` is a local training file in place of the published rows, `test_data` a held-out one. With `data`
    alone, the last tenth of its distinct keys (questions; Sudoku: solutions) is held out. Training rows whose
    key is held out are dropped: a published training set contains half of its test set. With train=False
    there are no training rows. held_out="validation": the rows of a tiny task to stop a base by and to tune
    on. Raises ValueError, in one line, for what cannot be used."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    if not chat and name not in TINY_TASKS:
        raise ValueError(f"{name} needs a model with a chat template")
    recipe = TASKS[name] if chat else TINY_TASKS[name]
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


# -------------------------------------------------------------------------------- what answers have in common

TAGS = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""  # at the start of the message, as in the d1 family
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."  # at its end
SUDOKU = ("Solve this 4x4 Sudoku: replace every 0 (a blank) so that each row, each column and each of the "
          "four 2x2 boxes holds 1, 2, 3 and 4 once. The answer is the whole board: 16 digits, row by row.")
COUNTDOWN = ("Write an arithmetic expression that equals {}. Use each of the numbers {} exactly once, with "
             "+, -, *, / and parentheses. The answer is the expression alone, such as 2 * (7 - 3).")
CODE = "Answer with one ```python block that holds the whole function and all it needs."


def between_tags(text: str) -> str:
    """What is in the last <answer>...</answer>; nothing without one, or if the last is not closed."""
    _, opened, rest = text.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return re.sub(r"```[a-z]*\n|`", "", inside) if opened and closed else ""  # a fence is no answer


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...}, up to the brace that closes it; None without one, or without that."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    inside, depth = text[starts[-1] :] if starts else "", 1
    for match in re.finditer(r"\\.|[{}]", inside, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are no braces
        if depth == 0:
            return inside[: match.start()]
    return None


POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SPELLING = [  # in a matrix \\ ends a row, and what follows it is no space
    ("[−–]", "-"), ("²", "^2"), ("³", "^3"), (r"[×·]|\\(?:times|cdot)(?![a-z])", "*"),
    (r"÷|\\div(?![a-z])", "/"), (r"(?<!\\)\\[][()!]", ""), (r"\{,\}", ","), (r"(?<!\\)\\[,;: ]|~", " "),
    (r"(?<=\d)\s(?=\d{3}(?!\d))", ""),  # 1 450 000
    (r"(?<![\w.])(\d{1,30}(?:\.\d{1,30})?)[eE]([-+]?\d\d?)(?![\w.])", r"\1*10^{\2}"),
    (rf"(?<=[^\s{{])((?:\s|\\text\s*{{)*)({'|'.join(POWERS)})s?\b",
     lambda found: f"*10^{{{POWERS[found[2]]}}}{found[1]}")]


def plain(text: str) -> str:
    r"""One spelling for minus and times, 1\,450\,000, 1.8e1, 18\text{ million}; without a final dot."""
    for pattern, plainly in SPELLING:
        text = re.sub(pattern, plainly, text)
    return text.strip().removesuffix(".")


def code_block(text: str) -> str:
    """The first ```python (or ```py) block; one that the end of the text cuts off counts."""
    match = re.search(r"```(?:python|py)[^\S\n]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(match[1]) if match else ""


def draw_text(text: str, row: dict) -> list[str]:
    """The question in two lines, the end of the answer in three or its code in eight, and what is right; at
    most 100 columns."""
    code = code_block(text).splitlines() if "tests" in row else []
    answer = code[:8] or textwrap.wrap(text[-1000:], 90)[-3:] or ["(nothing)"]
    question = textwrap.wrap(row["question"], 90, max_lines=2, placeholder=" ...")
    lines = [f"  {line}" for line in question] + [f"> {line}" for line in answer] + [f"= {row['answer']}"]
    return ["".join(c if c.isprintable() else " " for c in line[:100]) for line in lines]


# ----------------------------------------------------------------------------------------------------- sudoku


@functools.cache
def sudoku_grids() -> np.ndarray:
    """All 288 solved 4x4 Sudoku grids, (288, 16) digits 1-4, in lexicographic order."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    everything = np.array(list(itertools.product(rows, repeat=4)))  # (24**4, 4, 4): each row is already right
    columns = everything.transpose(0, 2, 1)
    boxes = everything.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    right = [(np.sort(units, axis=2) == [1, 2, 3, 4]).all((1, 2)) for units in (columns, boxes)]
    return everything[right[0] & right[1]].reshape(-1, 16)


@functools.cache
def sudoku_solutions() -> frozenset[str]:
    """The grids as 16 characters each."""
    return frozenset("".join(map(str, grid)) for grid in sudoku_grids())


@functools.cache
def sudoku_split() -> dict[str, np.ndarray]:
    """Solution grids for training (180), validation (48) and held out (60): no board shares its solution
    across."""
    grids = sudoku_grids()[np.random.default_rng(0).permutation(288)]
    return {"train": grids[48:228], "validation": grids[:48], "test": grids[228:]}


def sudoku_puzzles(grids: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw (puzzles, solutions), each (count, 16), 6 to 10 blanks written 0, exactly one solution each."""
    everything, puzzles, solutions = sudoku_grids(), [], []
    while sum(map(len, puzzles)) < count:
        solution = grids[rng.integers(len(grids), size=256)]
        blanks = rng.integers(6, 11, size=(256, 1))
        puzzle = np.where(rng.random((256, 16)).argsort(1).argsort(1) < blanks, 0, solution)
        fits = (everything == puzzle[:, None]) | (puzzle[:, None] == 0)  # (256, 288, 16)
        unique = fits.all(2).sum(1) == 1
        puzzles.append(puzzle[unique])
        solutions.append(solution[unique])
    return np.concatenate(puzzles)[:count], np.concatenate(solutions)[:count]


@functools.cache
def sudoku_boards(part: str, count: int) -> list[dict]:
    """Generated boards of the solutions of a part of the split; the same in every run."""
    rng = np.random.default_rng([1, ("train", "test", "validation").index(part)])
    pairs = zip(*sudoku_puzzles(sudoku_split()[part], count, rng), strict=True)
    return [{"puzzle": "".join(map(str, p)), "solution": "".join(map(str, s))} for p, s in pairs]


def sudoku() -> Task:
    """4x4 Sudoku, a board written as 16 digits: prompt "3102200002100320=", answer "3142243142131324"."""
    return load("sudoku", chat=False)


def sudoku_row(raw: dict) -> dict:
    puzzle, solution = str(column(raw, "puzzle", "Puzzle")), str(column(raw, "solution", "Solution"))
    if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
        raise ValueError(f"a board is 16 digits 1-4, 0 = blank, not {puzzle!r} and {solution!r}")
    clues = all(p in ("0", s) for p, s in zip(puzzle, solution, strict=True))
    if "0" not in puzzle or not clues or solution not in sudoku_solutions():
        raise ValueError(f"{solution} does not fill in {puzzle} by the rules")
    return {"prompt": puzzle + "=", "puzzle": puzzle, "solution": solution}


def sudoku_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """Share of the blanks filled as in the solution; 0 if a clue was changed or there are not exactly 16
    digits.

    White space is ignored, so a board may be written as a grid."""
    board, puzzle = "".join(text.split()), row["puzzle"]
    if len(board) != 16 or not (board.isascii() and board.isdigit()):
        return 0.0, {"correct": 0.0, "parse_fail": 1.0}
    if any(p not in ("0", b) for p, b in zip(puzzle, board, strict=True)):
        return 0.0, {"correct": 0.0, "parse_fail": 0.0}
    right = sum(p == "0" and b == s for p, b, s in zip(puzzle, board, row["solution"], strict=True))
    return right / puzzle.count("0"), {"correct": float(board == row["solution"]), "parse_fail": 0.0}


def sudoku_draw(text: str, row: dict) -> list[str]:
    """The puzzle beside the answer; a wrong cell is marked with !."""
    board = "".join(text.split())
    if len(board) != 16 or not board.isprintable():
        return [f"{row['puzzle']} -> {text[:40]!r} (not 16 digits)"]
    lines = []
    for r in range(0, 16, 4):
        asked = " ".join(row["puzzle"][r : r + 4]).replace("0", "·")
        cells = zip(board[r : r + 4], row["solution"][r : r + 4], strict=True)
        lines.append(f"{asked}   " + "".join(f" {b}" if b == s else f"!{b}" for b, s in cells))
    return lines


def sudoku_chat_row(raw: dict) -> dict:
    row = sudoku_row(raw)
    board = "\n".join(row["puzzle"][i : i + 4] for i in range(0, 16, 4))
    return row | {"prompt": f"{TAGS}\n\n{SUDOKU}\n\n{board}",
                  "question": row["puzzle"], "answer": row["solution"]}  # for draw_text


def sudoku_chat_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """That of the board between the answer tags; one without tags is not read."""
    return sudoku_reward(between_tags(text), row)


def sudoku_chat_draw(text: str, row: dict) -> list[str]:
    board = between_tags(text)
    return sudoku_draw(board, row) if board.strip() else draw_text(text, row)


# -------------------------------------------------------------------------------------------------- countdown

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown_hub() -> list[dict]:
    """The published problems of three numbers, none twice (the same numbers in another order)."""
    raws = [raw for raw in hub("Jiayi-Pan/Countdown-Tasks-3to4", split="train") if len(raw["nums"]) == 3]
    return list({(raw["target"], *sorted(raw["nums"])): raw for raw in raws}.values())


def countdown_row(raw: dict) -> dict:
    numbers = [int(str(n)) for n in listed(column(raw, "numbers", "nums", "input"))]  # int(3.7) would be 3
    target = int(str(column(raw, "target", "output")))
    if min(numbers, default=-1) < 0:
        raise ValueError(f"the numbers {numbers} are not what an expression may hold: integers from 0")
    given = ", ".join(map(str, numbers))
    return {"prompt": f"{TAGS}\n\n{COUNTDOWN.format(target, given)}", "question": f"{given} -> {target}",
            "answer": str(target), "numbers": numbers}


def countdown_chat_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """That of the expression between the answer tags; one without tags is not read."""
    return countdown_reward(between_tags(text), row)


def spelled(text: str) -> str:
    """The expression of an answer in one spelling, without what it says it comes to: "30 - 7 = 23"."""
    return re.sub(r" ?= ?-?[0-9.]+$", "", " ".join(plain(text).strip("$").split()))


def countdown_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """1 for an expression that hits the target, 0.1 for one over exactly the given numbers that misses it (or
    divides by zero), else 0. Only integers and binary + - * /: not 2**4, 7//2 or -3."""
    expression = spelled(text)
    nodes = []
    if len(expression) <= 200 and re.fullmatch(r"[0-9+\-*/() ]+", expression):  # "0x1e" is no number here
        with contextlib.suppress(SyntaxError, RecursionError, MemoryError):  # the latter: deep parentheses
            nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    if not nodes:
        return 0.0, {"correct": 0.0, "parse_fail": 1.0}
    used = sorted(node.value for node in nodes if isinstance(node, ast.Constant))
    allowed = {ast.Expression, ast.BinOp, ast.Constant, *OPERATORS}
    if not {type(node) for node in nodes} <= allowed or used != sorted(row["numbers"]):
        return 0.0, {"correct": 0.0, "parse_fail": 0.0}
    correct = 0.0
    with contextlib.suppress(ZeroDivisionError):
        correct = float(evaluate(nodes[0].body) == int(row["answer"]))
    return max(correct, 0.1), {"correct": correct, "parse_fail": 0.0}


def evaluate(node: ast.expr) -> Fraction:
    """The exact value of a tree of OPERATORS over integers."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))


LARGEST, TARGETS = 20, range(1, 61)  # the tiny model's numbers are 1 to 20; each is one token


def expressions(numbers: tuple[int, ...]) -> list[tuple[str, int, str]]:
    """Every expression with + - * over the numbers in this order: its text, its value and its outermost sign
    ("" for a number). What a - (b - c) says is said by a - b + c: nothing is nested to the right at equal
    rank."""
    if len(numbers) == 1:
        return [(str(numbers[0]), numbers[0], "")]
    found = []
    for cut in range(1, len(numbers)):
        for left, right in itertools.product(expressions(numbers[:cut]), expressions(numbers[cut:])):
            for sign, apply in (("+", operator.add), ("-", operator.sub), ("*", operator.mul)):
                if right[2] and (right[2] == "*") == (sign == "*"):
                    continue
                a, b = (f"({text})" if sign == "*" and inner in ("+", "-") else text
                        for text, _, inner in (left, right))
                found.append((f"{a} {sign} {b}", apply(left[1], right[1]), sign))
    return found


@functools.cache
def countdown_answers(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """The expressions over the numbers, in any order, by their value."""
    values = {}
    for order in sorted(set(itertools.permutations(numbers))):
        for text, value, _ in expressions(order):
            values.setdefault(value, []).append(text)
    return values


@functools.cache
def countdown_split() -> dict[str, list[dict]]:
    """All problems of two or three numbers from 1 to 20 with a target from 1 to 60 that + - * reach, the
    numbers in any order: 1024 held out, 1024 for validation, the rest for training. None shares its target
    and numbers with another."""
    chosen = (itertools.combinations_with_replacement(range(1, LARGEST + 1), n) for n in (2, 3))
    keys = sorted((target, *numbers) for numbers in itertools.chain(*chosen)
                  for target in countdown_answers(numbers) if target in TARGETS)
    rng = np.random.default_rng(0)
    rows = [{"numbers": rng.permutation(keys[i][1:]).tolist(), "target": keys[i][0]}
            for i in rng.permutation(len(keys))]
    return {"test": rows[:1024], "validation": rows[1024:2048], "train": rows[2048:]}


def countdown_prompt(numbers: Sequence[int], target: int) -> str:
    """ "3 2 7 > 13 =", to be answered by "3 * 2 + 7"."""
    return f"{' '.join(map(str, numbers))} > {target} ="


def countdown_tiny_row(raw: dict) -> dict:
    """A problem the tiny model can read, with its prompt."""
    row = countdown_row(raw)
    numbers, target = row["numbers"], int(row["answer"])
    if not (2 <= len(numbers) <= 3 and 1 <= min(numbers) <= max(numbers) <= LARGEST and target in TARGETS):
        raise ValueError(f"{row['question']}: the tiny model knows two or three numbers from 1 to {LARGEST} "
                         f"and a target from 1 to {TARGETS[-1]}")
    return row | {"prompt": countdown_prompt(numbers, target)}


def countdown_draw(text: str, row: dict) -> list[str]:
    """The problem, the answer and, if that is wrong, what it comes to."""
    reward = countdown_reward(text, row)[0]
    verdict = "right" if reward == 1 else f"not an expression over {row['question'].partition(' -')[0]}"
    if reward == 0.1:
        try:
            verdict = f"is {evaluate(ast.parse(spelled(text), mode='eval').body)}, not {row['answer']}"
        except ZeroDivisionError:
            verdict = "divides by zero"
    answer = "".join(c if c.isprintable() else " " for c in text[:40])
    return [f"{row['prompt']} {answer:<16} {verdict}"]


# ------------------------------------------------------------------------------------------------------ gsm8k


def gsm8k_row(raw: dict) -> dict:
    question, gold = str(column(raw, "question")), str(column(raw, "ground_truth_answer", "answer"))
    gold = gold.rpartition("####")[2].strip()
    if read_number(gold) is None:
        raise ValueError(f"the answer {gold!r} is not a number")
    return {"prompt": f"{question}\n{BOXED}", "question": question, "answer": gold}


NUMBER = re.compile(r"""[\s(]* ([-+]?) [\s(]* (?=\.?\d) ((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)?(?:\.\d+)?)
    (?:\s*/\s*([1-9]\d*))? (?:\s*\*\s*10\^\s*([-+]?\d\d?)(?!\d))?  # not 18x, 18 or more, 18 hundredths:
    (?![a-z]\b|.*(?:\b(?:and|or|plus|minus|half|squared|cubed)\b|(?:dred|sand|lion)th))
    (?:[a-z](?:\s*\^\s*\d)?|\^?\s*\\circ|[\s.,'"%°/()])*  # a unit""", re.VERBOSE | re.ASCII | re.I)


def read_number(text: str) -> Fraction | None:
    r"""The number in a text such as "$1,450,000", "10 + 8 = 18", "36/2" or "12\text{ m}^2", exactly. None if
    there is none or another ("18 or 19", "17 = 18"), or there may be more to it ("x^{18}", "not 18")."""
    text = plain(re.sub(r"<\|\w*\|>", "", text)) if len(text) <= 200 else ""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|math)(?:bf|it|rm)?(?![a-z])|\\(?=[$%])|[{}$€£]", " ", text)
    found = [NUMBER.fullmatch(side) for side in re.split(r"(?<![!<>])=|\bis\b|(?<=[a-z]):", text)]
    values = [Fraction(m[1] + m[2].replace(",", "")) / int(m[3] or 1) * Fraction(10) ** int(m[4] or 0)
              for m in found if m]
    return values[-1] if found[-1] and len(set(values)) == 1 else None


def gsm8k_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    r"""1 for the right number, 0.25 for any in a \boxed{} (`format`); a number in answer tags is read too."""
    box = boxed(text)
    value = read_number(between_tags(text) if box is None else box)
    correct, readable = float(value == read_number(row["answer"])), float(value is not None)
    form = 0.0 if box is None else readable
    return correct + 0.25 * form, {"correct": correct, "format": form, "parse_fail": 1 - readable}


# ------------------------------------------------------------------------------------------------------- math


def math_row(raw: dict) -> dict:
    question = str(column(raw, "question", "problem"))
    gold = str(column(raw, "ground_truth_answer", "answer", "solution"))
    if gold == raw.get("solution"):
        gold = boxed(gold) or ""
    if not gold.strip():
        raise ValueError(r"the solution has no \boxed{} answer")
    return {"prompt": f"{question}\n{BOXED}", "question": question, "answer": gold}


def math_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    r"""1 if what is in the last \boxed{} equals the answer, by math-verify. What has more than 500 characters
    or needs more than 2 CPU seconds or 1 GiB to judge counts as unreadable."""
    answer = boxed(text)
    verdict = judged(row["answer"], answer) if answer and len(answer) <= 500 else 12
    correct = float(verdict == 10)
    return correct, {"correct": correct, "parse_fail": float(verdict not in (10, 11))}


DIED = []  # answers of which the judge died


def judged(gold: str, answer: str) -> int:
    """What judge_math says, started again if it died; what it dies of twice is unreadable."""
    for _ in range(2):
        try:
            judge = math_judge()
            print(json.dumps([plain(gold), plain(answer)]), file=judge.stdin, flush=True)
            return int(judge.stdout.readline())
        except (OSError, ValueError, RuntimeError):
            if not DIED and not math_judge.cache_info().currsize:
                raise  # it never worked
        if not DIED:
            atexit.register(lambda: print(f"math: the judge died {len(DIED)} times", file=sys.stderr))
        DIED.append(answer)
        math_judge.cache_clear()
    return 12


@functools.cache
def math_judge() -> subprocess.Popen:
    """math-verify in a process of its own. Its own remedy for 9^{9^{9^9}} is an alarm, which works in a main
    thread only, comes after five seconds, and puts no limit on memory."""
    source = f"{inspect.getsource(judge_math)}\njudge_math()"  # not an import of this file: numpy has threads
    judge = subprocess.Popen([sys.executable, "-c", source], text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy iterates over sets
                             start_new_session=True)  # a ctrl-C is for us alone
    if judge.stdout.readline() != "ready\n":
        raise RuntimeError("math-verify does not work here: pip install 'math-verify[antlr4_13_2]'")
    return judge


def judge_math():
    """For every line [gold, answer] of stdin a child, and a line how it ended: 10 equal, 11 not, 12 it is not
    mathematics, else a limit. What an answer leaves in sympy's caches is gone with its child."""
    import json, logging, os, re, resource, sys
    from dataclasses import replace
    from functools import partial

    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    def verdict(*pair: str) -> int:
        bases = [re.findall(r"\d_\{?(\d+)", text) for text in pair]  # which math-verify leaves out
        # not expressions outside LaTeX: sympy would eval them; first_match: nor a part of what it cannot read
        latex, mode = LatexExtractionConfig(boxed_match_priority=0), "first_match"
        if re.search(r"(?<![a-zA-Z])[a-z]$", pair[0]):  # 2t: t is no unit
            latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False))
        gold, answer = (parse(f"\\boxed{{{text}}}", [latex], mode, mode, None) for text in pair)
        if all(isinstance(part, str) for part in answer):
            return 12
        equal = partial(verify, timeout_seconds=None, float_rounding=12, allow_set_relation_comp=True)
        chains = [part for part in answer if isinstance(part, (sympy.And, sympy.Eq))]
        sides = [side for part in chains for eq in part.atoms(sympy.Eq) for side in eq.args if side.is_number]
        same = sides[:1] if isinstance(gold[0], (sympy.And, sympy.Eq)) else gold
        if not all(equal(same, side) for side in sides):  # x = 6 = 5, of which verify reads the last
            return 11
        return 10 if equal(gold, answer) and bases[1] in ([], bases[0] or ["10"]) else 11

    logging.disable()
    # whether it works; and a child that finds warm caches takes 15 ms, not 90
    assert verdict(r"\frac{1}{2}", "0.5") == 10
    assert verdict("x^2+1", "x+1") == verdict("[0,1)", r"\{1,\sqrt{2}\}") == 11
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
            os._exit(verdict(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


# ----------------------------------------------------------------------------------------- mbpp and humaneval


def code_row(raw: dict) -> dict:
    """With an entry_point it is HumanEval's, whose tests are not shown; else MBPP's, full or sanitized."""
    setup = raw.get("test_setup_code") or "\n".join(listed(raw.get("test_imports") or []))
    if "entry_point" in raw:
        asked = head = column(raw, "prompt").strip()  # imports, helpers and the function without a body
        shown = f"Complete this function:\n```python\n{asked}\n```"
        tests = split_check(f"{column(raw, 'test')}\n\ncheck({raw['entry_point']})")
        body = ast.parse(asked).body  # its imports and helpers are the test's own, not the program's
        setup = "\n".join(ast.unparse(n) for n in body if getattr(n, "name", "") != raw["entry_point"])
    else:
        asked = column(raw, "text", "question", "prompt").strip()
        head = f"try:\n exec({setup!r})\nexcept NameError:\n pass  # it names what the program defines"
        tests = [part for test in listed(column(raw, "test_list")) for part in split_check(test)]
        shown = asked if "assert" in asked else f"{asked}\nYour code should pass:\n" + "\n".join(tests)
    if not tests:
        raise ValueError("no tests")
    for source in (head, setup, *tests):
        compile(source, "<test>", "exec")
    return {"prompt": f"{shown}\n{CODE}", "question": asked.partition("\nYour code should pass")[0],
            "answer": tests[0].splitlines()[-1], "head": head,
            "tests": [f"{setup}\n{test}" for test in tests]}  # again: a program may redefine its head


def code_free(rows: list[dict]) -> list[bool]:
    """Which rows reward a program that does nothing: a test passes alone, or all after the head. (Some may: a
    function of HumanEval without its body returns None.) All in one sandbox; if a test ends it, in halves."""
    tests = [way for row in rows for test in row["tests"] for way in (test, f"{row['head']}\n{test}")]
    passed = run_tests("", [*tests, "pass"], timeout=1.0)
    if not passed[-1] and len(rows) > 1:
        return code_free(rows[: len(rows) // 2]) + code_free(rows[len(rows) // 2 :])
    marks = iter(passed)
    ways = [[(next(marks), next(marks)) for _ in row["tests"]] for row in rows]
    return [any(alone for alone, _ in row) or all(after for _, after in row) for row in ways]


def split_check(code: str) -> list[str]:
    """The asserts of `check(candidate)` as a test each, so that a share can pass; `assert True`, of which
    HumanEval has many, is left out. Other code, or a check with more in it than asserts, is one test."""
    body = ast.parse(code).body
    checks = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or {type(node) for node in checks[0].body} != {ast.Assert}:
        return [code]
    before = "\n".join(ast.unparse(node) for node in body[:-1] if node is not checks[0])
    asserts = [ast.unparse(node) for node in checks[0].body if not isinstance(node.test, ast.Constant)]
    if any("candidate" in test for test in asserts):  # MBPP's do not, and 18 call check(another name)
        before += f"\ncandidate = {ast.unparse(body[-1].value.args[0])}"
    return [f"{before}\n{test}".strip() for test in asserts]


def code_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """Share of the tests passed by the first ```python block, run in a sandbox (sandbox.py)."""
    code = code_block(text)
    if not code.strip():
        return 0.0, {"correct": 0.0, "parse_fail": 1.0}
    passed = run_tests(f"{row['head']}\n{code}", row["tests"])
    return sum(passed) / len(passed), {"correct": float(all(passed)), "parse_fail": 0.0}


# ------------------------------------------------------------------------------------------------ all of them


BOARDS = {"train": lambda: sudoku_boards("train", 8192), "test": lambda: sudoku_boards("test", 1024),
          "validation": lambda: sudoku_boards("validation", 1024)}
PROBLEMS = {part: lambda part=part: countdown_split()[part] for part in ("train", "test", "validation")}
TINY_TASKS = {  # in a few tokens, for the tiny models of pretrain.py
    "sudoku": Recipe(sudoku_row, sudoku_reward, sudoku_draw, BOARDS, key=lambda row: row["solution"]),
    "countdown": Recipe(countdown_tiny_row, countdown_reward, countdown_draw, PROBLEMS,
                        key=lambda row: (row["answer"], *sorted(row["numbers"]))),
}
TASKS = {
    "sudoku": dataclasses.replace(TINY_TASKS["sudoku"], row=sudoku_chat_row, reward=sudoku_chat_reward,
                                  draw=sudoku_chat_draw),
    "gsm8k": Recipe(gsm8k_row, gsm8k_reward, draw_text, {
        "train": lambda: hub("openai/gsm8k", "main", split="train"),
        "test": lambda: hub("openai/gsm8k", "main", split="test")}),
    "math": Recipe(math_row, math_reward, draw_text, {  # a few solutions in training have no box
        "train": lambda: [raw for raw in hub("ankner/math-500", split="train") if boxed(raw["solution"])],
        "test": lambda: hub("HuggingFaceH4/MATH-500", split="test")}),
    "countdown": Recipe(countdown_row, countdown_chat_reward, draw_text, {"train": countdown_hub},
                        key=lambda row: (row["answer"], *sorted(row["numbers"]))),
    "mbpp": Recipe(code_row, code_reward, draw_text, free=code_free, parallel=True, sources={
        "train": lambda: hub("google-research-datasets/mbpp", "full", split="train"),
        "test": lambda: hub("google-research-datasets/mbpp", "full", split="test")}),
    "humaneval": Recipe(code_row, code_reward, draw_text, free=code_free, parallel=True, sources={
        "test": lambda: hub("openai/openai_humaneval", split="test")}),
}
