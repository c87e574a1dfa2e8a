"""4x4 Sudoku. A board is 16 digits, row by row, 0 for a blank; the tiny model reads and writes it so:

    row       {"prompt": "3102200002100320=", "puzzle": "3102200002100320", "solution": "3142243142131324"}
    answer    3142243142131324
    in words  <answer>3142 2431 4213 1324</answer>
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

from common import sudoku_reward
from tasks import Recipe, column
from tasks.answers import TAGS, between_tags, draw_text
from tasks.spelling import plain

SUDOKU = ("Solve this 4x4 Sudoku: replace every 0 (a blank) so that each row, each column and each of the "
          "four 2x2 boxes holds 1, 2, 3 and 4 once. The answer is the whole board: 16 digits, row by row.")


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


def sudoku_row(raw: dict) -> dict:
    puzzle, solution = str(column(raw, "puzzle", "Puzzle")), str(column(raw, "solution", "Solution"))
    if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
        raise ValueError(f"a board is 16 digits 1-4, 0 = blank, not {puzzle!r} and {solution!r}")
    clues = all(p in ("0", s) for p, s in zip(puzzle, solution, strict=True))
    if "0" not in puzzle or not clues or solution not in sudoku_solutions():
        raise ValueError(f"{solution} does not fill in {puzzle} by the rules")
    return {"prompt": puzzle + "=", "puzzle": puzzle, "solution": solution}


def sudoku_draw(text: str, row: dict) -> list[str]:
    """The puzzle beside the answer; a wrong cell is marked with !."""
    board = "".join(text.split())
    if len(board) != 16 or not board.isprintable():
        return [f"{row['puzzle']} -> {text[:40]!r} (not 16 digits)"]
    solved = sudoku_reward(text, row)[1]["correct"]  # a board may have several solutions
    solution = board if solved else row["solution"]
    lines = []
    for r in range(0, 16, 4):
        asked = " ".join(row["puzzle"][r : r + 4]).replace("0", "·")
        cells = zip(board[r : r + 4], solution[r : r + 4], strict=True)
        lines.append(f"{asked}   " + "".join(f" {b}" if b == s else f"!{b}" for b, s in cells))
    return lines


def sudoku_chat_row(raw: dict) -> dict:
    row = sudoku_row(raw)
    board = "\n".join(row["puzzle"][i : i + 4] for i in range(0, 16, 4))
    return row | {"prompt": f"{TAGS}\n\n{SUDOKU}\n\n{board}",
                  "question": row["puzzle"], "answer": row["solution"]}  # for draw_text


def sudoku_chat_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """That of the board between the answer tags; one without tags is not read."""
    return sudoku_reward(board_in(between_tags(text)), row)


LAYOUT = {"\\\\", "\\hline", "\\mid", "\\vert", "\\{", "\\}", "\\n"}  # and all signs, but for powers


def board_in(text: str) -> str:
    r"""The digits of a board in a \boxed{}, a list, a table or a grid of lines; the text itself if there is
    anything else in it, since that cannot be read."""
    text = " ".join(text.split())
    tokens = plain(text) if len(text) <= 400 else ["?"]
    layout = "\\begin" in text  # of \begin{array}{cc|cc}
    kept = [token for token in tokens if (token.isalnum() or token[0] in "\\^_?") and token not in LAYOUT
            and not token.startswith(("\\begin{", "\\end{"))
            and not (layout and set(token) <= set("clr"))]
    return "".join(kept)


def sudoku_chat_draw(text: str, row: dict) -> list[str]:
    board = board_in(between_tags(text))
    return sudoku_draw(board, row) if board.strip() else draw_text(text, row)


def demonstrations(
    count: int, careless: float, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
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


BOARDS = {"train": lambda: sudoku_boards("train", 8192), "test": lambda: sudoku_boards("test", 1024),
          "validation": lambda: sudoku_boards("validation", 1024)}
TINY = Recipe(sudoku_row, sudoku_reward, sudoku_draw, BOARDS, key=lambda row: row["solution"],
              right=lambda row: row["solution"])
TASK = dataclasses.replace(TINY, row=sudoku_chat_row, reward=sudoku_chat_reward, draw=sudoku_chat_draw,
                           right=lambda row: f"<answer>{row['solution']}</answer>")
