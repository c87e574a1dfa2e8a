"""The tiny tasks, Sudoku and Countdown: problems and rewards; prompts in and answers out; private draws."""

import csv
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, global_random_states, sharp_model

from common import (countdown_reward, draw_prompts, encode, generator, reward_rows, sudoku_reward,
                    until_eos)
from plumbing.pretrain import tiny_model
from tasks import load
from tasks.countdown import (LARGEST, TARGETS, countdown_answers, countdown_chat_reward, countdown_draw,
                             countdown_split, countdown_tiny_row)
from tasks.sudoku import sudoku_draw, sudoku_grids, sudoku_puzzles, sudoku_split

PUBLIC = ROOT.parent / "shared" / "data" / "4x4_test_sudoku.csv"
ROW = {"puzzle": "3102200002100320", "solution": "3142243142131324"}


@pytest.fixture(scope="module")
def task():
    return load("sudoku", chat=False)


@pytest.fixture(scope="module")
def public_rows() -> list[dict]:
    """The 500 boards d1, EGSPO and GDSD are tested on."""
    if not PUBLIC.exists():
        pytest.skip(f"the public test boards are not at {PUBLIC}")
    with open(PUBLIC, newline="") as file:
        return [{"puzzle": row["Puzzle"], "solution": row["Solution"]} for row in csv.DictReader(file)]


def solutions(board: str) -> list[str]:
    """All solutions, by trying every digit in the first blank: slow, and independent of common.py."""
    if "0" not in board:
        return [board]
    i = board.index("0")
    seen = {board[j] for j in range(16)
            if j // 4 == i // 4 or j % 4 == i % 4 or (j // 8, j % 4 // 2) == (i // 8, i % 4 // 2)}
    found = []
    for digit in "1234":
        if digit not in seen:
            found += solutions(board[:i] + digit + board[i + 1 :])
    return found


# ------------------------------------------------------------------------------------------------ the boards


def test_there_are_288_grids():
    """Equal to what the slow solver makes of an empty board."""
    assert ["".join(map(str, grid)) for grid in sudoku_grids()] == solutions("0" * 16)
    assert len(sudoku_grids()) == 288


def test_the_three_parts_share_no_solution(task):
    parts = {name: {"".join(map(str, grid)) for grid in grids} for name, grids in sudoku_split().items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 180, "validation": 48, "test": 60}
    assert len(set.union(*parts.values())) == 288
    validation = load("sudoku", chat=False, train=False, held_out="validation")
    assert (len(task.train), len(task.test), len(validation.test)) == (8192, 1024, 1024)
    for name, rows in (("train", task.train), ("test", task.test), ("validation", validation.test)):
        assert {row["solution"] for row in rows} == parts[name]


def test_boards(task):
    for row in task.train[:100] + task.test[:100]:
        assert row["prompt"] == row["puzzle"] + "="
        assert 6 <= row["puzzle"].count("0") <= 10
        assert solutions(row["puzzle"]) == [row["solution"]]
    blanks = [row["puzzle"].count("0") for row in task.test]
    assert set(blanks) == {6, 7, 8, 9, 10}
    again = load("sudoku", chat=False)
    assert again.train == task.train and again.test == task.test


def test_puzzles_are_a_function_of_their_generator():
    draws = [sudoku_puzzles(sudoku_grids(), 50, np.random.default_rng(seed))[0] for seed in (0, 0, 1)]
    assert draws[0].shape == (50, 16)
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


# ------------------------------------------------------------------------------------------------ the reward


def test_reward_on_the_public_boards(public_rows):
    assert len(public_rows) == 500
    for row in public_rows:
        puzzle, gold = row["puzzle"], row["solution"]
        assert sudoku_reward(gold, row) == (1.0, {"correct": 1.0, "parse_fail": 0.0})
        blanks = puzzle.count("0")
        for i in range(16):
            total, parts = sudoku_reward(gold[:i] + str(int(gold[i]) % 4 + 1) + gold[i + 1 :], row)
            assert total == ((blanks - 1) / blanks if puzzle[i] == "0" else 0.0)
            assert parts == {"correct": 0.0, "parse_fail": 0.0}


def test_124_public_boards_have_more_than_one_solution(public_rows):
    """Any board that keeps the clues and obeys the rules is right; the papers count the file's alone."""
    found = [solutions(row["puzzle"]) for row in public_rows]
    assert all(row["solution"] in answers for row, answers in zip(public_rows, found, strict=True))
    several = [(row, answers) for row, answers in zip(public_rows, found, strict=True) if len(answers) > 1]
    assert len(several) == 124
    for row, answers in several:
        assert all(sudoku_reward(answer, row) == (1.0, {"correct": 1.0,
                                                        "parse_fail": 0.0}) for answer in answers)
        assert all("!" not in line for answer in answers for line in sudoku_draw(answer, row))
        for answer, other in itertools.permutations(answers, 2):  # half of one and half of another
            mixed = answer[:8] + other[8:]
            assert sudoku_reward(mixed, row)[1]["correct"] == float(mixed in answers)


GOLD = ROW["solution"]


@pytest.mark.parametrize("text, total, parse_fail", [
    (GOLD, 1.0, 0.0),
    ("\n".join(GOLD[i : i + 4] for i in range(0, 16, 4)), 1.0, 0.0),
    (" ".join(GOLD) + "\n", 1.0, 0.0),
    ("1" + GOLD[1:], 0.0, 0.0),  # a changed clue
    ("0" + GOLD[1:], 0.0, 0.0),
    ("1" * 16, 0.0, 0.0),
    (ROW["puzzle"], 0.0, 0.0),  # the puzzle copied, blanks left
    (GOLD[:2] + "9" + GOLD[3:], 7 / 8, 0.0),
    (GOLD + "123", 0.0, 1.0),  # 19 digits
    (GOLD[:15], 0.0, 1.0),
    ("", 0.0, 1.0),
    ("   \n", 0.0, 1.0),
    ("the answer is 42", 0.0, 1.0),
    (GOLD[:15] + "x", 0.0, 1.0),
    (GOLD[:15] + "-", 0.0, 1.0),
    (GOLD[:15] + "٤", 0.0, 1.0),  # Arabic-Indic 4: str.isdigit() is True
    (GOLD[:15] + "⁴", 0.0, 1.0),
])
def test_reward_edge_cases(text, total, parse_fail):
    assert ROW["puzzle"].count("0") == 8
    expected = {"correct": float(total == 1.0), "parse_fail": parse_fail}
    assert sudoku_reward(text, ROW) == (total, expected)


def test_what_d1_rewards():
    """The released reward of d1, wd1 and EGSPO: cut to 16 digits, only blanks compared."""
    def d1(text):
        pairs = [(b, s) for p, b, s in zip(ROW["puzzle"], text[:16], GOLD, strict=True) if p == "0"]
        return sum(b == s for b, s in pairs) / len(pairs)

    for text, paid in ((GOLD, 1.0), ("1" + GOLD[1:], 1.0), (GOLD + "123", 1.0), ("1" * 16, 0.25)):
        assert d1(text) == paid
        assert sudoku_reward(text, ROW)[0] == (1.0 if text == GOLD else 0.0)


def test_the_reward_draws_no_number_and_prints_nothing(capsys):
    before = global_random_states()
    for text in (GOLD, "1" * 16, "", "what?") * 10:
        sudoku_reward(text, ROW)
    assert global_random_states() == before
    assert capsys.readouterr() == ("", "")


def test_draw_marks_every_wrong_cell():
    lines = sudoku_draw("1" + GOLD[1:], ROW)
    assert lines == ["3 1 · 2   !1 1 4 2", "2 · · ·    2 4 3 1", "· 2 1 ·    4 2 1 3", "· 3 2 ·    1 3 2 4"]
    assert sudoku_draw("12 3", ROW) == ["3102200002100320 -> '12 3' (not 16 digits)"]


# -------------------------------------------------------------------------------------------------- countdown


def reachable(numbers: tuple[int, ...]) -> set[int]:
    """The values of all binary trees over the numbers, in any order."""
    found = set(numbers) if len(numbers) == 1 else set()
    for order in itertools.permutations(numbers):
        for cut in range(1, len(numbers)):
            for a, b in itertools.product(reachable(order[:cut]), reachable(order[cut:])):
                found |= {a + b, a - b, a * b}
    return found


@pytest.mark.parametrize("numbers", [
    (7,), (1, 1), (3, 8), (8, 3), (2, 3, 7), (7, 2, 3), (4, 4, 4), (1, 15, 15), (1, 1, 2), (9, 1, 5, 3)])
def test_countdown_answers(numbers):
    answers = countdown_answers(numbers)
    assert answers.keys() == reachable(numbers)
    texts = sum(answers.values(), [])
    assert len(set(texts)) == len(texts)
    for value, found in answers.items():
        for text in found:
            tokens = re.findall(r"\d+|\S", text)
            assert sorted(int(token) for token in tokens if token.isdigit()) == sorted(numbers)
            assert eval(text) == value, text
            assert len(tokens) <= 7 or len(numbers) > 3


def key(row: dict) -> tuple:
    return int(row["target"] if "target" in row else row["answer"]), *sorted(row["numbers"])


def test_countdown_problems():
    """Three parts without a common problem; of all sets of numbers every target there is, and no other."""
    parts = countdown_split()
    assert len(parts["test"]) == 1024 and 512 <= len(parts["validation"]) <= 1024 and len(parts) == 3
    keys = [key(row) for rows in parts.values() for row in rows]
    orders = itertools.chain(*(itertools.product(range(1, LARGEST + 1), repeat=n) for n in (2, 3)))
    there = {(target, *sorted(order)) for order in orders for target in reachable(order) & set(TARGETS)}
    assert set(keys) == there and len(keys) == len(there)
    for rows in parts.values():
        assert all(row["target"] in reachable(tuple(row["numbers"])) for row in rows)
        assert {len(row["numbers"]) for row in rows} == {2, 3}
        assert any(row["numbers"] != sorted(row["numbers"]) for row in rows)
    assert countdown_split.__wrapped__() == parts
    task = load("countdown", chat=False)
    assert [key(row) for row in task.train + task.test] == [
        key(row) for row in parts["train"] + parts["test"]]
    validation = load("countdown", chat=False, train=False, held_out="validation")
    assert validation.train == [] and [*map(key, validation.test)] == [*map(key, parts["validation"])]


def test_countdown_prompts():
    row = countdown_tiny_row({"nums": [3, 7, 2], "target": 13})
    assert row == {"prompt": "3 7 2 > 13 =", "question": "3, 7, 2 -> 13", "answer": "13",
                   "numbers": [3, 7, 2]}
    assert countdown_tiny_row({"input": "12,4", "output": "48"})["prompt"] == "12 4 > 48 ="
    model = tiny_model(1, 32, task="countdown")
    for row in countdown_split()["test"]:  # a token nobody knows would raise
        texts = [countdown_tiny_row(row)["prompt"], *countdown_answers(tuple(row["numbers"]))[row["target"]]]
        prompt, *answers = model.tokenizer(texts)["input_ids"]
        assert len(prompt) == len(row["numbers"]) + 3 and all(len(answer) <= 7 for answer in answers)


@pytest.mark.parametrize("numbers, target", [
    ([3, LARGEST + 1], 24), ([3, 7, 2, 1], 13), ([5], 5), ([], 5), ([0, 7], 7), ([3, -2], 1),
    ([9, 9], max(TARGETS) + 1), ([3, 3], 0)])
def test_countdown_rows_a_tiny_model_does_not_know(numbers, target):
    with pytest.raises(ValueError, match=f"integers from 0|two or three numbers from 1 to {LARGEST} "):
        countdown_tiny_row({"numbers": numbers, "target": target})


def paid(text: str, numbers: list[int], target: int) -> tuple[float, float, str]:
    """Reward, parse_fail and text of an answer as the tiny model says it: as tokens, with EOS behind."""
    model = tiny_model(1, 32, task="countdown")
    row = countdown_tiny_row({"numbers": numbers, "target": target})
    ids = model.tokenizer(text)["input_ids"] + [model.eos_id]
    task = SimpleNamespace(reward=countdown_reward, parallel=False)
    total, parts, texts = reward_rows(model, task, torch.tensor([ids]), [row])
    return round(total.item(), 6), parts["parse_fail"].item(), texts[0]


@pytest.mark.parametrize("text, numbers, target, expected", [
    ("3*2+7", [3, 7, 2], 13, (1.0, 0.0, "3 * 2 + 7")),
    ("(7-3)*2", [3, 7, 2], 8, (1.0, 0.0, "( 7 - 3 ) * 2")),
    ("3+2+7", [3, 7, 2], 13, (0.1, 0.0, "3 + 2 + 7")),
    ("3*2=6", [3, 2], 6, (1.0, 0.0, "3 * 2 = 6")),
    ("3*2=5", [3, 2], 6, (1.0, 0.0, "3 * 2 = 5")),  # what it says behind "=" is not read
    ("6+7", [3, 7, 2], 13, (0.0, 0.0, "6 + 7")),  # another number
    ("13", [3, 7, 2], 13, (0.0, 0.0, "13")),
    ("3*2+", [3, 7, 2], 13, (0.0, 1.0, "3 * 2 +")),
    ("", [3, 7, 2], 13, (0.0, 1.0, "")),
    ("12+3", [12, 3], 15, (1.0, 0.0, "12 + 3")),
    ("1 2+3", [12, 3], 15, (0.0, 1.0, "1 2 + 3")),  # two tokens are never one number
    ("1 2+3", [1, 2, 3], 15, (0.0, 1.0, "1 2 + 3")),
])
def test_countdown_rewards_of_what_the_tokenizer_says(text, numbers, target, expected):
    assert paid(text, numbers, target) == expected
    row = {"numbers": numbers, "answer": str(target)}
    assert countdown_chat_reward(expected[2], row)[0] == 0  # between tags, from a model that reads words
    assert countdown_chat_reward(f"<answer>{expected[2]}</answer>", row)[0] == expected[0]


@pytest.mark.parametrize("text, verdict", [
    ("3 * 2 + 7", "right"),
    ("3 * 2 + 7 = 13", "right"),
    ("3 + 2 + 7", "is 12, not 13"),
    ("7 / ( 3 * 2 )", "is 7/6, not 13"),
    ("3 * 2 - 7 = 13", "is -1, not 13"),
    ("6 + 7", "not an expression over 3, 7, 2"),
    ("3 7 2", "not an expression over 3, 7, 2"),
    ("", "not an expression over 3, 7, 2"),
])
def test_countdown_drawn(text, verdict):
    row = countdown_tiny_row({"numbers": [3, 7, 2], "target": 13})
    [line] = countdown_draw(text, row)
    assert " ".join(line.split()) == " ".join(f"3 7 2 > 13 = {text} {verdict}".split())
    same = countdown_tiny_row({"numbers": [3, 7, 7], "target": 3})
    assert countdown_draw("3 / (7 - 7)", same)[0].endswith("divides by zero")


# ---------------------------------------------------------------------------------------------- text and ids


def test_encode_pads_on_the_left_and_cuts_nothing():
    model = sharp_model()
    texts = ["31=", "3102200002100320=", "="]
    ids, mask = encode(model, texts)
    assert ids.shape == mask.shape == (3, 17)
    assert (ids[~mask] == model.pad_id).all()
    for row, kept, text in zip(ids, mask, texts, strict=True):
        assert model.tokenizer.decode(row[kept]) == text
        assert kept.tolist() == [False] * (17 - len(text)) + [True] * len(text)


def test_reward_rows_reads_up_to_the_first_eos():
    model = sharp_model()
    eos, pad = model.eos_id, model.pad_id
    gold, more = (model.tokenizer(text)["input_ids"] for text in (GOLD, "123"))
    completions = torch.tensor([
        gold + [eos, eos, eos, eos],
        gold + [eos] + more,  # what is behind the EOS was never said
        gold + more + [eos],
        gold[:15] + [eos] + gold[15:] + more[:1] + [pad, pad],
        gold + [eos, pad, pad, pad],
    ])
    assert until_eos(completions, eos).sum(1).tolist() == [17, 17, 20, 16, 17]
    rows = [ROW] * len(completions)
    seen = []

    def reward(text, row):
        seen.append((text, row))
        return sudoku_reward(text, row)

    task = SimpleNamespace(reward=reward, parallel=False)
    total, parts, texts = reward_rows(model, task, completions, rows)
    assert texts == [GOLD, GOLD, GOLD + "123", GOLD[:15], GOLD]
    assert seen == list(zip(texts, rows, strict=True))
    assert total.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert parts["correct"].tolist() == [1, 1, 0, 0, 1] and parts["parse_fail"].tolist() == [0, 0, 1, 1, 0]


# --------------------------------------------------------------------------------------------- private draws


def test_a_generator_is_a_function_of_its_key():
    before = global_random_states()
    keys = [(1, "rollout", 3, 7), (2, "rollout", 3, 7), (1, "select", 3, 7), (1, "rollout", 7, 3),
            (1, "rollout", 37)]
    draws = [torch.rand(8, generator=generator("cpu", *key)).tolist() for key in keys]
    again = [torch.rand(8, generator=generator("cpu", *key)).tolist() for key in keys]
    assert draws == again
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert global_random_states() == before


def test_draw_prompts():
    before = global_random_states()
    updates = [draw_prompts(40, 8, 1, step) for step in range(15)]
    assert updates == [draw_prompts(40, 8, 1, step) for step in range(15)]  # no state
    assert global_random_states() == before
    assert all(len(set(ids)) == 8 for ids in updates)
    epochs = [sum(updates[i : i + 5], []) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1]  # shuffled anew
    assert draw_prompts(40, 8, 2, 0) != updates[0]
    uneven = [draw_prompts(43, 8, 1, step) for step in range(10)]  # 3 prompts sit out, other ones each epoch
    assert all(len(set(ids)) == 8 for ids in uneven)
    assert len(set(sum(uneven[:5], []))) == 40
