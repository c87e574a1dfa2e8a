"""The house: which file may import which, and what importing one costs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

METHODS = ("egspo", "rldf", "wd1", "gdsd")
FOLDERS = ("plumbing", "tasks", "baselines", "benchmarks", "tests")


def module(file: Path) -> str:
    """The name a file is imported by: "tasks" of tasks/__init__.py, "plumbing.run" of plumbing/run.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(file): file for file in [*ROOT.glob("*.py"), *(f for folder in FOLDERS
                                                               for f in (ROOT / folder).glob("*.py"))]}


def arrows(tree: ast.AST, ours=frozenset(FILES)) -> set[str]:
    """The modules of ours that a part of a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}  # from plumbing import parallel
            found |= (inside & ours) or {node.module}
    return {name for name in found if name in ours or name.split(".")[0] in FOLDERS}


def house(name: str) -> str:
    """What a module belongs to: "common", "a method", or its folder."""
    first = name.split(".")[0]
    return "a method" if first in METHODS or first == "baselines" else first


ALLOWED = {
    "common": set(),
    "a method": {"common"},
    "plumbing": {"common", "tasks", "plumbing"},
    "tasks": {"common", "tasks"},
}


def wrong_arrows(name: str, source: str) -> set[str]:
    """What a file of ours imports and may not. A method may call the plumbing when it is run as a script."""
    tree = ast.parse(source)
    if house(name) == "a method":
        last = tree.body[-1]
        assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'", name
        assert ast.unparse(last.body[0]) == "from plumbing.run import main" and len(last.body) == 2, name
        tree.body.pop()
    return {found for found in arrows(tree) if house(found) not in ALLOWED[house(name)]}


def test_arrows():
    """common knows nothing of ours, a method common alone, and nothing knows benchmarks or tests."""
    for name, file in FILES.items():
        if house(name) in ALLOWED:
            assert wrong_arrows(name, file.read_text()) == set(), name
    script = '\nif __name__ == "__main__":\n    from plumbing.run import main\n\n    main()\n'
    for name, source, found in [
            ("common", "def f():\n    from plumbing import parallel", {"plumbing.parallel"}),
            ("plumbing.models", "import benchmarks.compare", {"benchmarks.compare"}),
            ("tasks.code", "from plumbing.run import main", {"plumbing.run"}),
            ("egspo", "import wd1" + script, {"wd1"}),
            ("baselines.espo", "from plumbing import parallel\nfrom common import score" + script,
             {"plumbing.parallel"})]:
        assert wrong_arrows(name, source) == found
    with pytest.raises(AssertionError):
        wrong_arrows("egspo", "from common import score")


def test_the_root_is_the_card():
    assert {file.stem for file in ROOT.glob("*.py")} == {"common", *METHODS}


def without_circle(graph: dict[str, set[str]]) -> bool:
    """Can the modules be taken away one after the other, each when it knows none of those left?"""
    left = dict(graph)
    while free := [name for name, found in left.items() if not found & left.keys() - {name}]:
        for name in free:
            del left[name]
    return not left


@pytest.mark.parametrize("folder", ["plumbing", "tasks"])
def test_no_circle(folder):
    graph = {name: arrows(ast.parse(file.read_text())) for name, file in FILES.items()
             if house(name) == folder and name != folder}
    assert without_circle(graph)
    first, second = list(graph)[:2]
    assert not without_circle(graph | {first: {second}, second: {first}})


def test_the_gpu_is_hidden_from_the_tests():
    """Before torch is imported, and from processes that tests start; test_cuda.py alone may ask for it."""
    assert os.environ.get("TEST_CUDA") or os.environ["CUDA_VISIBLE_DEVICES"] == ""
    text = (ROOT / "tests" / "conftest.py").read_text()
    assert text.index("CUDA_VISIBLE_DEVICES") < text.index("import torch")


def test_the_gpu_benchmark_runs():
    """On a small body and a CPU: nobody has a GPU to notice on that it does not."""
    command = [sys.executable, "benchmarks/gpu.py", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row["model"] == "tiny" and row["rollout_tokens_per_s"] > 0 and row["update_s"] > 0


@pytest.mark.parametrize("code, without", [
    ("from common import denoise", "tyro datasets matplotlib transformers"),
    ("import egspo", "tyro datasets matplotlib transformers math_verify plumbing tasks"),
    ("from plumbing.run import main", "datasets matplotlib transformers math_verify"),
])
def test_what_an_import_brings(code, without):
    check = f"import sys; {code}; print(*[name for name in {without.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_task_files():
    """A task imports what all tasks share; of the other tasks none knows one but those on code, and word
    problems, whose reward is gsm8k's."""
    known = {"answers", "spelling", "code", "sandbox"}
    for file in (ROOT / "tasks").glob("*.py"):
        found = {node.module for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.ImportFrom) and node.module.startswith("tasks.")}
        allowed = {"__init__": set(), "answers": set(), "spelling": set(), "sandbox": set(),
                   "code": {"answers", "sandbox"}, "word_problems": {"answers", "gsm8k"}}
        assert found <= {f"tasks.{name}" for name in allowed.get(file.stem, known)}, file.stem


def test_a_task_is_imported_when_it_is_asked_for():
    check = ("import sys, tasks; tasks.find('gsm8k'); "
             "print(*[name for name in sys.modules if name.startswith('tasks.')])")
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"tasks.answers", "tasks.spelling", "tasks.gsm8k"}


def test_every_test_that_is_named_somewhere_exists():
    """In a README or in a docstring, by its file or with its name."""
    readers = [*ROOT.glob("**/README.md"), *(file for name, file in FILES.items() if house(name) in ALLOWED)]
    named = {found for file in readers for found in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?",
                                                              file.read_text())}
    assert len(named) > 20
    for file, name in named:
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, (file, name)
