"""What MBPP and HumanEval share: rows with tests, and the share of them that a program passes."""

import ast

from tasks import column, listed
from tasks.answers import code_block
from tasks.sandbox import run_tests

CODE = "Answer with one ```python block that holds the whole function and all it needs."


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
