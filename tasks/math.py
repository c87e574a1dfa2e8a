r"""MATH: competition problems whose answer is an expression, a set, an interval, a matrix, a word ...

    row     {"prompt": "What is half of 3? ...", "question": "What is half of 3?", "answer": "\\frac{3}{2}"}
    answer  It is $\boxed{1.5}$.
"""

import atexit
import functools
import inspect
import json
import os
import subprocess
import sys

from tasks import Recipe, column, hub
from tasks.answers import BOXED, boxed, draw_text, plain


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


TASK = Recipe(math_row, math_reward, draw_text, {  # a few solutions in training have no box
    "train": lambda: [raw for raw in hub("ankner/math-500", split="train") if boxed(raw["solution"])],
    "test": lambda: hub("HuggingFaceH4/MATH-500", split="test")})
