"""Rows and where they come from: files, rows from which nothing can be learned, a right answer before
anything costly, and tasks of one's own."""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from test_tasks_real import HUMANEVAL, MBPP, write

import tasks
from tasks import OwnError, load

QUESTIONS = [{"question": f"What is {i}?", "answer": str(i)} for i in range(300)]


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("line, said", [
    ("Tom has 3 pens, 5 pencils,8", "line 2 has more cells than the 2 columns"),
    ("What?,1,450", "line 2 has more cells than the 2 columns"), ('"a, b",8,', "line 2 has more cells"),
    ('"What?,8\nOr?,9\n"What', "expected after"), ('"What?,8', "expected|unexpected")])
def test_a_comma_without_quotes_is_refused(tmp_path, line, said):
    (tmp_path / "data.csv").write_text(f"question,answer\n{line}\nWhat is two?,2\nAnd three?,3\n")
    with pytest.raises(ValueError, match=said):
        load("gsm8k", chat=True, data=str(tmp_path / "data.csv"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer,answer\nWhat?,1,2\n")
    with pytest.raises(ValueError, match="two columns have the same name"):
        load("gsm8k", chat=True, data=str(tmp_path / "data.csv"))


@pytest.mark.parametrize("question", ["NaN", "null", '"nan"', '""', "[1]", '{"a": 1}', "true"])
def test_what_is_no_question_is_dropped_and_told(tmp_path, capsys, question):
    lines = [json.dumps(row) for row in QUESTIONS] + [f'{{"question": {question}, "answer": "3"}}']
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    task = load("gsm8k", chat=True, test_data=str(tmp_path / "data.jsonl"), train=False)
    assert len(task.test) == 300 and "1 of 301 rows dropped, the first is row 301:" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".parquet", ".PARQUET", ".JSONL", ".Json", ".CSV"])
def test_other_files(tmp_path, suffix):
    pandas = pytest.importorskip("pandas")
    file = tmp_path / f"data{suffix}"
    if suffix.lower() == ".parquet":
        pandas.DataFrame(QUESTIONS).to_parquet(file)
    else:
        os.rename(write(tmp_path / f"data{suffix.lower()}", QUESTIONS), file)
    task = load("gsm8k", chat=True, test_data=str(file), train=False)
    assert [row["answer"] for row in task.test] == [row["answer"] for row in QUESTIONS]
    file.write_bytes(b"PAR1\xff and nothing else")
    with pytest.raises(ValueError, match="^[^\n]*cannot read [^\n]*$"):
        load("gsm8k", chat=True, test_data=str(file), train=False)


@pytest.mark.parametrize("numbers, target", [
    ("[3 7 2]", 24.0), ("[ 3  7\n 2]", "24"), ([3.0, 7.0, 2.0], 24), ("[3. 7. 2.]", "24.0"), ("3 7 2", 24),
    ("3.0, 7.0, 2.0", 24), ("[np.int64(3), np.int64(7), np.int64(2)]", 24), ("array([3, 7, 2])", 24)])
def test_countdown_as_pandas_writes_it(tmp_path, numbers, target):
    raws = [{"nums": numbers, "target": target}, {"nums": [1, 2], "target": 3}]
    task = load("countdown", chat=True, test_data=write(tmp_path / "data.json", raws), train=False)
    assert (task.test[0]["numbers"], task.test[0]["answer"]) == ([3, 7, 2], "24")


# ------------------------------------------------------------------- rows from which nothing can be learned


@pytest.mark.parametrize("name, change, said", [
    ("mbpp", {"test_list": ["import numpy\nassert add(pair(1, 2)) == numpy.int64(3)"]}, "import numpy"),
    ("mbpp", {"test_list": ["from solution import add\nassert add([1, 2]) == 3"]},
     "from solution import add"),
    ("mbpp", {"test_setup_code": "import torch", "test_list": ["assert add([1, 2]) == 3"]}, "import torch"),
    ("mbpp", {"code": "def add(both):\n    return 0",
              "test_list": ["assert add([1, 2]) == 3"]}, "its own solution"),
    ("mbpp", {"code": "import numpy\ndef add(both):\n    return both[0] + both[1]"}, "its own solution"),
    ("humaneval", {"canonical_solution": "    return x\n"}, "its own solution"),
    ("mbpp", {"test_list": ["add([1, 2])"]}, "asserts nothing"),
    ("mbpp", {"test_list": ["assert add([1, 2]) == 3", "print(add([1, 2]))"]}, "asserts nothing"),
    ("mbpp", {"test_list": ["assert (add([1, 2]) == 3, 'a sum')"]}, "asserts nothing"),
    ("humaneval", {"test": "def check(candidate):\n    candidate([1])\n    assert True"},
     "for a program that does nothing"),
])
def test_code_rows_from_which_nothing_can_be_learned(tmp_path, name, change, said):
    raw = (MBPP if name == "mbpp" else HUMANEVAL) | change
    with pytest.raises(ValueError, match=f"row 1: .*{said}"):
        load(name, chat=True, test_data=write(tmp_path / "data.json", [raw]), train=False)


def test_code_rows_that_are_kept(tmp_path):
    """A test may import what there is, try what may be missing, or assert in a helper or by an exception."""
    tests = ["import math\nassert add([1, 2]) == math.floor(3.5)",
             "try:\n    import numpy\nexcept ImportError:\n    pass\nassert add([1, 2]) == 3",
             "def same(a, b):\n    assert a == b\nsame(add([1, 2]), 3)",
             "try:\n    add(1)\n    assert False\nexcept TypeError:\n    pass"]
    raws = [MBPP | {"text": f"Add {i}.", "test_list": [test]} for i, test in enumerate(tests)]
    task = load("mbpp", chat=True, test_data=write(tmp_path / "data.json", raws), train=False)
    assert len(task.test) == 4


@pytest.mark.parametrize("gold", ["]]{{??", "The answer is 18", "#### 18", [18], ["a",
                                                                                  "b"], float("nan"), True,
                                                                                  "\\frac{"])
def test_answers_of_mathematics_that_cannot_be_read(tmp_path, capsys, gold):
    raws = [{"problem": f"What is {i}?", "answer": f"\\frac{{{i}}}{{7}}x"} for i in range(120)]
    raws[7]["answer"] = gold
    task = load("math", chat=True, test_data=write(tmp_path / "data.json", raws), train=False)
    assert len(task.test) == 119
    assert ": 1 of 120 rows dropped, the first is row 8: " in capsys.readouterr().out


# --------------------------------------------------------------------------- a right answer earns its reward


def test_a_reward_that_is_always_0_is_refused(tmp_path, monkeypatch):
    data = {"gsm8k": QUESTIONS, "sudoku": [{"puzzle": "3102200002100320", "solution": "3142243142131324"}],
            "math": [{"problem": "What?", "answer": "x+1"}], "countdown": [{"nums": [3, 5], "target": 8}],
            "humaneval": [HUMANEVAL], "mbpp": [MBPP]}
    for name, raws in data.items():
        file = write(tmp_path / f"{name}.json", raws)
        assert load(name, chat=True, test_data=file, train=False).test
        recipe = tasks.find(name).TASK
        with monkeypatch.context() as patch:
            patch.setattr(recipe, "reward", lambda text, row: (0.0, {"correct": 0.0, "parse_fail": 1.0}))
            with pytest.raises(ValueError, match=f"^{name}: a right answer earns 0.0"):
                load(name, chat=True, test_data=file, train=False)


def test_the_judge_of_mathematics_starts_anywhere(tmp_path):
    """Modules of the working directory are not Python's; and it judges where memory has no limit, too."""
    for name in ("resource", "json", "random", "types", "sympy", "logging", "math_verify"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    code = f"""import sys
sys.path[:] = [path for path in sys.path if path] + [{str(ROOT)!r}]
from tasks.math import math_reward
print(math_reward("\\\\boxed{{1+x}}", {{"answer": "x+1"}})[0])"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr
    limits = "import resource\ndef refused(*_): raise ValueError('no')\nresource.setrlimit = refused\n"
    (tmp_path / "sitecustomize.py").write_text(limits)
    for name in ("resource", "json", "random", "types", "sympy", "logging", "math_verify"):
        (tmp_path / f"{name}.py").unlink()
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout == "1.0\n", done.stderr


# ----------------------------------------------------------------------------------------- tasks of one's own


def test_the_task_of_the_readme(tmp_path):
    text = (ROOT / "tasks" / "README.md").read_text()
    (tmp_path / "words.py").write_text(re.search("```python\n(.*?)```",
                                                 text, re.DOTALL)[1].replace('"""R', 'r"""R'))
    data = write(tmp_path / "words.jsonl", [{"word": word} for word in ("stone", "tree", "river", "cloud")])
    task = load(str(tmp_path / "words.py"), chat=True, data=data)
    assert len(task.train) == 3 and task.test[0]["answer"] == "duolc"
    assert task.reward("It is \\boxed{duolc}.", task.test[0]) == (1.0, {"correct": 1.0, "parse_fail": 0.0})
    assert task.reward("It is duolc.", task.test[0]) == (0.0, {"correct": 0.0, "parse_fail": 1.0})
    assert task.draw("a\nb", task.test[0]) == ["a", "b"]
    with pytest.raises(ValueError, match="words.py has no training rows"):
        load(str(tmp_path / "words.py"), chat=True)
    with pytest.raises(ValueError, match="needs a model with a chat template"):
        load(str(tmp_path / "words.py"), chat=False, data=data)


HALF = """from tasks import Recipe
def reward(text, row):
    return 0.0, {'correct': 0.0, 'parse_fail': 0.0}
TASK = Recipe(lambda raw: {'prompt': '?'}, reward, """


@pytest.mark.parametrize("source, said", [
    (None, "cannot load .*mine.py: FileNotFoundError"), ("TASK = (", "cannot load .*mine.py: SyntaxError"),
    ("1 / 0", "cannot load .*mine.py: ZeroDivisionError"), ("import sys; sys.exit(3)", "mine.py: SystemExit"),
    ("", "mine.py defines no TASK"), ("TASK = 3", "must be a tasks.Recipe, not a int"),
    ("from tasks import Recipe\nTASK = Recipe(lambda raw: {'prompt': '?'}, lambda text, row: 1.0)",
     "mine.py: a reward is .*TypeError"),
    ("from tasks import Recipe\nTASK = Recipe(lambda raw: {'prompt': '?'}, lambda text, row: (1.0, {}))",
     "mine.py: a reward is .*'correct'"),
    ("from tasks import Recipe\nTASK = Recipe(lambda raw: {}, lambda text, row: 1.0)", "row 1: .*'prompt'"),
    *((HALF + option, said) for option, said in (
        ("draw=lambda text, row: 1 / 0)", "mine.py, line 4: a drawing is .*ZeroDivisionError"),
        ("draw=lambda text, row: 'text')", "a drawing is a list of lines"),
        ("draw=lambda text, row: [5])", "a drawing is a list of lines"),
        ("key=lambda row: [1])", "unhashable"), ("right=lambda row: row['a'])", "mine.py, line 4: KeyError"),
        ("flawed=lambda rows: None)", "mine.py: TypeError"), ("flawed=lambda rows: [True])", "mine.py: "),
        ("flawed=lambda rows: exit())", "mine.py, line 4: SystemExit"),
        ("sources={'test': 5})", "mine.py: TypeError"),
        ("sources={'test': lambda: 1 / 0})", "line 4: Zero"), ("flawed=lambda rows: [])", "0 answers for 1 "),
        ("right=lambda row: int('x'))", "mine.py, line 4: ValueError: invalid"),
        ("sources={'test': lambda: int('x' + chr(10))})", "mine.py, line 4: ValueError: invalid"))),
    (HALF.replace("'?'", "''") + ")", "row 1: its prompt is no text"),
    (HALF.replace("0.0, {", "float('inf'), {") + ")", "mine.py: a reward is .*finite"),
    (HALF.replace("'correct': 0.0", "'correct': 2") + ")", "mine.py: a reward is .*from 0 to 1"),
    (HALF.replace("{'prompt'", "exit() or {'prompt'") + ")", "row 1: .*"),
])
def test_a_task_of_ones_own_that_cannot_be_used(tmp_path, source, said):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    data = "" if source and "sources" in source else write(tmp_path / "rows.json", [{"a": 1}])
    with pytest.raises(ValueError, match=said) as refusal:
        load(str(tmp_path / "mine.py"), chat=True, test_data=data, train=False)
    assert "\n" not in str(refusal.value)


def test_a_row_is_not_changed_by_a_task_of_ones_own(tmp_path):
    """Nor are the lists in it, from which a reward may take what an answer has used."""
    (tmp_path / "mine.py").write_text("""from tasks import Recipe
def reward(text, row):
    right = float(row["left"].pop() == 3)
    return right, {"correct": right, "parse_fail": 0.0}
TASK = Recipe(lambda raw: {"prompt": "?", **raw}, reward, lambda text, row: [str(row["left"].pop())])""")
    data = write(tmp_path / "rows.json", [{"left": [1, 2, 3]}])
    task = load(str(tmp_path / "mine.py"), chat=True, test_data=data, train=False)
    for _ in range(3):
        assert task.reward("", task.test[0])[0] == 1.0 and task.draw("", task.test[0]) == ["3"]


@pytest.mark.parametrize("where", [
    "at import", "in a row", "in the reward", "in the reward, which then falls"])
def test_a_task_of_ones_own_leaves_the_process_as_it_was(tmp_path, where):
    """Working directory, gradients, default dtype: a run's folder may be relative, its update needs both."""
    at_import, in_row = ("change()" if where == place else "" for place in ("at import", "in a row"))
    fall = " / 0" if "falls" in where else ""
    (tmp_path / "mine.py").write_text(f"""import os, tempfile, torch
from tasks import Recipe
def change():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # and it is gone afterwards
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float16)
{at_import}
def reward(text, row):
    if text and {"reward" in where}:
        change()
        1{fall}
    return 0.0, {{"correct": 0.0, "parse_fail": 0.0}}
def row(raw):
    {in_row}
    return {{"prompt": "?"}}
TASK = Recipe(row, reward)""")
    before = os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype()
    data = write(tmp_path / "rows.json", [{}])
    task = load(str(tmp_path / "mine.py"), chat=True, test_data=data, train=False)
    assert (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype()) == before
    with pytest.raises(OwnError) if fall else contextlib.nullcontext():
        task.reward("1", task.test[0])
    assert (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype()) == before


@pytest.mark.parametrize("questions, held", [
    (1, None), (2, 1), (9, 1), (300, 30), (10240, 1024), (12000, 1024)])
def test_of_a_source_without_held_out_rows_a_tenth_is_held_out_and_1024_at_most(tmp_path, questions, held):
    (tmp_path / "mine.py").write_text(f"""from tasks import Recipe
TASK = Recipe(lambda raw: {{"prompt": str(raw["n"])}},
              lambda text, row: (0.0, {{"correct": 0, "parse_fail": 0}}),
              sources={{"train": lambda: [{{"n": n}} for n in range({questions})]}})""")
    if held is None:
        with pytest.raises(ValueError, match="no training rows are left"):
            load(str(tmp_path / "mine.py"), chat=True)
    else:
        task = load(str(tmp_path / "mine.py"), chat=True)
        assert (len(task.train), len(task.test)) == (questions - held, held)
        assert {row["prompt"] for row in task.test} == set(map(str, range(questions - held, questions)))
