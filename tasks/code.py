"""What MBPP and HumanEval share: rows with tests, and the share of them that a program passes."""

import ast
import warnings

from tasks import column, listed
from tasks.answers import code_block
from tasks.sandbox import run_tests

CODE = "Answer with one ```python block that holds the whole function and all it needs."


SOLUTIONS = ("canonical_solution", "code")  # where a published row has its own


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
    with warnings.catch_warnings(action="ignore"):
        for source in (head, setup, *tests):
            compile(source, "<test>", "exec")
    own = next((raw[name] for name in SOLUTIONS if isinstance(raw.get(name), str) and raw[name].strip()), "")
    if own and "entry_point" in raw:  # HumanEval's is the body
        own = f"{raw['prompt']}{own}"
    return {"solution": own, "prompt": f"{shown}\n{CODE}",
            "question": asked.partition("\nYour code should pass")[0],
            "answer": tests[0].splitlines()[-1], "head": head,
            "tests": [f"{setup}\n{test}" for test in tests]}  # again: a program may redefine its head


def code_flawed(rows: list[dict]) -> list[str]:
    """For each row why nothing can be learned from it, "" if something can: its tests pass for any program,
    or for none."""
    if run_tests("x = 1", ["assert x == 1", "assert x == 2"]) != [True, False]:
        raise ValueError("the sandbox passes no right program here, or a wrong one")
    missing = not_importable(rows)
    why = []
    for row, free, absent, failed in zip(rows, code_free(rows), missing, own_failed(rows), strict=True):
        if free:
            why.append("its tests pass for a program that does nothing")
        elif not all(map(asserts, row["tests"])):
            why.append("a test of it asserts nothing")
        elif absent:
            why.append(f"its tests need what the sandbox does not have: {absent}")
        else:
            why.append("its own solution fails its tests" if failed else "")
    return why


def code_free(rows: list[dict]) -> list[bool]:
    """Which rows reward a program that does nothing: a test passes alone, or all after the head. (Some may: a
    function of HumanEval without its body returns None.) All in one sandbox; if a test ends it, in halves."""
    ways = [[way for test in row["tests"] for way in (test, f"{row['head']}\n{test}")] for row in rows]
    return [any(marks[::2]) or all(marks[1::2]) for marks in passing(ways, 1.0)]


def own_failed(rows: list[dict]) -> list[bool]:
    """Which rows have a solution of their own that fails, 20 of them in one sandbox."""
    known = [k for k, row in enumerate(rows) if row["solution"]]
    ways = [[f"{rows[k]['head']}\n{rows[k]['solution']}\n{test}" for test in rows[k]["tests"]] for k in known]
    marks = [mark for k in range(0, len(ways), 20) for mark in passing(ways[k : k + 20], 5.0)]
    failed = {k for k, found in zip(known, marks, strict=True) if not all(found)}
    return [k in failed for k in range(len(rows))]


def passing(ways: list[list[str]], timeout: float) -> list[list[bool]]:
    """Which tests pass without a program, in one sandbox; if one ends it, in halves."""
    passed = run_tests("", [*(test for tests in ways for test in tests), "pass"], timeout=timeout)
    if not passed[-1] and len(ways) > 1:
        return passing(ways[: len(ways) // 2], timeout) + passing(ways[len(ways) // 2 :], timeout)
    marks = iter(passed)
    return [[next(marks) for _ in tests] for tests in ways]


def not_importable(rows: list[dict]) -> list[str]:
    """What the tests of each row import and the sandbox does not have: numpy, or the program as a module."""
    found = []
    for row in rows:
        trees = [ast.parse(test) for test in row["tests"]]
        tried = {inner for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Try)
                 for inner in ast.walk(node)}  # what fails there is caught
        found.append({ast.unparse(node) for tree in trees for node in ast.walk(tree)
                      if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in tried})
    imports = sorted(set().union(*found))
    there = dict(zip(imports, run_tests("", [*imports, "pass"]), strict=False))
    return [", ".join(sorted(line for line in lines if not there[line])) for lines in found]


def asserts(test: str) -> bool:
    """Whether a test can fail by what it finds: `assert (x, "message")` and `assert True` cannot."""
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Assert):
            always = isinstance(node.test, ast.Tuple) and node.test.elts or (
                isinstance(node.test, ast.Constant) and node.test.value)
            if not always:
                return True
        called = node.func if isinstance(node, ast.Call) else None
        name = getattr(called, "attr", getattr(called, "id", ""))
        if isinstance(node, ast.Raise) or name.lower().startswith(("assert", "fail", "raises")):
            return True
    return False


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
    passed = run_tests(code, row["tests"], head=row["head"])
    return sum(passed) / len(passed), {"correct": float(all(passed)), "parse_fail": 0.0}


def code_right(row: dict) -> str | None:
    """The row's own solution, as a model would write it."""
    return f"```python\n{row['solution']}\n```" if row["solution"] else None
