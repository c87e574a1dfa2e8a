"""Countdown: an expression over given numbers, each used once, that equals a target.

    row       {"prompt": "3 7 2 > 13 =", "numbers": [3, 7, 2], "answer": "13", "question": "3, 7, 2 -> 13"}
    answer    3 * 2 + 7
    in words  <answer>3 * 2 + 7 = 13</answer>
"""

import ast
import functools
import itertools
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from common import countdown_reward, value_of, without_result
from tasks import Recipe, column, hub, listed
from tasks.answers import TAGS, between_tags, draw_text
from tasks.spelling import plain, trimmed

COUNTDOWN = ("Write an arithmetic expression that equals {}. Use each of the numbers {} exactly once, with "
             "+, -, *, / and parentheses. The answer is the expression alone, such as 2 * (7 - 3).")


def countdown_hub() -> list[dict]:
    """The published problems of three numbers, none twice (the same numbers in another order)."""
    raws = [raw for raw in hub("Jiayi-Pan/Countdown-Tasks-3to4", split="train") if len(raw["nums"]) == 3]
    return list({(raw["target"], *sorted(raw["nums"])): raw for raw in raws}.values())


def countdown_row(raw: dict) -> dict:
    given = column(raw, "numbers", "nums", "input")
    given = listed(NUMPY.sub("", given) if isinstance(given, str) else given)
    if len(given) == 1 and isinstance(given[0], str):  # "[3 7 2]", as numpy prints it
        given = given[0].strip("[]() ").replace(",", " ").split()
    numbers, target = [whole(n) for n in given], whole(column(raw, "target", "output"))
    if min(numbers, default=-1) < 0:
        raise ValueError(f"the numbers {numbers} are not what an expression may hold: integers from 0")
    given = ", ".join(map(str, numbers))
    return {"prompt": f"{TAGS}\n\n{COUNTDOWN.format(target, given)}", "question": f"{given} -> {target}",
            "answer": str(target), "numbers": numbers}


NUMPY = re.compile(r"(?:np\.\w{1,10}|array|tensor)(?=\()|, ?dtype=\w{1,10}|[()]")  # [np.int64(3)]


def whole(value) -> int:
    """An integer, be it the number 24, 24.0 or the text "24"; ValueError for a fraction."""
    before, _, after = str(value).partition(".")
    return int(str(value) if after.strip("0") else before)  # int(3.7) would be 3


def countdown_chat_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """That of the expression between the answer tags; one without tags is not read."""
    return countdown_reward(expression(between_tags(text)), row)


SIGNS = {"[": "(", "]": ")", "\\{": "(", "\\}": ")", "x": "*", "X": "*", "$": "", "&": ""}


def expression(text: str) -> str:
    r"""An answer in the signs of Python: 3 \times 5, \frac{6}{3}, [3 + 5] x 2. It is not looked at whether it
    makes sense; what is no sign of an expression stays as it is."""
    text = " ".join(text.split())
    out, closing, due, before = [], [], [], ""  # due: what closes the next groups of each \frac
    for token in trimmed(plain(text)) if len(text) <= 400 else []:
        if token == "\\frac":
            out.append("(")
            due.append([")/", "))"])
        elif token == "{":
            out.append("(")
            closing.append(due[-1].pop(0) if due and before in ("\\frac", "}") else ")")
            due = due[:-1] if due and not due[-1] else due
        elif token == "}" and closing:
            out.append(closing.pop())
        else:
            out.append(token if token in "xX" and before == "0" else SIGNS.get(token, token))  # 0x5
        before = token
    result, equals, rest = "".join(out).strip(". ").partition("=")
    sides = [result.strip(), rest.strip()]
    alone = [bool(RESULT.fullmatch(side)) for side in sides]
    return sides[alone[0]] if equals and alone[0] != alone[1] else f"{result}{equals}{rest}"


RESULT = re.compile(r"[+-]? ?[0-9]+(?:,[0-9]{3})*(?:\.0*)?")  # of 16 = (3 + 5) * 2, or (100 + 5) * 10 = 1,050


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
            verdict = f"is {value_of(ast.parse(without_result(text), mode='eval').body)}, not {row['answer']}"
        except ZeroDivisionError:
            verdict = "divides by zero"
    answer = "".join(c if c.isprintable() else " " for c in text[:40])
    return [f"{row['prompt']} {answer:<16} {verdict}"]


def demonstrations(
    count: int, careless: float, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
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


def solution(row: dict) -> str | None:
    """An expression that hits the target, by trying; None without one, or for five numbers."""
    def search(terms: list[tuple[Fraction, str]]) -> str | None:
        if len(terms) == 1:
            return terms[0][1] if terms[0][0] == int(row["answer"]) else None
        for (i, a), (j, b) in itertools.permutations(enumerate(terms), 2):
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for sign, apply in (("+", operator.add), ("-", operator.sub), ("*", operator.mul),
                                ("/", operator.truediv)):
                if sign != "/" or b[0]:
                    found = search([*rest, (apply(a[0], b[0]), f"({a[1]} {sign} {b[1]})")])
                    if found:
                        return found
        return None

    return search([(Fraction(n), str(n)) for n in row["numbers"]]) if len(row["numbers"]) <= 4 else None


PROBLEMS = {part: lambda part=part: countdown_split()[part] for part in ("train", "test", "validation")}
TINY = Recipe(countdown_tiny_row, countdown_reward, countdown_draw, PROBLEMS, right=solution,
              key=lambda row: (row["answer"], *sorted(row["numbers"])))
TASK = Recipe(countdown_row, countdown_chat_reward, draw_text, {"train": countdown_hub}, key=TINY.key,
              right=lambda row: f"<answer>{text}</answer>" if (text := solution(row)) else None)
