r"""How answers are spelled: which spellings of an answer are equal and which are not,
kind by kind; and that no
text takes long to read."""

import itertools
import random
import time
from fractions import Fraction as F

import pytest

from common import countdown_reward, sudoku_reward
from tasks.answers import between_tags, boxed, code_block
from tasks.countdown import countdown_chat_reward, expression
from tasks.gsm8k import gsm8k_reward, read_number
from tasks.math import math_reward, reading
from tasks.spelling import plain
from tasks.sudoku import board_in, sudoku_chat_reward

NUMBERS = {
    "mixed numbers": [
        ("18\\frac{1}{2}", F(37, 2)), ("18 1/2", F(37, 2)), ("18½", F(37, 2)), ("18 \\tfrac12", F(37, 2)),
        ("-18 1/2", F(-37, 2)), ("2⅔", F(8, 3)), ("1 1/2", F(3, 2)), ("3\\frac{5}{2}", None),
        ("18 and 1/2", None)],
    "fractions": [
        ("½", F(1, 2)), ("\\frac12", F(1, 2)), ("\\frac1{2}", F(1, 2)), ("\\cfrac{1}{2}", F(1, 2)),
        ("3⁄4", F(3, 4)),
        ("\\frac{1,000}{2}", 500), ("\\frac{3.6}{0.2}", 18), ("36 ÷ 2", 18), ("36/2/2", None), ("1/0", None)],
    "magnitudes": [
        ("18\\text{k}", 18000), ("\\$18 \\text{M}", 18 * 10**6), ("1.45M", 1450000), ("18K", 18000),
        ("2B", 2 * 10**9),
        ("2 hundred thousand", 200000), ("3 bn", 3 * 10**9), ("2 lakh", 200000), ("2 dozen", 24),
        ("18m", None),
        ("18 m", 18), ("18 mm", 18), ("18 kg", 18), ("18 grand", None)],
    "fractions in words": [
        ("2 thirds", F(2, 3)), ("2\\text{ thirds}", F(2, 3)), ("3 halves", F(3, 2)), ("3 quarters", F(3, 4)),
        ("5 eighths", F(5, 8)), ("3 twentieths", None), ("18 and a third", None), ("18 months", 18)],
    "currencies": [
        ("US$18", 18), ("USD 18", 18), ("18 USD", 18), ("€18", 18), ("18 €", 18), ("£18", 18), ("Rs. 18", 18),
        ("C$18", 18), ("-US\\$18", -18), ("1$8", None)],
    "repeating decimals": [
        ("0.\\overline{3}", F(1, 3)), ("0.(3)", F(1, 3)), ("0.1\\overline{6}", F(1, 6)), ("0.333...", None)],
    "wrappers": [
        ("**18**", 18), ("\\textbf{18}", 18), ("\\color{red}{18}", 18), ("`18`", 18), ("\\text{-}18", -18),
        ("\\displaystyle 18", 18), ("\\left(18\\right)", 18), ("\"18\"", 18)],
    "numbers in text": [
        ("\\text{18 apples}", 18), ("\\textbf{18 apples}", 18), ("\\text{Total: }18", 18),
        ("\\text{USD }18", 18), ("\\text{18 or 19}", None), ("\\text{not 18}", None)],
    "compound units": [
        ("18\\,\\mathrm{cm^2}", 18), ("18\\text{ cm²}", 18), ("18\\frac{\\text{km}}{\\text{h}}", 18),
        ("18\\text{ m}\\cdot\\text{s}^{-2}", 18), ("18\\text{ cm}^4", None), ("2pi", None)],
    "other fractions": [
        ("{1 \\over 2}", F(1, 2)), ("36 \\over 2", 18), ("\\nicefrac{1}{2}", F(1, 2)), ("18 tens", 180)],
    "dots and wide signs": [
        ("0.\\dot{3}\\dot{6}", F(4, 11)), ("0.\\dot{1}4285\\dot{7}", F(1, 7)), ("0.\\dot{3}6", None),
        ("（18）", 18), ("－18", -18), ("18。", 18), ("1.8×10⁻¹", F(9, 50)), ("<u>18</u>", 18)],
    "special tokens": [
        ("1<|start_header_id|>8", None), ("18<|eot_id|>", 18), ("<|a|>18<|b|>", 18), ("1<|a|><|b|>8", None)],
    "equations": [
        ("2x = 18", None), ("x + 5 = 18", None), ("\\frac{x}{2} = 18", None), ("x = 9, y = 18", None),
        ("9 x $2 = $18", 18), ("3x = 3(6) = 18", 18), ("x + y = 18", 18), ("50\\% \\text{ of } 36 = 18", 18)],
    "not a unit": [
        ("18 times", None), ("18 to 20", None), ("18 over 5", None), ("18 feet 3 inches", None),
        ("18 x", None),
        ("18 squared", None), ("18 twenty", None), ("18*2", None), ("18°C", 18), ("18 miles per hour", 18),
        ("$18/hour", 18)],
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_in_other_spellings(kind):
    for text, value in NUMBERS[kind]:
        assert read_number(text) == value, text
    right = [(text, value) for text, value in NUMBERS[kind] if value is not None]
    for text, value in right:
        assert gsm8k_reward(f"\\boxed{{{text}}}", {"answer": str(value)})[0] == 1.25, text
        assert gsm8k_reward(f"\\boxed{{{text}}}", {"answer": str(value + 1)})[0] == 0.25, text


def test_a_question_that_counts_in_dozens_is_answered_in_dozens():
    row = {"question": "How many dozens of eggs does she need?", "answer": "7"}
    assert gsm8k_reward("\\boxed{7 dozen}", row)[0] == 1.25
    assert gsm8k_reward("\\boxed{7 dozen}", row | {"question": "How many eggs?", "answer": "84"})[0] == 1.25
    assert gsm8k_reward("\\boxed{7 dozen}", row | {"question": "How many eggs?"})[0] == 0.25


MATHEMATICS = {  # gold, what is equal to it, what is not
    "digits in groups": [
        ("11,\\! 111,\\! 111,\\! 100", "11111111100|11,111,111,100|11{,}111{,}111{,}100",
         "111,11,100|11,111"),
        ("10080", "10,\\! 080|10{,} 080|10\\,080|10~080|10\\thinspace080", "10, 080|100,80")],
    "collections": [
        ("(6,31,-1)", "(6, 31, -1)|\\left(6,31,-1\\right)|\\langle 6,31,-1\\rangle",
         "\\{6,31,-1\\}|6,31,-1|[6,31,-1]|(31,6,-1)"),
        ("0<x<1", "(0,1)|x\\in(0,1)", "0,1|\\{0,1\\}|[0,1]|0<x\\le1"),
        ("1,-2", "-2,1|\\{1,-2\\}", "(1,-2)|1|1,2"),
        ("(3,\\frac{\\pi}{2})", "(3,\\pi/2)", "(4,\\frac{\\pi}{2})|[3,\\frac{\\pi}{2}]|3,\\frac{\\pi}{2}"),
        ("(2,\\infty)", "x>2|2<x", "x\\ge2|2,\\infty|[2,\\infty)"), ("\\{5\\}", "5", "6"),
        ("(3,4]", "3<x\\le4", "(3,4)|[3,4]|3,4"), ("3,5,7", "7, 5, 3|3,5\\text{ and }7", "(3,5,7)|3,5")],
    "complex numbers": [
        ("6 - 5i", "6 - 5 i|6-5\\mathrm{i}|6-5\\cdot i|-5i+6|6-5\\imath", "6+5i|6-5|1"),
        ("-i", "-1i|-\\mathrm{i}", "i|-1"),
        ("\\frac{1+i}{2}", "0.5+0.5i", "0.5-0.5i"), ("-1", "e^{i\\pi}", "i")],
    "bare units": [
        ("15", "15 cm^2|15 dollars|15 km/h|15 people|15 square units|15 miles per hour|15\\ \\mathrm{m/s}",
         "15x|15 or 16|15 thousand|15 times 2|16 cm^2|15 squared|not 15|15 feet 3 inches"),
        ("864 \\mbox{ inches}^2", "864|864 in^2|864 square inches", "865 in^2"),
        ("15\\pi", "15\\pi cm^2", "15|15 cm^2"),
        ("15000", "15 thousand|15\\text{ thousand dollars}", "15"), ("2k", "2 k", "2 kg|2|2000"),
        ("3x", "3x cm", "3")],
    "degrees and currencies": [
        ("90^\\circ", "90°|90|90 degrees|90\\degree|90^{\\circ}", "91°|0"),
        ("15", "€15|15 €|£15|US\\$15|USD 15", "€16|-€15"),
        ("\\$18.90", "18.9|€18.90|18.90 dollars", "1890|18.91")],
    "repeating decimals": [
        ("\\frac{1}{3}", "0.\\overline{3}|0.\\bar{3}|0.(3)|0.3\\overline{3}",
         "0.\\overline{6}|0.333|0.333..."),
        ("1.\\overline{18}", "\\frac{13}{11}", "1.18|1.\\overline{1}8")],
    "unions": [
        ("(0,9) \\cup (9,36)",
         "(0,9) or (9,36)|(9,36)∪(0,9)|(0,9)U(9,36)|(0,9)\\text{ union }(9,36)|0<x<9 or 9<x<36",
         "(0,36)|(0,9]\\cup(9,36)|(0,9)\\cap(9,36)"),
        ("(-\\infty,2)\\cup(3,\\infty)", "x<2\\text{ or }x>3", "x<2\\text{ or }x\\ge3|x<2\\text{ and }x>3")],
    "sets in words": [
        ("(3,4]", "\\{x\\mid3<x\\le4\\}|\\{x\\in\\mathbb{R}:3<x\\le4\\}", "\\{x\\mid3<x<4\\}"),
        ("3,5,7", "3, 5, and 7|3,5,\\text{ and }7|x\\in\\{3,5,7\\}", "3, and 5"),
        ("(-\\infty,2)\\cup(3,\\infty)", "x<2\\lor x>3|x<2∨x>3|x<2\\cup x>3|(-∞,2)⋃(3,∞)",
         "x<2\\land x>3"),
        ("\\emptyset", "\\{\\}|∅", "0")],
    "names and values": [
        ("7", "\\frac{AB}{BC} = 7|P(A \\cap B)=7|\\det A = 7|AB + BC = 3 + 4 = 7|P(X = 3) = 7",
         "\\det A = 8|\\det A = 6 = 7|not \\det A = 7|AB\\cdot CD \\ne BC = 7|9^{9^{9^9}} = 7|"
         "AB + BC = 7 or 8|\\frac{AB}{BC} = 7x|\\frac{AB}{BC} = 8, \\frac{BC}{AB} = 7"),
        ("k = \\frac{1}{2}", "k = 0.5|k = 1/2|0.5", "k = 2|k = 0.05|k = 0.50001"),
        ("\\frac{1}{2}", "\\sin 30^\\circ = \\frac{1}{2}|\\cos(60°) = 0.5",
         "\\sin 60^\\circ = \\frac{1}{2}|\\tan 30^\\circ")],
    "both signs": [
        ("\\frac{3 \\pm \\sqrt{5}}{2}",
         "x = \\frac{3\\pm\\sqrt5}{2}|\\frac{3+\\sqrt5}{2}, \\frac{3-\\sqrt5}{2}|"
         "\\frac32 \\pm \\frac{\\sqrt5}{2}|\\frac{1}{2}(3 \\pm \\sqrt{5})",
         "\\frac{3+\\sqrt5}{2}|\\frac{5\\pm\\sqrt3}{2}|3\\pm\\frac{\\sqrt5}{2}|\\frac{3\\pm\\sqrt5}{2}, 1"),
        ("-1, \\frac{1 \\pm \\sqrt{5}}{2}", "\\{\\frac{1-\\sqrt5}{2}, -1, \\frac{1+\\sqrt5}{2}\\}",
         "\\frac{1\\pm\\sqrt5}{2}|1, \\frac{1\\pm\\sqrt5}{2}"),
        ("\\pm\\frac{3}{2}", "\\frac{\\pm3}{2}|1.5, -1.5", "\\frac{3}{2}|\\frac{3\\pm1}{2}")],
    "letters and names": [
        ("B", "\\text{B}|\\text{(B)}|\\textbf{B}", "\\text{C}"),
        ("\\ln 2", "ln(2)|\\mathrm{ln}\\,2", "ln(3)"),
        ("\\sqrt{13}", "sqrt(13)|√(13)", "√13+1"), ("2", "2.0", "2pi"),
        ("10", "{5 \\choose 2}|\\binom52", "5")],
    "small differences": [
        ("6.63\\times10^{-34}", "6.63e-34|6.63\\cdot10^{-34}", "6.62\\times10^{-34}|0"),
        ("10^{20}", "1e20", "10^{20}+1"),
        ("(10^{-15},1)", "(1e-15,1)", "(2\\cdot10^{-15},1)"), ("\\frac13x", "x/3", "0.3333333333333333x"),
        ("0.3", "0.1+0.2|\\frac{3}{10}|.30", "0.3000000000000001")],
    "wrappers": [
        ("73", "**73**|\\color{red}{73}|\\textcolor{blue}{73}|\\underline{73}|`73`|\\bm{73}|\\boxed{73}",
         "**74**|\\text{-}73|\\phantom{7}3"),
        ("-73", "\\text{-}73|−73|-\\mathbf{73}", "73"), ("\\frac{1}{e}", "\\frac1{\\mathrm e}", "e"),
        ("\\text{Evelyn}", "Evelyn|\\textbf{Evelyn}|\\color{red}{\\text{Evelyn}}|evelyn",
         "\\text{Carla}|not Evelyn|1"),
        ("\\text{(C)}", "C|(C)|\\textbf{(C)}", "D|(D)"),
        ("1\\frac{4}{5}", "1⅘|1 4/5|1.8|\\frac95", "1\\frac{5}{4}|14/5")],
}


@pytest.mark.parametrize("kind", MATHEMATICS)
def test_mathematics_in_other_spellings(kind):
    for gold, right, wrong in MATHEMATICS[kind]:
        for answer in (gold, *right.split("|")):
            assert math_reward(f"\\boxed{{{answer}}}", {"answer": gold})[0] == 1, (gold, answer)
        for answer in wrong.split("|"):
            assert math_reward(f"\\boxed{{{answer}}}", {"answer": gold})[0] == 0, (gold, answer)


def test_special_tokens_of_an_answer_of_mathematics():
    assert math_reward("\\boxed{73<|eot_id|>}", {"answer": "73"})[0] == 1
    assert math_reward("\\boxed{7<|eot_id|>3}", {"answer": "73"})[0] == 0


@pytest.mark.parametrize("text", [
    "16 = (3+5)*2", "\\boxed{(3+5)*2}", "(3+5)⋅2", "\\left(3+5\\right)*2", "$(3+5)\\times2$", "(3 + 5) x 2",
    "[3+5]*2",
    "\\boxed{(3+5)*2 = 16}", "**(3+5)*2**", "\\text{(3+5)*2}", "16 = \\boxed{(3+5)*2}", "\\frac{(3+5)}{1}*2",
    "（3＋5）×2", "(3+5)✕2", "(3+5) \\* 2", "(3+5)*2 &= 16", "(3+5)*2 = +16", "16.0 = (3+5)*2",
    "```text\n(3+5)*2\n```", "```Python3\n(3+5)*2\n```"])
def test_expressions_in_other_spellings(text):
    row = {"numbers": [2, 3, 5] + [1] * ("frac" in text), "answer": "16"}
    assert countdown_chat_reward(f"<answer>{text}</answer>", row)[0] == 1
    assert countdown_chat_reward(f"<answer>{text}</answer>", row | {"answer": "17"})[0] == 0.1
    assert countdown_chat_reward(f"<answer>{text}</answer>", row | {"numbers": [2, 3, 4]})[0] == 0


@pytest.mark.parametrize("text", [
    "\\boxed{3142243142131324}", "3142|2431\n----+----\n4213|1324",
    "[[3,1,4,2],[2,4,3,1],[4,2,1,3],[1,3,2,4]]", '["3142", "2431", "4213", "1324"]',
    "|3|1|4|2|\n|:-:|:-:|:-:|:-:|\n|2|4|3|1|\n|4|2|1|3|\n|1|3|2|4|", "┌──┐\n│3142│\n│2431│\n│4213│\n│1324│",
    "**3142 2431 4213 1324**",
    "\\begin{array}{cc|cc}3&1&4&2\\\\2&4&3&1\\\\\\hline4&2&1&3\\\\1&3&2&4\\end{array}"])
def test_boards_in_other_spellings(text):
    row = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    assert sudoku_chat_reward(f"<answer>{text}</answer>", row)[0] == 1
    assert sudoku_chat_reward(f"<answer>{text.replace('4', '1', 1)}</answer>", row)[0] < 1
    assert sudoku_chat_reward(f"<answer>Row {text}</answer>", row)[1]["parse_fail"] == 1


@pytest.mark.parametrize("text", [
    "```Python\na\n```", "```python3\na\n```", "``` python\na\n```", "```PY\na\n```", "~~~python\na\n~~~",
    "````python\na\n````", "```{python}\na\n```", "```python title=\"x.py\"\na\n```",
    "```python3.11\na\n```", "```python\r\na\r\n```",
    "```ipython3\na\n```", "```language-python\na\n```",
    "```python\na```", "```python\na```\nIt works.", "```java\nb\n```\n```python\na\n```"])
def test_fences_in_other_spellings(text):
    assert code_block(text).strip() == "a"


@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_a_fence_in_a_docstring_does_not_end_the_code(quotes):
    code = f"def f():\n    {quotes}Says.\n\n    ```\n    f()\n    ```\n    {quotes}\n    return 1\n"
    assert code_block(f"```python\n{code}```\nIt works.\n```python\nf()\n```") == code
    assert code_block(f"````python\n{code}````") == code


FRAGMENTS = ["\\over", "^{-1}", "\\dot{1}", "sqrt(", "\\mathrm{cm^2}", "\\mid", "\"\"\"", "（",
             "18", " ", "\\circ", "^", "!", "1", ",", "\\!", "{", "}", "{,}", "\\text{", "\\frac",
             "\\frac{", "(", "[",
             "\\{", "\\left", "=", "is", ":", "$", "\\$", "US", "%", "e1", "*10^{", "x", "/", "\\overline{",
             ".", "-",
             "\\cup", "or", "\\text{or}", "\\color{red}{", "\\sqrt", "\\sqrt[", "**", "_", "`", "½", "²",
             "<|a|>", "<|",
             "\\\\", "\\,", "~", "thousand", "km", "^2", "\\pm", "i", "000", " 000", "<", "\n", "```",
             "```python\n",
             "<answer>", "</answer>", "\\boxed{", '"', "and"]
READERS = {  # and the most characters that they read
    "number": (read_number, 200), "mathematics": (lambda text: reading.__wrapped__(text, frozenset("x")),
                                                  500),
    "gold": (reading.__wrapped__, 500), "expression": (expression, 400), "board": (board_in, 400),
    "plain": (plain, 1000),
    "tags": (between_tags, 20000), "box": (boxed, 20000), "code": (code_block, 20000),
    "tiny countdown": (lambda text: countdown_reward(text, {"numbers": [1], "answer": "1"}), 20000),
    "tiny sudoku": (lambda text: sudoku_reward(text, {"puzzle": "0" * 16, "solution": "1" * 16}), 20000)}


@pytest.mark.parametrize("name", READERS)
def test_no_text_takes_long_to_read(name):
    """Fragments, and two to five of them, repeated up to the limit: at most 1 ms for 100 characters."""
    read, size = READERS[name]
    gen = random.Random(0)
    some = [(a,) for a in FRAGMENTS] + gen.sample([*itertools.permutations(FRAGMENTS, 2)], 300)
    some += [gen.choices(FRAGMENTS, k=gen.randrange(3, 6)) for _ in range(200)]
    for parts in some:
        text = ("".join(parts) * size)[:size]
        for tries_left in reversed(range(10)):  # a busy machine takes longer, but not ten times running
            start = time.process_time()
            read(text)
            spent = 1000 * (time.process_time() - start) / (size / 100)
            if spent <= 1:
                break
            assert tries_left, (name, parts, spent)
            time.sleep(0.2)  # so that one burst of other work does not fall on all ten


def test_the_text_that_hung():
    start = time.process_time()
    text = "\\boxed{18 " + "\\circ " * 30 + "!}"
    assert gsm8k_reward(text, {"answer": "18"})[0] == 0
    assert time.process_time() - start < 0.1
