"""The tasks of the papers: every published answer is right and its neighbours are not, the rewards of the
released code that are wrong, programs, hostile texts, and where rows come from."""

import csv
import itertools
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import datasets
import pytest
from helpers import ROOT, global_random_states

import tasks
from tasks import answers, load
from tasks import math as math_task
from tasks.answers import BOXED, TAGS, boxed, code_block
from tasks.code import CODE, code_free, code_reward, code_row
from tasks.countdown import countdown_chat_reward
from tasks.gsm8k import gsm8k_reward, gsm8k_row, read_number
from tasks.math import math_reward

DATA = ROOT.parent / "shared" / "data"
FILES = {"sudoku": "4x4_test_sudoku.csv", "gsm8k": "gsm8k_test.json", "math": "MATH500.json",
         "countdown": "countdown_cd3_test.jsonl", "mbpp": "MBPP.json"}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no published test sets at {DATA}")

RIGHT = {"correct": 1.0, "parse_fail": 0.0}
WRONG = {"correct": 0.0, "parse_fail": 0.0}
UNREADABLE = {"correct": 0.0, "parse_fail": 1.0}


def published(name: str) -> list[dict]:
    return load(name, chat=True, test_data=str(DATA / FILES[name]), train=False).test


def changed_digit(text: str) -> str:
    """The first digit one up, 9 to 0."""
    i = next(i for i, c in enumerate(text) if c.isdigit())
    return text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]


# ------------------------------------------------------------------------------------------------------ gsm8k


@needs_data
def test_gsm8k_golds():
    rows = published("gsm8k")
    assert len(rows) == 1319
    assert sum("," in row["answer"] for row in rows) == 14 and sum("-" in row["answer"] for row in rows) == 2
    for row in rows:
        gold = row["answer"]
        plain = gold.replace(",", "")
        right, wrong = (1.25, RIGHT | {"format": 1.0}), (0.25, WRONG | {"format": 1.0})
        for text in (gold, plain, f"\\${gold}", f"{plain}.0", f"{gold} \\text{{ apples}}", f"x = {gold}\\%"):
            assert gsm8k_reward(f"So it is $\\boxed{{{text}}}$.", row) == right, text
        changed = (str(int(plain) + 1), str(-int(plain) or 1), changed_digit(plain), f"{plain}.{'0' * 20}1")
        for text in changed:
            assert gsm8k_reward(f"So it is $\\boxed{{{text}}}$.", row) == wrong, text
        assert gsm8k_reward(f"So it is {gold}.", row) == (0.0, UNREADABLE | {"format": 0.0})


@pytest.mark.parametrize("text, value", [
    ("18", 18), ("$18", 18), ("\\$18", 18), ("18.0", 18), ("18 apples", 18), ("18\\%", 18),
    ("18 \\text{ apples}", 18), ("1,450,000", 1450000), ("1{,}450{,}000", 1450000), ("-3", -3), ("-\\$3", -3),
    ("−3", -3), ("18<|eot_id|>", 18), ("10 + 8 = 18", 18), ("\\text{18}", 18), ("18.", 18),
    (".5", Fraction(1, 2)), ("0.1", Fraction(1, 10)),
    ("36/2", 18), ("\\frac{36}{2}", 18), ("1/2", Fraction(1, 2)), ("-\\frac{6}{2}", -3),
    ("12\\text{ m}^2", 12), ("12 \\text{m}^{2}", 12), ("12 m²", 12), ("60 \\text{ km/h}", 60),
    ("18^\\circ", 18),
    ("1\\,450\\,000", 1450000), ("1,\\!450,\\!000", 1450000), ("1 450 000", 1450000),
    ("1.45 million", 1450000), ("\\$1.45\\text{ million dollars}", 1450000), ("18 thousand", 18000),
    ("1.8e1", 18), ("1.8 \\times 10^{1}", 18), ("180e-1", 18), ("1e5", 100000), ("–3", -3),
    ("-\\text{3}", -3),
    ("The answer is 18.", 18), ("Total: $18", 18), ("18 = 18.0", 18), ("18 months", 18),
    ("", None), ("apples", None), ("18 = 10 + 8", None), ("18 or 19", None), ("18, 19", None),
    ("18 million = 18", None), ("17 = 18", None), ("36/2 = 17", None), ("18 hundredths", None),
    ("\\sqrt{18}", None), ("x^{18}", None), ("18^2", None), ("18_3", None), ("18!", None), ("18\\pi", None),
    ("18\\sqrt{2}", None), ("18x", None), ("18k", 18000), ("1\\,8", None), ("3:18", None), ("17-18", None),
    ("not 18", None), ("\\text{not }18", None), ("\\neq 18", None), ("!= 18", None), (">= 18", None),
    ("18 or more", None), ("18 and a half", None), ("--3", None), ("18/0", None), ("\\binom{1}{8}", None),
    ("1,2", None), ("1,45", None), ("0,500", None), ("1.450.000", None), ("1e400", None), ("1e-400", None),
    ("１８", None), ("1８", None), ("٣", None), ("18½", Fraction(37, 2)), ("18²", None), ("0x12", None),
    ("1_000", None), ("nan", None), ("inf", None), ("9" * 5000, None), ("." * 5000, None),
])
def test_which_numbers_are_read(text, value):
    assert read_number(text) == value
    row = {"answer": "18"}
    form, correct = float(value is not None), float(value == 18)
    expected = {"correct": correct, "format": form, "parse_fail": 1 - form}
    assert gsm8k_reward(f"\\boxed{{{text}}}", row) == (correct + 0.25 * form, expected)


def test_numbers_are_exact():
    row = {"answer": str(2**53)}
    assert float(2**53) == float(2**53 + 1)  # a comparison of floats would accept it
    assert gsm8k_reward(f"\\boxed{{{2**53}}}", row)[1]["correct"] == 1
    assert gsm8k_reward(f"\\boxed{{{2**53 + 1}}}", row)[1]["correct"] == 0


@pytest.mark.parametrize("text, total, form", [
    ("<reasoning>\nhalf of 36\n</reasoning>\n<answer>\n18\n</answer>", 1.0, 0.0),
    ("<answer>17</answer> no: <answer>$18</answer>", 1.0, 0.0),
    ("<answer>18<|eot_id|></answer>", 1.0, 0.0),
    ("<answer>18</answer> \\boxed{17}", 0.25, 1.0),  # the box counts
    ("\\boxed{17} no: \\boxed{18}", 1.25, 1.0),
    ("\\boxed{\\boxed{18}}", 1.25, 1.0),
])
def test_where_the_number_is(text, total, form):
    expected = {"correct": float(total >= 1), "format": form, "parse_fail": 0.0}
    assert gsm8k_reward(text, {"answer": "18"}) == (total, expected)


@pytest.mark.parametrize("text", [
    "18", "The answer is 18.", "\\boxed{18", "\\boxed{}", "\\boxed 18", "18</answer>", "<answer>18", "",
    "<answer>18 or 19</answer>", "\\boxed{18 or 19} <answer>18</answer>", "\\boxed{} <answer>18</answer>",
    "\\boxed{18} \\boxed{1"])
def test_where_no_number_is(text):
    assert gsm8k_reward(text, {"answer": "18"}) == (0.0, UNREADABLE | {"format": 0.0})


@pytest.mark.parametrize("text, inside", [
    ("\\boxed{1} \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}} {", "\\frac{1}{2}"), ("\\boxed {3}", "3"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed{[0, 1\\}}", "[0, 1\\}"), ("\\boxed{}", ""),
    ("\\boxed{1} \\boxed{2", None), ("\\boxed{1\\}", None), ("boxed{1}", None), ("", None)])
def test_boxed(text, inside):
    assert boxed(text) == inside


# ------------------------------------------------------------------------------------------------------- math


@needs_data
def test_math_golds():
    """Every gold is right; a number changed, one added, the sign changed or another row's gold is not."""
    rows = published("math")
    assert len(rows) == 500
    for row in rows:
        assert math_reward(f"Thus $\\boxed{{{row['answer']}}}$.", row) == (1.0, RIGHT), row["answer"]
    for i, row in enumerate(rows[::4]):
        gold = row["answer"]
        other = next(r["answer"] for r in rows[i + 1 :] if r["answer"].lstrip("x=") != gold.lstrip("x="))
        choices = [f"-({gold})" if gold != "0" else "1", f"{gold}+1", other]
        if any(c.isdigit() for c in gold):
            choices.append(changed_digit(gold))
        choice = choices[i % len(choices)]
        assert math_reward(f"Thus $\\boxed{{{choice}}}$.", row)[0] == 0, (gold, choice)


@pytest.mark.parametrize("gold, answer, correct", [
    ("\\frac{1}{2}", "0.5", True), ("\\frac{1}{2}", "\\dfrac12", True), ("x^2+2x+1", "(x+1)^2", True),
    ("\\sqrt{8}", "2\\sqrt2", True), ("5", "x = 5", True), ("1,2", "2, 1", True), ("90^\\circ", "90", True),
    ("\\text{Evelyn}", "\\text{Carla}", False), ("(1,2)", "(2,1)", False), ("p - q", "q - p", False),
    ("3", "3, 4", False), ("3", "3 \\text{ or } 4", False), ("\\frac{1}{3}", "0.33", False),
    ("3", "\\infty", False),
    ("\\frac{1}{2}", "0.50000001", False), ("0.3", "0.1+0.2", True), ("1011_2", "1011_3", False),
    ("5", "\\[5\\]", True), ("28", "28_2", False), ("28", "28_{10}", True), ("1011_2", "1011_{2}", True),
    ("1011_2", "1011", True), ("2k", "9 = 2k", False), ("2k", "x = 2k", True),
    ("2x+3y=7", "2x + 3y = 7", True),
    ("7\\pi", "7\\pi\\text{ thousand}", False), ("5", "6=5", False), ("5", "10-5=5", True),
    ("x=5", "x=6=5", False), ("5", "6=x=5", False), ("0.5", "x = \\frac12 = 0.5", True),
    ("x=5,y=6", "x = 5, y = 6", True), ("1000000", "1e6", True), ("1000000", "1\\,000\\,000", True),
    ("[0,1)", "0\\le x<1", True), ("[0,1)", "0\\le x\\le 1", False), ("-3", "–3", True), ("12", "12.", True),
    ("18", "18\\text{ million}", False), ("18000000", "18\\text{ million}", True),
    ("12", "12\\text{ cm}^2", True), ("2t", "2", False), ("2t", "2h", False), ("2t", "2\\cdot t", True),
    ("\\begin{pmatrix}1\\\\200\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 200 \\end{pmatrix}", True),
    ("\\begin{pmatrix}1\\\\200\\end{pmatrix}", "1200", False)])
def test_math_is_not_string_equality(gold, answer, correct):
    row = {"answer": gold}
    assert math_reward(f"\\boxed{{{answer}}}", row) == (float(correct), RIGHT if correct else WRONG)


@pytest.mark.parametrize("text", ["3", "\\boxed{}", "\\boxed{ }", "\\boxed{3", "\\boxed{???}",
                                  "\\boxed{\\}3}", "\\boxed{１８}", "<answer>3</answer>",
                                  "\\boxed{" + "1+" * 300 + "2}"])
def test_math_unreadable(text):
    assert math_reward(text, {"answer": "3"}) == (0.0, UNREADABLE)


@pytest.mark.parametrize("gold, answer", [
    ("\\frac{1}{2}", "])\\frac{1}{2}|99"), ("\\frac{1}{2}", "\\frac{1}{2}x^"), ("5", "the answer is $5$ ?"),
    ("5", "? \\[5\\]")])
def test_math_reads_all_of_the_box(gold, answer):
    """math-verify looks for something it can read: a fraction in nonsense was an answer."""
    assert math_reward(f"\\boxed{{{answer}}}", {"answer": gold})[0] == 0


def test_math_does_not_hang():
    """math-verify's own remedy is an alarm after 5 s, in the main thread only. This is another."""
    row, start = {"answer": "3"}, time.process_time()
    before = os.times().children_user
    with ThreadPoolExecutor(1) as pool:
        for answer in ("9^{9^{9^9}}", "1000000! - 999999!"):
            judged = pool.submit(math_reward, f"\\boxed{{{answer}}}", row)
            assert judged.result(timeout=30) == (0.0, UNREADABLE)
        judged = pool.submit(math_reward, "\\boxed{2+1}", row)  # and it goes on
        assert judged.result(timeout=30) == (1.0, RIGHT)
    assert time.process_time() - start < 1 and os.times().children_user == before  # not here
    assert os.getsid(math_task.math_judge().pid) != os.getsid(0)  # a ctrl-C does not reach it


def test_math_verify_that_does_not_work_is_told(monkeypatch):
    math_task.math_judge.cache_clear()
    monkeypatch.setattr(math_task, "DIED", [])
    monkeypatch.setattr(math_task.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="pip install"):
        math_reward("\\boxed{2+1}", {"answer": "3"})


def test_a_judge_that_died_is_started_again(monkeypatch, capfd):
    """And an answer of which it dies again, or after which none starts, scores 0; no run ends for it."""
    row, said = {"answer": "3"}, []
    monkeypatch.setattr(math_task, "DIED", [])
    monkeypatch.setattr(math_task.atexit, "register", said.append)
    assert math_reward("\\boxed{1+2}", row) == (1.0, RIGHT)
    math_task.math_judge().kill()
    math_task.math_judge().wait()
    assert math_reward("\\boxed{2+1}", row) == (1.0, RIGHT) and len(math_task.DIED) == 1
    with monkeypatch.context() as patch:
        for executable in ("true", "/nowhere"):
            patch.setattr(math_task.sys, "executable", executable)
            math_task.math_judge.cache_clear()
            assert math_reward("\\boxed{2+1}", row) == (0.0, UNREADABLE)
    assert math_reward("\\boxed{2+1}", row) == (1.0, RIGHT)
    assert capfd.readouterr() == ("", "")
    assert len(said) == 1 and said[0]() is None
    assert capfd.readouterr() == ("", "math: the judge died 5 times\n")


# -------------------------------------------------------------------------------------------------- countdown


def solutions(numbers: list[int]) -> dict[Fraction, str]:
    """What three numbers can make, with an expression for each: all orders, operators and parentheses."""
    def combine(a, b, op):
        value = {"+": a[0] + b[0], "-": a[0] - b[0], "*": a[0] * b[0]}.get(op)
        return (a[0] / b[0] if op == "/" else value), f"({a[1]} {op} {b[1]})"

    found = {}
    for a, b, c in itertools.permutations([(Fraction(n), str(n)) for n in numbers]):
        for first, second in itertools.product("+-*/", repeat=2):
            for left in (True, False):
                try:
                    value, text = (combine(combine(a, b, first), c, second) if left else
                                   combine(a, combine(b, c, second), first))
                except ZeroDivisionError:
                    continue
                found[value] = text[1:-1]
    return found


@needs_data
def test_countdown_golds():
    rows = published("countdown")
    assert len(rows) == 256
    for row in rows:
        found = solutions(row["numbers"])
        hit = found.pop(Fraction(row["answer"]))
        assert countdown_chat_reward(f"<answer>{hit}</answer>", row) == (1.0, RIGHT), hit
        assert countdown_chat_reward(f"<answer>\n{hit} = {row['answer']}\n</answer>", row) == (1.0, RIGHT)
        assert countdown_chat_reward(hit, row) == (0.0, UNREADABLE)
        for miss in list(found.values())[::7]:
            for text in (miss, f"{miss} = {row['answer']}"):
                assert countdown_chat_reward(f"<answer>{text}</answer>", row) == (0.1, WRONG), text


@pytest.mark.parametrize("numbers, target, answer, total, parse_fail", [
    ([2, 4], 16, "2**4", 0.0, 0.0),  # d1 pays 1.0
    ([7, 2], 3, "7//2", 0.0, 0.0),
    ([9, 9, 9], 1, "9**9**9", 0.0, 0.0),  # would hang eval
    ([3, 5], 2, "-3+5", 0.0, 0.0),
    ([3, 5], 2, "5 − 3", 1.0, 0.0),
    ([3, 5], 15, "3 × 5", 1.0, 0.0),
    ([6, 3], 2, "6 ÷ 3 = 2", 1.0, 0.0),
    ([6, 3], 2, "6/3 = 2 = 2", 0.0, 1.0),
    ([6, 3], 2, "6/3 == 2", 0.0, 1.0),
    ([1, 3, 3, 4], 1, "1/3*3", 0.0, 0.0),  # a number left out
    ([1, 49, 49], 1, "1/49*49", 1.0, 0.0),  # 0.9999999999999999 in floats
    ([10**17, 1], 10**17, "100000000000000000/1", 1.0, 0.0),
    ([10**17, 1], 10**17, "100000000000000000+1", 0.1, 0.0),  # equal in floats
    ([5, 3, 3], 5, "5/(3-3)", 0.1, 0.0),
    ([3, 5], 8, "3+5+0", 0.0, 0.0),
    ([3, 5], 8, "3+3+5-3", 0.0, 0.0),
    ([3, 5], 8, "8", 0.0, 0.0),
    ([3, 5], 35, "35", 0.0, 0.0),
    ([3, 5], 8, "3(5)", 0.0, 0.0),
    ([3, 5], 8, "(3, 5)", 0.0, 1.0),
    ([3, 5], 8, "()", 0.0, 0.0),
    ([3, 5], 8, "3+0x5", 0.0, 1.0),
    ([3, 5], 8, "3.0+5", 0.0, 1.0),
    ([1, 5], 6, "True+5", 0.0, 1.0),
    ([3, 5], 8, "__import__('os').getpid()", 0.0, 1.0),
    ([3, 5], 8, "３+5", 0.0, 1.0),
    ([3, 5], 8, "3+5 #", 0.0, 1.0),
    ([3, 5], 8, "3+", 0.0, 1.0),
    ([3, 5], 15, "3 \\times 5", 1.0, 0.0),
    ([3, 5], 15, "$3 \\cdot 5 = 15$", 1.0, 0.0),
    ([6, 3], 2, "6 \\div 3", 1.0, 0.0),
    ([3, 5], 8, "\\(3+5\\)", 1.0, 0.0),
    ([3, 5], 8, "`3+5`", 1.0, 0.0),
    ([3, 5], 8, "```python\n3+5\n```", 1.0, 0.0),
    ([3, 5], 8, "3+5.", 1.0, 0.0),
    ([3, 5], 8, "3+5 = 8.", 1.0, 0.0),
    ([3, 5], 2, "5 – 3", 1.0, 0.0),
    ([3, 5], 8, "", 0.0, 1.0),
    ([3, 5], 8, "the sum", 0.0, 1.0),
    ([3, 5], 8, "(" * 90 + "3" + ")" * 90 + "+5", 1.0, 0.0),
    ([3, 5], 8, "(" * 5000 + "3" + ")" * 5000 + "+5", 0.0, 1.0),
    ([1] * 100, 100, "1" + "+1" * 99, 1.0, 0.0),
    ([1] * 101, 101, "1" + "+1" * 100, 0.0, 1.0),  # above 200 characters
    ([3, 5], 8, "3+5" + " " * 5000, 1.0, 0.0),
    ([3, 5], 8, "3+5" + " " * 5000 + "+5", 0.0, 0.0),
])
def test_countdown_edge_cases(numbers, target, answer, total, parse_fail):
    row = {"numbers": numbers, "answer": str(target)}
    expected = {"correct": float(total == 1), "parse_fail": parse_fail}
    assert countdown_chat_reward(f"<answer>{answer}</answer>", row) == (total, expected)


def test_countdown_reads_the_last_answer():
    row = {"numbers": [3, 5], "answer": "8"}
    text = "In <answer> tags: <answer>3*5</answer>, or <answer>3+5</answer>"
    assert countdown_chat_reward(text, row) == (1.0, RIGHT)
    for text in ("<answer>3+5</answer> or <answer>5+", "<answer>3+5", "3+5</answer>", "3+5"):
        assert countdown_chat_reward(text, row) == (0.0, UNREADABLE)


# ----------------------------------------------------------------------------------------------------- sudoku


@needs_data
def test_sudoku_in_words_pays_as_in_digits():
    """And nothing of the d1 family's: 1.0 for a changed clue, or for 19 digits."""
    compact = load("sudoku", chat=False, test_data=str(DATA / FILES["sudoku"]), train=False)
    chat = load("sudoku", chat=True, test_data=str(DATA / FILES["sudoku"]), train=False)
    assert len(chat.test) == 500 and chat.test[0]["prompt"] != compact.test[0]["prompt"]
    seen = set()
    for row, words in zip(compact.test, chat.test, strict=True):
        gold, puzzle = row["solution"], row["puzzle"]
        grid = "\n".join(" ".join(gold[i : i + 4]) for i in range(0, 16, 4))
        for board in (gold, grid, changed_digit(gold), gold[:15] + "1", puzzle, gold + "123", gold[:15]):
            expected = compact.reward(board, row)
            reasoned = f"<reasoning>\nIt is {gold}.\n</reasoning>\n<answer>\n{board}\n</answer>"
            assert chat.reward(reasoned, words) == expected
            assert chat.reward(f"<answer>{gold}</answer>, no: <answer>{board}</answer>", words) == expected
            assert chat.reward(board, words) == (0.0, UNREADABLE)
            for fenced in (f"```\n{board}\n```", f"```text\n{board}\n```", f"`{board}`"):
                assert chat.reward(f"<answer>\n{fenced}\n</answer>", words) == expected
            seen.add((expected[0] == 1, expected[0] == 0, expected[1]["parse_fail"]))
        assert compact.reward(gold, row) == (1.0, RIGHT)
        assert compact.draw(gold, row) == chat.draw(f"<answer>{gold}</answer>", words)
        assert chat.draw(f"It is {gold}.", words) == [f"  {puzzle}", f"> It is {gold}.", f"= {gold}"]
    assert seen == {(True, False, 0.0), (False, False, 0.0), (False, True, 0.0), (False, True, 1.0)}


# ----------------------------------------------------------------------------------------- mbpp and humaneval

PROGRAMS = {  # row of MBPP.json: a correct program
    0: """def remove_Occ(s, ch):
    i = s.find(ch)
    if i >= 0:
        s = s[:i] + s[i + 1:]
    i = s.rfind(ch)
    return s[:i] + s[i + 1:] if i >= 0 else s""",
    1: "def sort_matrix(M):\n    return sorted(M, key=sum)",
    3: "def find_Volume(l, b, h):\n    return l * b * h / 2",
    6: "def square_perimeter(a):\n    return 4 * a",
    7: "def remove_dirty_chars(a, b):\n    return ''.join(c for c in a if c not in b)",
    8: "def test_duplicate(nums):\n    return len(set(nums)) < len(nums)",
    10: "def multiples_of_num(m, n):\n    return [n * i for i in range(1, m + 1)]",
    11: """def find_first_duplicate(nums):
    seen = set()
    for n in nums:
        if n in seen:
            return n
        seen.add(n)
    return -1""",
    12: "def maximum_Sum(lists):\n    return max(map(sum, lists))",
    13: "def binary_to_decimal(n):\n    return int(str(n), 2)",
    16: "import re\n\ndef remove(items):\n    return [re.sub(r'\\d', '', item) for item in items]",
    17: "from math import comb\n\ndef binomial_Coeff(n, k):\n    return comb(n, k)",
    21: """def max_Prime_Factors(n):
    largest, p = 1, 2
    while n > 1:
        while n % p == 0:
            largest, n = p, n // p
        p += 1
    return largest""",
    22: "def decimal_To_Binary(n):\n    return int(bin(n)[2:])",
    24: "def find_rect_num(n):\n    return n * (n + 1)",
    30: "def filter_evennumbers(nums):\n    return list(filter(lambda n: n % 2 == 0, nums))",
    34: "import functools, math\n\ndef get_gcd(nums):\n    return functools.reduce(math.gcd, nums)",
    35: "def test_distinct(data):\n    return len(set(data)) == len(data)",
    41: "def parallelogram_area(b, h):\n    return b * h",
    44: "def tn_gp(a, n, r):\n    return a * r ** (n - 1)",
    45: "def check(n):\n    return 2 * int(str(n)[::-1]) == n + 1",
    47: "def opposite_Signs(x, y):\n    return (x < 0) != (y < 0)",
    55: "def pos_count(nums):\n    return sum(n >= 0 for n in nums)",
    57: "def is_Monotonic(A):\n    return A in (sorted(A), sorted(A, reverse=True))",
    68: "def word_len(s):\n    return len(s) % 2 == 1",
}


def block(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nIt does what was asked."


@needs_data
def test_mbpp_programs():
    rows = published("mbpp")
    assert [sum(len(row["tests"]) == n for row in rows) for n in (3, 4, 5, 6)] == [487, 8, 1, 2]
    jobs = [(block(program), rows[i], 1.0) for i, program in PROGRAMS.items()]
    jobs += [(block(text), rows[i], total) for i, text, total in (
        (3, "def find_Volume(l, b, h):\n    return 240", 1 / 3),
        (0, "def remove_Occ(s, ch):\n    return s.replace(ch, '', 1)", 1 / 5),
        (12, "def maximum_Sum(lists):\n    return max(max(map(sum, lists)), 0)", 3 / 4),
        (17, "def binomial_Coeff(n, k):\n    return n * k", 1 / 4),
        (44, "def tn_gp(a, n, r):\n    return a * r ** n", 0.0),
        (6, "def perimeter(a):\n    return 4 * a", 0.0),
        (6, "def square_perimeter(a):\n    print('passed' * 3)\n    raise SystemExit(0)", 0.0),
        (6, "def square_perimeter(a)\n    return 4 * a", 0.0),
    )]
    texts, job_rows, totals = zip(*jobs, strict=True)
    with ThreadPoolExecutor(2) as pool:  # as common.py does
        scored = list(pool.map(code_reward, texts, job_rows))
    for (total, parts), expected, text in zip(scored, totals, texts, strict=True):
        assert (total, parts) == (pytest.approx(expected), RIGHT if expected == 1 else WRONG), text


@needs_data
def test_mbpp_calls_of_check_that_name_another_function():
    """18 of the 498 rows as packed end in check(find_gcd) and the like, where the asserts call get_gcd."""
    rows, raws = published("mbpp"), json.loads((DATA / FILES["mbpp"]).read_text())
    assert raws[34]["test_list"][0].endswith("check(find_gcd)")
    assert not any("find_gcd" in test for test in rows[34]["tests"])


@pytest.mark.parametrize("text, code", [
    ("```python\na\n``` and ```python\nb\n```", "a\n"), ("```py\na\n```", "a\n"), ("```python\na", "a"),
    ("- so:\n  ```python\n  if a:\n    b\n  ```", "if a:\n  b\n"),
    ("```python\ns = '```'\n```", "s = '```'\n"),
    ("```\na\n```", ""), ("```java\na\n```", ""), ("```python a```", ""), ("a", ""), ("", "")])
def test_code_block(text, code):
    assert code_block(text) == code
    if not code:
        assert code_reward(text, {"head": "", "tests": ["assert True"]}) == (0.0, UNREADABLE)


HUMANEVAL = {
    "task_id": "HumanEval/1000", "entry_point": "up",
    "canonical_solution": "    return [n + one() for n in x]\n",
    "prompt": """from typing import List


def one() -> int:
    return 1


def up(x: List[int]) -> List[int]:
    \""" Add one to each.
    >>> up([1])
    [2]
    \"""
""",
    "test": """

METADATA = {
    'author': 'x'
}


def check(candidate):
    # simple cases
    assert True, 'This prints if this assert fails 1 (good for debugging!)'
    assert candidate([]) == []
    assert candidate([1, 2]) == [2, 3]
    assert candidate([-1]) == [0], 'negative'
    assert candidate([5] * 3) == [6] * 3

"""}
MBPP = {"task_id": 1, "text": "Write a function to add the fields of a pair.", "challenge_test_list": [],
        "code": "def add(both):\r\n  return both[0] + both[1]",
        "test_list": ["assert add(pair(1, 2)) == 3", "assert add(pair(0, 0)) == 0"],
        "test_setup_code": "def pair(a, b):\n    return [a, b]"}


def test_humaneval_rows():
    row = code_row(HUMANEVAL)
    assert len(row["tests"]) == 4
    assert HUMANEVAL["prompt"].strip() in row["prompt"] and "assert" not in row["prompt"]
    # what the prompt defines need not be repeated, and may be
    assert code_reward(block("def up(x: List[int]):\n    return [n + one() for n in x]"), row) == (1.0, RIGHT)
    assert code_reward(block("def up(x):\n    return [n + 1 for n in x]"), row) == (1.0, RIGHT)
    assert code_reward(block("def up(x):\n    return x"), row) == (0.25, WRONG)  # not 2 / 5
    assert code_reward(block("def down(x):\n    return x"), row) == (0.0, WRONG)


def test_humaneval_rows_with_more_than_asserts():
    test = """def check(candidate):
    for i in range(3):
        assert candidate([i]) == [i + 1]
    assert candidate([]) == []"""
    row = code_row(HUMANEVAL | {"test": test})
    assert len(row["tests"]) == 1
    assert code_reward(block("def up(x):\n    return [n + 1 for n in x]"), row) == (1.0, RIGHT)
    assert code_reward(block("def up(x):\n    return []"), row) == (0.0, WRONG)


def test_a_program_cannot_change_what_a_test_sets_up():
    row = code_row(MBPP)
    assert all(test in row["prompt"] for test in MBPP["test_list"])
    assert row["prompt"].startswith(MBPP["text"]) and row["prompt"].endswith(CODE)
    assert code_reward(block("def add(both):\n    return sum(pair(*both))"), row) == (1.0, RIGHT)
    cheat = """class Any:
    def __eq__(self, other):
        return True
def pair(a, b):
    return Any()
def add(both):
    return both if type(both) is Any else 0"""
    assert code_reward(block(cheat), row) == (0.5, WRONG)  # 0 is right once; 1.0 if pair were its own


TREE = MBPP | {"text": "Write a tree and its depth.",
               "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
               "test_list": ["assert depth(root) == 2", "assert depth(root.left) == 1"]}
NODE = """class Node:
    def __init__(self, data):
        self.data, self.left, self.right = data, None, None
def depth(node):
    return 1 + max(depth(node.left), depth(node.right)) if node else 0"""


def test_a_set_up_may_use_what_the_program_defines():
    """MBPP's 367 and 927; and as before, a program may use what the set-up defines."""
    row = code_row(TREE)
    assert code_reward(block(NODE), row) == (1.0, RIGHT)
    assert code_reward(block(NODE.replace("1 + max", "0 * max")), row) == (0.0, WRONG)
    assert code_reward(block("root = 1"), row) == (0.0, WRONG)
    row = code_row({"text": "Pi?", "test_imports": "['import math']",
                    "test_list": "['assert f(1) > math.pi']"})
    assert code_reward(block("def f(x):\n    return x + math.pi"), row) == (1.0, RIGHT)


@pytest.mark.parametrize("tests", [MBPP["test_list"], str(MBPP["test_list"]), json.dumps(MBPP["test_list"])])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tests_that_a_column_holds_as_text(tmp_path, suffix, tests):
    """A list that arrives as text was one test that never fails: every program earned 1.0."""
    raws = [MBPP | {"test_list": tests, "text": f"Add {i}."} for i in range(4)]
    row = load("mbpp", chat=True, data=write(tmp_path / f"data{suffix}", raws)).test[0]
    assert row["tests"] == [f"{MBPP['test_setup_code']}\n{test}" for test in MBPP["test_list"]]
    assert code_reward(block("pass"), row) == (0.0, WRONG)


def test_numbers_that_a_column_holds_as_text(tmp_path):
    for text in ("[3, 7, 2]", "(3, 7, 2)", "3, 7, 2", "3,7,2"):
        raws = [{"nums": text, "target": i} for i in (1, 2)]
        row = load("countdown", chat=True, data=write(tmp_path / "data.csv", raws)).test[0]
        assert row["numbers"] == [3, 7, 2]


FREE = "row 1: its tests pass for a program that does nothing"


@pytest.mark.parametrize("name, change", [
    ("mbpp", {"test_list": ["['assert add(1) == 2']"]}), ("mbpp", {"test_list": ["pass", "assert f() == 2"]}),
    ("mbpp", {"test_list": ["x = 3"]}), ("mbpp", {"test_list": ["assert add(1)", "# none"]}),
    ("mbpp", {"test_list": ["try:\n    add(1)\nexcept NameError:\n    pass"]}),
    ("humaneval", {"prompt": HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]}),  # it is all there
    ("humaneval", {"test": "def check(candidate):\n    pass"})])
def test_rows_that_reward_a_program_that_does_nothing(tmp_path, name, change):
    raw = (MBPP if name == "mbpp" else HUMANEVAL) | change
    with pytest.raises(ValueError, match=FREE):
        load(name, chat=True, test_data=write(tmp_path / "data.json", [raw]), train=False)


def test_tests_that_a_body_of_none_passes_are_not_free(tmp_path):
    """Some of HumanEval's rows have one. And a test may end the sandbox they are looked at in, or hang."""
    test = "def check(candidate):\n    assert candidate(0) is None\n    assert candidate([1]) == [2]"
    unsolved = HUMANEVAL | {"canonical_solution": ""}  # no solution of it passes these
    raws = [unsolved | {"test": test}, HUMANEVAL]
    raws += [unsolved | {"test": f"def check(candidate):\n    {code}\n    assert candidate(0) == 1"}
             for code in ("import os; os._exit(0)", "while True: pass")]
    task = load("humaneval", chat=True, test_data=write(tmp_path / "data.json", raws), train=False)
    assert len(task.test) == 4
    assert code_free(task.test) == [False] * 4
    free = code_row(MBPP | {"test_list": ["pass"]})
    assert code_free([*task.test, free, *task.test]) == [False] * 4 + [True] + [False] * 4


@needs_data
def test_no_test_of_mbpp_is_free():
    """`published` looks at them too; this says how long it takes: 1 s would be 20 times what it does."""
    rows, start = published("mbpp"), time.perf_counter()
    assert not any(code_free(rows * 2))
    assert len(rows) == 498 and time.perf_counter() - start < 10


def test_sanitized_mbpp_rows():
    row = code_row({"prompt": "Add.", "test_imports": ["import math"],
                    "test_list": ["assert add(math.pi, 1) == math.pi + 1"]})
    assert row == code_row({"prompt": "Add.", "test_setup_code": "import math",
                            "test_list": "assert add(math.pi, 1) == math.pi + 1"})  # as in a .csv file
    assert code_reward(block("def add(a, b):\n    return a + b"), row) == (1.0, RIGHT)
    assert code_reward(block("class math:\n    pi = 0\ndef add(a, b):\n    return 1"), row) == (0.0, WRONG)


# ----------------------------------------------------------------------------------------------- every reward

REWARDS = {
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    "gsm8k": {"question": "How many?", "answer": "#### 1,018"},
    "math": {"problem": "How many?", "answer": "\\frac{1}{2}"},
    "countdown": {"target": 24, "nums": [2, 3, 4]},
    "mbpp": MBPP,
    "humaneval": HUMANEVAL,
    "word_problems": {"question": "How many?", "answer": "1018", "steps": 1},
}
PIECES = ["<answer>", "</answer>", "\\boxed{", "}", "{", "\\", "```python\n", "```", "\n", " ", "=", "2*3*4",
          "1,018", "3142243142131324", "-", "(", ")", "**", "9" * 30, "\\frac{1}{2}", "x", "é", "１８",
          "\ud800", "\0", "\x1b[2J", "$", "import os\nos._exit(0)", "%", "½", "\u2028", "<|eot_id|>", "∞",
          "def add(pair): return 3", "^{", "!"]


WRAP = {"gsm8k": "\\boxed{{{}}}", "math": "\\boxed{{{}}}", "word_problems": "\\boxed{{{}}}",
        "mbpp": "```python\n{}", "humaneval": "```python\n{}"}
COUNT = {"math": 60, "mbpp": 20, "humaneval": 20}  # these start processes


RECIPES = [(name, getattr(tasks.find(name), of)) for of in ("TASK", "TINY") for name in tasks.names(of)]


@pytest.mark.parametrize("name, recipe", RECIPES)
def test_no_text_breaks_a_reward(name, recipe, capfd, recwarn):
    """Nor makes it print, warn, or draw a random number; and a drawing fits into a terminal."""
    gen = random.Random(0)
    row = recipe.row(REWARDS[name])
    before, readable = global_random_states(), set()
    for _ in range(COUNT.get(name, 3000)):
        text = "".join(gen.choices(PIECES, k=gen.randrange(10)))
        text = gen.choice(["{}", WRAP.get(name, "<answer>{}</answer>")]).format(text)
        total, parts = recipe.reward(text, row)
        assert isinstance(total, float) and {"correct", "parse_fail"} <= parts.keys()
        assert {parts["correct"], parts["parse_fail"]} <= {0.0, 1.0}
        assert total == 0 if parts["parse_fail"] else 0 <= total <= 1.25
        readable.add(1 - parts["parse_fail"])
        lines = recipe.draw(text, row)
        assert lines and all(len(line) <= 100 and line.isprintable() for line in lines)
    assert readable == {0.0, 1.0}
    assert global_random_states() == before
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_rewards_are_quick_on_long_texts():
    for name in ("sudoku", "gsm8k", "math", "countdown", "mbpp"):
        recipe = tasks.find(name).TASK
        row = recipe.row(REWARDS[name])
        for piece in ("<answer>", "</answer>", "\\boxed{", "{", "}", "= 1", "```", "1", ".", "<|", " ", "\n"):
            for text in (piece * 20000, f"<answer>{piece * 20000}</answer>", f"\\boxed{{{piece * 20000}}}"):
                start = time.process_time()
                recipe.reward(text, row)
                recipe.draw(text, row)
                assert time.process_time() - start < 1, (name, piece)


def test_drawings_show_the_end_of_the_answer():
    row = gsm8k_row({"question": "How many? " * 50, "answer": "#### 18"})
    lines = answers.draw_text("First, I think. " * 200 + "So it is \\boxed{17}.", row)
    assert len(lines) == 6 and lines[1].endswith(" ...") and lines[5] == "= 18"
    assert lines[4].endswith("\\boxed{17}.")
    assert answers.draw_text("", row)[2:] == ["> (nothing)", "= 18"]
    wide = answers.draw_text(block("x = [" + "1, " * 99 + "]"), code_row(MBPP))[1]
    assert wide.startswith("> x = [1, 1") and len(wide) == 100
    assert answers.draw_text(block("def f():\n    return 1"), code_row(MBPP)) == [
        "  Write a function to add the fields of a pair.", "> def f():", ">     return 1",
        "= assert add(pair(1, 2)) == 3"]


# --------------------------------------------------------------------------------------- where rows come from


def fake_hub(monkeypatch, sets: dict):
    """Replace the hub by sets[id, configuration or None, split]. Returns the list of what was asked for."""
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(sets[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_gsm8k_from_the_hub(monkeypatch):
    rows = [{"question": f"What is {i} + 1?", "answer": f"Well,\n<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
            for i in range(8)]
    asked = fake_hub(monkeypatch, {("openai/gsm8k", "main", "train"): rows[:5],
                                   ("openai/gsm8k", "main", "test"): rows[5:]})
    task = load("gsm8k", chat=True)
    assert (len(task.train), len(task.test), task.parallel) == (5, 3, False)
    assert task.test[0]["prompt"] == f"What is 5 + 1?\n{BOXED}" and task.test[0]["answer"] == "6"
    assert task.reward("\\boxed{6}", task.test[0])[0] == 1.25
    assert len(asked) == 2
    task = load("gsm8k", chat=True, train=False)
    assert task.train == [] and len(task.test) == 3
    assert asked[2:] == [("openai/gsm8k", "main", "test")]  # and nothing else


def test_math_from_the_hub(monkeypatch, capsys):
    """The published training set holds half of the test set, and a few solutions without a readable box."""
    train = [{"problem": f"What is half of {i}?", "solution": f"It is $\\boxed{{\\frac{i}{2}}}$."}
             for i in range(6)]
    train.append({"problem": "What is 2?", "solution": "It is $\\boxed 2$."})
    test = [{"problem": f"What is  half of {i}?\n", "solution": "Easy: $\\boxed{1}$", "answer": f"{i}/2",
             "level": 1, "subject": "Algebra", "unique_id": str(i)} for i in (4, 5, 6)]
    fake_hub(monkeypatch, {("ankner/math-500", None, "train"): train,
                           ("HuggingFaceH4/MATH-500", None, "test"): test})
    task = load("math", chat=True)
    assert [row["answer"] for row in task.train] == [f"\\frac{i}{2}" for i in range(4)]
    assert [row["answer"] for row in task.test] == ["4/2", "5/2", "6/2"]
    assert task.train[0]["prompt"] == f"What is half of 0?\n{BOXED}"
    assert task.reward("\\boxed{2}", task.test[0]) == (1.0, RIGHT)
    assert capsys.readouterr().out == "math: 2 of 6 training rows dropped, they are held out\n"


def test_countdown_from_the_hub(monkeypatch, capsys):
    raws = [{"target": i, "nums": [i, i + 1, 7]} for i in range(1, 1101)]
    again = [{"target": 5, "nums": [7, 6, 5]}, {"target": 6, "nums": [1, 2, 3, 4]}]
    fake_hub(monkeypatch, {("Jiayi-Pan/Countdown-Tasks-3to4", None, "train"): raws + again})
    task = load("countdown", chat=True)
    assert (len(task.train), len(task.test)) == (990, 110)
    assert {len(row["numbers"]) for row in task.train + task.test} == {3}
    keys = [{(row["answer"], *sorted(row["numbers"])) for row in rows} for rows in (task.train, task.test)]
    assert not keys[0] & keys[1] and len(keys[1]) == 110
    assert [row["answer"] for row in task.test] == [str(i) for i in range(991, 1101)]  # the last ones
    assert task.train[0]["prompt"].startswith(TAGS) and "1, 2, 7" in task.train[0]["prompt"]
    only = load("countdown", chat=True, train=False)
    assert only.train == [] and only.test == task.test
    assert capsys.readouterr().out == ""


def test_code_from_the_hub(monkeypatch):
    other = MBPP | {"text": "Write a function to add.", "task_id": 2}
    fake_hub(monkeypatch, {("google-research-datasets/mbpp", "full", "train"): [MBPP],
                           ("google-research-datasets/mbpp", "full", "test"): [other],
                           ("openai/openai_humaneval", None, "test"): [HUMANEVAL]})
    task = load("mbpp", chat=True)
    assert (len(task.train), len(task.test), task.parallel) == (1, 1, True)
    task = load("humaneval", chat=True, train=False)
    assert (len(task.train), len(task.test), task.parallel) == (0, 1, True)
    with pytest.raises(ValueError, match="^humaneval has no training rows: use --eval_only, or give --data$"):
        load("humaneval", chat=True)


@pytest.mark.parametrize("error", [
    ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)"),
    datasets.exceptions.DatasetNotFoundError("Dataset 'openai/gsm8k' doesn't exist\non the Hub"),
    ValueError("Unknown split"), RuntimeError("gated"), OSError(28, "No space left on device")])
def test_no_hub(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError) as refusal:
        load("gsm8k", chat=True)
    message = str(refusal.value)
    assert message.startswith("cannot load openai/gsm8k") and "--data" in message and "\n" not in message


def write(path, rows) -> str:
    """Rows as the kind of file that the name says."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_tenth_of_the_questions_is_held_out(tmp_path, capsys, suffix):
    raws = [{"question": f"What is {i % 25},\n\"again\"\u2028?", "answer": f"{i % 25}"} for i in range(60)]
    file = write(tmp_path / f"data{suffix}", raws)
    task = load("gsm8k", chat=True, data=file)
    assert {row["answer"] for row in task.test} == {"23", "24"}  # 25 questions: two of them
    assert {row["answer"] for row in task.train} == {str(i) for i in range(23)}
    assert (len(task.train), len(task.test)) == (56, 4)
    assert task.test[0]["question"] == raws[23]["question"]
    assert load("gsm8k", chat=True, data=file, train=False).test == task.test
    assert capsys.readouterr().out == ""


@needs_data
def test_sudoku_files_split_by_solution(capsys):
    file = str(DATA / FILES["sudoku"])
    task = load("sudoku", chat=False, data=file)
    grids = [{row["solution"] for row in rows} for rows in (task.train, task.test)]
    assert len(grids[0]) + len(grids[1]) == 229 and len(grids[1]) == 22 and not grids[0] & grids[1]
    assert len(task.train) + len(task.test) == 500
    assert task.train[1]["puzzle"] == "0140432014020000" and task.train[1]["prompt"] == "0140432014020000="
    # generated boards for training: those with a solution of the file are not
    mixed = load("sudoku", chat=True, test_data=file)
    assert len(mixed.test) == 500 and 0 < len(mixed.train) < 8192
    assert not {row["solution"] for row in mixed.train} & (grids[0] | grids[1])
    dropped = 8192 - len(mixed.train)
    assert capsys.readouterr().out == f"sudoku: {dropped} of 8192 training rows dropped, they are held out\n"


def test_training_rows_that_are_held_out_are_dropped(tmp_path, capsys):
    raws = [{"input": f"{i},2,3", "output": str(i)} for i in range(10, 20)]
    data = write(tmp_path / "data.jsonl", raws)
    test = [{"input": "3,2,11", "output": "11"}, {"input": "12,2,3", "output": "5"}]
    test = write(tmp_path / "test.jsonl", test)
    task = load("countdown", chat=True, data=data, test_data=test)
    assert [row["answer"] for row in task.train] == ["10"] + [str(i) for i in range(12, 20)]
    assert [row["numbers"] for row in task.test] == [[3, 2, 11], [12, 2, 3]]
    assert capsys.readouterr().out == "countdown: 1 of 10 training rows dropped, they are held out\n"
    with pytest.raises(ValueError, match="no training rows are left"):
        load("countdown", chat=True, data=data, test_data=data)


def test_evaluation_of_a_file_loads_nothing_else(tmp_path, monkeypatch):
    asked = fake_hub(monkeypatch, {})
    test = write(tmp_path / "test.json", [{"question": "What?", "ground_truth_answer": 3}])
    task = load("math", chat=True, test_data=test, data="missing.json", train=False)
    assert (task.train, len(task.test), asked) == ([], 1, [])


@needs_data
def test_prompts():
    for name in ("gsm8k", "math"):
        assert all(row["prompt"].endswith(f"\n{BOXED}") for row in published(name))
    for name in ("countdown", "sudoku"):
        assert all(row["prompt"].startswith(f"{TAGS}\n\n") for row in published(name))
    assert "\n\n3102\n2000\n0210\n0320" in published("sudoku")[0]["prompt"]
    for row in published("mbpp"):
        assert row["prompt"].count("assert") == 1 and row["prompt"].endswith(CODE)


def test_a_few_rows_that_cannot_be_used_are_dropped(tmp_path, capsys):
    """And told, in one line; of more than 1 % the file is refused."""
    raws = [{"problem": f"What is {i}?", "answer": f"{i}"} for i in range(300)]
    raws[7]["answer"], raws[9]["problem"], raws[11]["answer"] = "", None, "\ud800"
    file = write(tmp_path / "data.json", raws)
    task = load("math", chat=True, test_data=file, train=False)
    assert len(task.test) == 297
    assert capsys.readouterr().out == (f"{file}: 3 of 300 rows dropped, the first is row 8: no column "
                                       "ground_truth_answer or answer or solution; it has problem\n")
    raws[13]["answer"] = " "
    with pytest.raises(ValueError, match=r"row 8: .* \(4 of 300 rows cannot be used\)$"):
        load("math", chat=True, test_data=write(tmp_path / "data.json", raws), train=False)


@pytest.mark.parametrize("name, content, message", [
    ("data.json", '[{"question": "What?", "answer": %s}]' % ("9" * 5000), "cannot read .*4300 digits"),
    ("data.jsonl", '{"question": "What?", "answer": %s}' % ("9" * 5000), "line 1: .*4300 digits"),
    ("data.json", "[" * 10**5, "cannot read .*recursion"),
    ("data.jsonl", "[" * 10**5, "cannot read .*line 1: .*recursion"),
    ("data.json", '[{"question": "What\\ud800?", "answer": "3"}]', "row 1: .*surrogates not allowed"),
    ("data.json", '[{"question": " ", "answer": "3"}]', "row 1: no column question; it has answer"),
    ("data.csv", "question,answer\nWhat?," + "9" * 5000 + "\n", r"row 1: the answer \[...\] \(1 of 1 rows"),
    ("data.json", None, "cannot read .*data.json: .*No such file"),
    ("data.txt", "x", "cannot read .*data.txt: it must be a .json .*, .jsonl or .csv file"),
    ("data.json", "", "data.json is empty"),
    ("data.json", "[]", "data.json is empty"),
    ("data.jsonl", "\n\n", "data.jsonl is empty"),
    ("data.csv", "question,answer\n", "data.csv is empty"),
    ("data.json", '{"question": "What?"}', "must hold a list of objects"),
    ("data.jsonl", "3\n4\n", "must hold a list of objects"),
    ("data.json", "[{", "cannot read .*data.json: Expecting"),
    ("data.jsonl", '{"question": "What?", "answer": "3"}\n\n{"question"\n', "data.jsonl: line 3: Expecting"),
    ("data.csv", b"question,answer\n\xff\xfe,3\n", "cannot read .*data.csv: .*utf-8"),
    ("data.csv", "question\nWhat?\n", "row 1: no column ground_truth_answer or answer; it has question"),
    ("data.json", '[{"question": "What?", "answer": "3"}, {"question": "So?", "answer": "many"}]',
     "data.json, row 2: the answer 'many' is not a number"),
    ("data.csv", "question,answer\nWhat?,3\n", "data.csv: no training rows are left"),
])
def test_refused_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as refusal:
        load("gsm8k", chat=True, data=str(tmp_path / name))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize("name, raw, message", [
    ("sudoku", {"Puzzle": "140432014020000", "Solution": "2143432114323214"}, "16 digits"),  # no longer
    ("sudoku", {"Puzzle": "0140432014020000", "Solution": "214343211432321"}, "16 digits"),
    ("sudoku", {"Puzzle": "0140432014020000", "Solution": "2133432114323214"}, "does not fill in"),
    ("sudoku", {"Puzzle": "2143432114323214", "Solution": "2143432114323214"}, "does not fill in"),
    ("countdown", {"input": "3,x,4", "output": "5"}, "row 1: invalid literal"),
    ("sudoku", {"Puzzle": "0" * 16, "Solution": "1" * 16}, "does not fill in"),
    ("sudoku", {"Puzzle": "0" * 16, "Solution": "1234" * 4}, "does not fill in"),  # rows alone
    ("sudoku", {"Puzzle": "0" * 16, "Solution": "1234234134124123"}, "does not fill in"),  # but for boxes
    ("countdown", {"nums": [1, 2], "target": 3.7}, "row 1: invalid literal .*3.7"),
    ("countdown", {"nums": [1, 2.5], "target": 3}, "row 1: invalid literal .*2.5"),
    ("countdown", {"nums": [1, -2], "target": 3}, "row 1: .*integers from 0"),
    ("countdown", {"nums": [], "target": 3}, "row 1: .*integers from 0"),
    ("countdown", {"nums": [1, 2], "target": "9" * 5000}, "row 1: .*4300 digits"),
    ("countdown", {"nums": [[1, 2]], "target": 3}, "row 1: invalid literal"),
    ("countdown", {"nums": "[" * 2000, "target": 3}, "row 1: "),
    ("mbpp", {"text": "What?", "test_list": "[" * 2000}, "row 1: "),
    ("mbpp", {"text": "What?", "test_list": ["assert " + "(" * 2000]}, "row 1: "),
    ("mbpp", {"text": "What?", "test_list": ["assert f() == '\ud800'"]}, "row 1: .*surrogates"),
    ("mbpp", {"text": "What?", "test_list": [1]}, "row 1: "),
    ("countdown", {"target": 5}, "no column numbers or nums or input; it has target"),
    ("math", {"problem": "What?", "solution": "It is 3."}, "no .boxed"),
    ("math", {"problem": "What?", "answer": " "}, "row 1"),
    ("mbpp", {"text": "What?", "test_list": []}, "row 1: no tests"),
    ("mbpp", {"text": "What?", "test_list": ["assert f(("]}, "row 1: .*never closed"),
    ("mbpp", {"text": "What?", "test_list": ["return 3"]}, "row 1: .*outside function"),
    ("humaneval", {"prompt": "def f():", "test": "def check(candidate):\n    assert candidate()",
                   "entry_point": "f"}, "row 1: expected an indented block"),
])
def test_refused_rows(tmp_path, name, raw, message):
    file = write(tmp_path / "data.json", [raw])
    with pytest.raises(ValueError, match=message) as refusal:
        load(name, chat=True, data=file)
    assert "\n" not in str(refusal.value)


def test_refused_tasks():
    every = "countdown, gsm8k, humaneval, math, mbpp, sudoku, word_problems"
    with pytest.raises(ValueError, match=f"^unknown task 'chess': choose from {every}$"):
        load("chess", chat=True)
    for name in ("gsm8k", "math", "mbpp", "humaneval", "word_problems"):
        with pytest.raises(ValueError, match=f"^{name} needs a model with a chat template$"):
            load(name, chat=False)


def test_a_program_cannot_change_the_helpers_of_a_humaneval_test():
    """`poly`, which the prompt defines and the test calls, is the test's own."""
    prompt = ("def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n\n\n"
              "def zero(xs):\n    \"\"\"A root of xs[0] + xs[1] x.\"\"\"\n")
    test = "def check(candidate):\n    assert abs(poly([3, 1], candidate([3, 1]))) < 1e-4\n"
    row = code_row({"entry_point": "zero", "prompt": prompt, "test": test})
    assert code_reward("```python\ndef zero(xs):\n    return -xs[0] / xs[1]\n```", row)[0] == 1.0
    cheat = "```python\ndef poly(*_):\n    return 0\n\n\ndef zero(xs):\n    return 7\n```"
    assert code_reward(cheat, row)[0] == 0.0
