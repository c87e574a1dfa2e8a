"""Tasks and their rewards: what is asked, what an answer earns, how it is drawn for a person.

Apart from common.py because nobody needs it to understand an update, and because it is what grows: a task
adds its rows, reward and drawing here and nothing elsewhere. A reward prints nothing and draws no random
numbers; what cannot be read scores 0 and counts as parse_fail.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Task:
    """Prompts and the reward of what is answered; its parts always have `correct` and `parse_fail`."""

    train: list[dict]  # each row has "prompt" and whatever the reward reads
    test: list[dict]  # held out
    reward: Callable[[str, dict], tuple[float, dict[str, float]]]
    draw: Callable[[str, dict], list[str]]  # a completion as a person would want to see it, line by line


@functools.cache
def sudoku_grids() -> np.ndarray:
    """All 288 solved 4x4 Sudoku grids, (288, 16) digits 1-4, in lexicographic order."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    everything = np.array(list(itertools.product(rows, repeat=4)))  # (24**4, 4, 4): each row is already right
    columns = everything.transpose(0, 2, 1)
    boxes = everything.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    right = [(np.sort(units, axis=2) == [1, 2, 3, 4]).all((1, 2)) for units in (columns, boxes)]
    return everything[right[0] & right[1]].reshape(-1, 16)


def sudoku_split() -> tuple[np.ndarray, np.ndarray]:
    """Solution grids for training (228) and held out (60): no board shares its solution across."""
    grids = sudoku_grids()[np.random.default_rng(0).permutation(288)]
    return grids[:228], grids[228:]


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


def sudoku() -> Task:
    """4x4 Sudoku, a board written as 16 digits: prompt "3102200002100320=", answer "3142243142131324"."""
    rows = []
    for seed, (grids, count) in enumerate(zip(sudoku_split(), (8192, 1024), strict=True)):
        pairs = zip(*sudoku_puzzles(grids, count, np.random.default_rng([1, seed])), strict=True)
        texts = [("".join(map(str, puzzle)), "".join(map(str, solution))) for puzzle, solution in pairs]
        rows.append([{"prompt": p + "=", "puzzle": p, "solution": s} for p, s in texts])
    return Task(rows[0], rows[1], sudoku_reward, sudoku_draw)


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
    if len(board) != 16:
        return [f"{row['puzzle']} -> {text!r} (not 16 digits)"]
    lines = []
    for r in range(0, 16, 4):
        asked = " ".join(row["puzzle"][r : r + 4]).replace("0", "·")
        cells = zip(board[r : r + 4], row["solution"][r : r + 4], strict=True)
        lines.append(f"{asked}   " + "".join(f" {b}" if b == s else f"!{b}" for b, s in cells))
    return lines


TASKS = {"sudoku": sudoku}
