"""The house: which file may import which, and what importing one costs."""

import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

ABOVE = [["parallel"], ["common"], ["tasks", "models", "report"], ["pretrain"], ["run"],
         ["egspo", "rldf", "wd1", "gdsd", "compare"]]
FLOOR = {name: floor for floor, names in enumerate(ABOVE) for name in names}


def arrows(source: str) -> set[str]:
    """The modules of ours that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & FLOOR.keys()


def points_up(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Arrows that do not lead to a lower floor: without one there is no circle either."""
    return [(a, b) for a, found in graph.items() for b in found if FLOOR[b] >= FLOOR[a]]


def test_arrows_point_down():
    graph = {name: arrows((ROOT / f"{name}.py").read_text()) for name in FLOOR.keys() - {"tasks"}}
    graph["tasks"] = set.union(*(arrows(file.read_text()) for file in (ROOT / "tasks").glob("*.py")))
    assert graph["tasks"] == {"common", "tasks"}  # its own files; test_task_files has their arrows
    graph["tasks"] = {"common"}
    assert set(FLOOR) == {file.stem for file in ROOT.glob("*.py")} | {"tasks"}
    assert points_up(graph) == []
    methods = [arrows(file.read_text()) for file in (ROOT / "baselines").glob("*.py")]
    methods += [graph[method] for method in ABOVE[-1][:4]]
    assert all(found == {"common", "run"} for found in methods)
    bad = graph | {"common": arrows("def f():\n    from run import Run")}
    assert points_up(bad) == [("common", "run")]
    assert points_up(graph | {"models": arrows("import tasks")}) == [("models", "tasks")]  # no side doors


def test_the_gpu_benchmark_runs():
    """On a small body and a CPU: nobody has a GPU to notice on that it does not."""
    command = [sys.executable, "benchmarks/gpu.py", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row["model"] == "tiny" and row["rollout_tokens_per_s"] > 0 and row["update_s"] > 0


@pytest.mark.parametrize("code, without", [
    ("from common import denoise", "tyro datasets matplotlib transformers"),
    ("import egspo", "datasets matplotlib transformers math_verify"),
])
def test_what_an_import_brings(code, without):
    check = f"import sys; {code}; print(*[name for name in {without.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_task_files():
    """A task imports what all tasks share; of the other tasks none knows one but those on code."""
    known = {"answers", "spelling", "code", "sandbox"}
    for file in (ROOT / "tasks").glob("*.py"):
        found = {node.module for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.ImportFrom) and node.module.startswith("tasks.")}
        allowed = {"__init__": set(), "answers": set(), "spelling": set(), "sandbox": set(),
                   "code": {"answers", "sandbox"}}
        assert found <= {f"tasks.{name}" for name in allowed.get(file.stem, known)}, file.stem


def test_a_task_is_imported_when_it_is_asked_for():
    check = ("import sys, tasks; tasks.find('gsm8k'); "
             "print(*[name for name in sys.modules if name.startswith('tasks.')])")
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"tasks.answers", "tasks.spelling", "tasks.gsm8k"}
