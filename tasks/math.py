r"""MATH: competition problems whose answer is an expression, a set, an interval, a matrix, a word ...

    row     {"prompt": "What is half of 3? ...", "question": "What is half of 3?", "answer": "\\frac{3}{2}"}
    answer  It is $\boxed{1.5}$.
"""

import atexit
import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from fractions import Fraction
from typing import NamedTuple

from tasks import Recipe, hub, written
from tasks.answers import BOXED, boxed, draw_text
from tasks.spelling import (CODES, NO_UNIT, POWERS, UNIT_POWERS, decimal, in_text, opened, plain, prefix,
                            quantity, trimmed)

LENGTH = 500  # characters of an answer that is read
EQUAL, UNEQUAL, UNREADABLE = 10, 11, 12  # what a judge ends with


def math_row(raw: dict) -> dict:
    question = written(raw, "question", "problem")
    gold = written(raw, "ground_truth_answer", "answer", "solution")
    if gold == raw.get("solution"):
        gold = boxed(gold) or ""
    if not gold.strip():
        raise ValueError(r"the solution has no \boxed{} answer")
    return {"prompt": f"{question}\n{BOXED}", "question": question, "answer": gold}


def unreadable(rows: list[dict]) -> list[str]:
    """For each row why its answer cannot be read, "" if it can: no answer would ever be right. What is a
    number or words is clear at a glance; the rest the judge reads, many at once, in halves if one fails."""
    golds = [row["answer"] for row in rows]
    math_judge()  # it must work, though these answers may not need it
    unclear = [k for k, gold in enumerate(golds) if reading(gold).number is None and not reading(gold).words]
    work = [unclear[k : k + 16] for k in range(0, len(unclear), 16)]
    wrong = set()
    while work:
        part = work.pop()
        if ask([(golds[k], golds[k]) for k in part]) != EQUAL:
            wrong |= set(part) if len(part) == 1 else set()
            work += [part[: len(part) // 2], part[len(part) // 2 :]] if len(part) > 1 else []
    return [f"the answer {gold!r} cannot be read" if k in wrong else "" for k, gold in enumerate(golds)]


def math_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    r"""1 if what is in the last \boxed{} equals the answer: as exact numbers, as words, or by math-verify.
    What has more than 500 characters or needs more than 2 CPU seconds or 1 GiB to judge counts as
    unreadable."""
    answer = boxed(text)
    verdict = judged(row["answer"], answer) if answer and len(answer) <= LENGTH else UNREADABLE
    correct = float(verdict == EQUAL)
    return correct, {"correct": correct, "parse_fail": float(verdict not in (EQUAL, UNEQUAL))}


# -------------------------------------------------------------------------------------------------- reading


class Reading(NamedTuple):
    """An answer in one spelling."""

    latex: str  # what math-verify is to read; "" if it cannot be read
    number: Fraction | None  # if it is a number
    words: str  # if it is words alone: "evelyn", "(c)"
    kind: str  # list, set, pair, tuple, interval, relation, union, words, or other
    parts: tuple[str, ...]  # of relations joined by "or" or "and", which `joint` then is
    joint: str
    symbols: frozenset[str]  # letters that stand for something


FUNCTIONS = set("""sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp lim max min
    sup inf gcd lcm mod det dim deg arg ker sqrt frac pi infinity infty""".split())
NAMED = set("sin cos tan cot csc sinh cosh tanh arcsin arccos arctan log ln exp".split())
JOINERS = {"or": "or", "and": "and", "\\lor": "or", "\\land": "and", "union": "\\cup",
           "infinity": "\\infty", "pi": "\\pi"}
UNITS = CODES | set("""mm cm dm km nm ft in yd mi kg mg lb lbs oz ml mL cl hr hrs min sec ms mph kph sq cu
    cc pt qt rad deg rpm psi Hz kHz MHz kW kWh kJ kN Pa kPa eV mol gal mils pts""".split())
RELATIONS = {"<", ">", "\\le", "\\ge", "\\ne", "\\in"}
OPEN, CLOSE = {"(", "[", "\\{"}, {")", "]", "\\}"}


@functools.lru_cache(1024)
def reading(text: str, symbols: frozenset[str] | None = None) -> Reading:
    """Read an answer; symbols: those of the gold answer, None if this is the gold answer itself.

    What is bare behind an answer is a unit ("15 cm^2", "15 people") unless it is a product of the gold
    answer's symbols; behind the gold answer only known units are, and what stands in \\text."""
    strange = sum(not c.isascii() for c in text)  # each may be a dozen tokens: ½
    tokens = plain(text) if strange <= 100 else []
    tokens = trimmed(joiners(without_label(opened(tokens) if symbols is not None else tokens)))
    if not tokens or len(tokens) > LENGTH:
        return Reading("", None, "", "other", (), "", frozenset())
    written = [token for token in tokens if token not in (" ", "$")]
    texts = [token for token in written if token.startswith("\\text{")]
    if texts and all(token in texts or token.isalpha() or token in ".,()" for token in written):
        words = "".join(in_text(token) or token for token in tokens)
        return Reading("", None, squeezed(words), "words", (), "", frozenset())
    tokens = without_unit([" " if token == "$" else token for token in tokens], symbols)
    tokens = of_set(tokens)
    number = None if "%" in tokens else quantity(tokens, letters=False) if not bare_words(tokens) else None
    if len(bare_words(tokens)) > 1 and any(token.isdigit() for token in tokens):  # "The answer is 18"
        return Reading("", None, "", "other", (), "", frozenset())
    tokens = both_signs(numbers_exact(tokens))
    letters = frozenset(c for token in tokens if token.isalpha() and token not in FUNCTIONS for c in token)
    if (RELATIONS - {"\\in"}) & set(tokens):  # x < 2 \cup x > 3
        tokens = ["or" if token == "\\cup" else token for token in tokens]
    joint, parts = divided(tokens)
    if joint == "or" and all(kind_of(part) in ("pair", "interval", "union", "set") for part in parts):
        tokens = [token for part in parts for token in ("\\cup ", *part)][1:]
        parts = []
    elif not parts or not all(kind_of(part) == "relation" for part in parts):
        tokens, parts = ["," if token in ("or", "and") else token for token in tokens], []
    kind = "relation" if parts else kind_of(tokens)
    if kind == "one":  # {5} is 5, {(1, 2)} is (1, 2)
        tokens = trimmed(tokens[1:-1])
        kind = kind_of(tokens)
    return Reading(latex(tokens), number, "", kind, tuple(map(latex, parts)), joint if parts else "", letters)


def squeezed(words: str) -> str:
    """Words to compare: without case, spaces and the brackets of a choice, "(C)"."""
    return "".join(c for c in words.lower() if c.isalnum())


def joiners(tokens: list[str]) -> list[str]:
    r"""\text{ or } and \lor as or, without a comma before it; \text{i} as i, ln( and \text{ln} as \ln; U
    between intervals and "union" as \cup; \{\} as \emptyset."""
    out = []
    for k, token in enumerate(tokens):
        word = in_text(token).strip() or token
        last = next((before for before in out[:-3:-1] if before != " "), "")
        if word.lower() in JOINERS:
            out.append(JOINERS[word.lower()])
            while out[-1] in ("or", "and") and out[-2:-1] in ([" "], [","]):
                del out[-2]
        elif token == "*" and out[-1:] == ["*"]:  # x**2
            out[-1] = "^"
        elif token != word and word in ("i", "e"):
            out.append(word)
        elif word in NAMED and (token != word or tokens[k + 1 : k + 2] == ["("]):
            out.append(f"\\{word}")
        elif token == "\\}" and last == "\\{":
            while out.pop() != "\\{":
                pass
            out.append("\\emptyset")
        elif prefix(tokens, k) and set(out[-9:]) <= {" ", "$", "+", "-"}:
            continue  # US$15
        elif token == "U" and last in (")", "]", "\\}"):
            out.append("\\cup")
        elif token == "\\backslash" or token == "\\" and tokens[k + 1 : k + 2] == ["\\{"]:
            out.append("\\setminus")
        else:
            out.append(token)
    return out


def without_label(tokens: list[str]) -> list[str]:
    r"""What is behind a word and a colon: "Answer: 18", \text{Area: }18."""
    k = next((k for k, token in enumerate(tokens) if not token.isalpha() and token not in (" ", "$")), 0)
    words = tokens[k : k + 1] == [":"] and bare_words(tokens[:k])
    return tokens[k + 1 :] if words or tokens and in_text(tokens[k]).rstrip().endswith(":") else tokens


def bare_words(tokens: list[str]) -> list[str]:
    return [t for t in tokens if t.isalpha() and len(t) > 1 and t not in FUNCTIONS and t not in ("or", "and")]


def without_unit(tokens: list[str], symbols: frozenset[str] | None) -> list[str]:
    """The tokens up to the unit in which an answer ends, times a thousand if that is a word of it."""
    end, power, units = len(tokens), 1, 0

    def is_unit(k: int) -> bool:
        word = tokens[k]
        if word.startswith("\\text{"):
            found = re.findall("[a-zA-Z]+", in_text(word))
            return bool(found) and not NO_UNIT & {each.lower() for each in found} and not any(
                c in word for c in "0123456789=+<>")
        if not word.isalpha() or not word.isascii() or word in FUNCTIONS or word.lower() in NO_UNIT:
            return False
        if symbols is not None and set(word) <= symbols:
            return False
        if word in UNITS:
            return k > 0
        if symbols is None:
            return False
        if len(word) == 1:  # behind a slash, or 15 m; never beside other symbols
            metres = word in "mhsgL" and not symbols and tokens[k - 1 : k] == [" "]
            return tokens[k - 1 : k] == ["/"] or metres
        behind = tokens[k - 1 : k] in ([" "], ["/"])
        return behind and len(word) > 2 and bool(set("aeiouy") & set(word.lower()))

    while end:
        token = tokens[end - 1]
        raised = next((size for size in (2, 3, 4, 5) if end > size and tokens[end - size] == "^"
                       and "".join(tokens[end - size + 1 : end]) in UNIT_POWERS), 0)
        if token in (" ", ".", ",", ";"):
            end -= 1
        elif tokens[end - 2 : end] == ["^", "\\circ"]:
            end -= 2
        elif token in ("/", "*") and units:
            end -= 1
        elif token == "}" and (start := unit_fraction(tokens, end)):
            end, units = start, units + 1
        elif is_unit(end - 1):
            for each in re.findall("[a-z]+", (in_text(token) or token).lower()):
                scale = POWERS.get(each, POWERS.get(each.removesuffix("s"), 1))
                if scale < 1:
                    return tokens
                power *= scale if scale >= 100 else 1
            end, units = end - 1, units + 1
        elif raised and end > raised and is_unit(end - raised - 1):
            end, units = end - raised, units + 1
        else:
            break
    core = tokens[:end]
    written = [token for token in core if token != " "]
    if not written or written[-1] in ("+", "-", "*", "/", "^", "_", "=", "(", "[", "{", "<", ">", *RELATIONS):
        return tokens
    return core if power == 1 else [*core, "*", str(power)]


def unit_fraction(tokens: list[str], end: int) -> int:
    r"""Where a \frac{\text{m}}{\text{s}^2} begins that ends at `end`; 0 if there is none."""
    start = end
    while start > end - 20 and start > 0 and (tokens[start - 1] in "{}^23" or in_text(tokens[start - 1])):
        start -= 1
    units = sum(map(bool, map(in_text, tokens[start:end])))
    return start - 1 if start and tokens[start - 1] == "\\frac" and units == 2 else 0


def of_set(tokens: list[str]) -> list[str]:
    r"""What is said of x in \{x \mid 0 < x < 1\}; and the set in x \in \{1, 2\}."""
    written = [token for token in tokens if token != " "]
    name = written[0] if written and len(written[0]) == 1 and written[0].isalpha() else ""
    if name and written[1:3] == ["\\in", "\\{"]:
        return written[2:]
    if written[:1] == ["\\{"] and written[-1:] == ["\\}"] and "\\{" not in written[1:]:
        bar = next((k for k, token in enumerate(written[:12]) if token in ("|", "\\mid", "\\vert", ":")), 0)
        who, said = "".join(written[1:bar]), written[bar + 1 : -1]
        if len(who.removesuffix("\\in\\mathbb{R}")) == 1 and RELATIONS & set(said):
            return said
    return tokens


def numbers_exact(tokens: list[str]) -> list[str]:
    """Decimals, repeating ones too, as fractions: compared as floats, what differs by 1e-12 would be equal.
    And 1 4/5 as a mixed number."""
    out, i = [], 0
    mixed = [token for token in tokens if token not in ("-", "+")]
    if len(mixed) == 5 and mixed[1] == " " and mixed[3] == "/" and all(mixed[k].isdigit() for k in (0, 2, 4)):
        return [*tokens[: tokens.index(" ")], "\\frac", "{", mixed[2], "}", "{", mixed[4], "}"]
    while i < len(tokens):
        if tokens[i].isdigit() or tokens[i] == ".":
            value, end = decimal(tokens, i, commas=False)
            if value is not None and "." in tokens[i:end] and tokens[end : end + 1] != ["."]:
                fraction = ["\\frac", "{", str(value.numerator), "}", "{", str(value.denominator), "}"]
                out += fraction if value.denominator > 1 else fraction[2:3]
                i = end
                continue
        out.append(tokens[i])
        i += 1
    return out


def both_signs(tokens: list[str]) -> list[str]:
    r"""\frac{3 \pm \sqrt{5}}{2} as two numbers: math-verify reads a \pm outside of brackets alone."""
    if tokens.count("\\pm") != 1 or tokens[0] == "(":
        return tokens
    at, marks = tokens.index("\\pm"), {"=", ",", ";", "or", "and", "\\{", "\\}"}
    start = max((k + 1 for k in range(at) if tokens[k] in marks), default=0)
    end = min((k for k in range(at, len(tokens)) if tokens[k] in marks), default=len(tokens))
    if sum((token in "{(") - (token in "})") for token in tokens[start:at]) == 0:
        return tokens
    return [*tokens[:at], "+", *tokens[at + 1 : end], ",", *tokens[start:at], "-", *tokens[at + 1 :]]


def divided(tokens: list[str]) -> tuple[str, list[list[str]]]:
    """What joins the parts of an answer, "or" or "and", and the parts; none if nothing does, or both do."""
    words = {token for token in tokens if token in ("or", "and")}
    if len(words) != 1:
        return "", []
    parts = [[]]
    for token in tokens:
        if token in words:
            parts.append([])
        else:
            parts[-1].append(token)
    return words.pop(), [trimmed(part) for part in parts]


def kind_of(tokens: list[str]) -> str:
    """list, set, one (a set of one), pair (a point or an open interval), tuple, interval, relation, union or
    other."""
    depth, top, closes, commas = 0, set(), None, 0  # closes: where what opens first is closed
    for k, token in enumerate(tokens):
        if token == "{" or token in OPEN:
            depth += 1
        elif token == "}" or token in CLOSE:
            depth -= 1
            closes = k if depth == 0 and closes is None else closes
        elif depth == 0:
            top.add(token)
        elif depth == 1 and closes is None and token == ",":
            commas += 1
    if "=" in top or any(token.startswith("\\begin") for token in top):
        return "other"
    if top & RELATIONS:
        return "relation" if "," not in top else "other"
    if top & {"\\cup", "\\cap", "\\setminus"}:
        return "union"
    if top & {",", ";", "\\pm"}:
        return "list"
    if tokens and tokens[0] in OPEN and closes == len(tokens) - 1:
        if tokens[0] == "\\{":
            return "set" if commas or {"\\pm", "|", ":", "\\mid"} & set(tokens) else "one"
        if commas == 1:
            return "pair" if tokens[0] == "(" and tokens[-1] == ")" else "interval"
        return {"(": "tuple", "[": "list"}.get(tokens[0], "other") if commas else "other"
    return "other"


def latex(tokens: list[str]) -> str:
    """The tokens as text: a command parted from a letter, i as the imaginary unit, an exponent in braces."""
    out, ends = "", []  # ends: braces open before \\frac in an exponent
    index = bool({"\\sum", "\\prod", "_"} & set(tokens))
    for token in ("I" if token == "i" and not index else token for token in tokens):
        if token == "\\frac" and out[-2:].rstrip().endswith("^"):
            out, ends = out + "{", [*ends, 2]
        out += " " if out and token[0].isalpha() and out[-1].isalpha() else ""
        out += token
        if token == "{" and ends:
            ends.append(0)
        elif token == "}" and ends:
            if ends[-1] == 0:
                ends.pop()
            if ends and ends[-1] > 0:
                ends[-1] -= 1
                if ends[-1] == 0:
                    out += "}"
                    ends.pop()
    return out


PAIRS = {"pair", "interval"}
APART = [{"pair", "tuple", "interval", "relation", "union"}, {"list", "set"}]  # never the same thing


def compared(gold: str, answer: str) -> int:
    """What can be said without mathematics: EQUAL, UNEQUAL, UNREADABLE, or 0 if math-verify has to say it."""
    right = reading(gold)
    given = reading(answer, right.symbols)
    verdict = 0
    if right.words:
        words = squeezed(answer_words(answer))
        verdict = EQUAL if words == right.words else UNEQUAL if words or given.latex else UNREADABLE
    elif right.number is not None and given.number is not None:
        verdict = EQUAL if right.number == given.number else UNEQUAL
    elif given.words and right.latex:  # B, which may be a choice or a point, and \text{(B)}
        verdict = EQUAL if given.words == squeezed(answer_words(gold)) else UNEQUAL
    elif not given.latex or not right.latex:
        verdict = UNREADABLE
    elif any(right.kind in one and given.kind in other for one, other in (APART, APART[::-1])):
        verdict = UNEQUAL
    elif {right.kind, given.kind} == {"tuple", "relation"}:
        verdict = UNEQUAL
    elif {right.kind, given.kind} <= PAIRS and brackets(right.latex) != brackets(given.latex):
        verdict = UNEQUAL
    return verdict


def brackets(latex: str) -> tuple[str, str]:
    return latex[0], latex[-1]


def answer_words(answer: str) -> str:
    """The words of an answer, in \\text or bare; "" if there is more to it."""
    words = "".join(in_text(token) or token for token in trimmed(plain(answer)) if token != "$")
    return words if all(c.isalnum() or c in " .,()'" or c == "-" and before.isalnum()
                        for before, c in zip(" " + words, words, strict=False)) else ""


DIED = []  # answers of which the judge died


def judged(gold: str, answer: str) -> int:
    """EQUAL, UNEQUAL or UNREADABLE."""
    verdict = compared(gold, answer) or ask([(gold, answer)])
    if verdict == UNREADABLE and "=" not in gold and (value := behind_name(answer)):
        verdict = compared(gold, value) or ask([(gold, value)])
    return verdict


def behind_name(answer: str) -> str:
    r"""The 7 of \frac{AB}{BC} = 7, whose left side math-verify cannot read; "" if that is no name alone."""
    depth = 0
    for k, c in enumerate(answer):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and c in "=,;":
            words = set(re.findall(r"(?<![\\a-z])[a-z]+", answer[:k].lower()))
            said = words | set(plain(answer[:k]))
            return answer[k + 1 :] if c == "=" and words and not said & (RELATIONS | NO_UNIT | {"!"}) else ""
    return ""


def ask(pairs: list[tuple[str, str]]) -> int:
    """What math-verify says of (gold, answer), of several the worst. A judge that died is started again; what
    it dies of twice is unreadable."""
    job = []
    for gold, answer in pairs:
        right = reading(gold)
        sides = (right, reading(answer, right.symbols))
        if {side.kind for side in sides} <= PAIRS:  # as an interval (3, 2) would be empty, like (5, 4)
            sides = [side._replace(latex=f"({side.latex[1:-1]},0)") for side in sides]
        job.append([[side.latex, side.joint, side.parts, bases(side.latex)] for side in sides])
    for _ in range(2):
        judge = None
        try:
            judge = math_judge()
            print(json.dumps(job), file=judge.stdin, flush=True)
            return int(judge.stdout.readline())
        except (OSError, ValueError, RuntimeError):
            if not DIED and not math_judge.cache_info().currsize:
                raise  # it never worked
        if not DIED:
            atexit.register(lambda: print(f"math: the judge died {len(DIED)} times", file=sys.stderr))
        DIED.append(pairs[-1][1])
        math_judge.cache_clear()
        if judge:
            with contextlib.suppress(OSError), judge:  # it is buried, and its pipes are closed
                judge.kill()
    return UNREADABLE


def bases(text: str) -> list[str]:
    """Of numbers such as 52_8, which math-verify leaves out."""
    return re.findall(r"[0-9]_\{?([0-9]+)", text)


@functools.cache
def math_judge() -> subprocess.Popen:
    """math-verify in a process of its own. Its own remedy for 9^{9^{9^9}} is an alarm, which works in a main
    thread only, comes after five seconds, and puts no limit on memory."""
    source = f"{inspect.getsource(judge_math)}\njudge_math()"  # not an import of this file: numpy has threads
    with tempfile.TemporaryFile("w+") as errors:
        # -P: a random.py in the working directory is none of Python's
        judge = subprocess.Popen([sys.executable, "-P", "-c", source], text=True, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=errors,
                                 env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy iterates over sets
                                 start_new_session=True)  # a ctrl-C is for us alone
        if judge.stdout.readline() != "ready\n":
            errors.seek(0)
            why = (errors.read().strip().splitlines() or ["it does not start"])[-1]
            raise RuntimeError(f"math-verify does not work here: {why[:200]}; "
                               "pip install 'math-verify[antlr4_13_2]'")
    return judge


def judge_math():
    """For every line of stdin, a job, a child, and a line how it ended: 10 equal, 11 not, 12 it is not
    mathematics, else a limit. What an answer leaves in sympy's caches is gone with its child."""
    import contextlib, json, logging, os, re, resource, sys
    from functools import partial

    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import verify
    from math_verify.grader import unwrap_fcs

    nothing_added = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False,
                                        boxed="none", equations=False)

    def read(text: str, real: bool):
        text = normalize_latex(text, nothing_added)
        degrees = "=" in text and bool(re.search(r"\\(sin|cos|tan|cot|sec|csc)\b", text))  # cos 60° = 0.5
        return latex2sympy(text, is_real=real, convert_degrees=degrees, normalization_config=None)

    def read_side(latex: str, joint: str, parts: list[str], real: bool):
        if not parts:
            return read(latex, real)
        sets = [unwrap_fcs(read(part, real)).as_set() for part in parts]
        return sympy.Union(*sets) if joint == "or" else sympy.Intersection(*sets)

    def verdict(gold: list, answer: list) -> int:
        real = not any("I" in side[0] for side in (gold, answer))
        try:
            right, given = (read_side(*side[:3], real) for side in (gold, answer))
        except Exception:  # of many kinds
            return 12
        if right is None or given is None:
            return 12
        equal = partial(verify, timeout_seconds=None, float_rounding=12, allow_set_relation_comp=True)
        chains = [part for part in (given,) if isinstance(part, (sympy.And, sympy.Eq))]
        sides = [side for part in chains for eq in part.atoms(sympy.Eq) for side in eq.args if side.is_number]
        same = sides[:1] if isinstance(right, (sympy.And, sympy.Eq)) else right
        if not all(equal(same, side) for side in sides):  # x = 6 = 5, of which verify reads the last
            return 11
        return 10 if equal(right, given) and answer[3] in ([], gold[3] or ["10"]) else 11

    logging.disable()
    sys.stderr = open(os.devnull, "w")
    # whether it works; and a child that finds warm caches takes 15 ms, not 90
    for gold, answer, expected in (
            (r"\frac{1}{2}x", r"\frac{2x}{4}", 10), ("x^2+1", "x+1", 11), ("[0,1)", r"\{1,\sqrt{2}\}", 11),
            ("(1,2,3)", "(1,3,2)", 11), ("1,-2", "-2,1", 10), (r"(0,9)\cup(9,36)", r"(9,36]\cup(0,9)", 11),
            (r"(0,\frac{\pi}{2}]", r"0<x\le\frac{\pi}{2}", 10),
            (r"3\pm2\sqrt{2}", r"3+\sqrt{8},3-\sqrt{8}", 10),
            (r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 11),
            ("6-5I", "6+5I", 11), ("y=2x+3", "y=3+2x", 10),
            (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", 10)):
        assert verdict([gold, "", [], []], [answer, "", [], []]) == expected
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            for kind, limit in ((resource.RLIMIT_CPU, 2), (resource.RLIMIT_AS, 1 << 30)):
                with contextlib.suppress(ValueError, OSError):  # macOS has no limit on memory
                    resource.setrlimit(kind, (limit, limit))
            try:
                os._exit(max(verdict(*pair) for pair in json.loads(line)))
            except BaseException:
                os._exit(12)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


TASK = Recipe(math_row, math_reward, draw_text, {  # a few solutions in training have no box
    "train": lambda: [raw for raw in hub("ankner/math-500", split="train") if boxed(raw["solution"])],
    "test": lambda: hub("HuggingFaceH4/MATH-500", split="test")},
    flawed=unreadable, right=lambda row: f"\\boxed{{{row['answer']}}}")
