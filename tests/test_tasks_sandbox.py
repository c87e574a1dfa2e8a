"""Attacks on the sandbox: none may score, survive, or leave anything behind in the process that calls it."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT

from tasks import sandbox
from tasks.sandbox import run_tests

TESTS = ["assert f(1) == 10", "assert all([abs(f(2) - 20) < 1])", "import math\nassert math.fabs(f(3)) == 7"]
WRONG = "def f(x): return 0\n"
RIGHT = "def f(x): return [0, 10, 20, 7][x]\n"
LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1)  # its version, -1 without


def running(mark) -> list[int]:
    """Living processes with `mark` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(mark) in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
    return found


def wait_until(condition) -> bool:
    """Whether it becomes true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def state() -> tuple:
    """What a call must leave as it was in this process."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    children = Path("/proc/thread-self/children").read_text()
    return os.getcwd(), environ, sorted(os.listdir("/proc/self/fd")), children, threading.active_count()


@pytest.fixture(params=[True, False], ids=["namespaces", "fallback"])
def layers(request, monkeypatch) -> bool:
    monkeypatch.setattr(sandbox, "NAMESPACES", request.param)
    return request.param


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The supervisor under a name of its own, so that whatever comes from it can be found."""
    return Path(shutil.copy(sandbox.__file__, tmp_path_factory.mktemp("sandbox")))


@pytest.fixture(autouse=True)
def nothing_stays(script, monkeypatch):
    monkeypatch.setattr(sandbox, "__file__", str(script))
    monkeypatch.setattr(tempfile, "tempdir", str(script.parent))
    before = state()
    yield
    assert running(script.parent) == []
    assert os.listdir(script.parent) == [script.name]
    assert state() == before


@pytest.fixture
def untouchable(layers):
    """Skips where nothing keeps a program from killing this very process."""
    attempt = f"import os\ntry: os.kill({os.getpid()}, 0)\nexcept OSError: failed = True"
    if run_tests(attempt, ["assert failed"]) == [False]:
        pytest.skip("needs namespaces, root or Landlock 6 (Linux 6.12)")


@pytest.fixture
def may_fork(layers):
    """Skips where the other processes of this user count for the program's limit."""
    if run_tests("import os\nif os.fork() == 0: os._exit(0)", ["assert True"]) == [False]:
        pytest.skip("needs namespaces, root or a user with few processes")


def isolated() -> bool:
    """Whether the namespaces are there."""
    return run_tests("import os\npid = os.getpid()", ["assert pid == 1"]) == [True]


# ----------------------------------------------------------------------------------------- as in plain Python

PLAIN = """import json, os, sys, types
program, tests = json.load(sys.stdin)
out, marks = os.dup(1), []
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for test in tests:
    pid = os.fork()
    if pid == 0:
        try:
            sys.modules["program"] = module = types.ModuleType("program")
            exec(program, vars(module))
            exec(test, vars(module))
        except BaseException:
            os._exit(1)
        os._exit(0)
    marks.append(os.waitpid(pid, 0)[1] == 0)
os.write(out, json.dumps(marks).encode())"""


def plain_exec(program: str, tests: list[str], folder: Path | None = None) -> list[bool]:
    """Which tests pass after the program in one process, each with the program for itself."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", PLAIN], input=json.dumps([program, tests]),
                          capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout)


def read_pairs() -> dict[str, tuple[list[str], list[str]]]:
    """Kind: a right program and wrong ones, and the tests for all of them."""
    kinds = {}
    for text in (Path(__file__).parent / "sandbox_pairs.txt").read_text().split("==== ")[1:]:
        programs, tests = text.partition("\n")[2].rstrip("\n").split("---- tests\n")
        kinds[text.partition("\n")[0]] = programs.split("---- wrong\n"), tests.split("\n\n")
    return kinds


PAIRS = read_pairs()


@pytest.mark.parametrize("kind", PAIRS)
def test_verdicts_are_those_of_plain_python(kind):
    """There a program and its tests share all objects: copies, identity, operators, exceptions ..."""
    programs, tests = PAIRS[kind]
    for program in programs:
        plain, ours = plain_exec(program, tests), run_tests(program, tests, timeout=10)
        assert [test for test, mark in zip(tests, plain, strict=True) if mark] \
            == [test for test, mark in zip(tests, ours, strict=True) if mark]
        assert all(plain) or program != programs[0]
    assert len(programs) > 1


def test_the_pairs_are_many():
    assert sum(len(programs) * len(tests) for programs, tests in PAIRS.values()) > 800


CANNOT = {  # what passes in plain Python and not here: the docstring names it
    "compare with a value": ("class V:\n    def __eq__(self, other): return other == 5", "assert V() == 5"),
    "order with a value": ("class V:\n    def __lt__(self, other): return other > 5", "assert V() < 6"),
    "text that is equal to more": (
        "class T(str):\n    def __eq__(self, other): return str(self) == other.lower()",
        "assert T('a') == 'A'"),
    "difference with a value": (
        "class V:\n    def __sub__(self, other): return V()\n    def __eq__(self, other): return True",
        "assert V() - 1 == V()"),
    "number made with a value": ("class V:\n    def __mul__(self, other): return 6", "assert V() * 3 == 6"),
    "in without items": ("class V:\n    def __contains__(self, item): return item == 5", "assert 5 in V()"),
    "derive from": ("class V:\n    x = 5", "class W(V): pass\nassert W().x == 5"),
    "private names": ("def f(v): return v._x", "class V: _x = 5\nassert f(V()) == 5"),
    "change a name": ("X = 1\ndef f(): return X", "X = 2\nassert f() == 2"),
    "patch a module": ("import time\ndef f(): return time.time()",
                       "import time\ntime.time = lambda: 5\nassert f() == 5"),
    "inspect": ("def f(x): return x",
                "import inspect\nassert list(inspect.signature(f).parameters) == ['x']"),
    "dataclasses": ("import dataclasses\n@dataclasses.dataclass\nclass V:\n    x: int = 5",
                    "import dataclasses\nassert dataclasses.asdict(V()) == {'x': 5}"),
    "text in C": ("class T(str): pass\ndef f(): return T('a')", "assert ','.join([f()]) == 'a'"),
    "pickle": ("class V: pass", "import pickle\nassert pickle.dumps([V()])"),
    "share a file": ("def f(name): return open(name).read()",
                     "open('note', 'w').write('x')\nassert f('note') == 'x'"),
    "identity of text": ("def f(x): return x", "x = 'a' * 50\nassert f(x) is x"),
    "getstate": ("import random\ndef f(): return random.random()",
                 "import random\ns = random.getstate()\na = f()\nrandom.setstate(s)\nassert f() == a"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_test_cannot_do(name, tmp_path):
    program, test = CANNOT[name]
    assert plain_exec(program, [test], tmp_path) == [True] and run_tests(program, [test]) == [False]


def test_a_program_begins_with_a_future_import():
    program = "from __future__ import annotations\ndef f(x: Unknown) -> Unknown: return x + one"
    assert run_tests(program, ["assert f(1) == 2"], head="import math\none = 1") == [True]
    assert run_tests(program, ["assert f(1) == 2"], head="one = ") == [False]


# ----------------------------------------------------------------------------------------------------- honest


def test_each_test_counts_for_itself(layers):
    assert run_tests("def f(x): return 2 * x", ["assert f(2) == 4", "assert f(2) == 5", "assert f(3) == 6"]) \
        == [True, False, True]
    assert run_tests(RIGHT, TESTS) == [True] * 3
    assert run_tests(RIGHT, []) == []
    assert run_tests(RIGHT, ["assert g(1)", "x = (", "raise SystemExit", "1 / 0", "assert f(1) == 10"]) \
        == [False] * 4 + [True]


def test_tests_do_not_see_each_other():
    tests = ["f = len", "assert f(1) == 10", "def f(x): return 0", "assert f(1) == 10"]
    assert run_tests(RIGHT, tests) == [True] * 4


def test_forms_of_the_data_sets():
    """MBPP's and HumanEval's check(candidate), and MBPP's function that is called `sum`."""
    check = "def check(candidate):\n    assert {0}(10, 15) == 6\n    assert candidate(4, 6) == 3\ncheck({0})"
    program = "def {0}(a, b): return builtins_sum(i for i in range(1, a + 1) if a % i == b % i == 0)"
    for name in "divisors", "sum":
        right = "builtins_sum = sum\n" + program.format(name)
        assert run_tests(right, [check.format(name)]) == [True]
        assert run_tests(right, [f"assert {name}(4, 6) == {n}" for n in (3, 4)]) == [True, False]
        assert run_tests(right.replace("range(1,", "range(2,"), [check.format(name)]) == [False]


def test_ordinary_programs_work(layers):
    """Modules that are files, dataclasses that look for their module, a file in the folder; no script."""
    program = """from __future__ import annotations
import collections.abc, dataclasses, decimal, hashlib, heapq, json.tool, os, statistics
@dataclasses.dataclass
class Point:
    x: int
first = os.listdir(".")
with open("note", "w") as file:
    file.write("kept")
with open(os.devnull, "w") as file:
    print("discarded", file=file)
def kept():
    return open("note").read()
if __name__ == "__main__":
    raise ValueError
"""
    tests = ["assert Point(1) == Point(1)", "assert kept() == 'kept' and first == []",
             "assert 'é'.encode('latin-1') == b'\\xe9'", "assert hashlib.md5(b'').hexdigest()[:4] == 'd41d'"]
    assert run_tests(program, tests) == [True] * 4


CLASSES = """import abc, collections, dataclasses, enum
class Node:
    count = 0
    def __init__(self, value, *, what=None):
        self.value, self.left, self.right = value, None, None
        Node.count += 1
    def __len__(self): return 1 + sum(len(n) for n in (self.left, self.right) if n)
    def __iter__(self): yield from (self.value, *(self.left or ()), *(self.right or ()))
    def __getitem__(self, i): return list(self)[i]
    def __repr__(self): return f"Node({self.value})"
Pair = collections.namedtuple("Pair", "a b")
class Stack(list):
    def push(self, value): self.append(value)
class Color(enum.IntEnum):
    RED = 1
@dataclasses.dataclass(order=True, frozen=True)
class Point:
    x: int
    def __add__(self, other): return Point(self.x + other.x)
class TooMuch(ValueError): pass
only = Node(0)
log = []
def height(node): return 0 if node is None else 1 + max(height(node.left), height(node.right))
def same(node): return node
def one(): return only
def fail(text): raise TooMuch(text)
def note(x): log.append(x)
def numbers():
    n = 0
    while True:
        yield n
        n += 1
"""
SETUP = "root = Node(1)\nroot.left = Node(2, what=3)\nroot.left.right = Node(5)\n"  # as in MBPP 367 and 927


def test_objects_of_the_program(layers):
    """They stay with the program; to a test they are what they are in Python."""
    tests = ["assert height(root) == len(root) == 3 and root.left.value == 2 and height(None) == 0",
             "assert list(root) == [1, 2, 5] and 5 in root and 7 not in root and max(root) == 5",
             "assert root[1] == 2 and root[:2] == [1, 2] and str(root) == f'{root}' == 'Node(1)'",
             "assert same(root) is root and one() is one() is not root and isinstance(root, Node)",
             "assert root != 1 and root != None and root and not isinstance(root, int) and root in [3, root]",
             "assert hasattr(root, 'left') and not hasattr(root, 'middle') and Node.count > 0",
             "p = Pair(1, b=2)\nassert p == (1, 2) and (1, 2) == p and p.b == p[1] == max(p) and len(p) == 2",
             "s = Stack([1])\ns.push(2)\nassert s == [1, 2] and s + [3] == [1, 2, 3] and s.pop() == 2",
             "assert Color.RED == 1 and Color.RED < 2 and Color.RED.name == 'RED' and {Color.RED: 5}[1] == 5",
             "assert Point(1) == Point(1) < Point(1) + Point(2) == Point(3)",
             "assert {Point(1), Point(1)} == {Point(1)} != {Point(2)}",
             "n = numbers()\nassert [next(n), next(n)] == [0, 1] == [a for a, b in zip(numbers(), 'xy')]",
             "note(1)\nassert log == [1]",
             "try: fail('x')\nexcept ValueError as error: assert str(error) == 'x'\nelse: assert False"]
    assert run_tests(CLASSES, [SETUP + test for test in tests]) == [True] * len(tests)
    assert run_tests(CLASSES, [SETUP + "assert root == root.left", "assert Point(1) == Point(2)",
                               "assert Pair(1, 2) == (1, 3)", "assert next(numbers()) == 1"]) == [False] * 4


def test_values_arrive_as_they_were_sent(layers):
    """By way of the program and back, with their types; what it changes is changed, functions are called."""
    program = """import collections, decimal, fractions, datetime, functools
def twice(f):
    @functools.wraps(f)
    def both(x): return f(f(x))
    return both
def same(x): return x
def kind(x): return type(x)
def call(f, *args, **options): return f(*args, **options)
def each(f, items): return [f(item) for item in items]
def change(numbers, table, chosen):
    numbers.sort()
    table.pop("a")
    chosen.add(3)
def huge(n): return list(range(n))
def power(n): return 10 ** n
def named(**options): return options
counter, ordered = collections.Counter("aab"), collections.OrderedDict(b=1, a=2)
default, queue = collections.defaultdict(list, a=[1]), collections.deque([1, 2])
decimals, third = decimal.Decimal("0.10"), fractions.Fraction(1, 3)
day = datetime.date(2024, 2, 29)"""
    values = [None, True, 1, -0.0, 1e300, 2**64, -2**63, 1j, "é\U0001f600\0", b"\xff", bytearray(b"a"), (),
              (1, (2,)), [1, [2.0]], {1: {"a": (None,)}, (1, 2): [3], None: 1}, {1}, frozenset({1}), range(3)]
    tests = [f"x = {value!r}\ny = same(x)\nassert repr(x) == repr(y) and type(x) is type(y) is kind(x)"
             for value in values]
    tests += ["assert same(int) is int and kind([]) == list and same(1) != same('1')",
              "x = same(float('nan'))\nassert x != x and same(float('-inf')) == float('-inf')",
              "assert call(lambda x, y: x + y, 1, y=2) == 3 and call(max, 1, 2) == 2 and call(len, [1]) == 1",
              "assert twice(lambda x: x + 1)(1) == 3",
              "assert each(str.upper, 'ab') == ['A', 'B'] and each(abs, iter([-1])) == [1]",
              "a, b, c = [2, 1], {'a': 1, 'b': 2}, set()\nd = a\nchange(a, b, c)\n"
              "assert (d, b, c) == ([1, 2], {'b': 2}, {3})",
              "assert huge(100_000) == list(range(100_000))", "assert power(10_000) == 10 ** 10_000",
              "assert named(self=1, what=2, name=3) == {'self': 1, 'what': 2, 'name': 3}",
              "assert counter == {'a': 2, 'b': 1} and counter.most_common(1) == [('a', 2)]",
              "assert list(ordered) == ['b', 'a'] and default['a'] == [1]\n"
              "from collections import deque\nassert queue == deque([1, 2]) and queue != [1, 2]",
              "import decimal, fractions, datetime\nassert decimals == decimal.Decimal('0.1')\n"
              "assert third == fractions.Fraction(1, 3) and day == datetime.date(2024, 2, 29)"]
    assert run_tests(program, tests) == [True] * len(tests)


def test_a_wait_for_a_core_does_not_count():
    """Half a second of work while two others want the same core: too long by the clock alone."""
    program = "import time\nwhile time.process_time() < 0.5: pass\n" + RIGHT
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        assert run_tests(program, TESTS, timeout=0.8) == [True] * 3
    finally:
        os.sched_setaffinity(0, cores)
        for process in others:
            process.kill()
            process.wait()


def test_threads_get_the_same_verdicts():
    programs = [f"def f(x): return {'x * 10' if i % 2 else 'exit'}\n" + ("while 1: 1" if i == 4 else "")
                for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda program: run_tests(program, TESTS, timeout=0.6), programs))
    assert verdicts == [[bool(i % 2), bool(i % 2), False] for i in range(8)]


def test_what_is_not_the_programs_fault_is_raised(monkeypatch):
    monkeypatch.setattr(sandbox, "PAUSES", (0, 0))
    monkeypatch.setattr(sandbox, "__file__", "/nowhere/sandbox.py")
    monkeypatch.setattr(sandbox, "health", {"works": False, "failures": 0})
    with pytest.raises(RuntimeError, match="nowhere"):
        run_tests(RIGHT, TESTS)


def test_a_failure_that_passes(monkeypatch, capsys):
    """No process to be had: it tries again; if that lasts, and it has worked before, no test passes."""
    def fails(times: int):
        failures = iter([OSError(11, "Resource temporarily unavailable")] * times)

        def start(*args):
            for failure in failures:
                raise failure
            return true_start(*args)
        monkeypatch.setattr(sandbox, "start_supervisor", start)

    true_start = sandbox.start_supervisor
    monkeypatch.setattr(sandbox, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(sandbox, "health", {"works": False, "failures": 0})
    fails(2)
    assert run_tests(RIGHT, TESTS) == [True] * 3
    for count in 1, 2:
        fails(3)
        assert run_tests(RIGHT, TESTS) == [False] * 3
        assert f"no sandbox for {count} programs" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- forging

FORGERS = {
    "syntax error": "def f(x: return 10",
    "null byte": WRONG + "\0",
    "surrogate": WRONG + "'\ud800'",
    "nested": "(" * 100_000,
    "raises": RIGHT + "raise ValueError",
    "raises BaseException": RIGHT + "raise BaseException",
    "sys.exit": RIGHT + "import sys; sys.exit(0)",
    "os._exit": RIGHT + "import os; os._exit(0)",
    "segmentation fault": RIGHT + "import ctypes; ctypes.string_at(0)",
    "sys.exit in f": "import sys\ndef f(x): sys.exit(0)",
    "os._exit in f": "import os\ndef f(x): os._exit(0)",
    "os._exit in a thread": RIGHT + """import os, threading
thread = threading.Thread(target=os._exit, args=[0])
thread.start()
thread.join()""",
    "interrupt in f": "def f(x): raise KeyboardInterrupt",
    "generator exit in f": "def f(x): raise GeneratorExit",
    "recursion": "def f(x): return f(x)",
    "prints": WRONG + """import sys
for stream in sys.stdout, sys.stderr, sys.__stdout__: print("111", "3 passed", file=stream, flush=True)""",
    "writes": WRONG + """import os
for fd in range(64):
    for text in (b"111", b"0" * 32 + b"111"):
        try: os.write(fd, text)
        except OSError: pass""",
    "floods the judge": WRONG + "import os\nwhile True: os.write(4, b'1' * 65536)",
    "writes marks": "import os; os.write(4, b'111'); os._exit(0)",
    "writes a report": "import os; os.write(4, b'.111.'); os._exit(0)",
    "closes everything": RIGHT + "import os; os.closerange(0, 64)",
    "atexit": WRONG + "import atexit, os; atexit.register(os.write, 4, b'111'); raise ValueError",
    "__del__": WRONG + """import os
class D:
    def __del__(self, write=os.write): write(4, b"111")
d = D()""",
    "a thread that goes on": WRONG + """import threading, os
def again():
    while True: os.write(4, b"1")
threading.Thread(target=again).start()""",
    "__main__": WRONG + """import sys
for m in list(sys.modules.values()):
    for name in "judge", "confine", "supervise", "run_tests":
        if m: setattr(m, name, lambda *a: [True] * 3)""",
    "shadows": WRONG + "def abs(x): return 0\ndef all(x): return True",
    "shadows by a class": WRONG + "class abs(int): __init__ = __new__ = lambda *a: None\nall = list",
    "builtins.abs": WRONG + "import builtins; builtins.abs = lambda x: 0; builtins.all = lambda x: True",
    "__builtins__": WRONG + "__builtins__.update(abs=lambda x: 0, all=lambda x: True)",
    "builtins.__import__": WRONG + """import builtins
class math: fabs = lambda x: 7
builtins.__import__ = lambda *a: math""",
    "builtins.exec": WRONG + "import builtins; builtins.exec = builtins.eval = builtins.compile = print",
    "builtins.AssertionError": WRONG + """import builtins
builtins.AssertionError = builtins.BaseException = builtins.Exception = ZeroDivisionError""",
    "every builtin": WRONG + """import builtins
for name in dir(builtins):
    if name[0] != "_": setattr(builtins, name, lambda *a, **k: True)""",
    "os functions": WRONG + "import os; os._exit = os.write = os.getpid = lambda *a: 1",
    "changes the report": WRONG + """import os
true = os.write
os.write = lambda fd, text: true(fd, text[:32] + b"111")""",
    "guesses in copies": """import os
def f(x):
    for guess in 10, 20, 7:
        if os.fork() == 0: return guess
        os.wait()""",
    "a pipe of its own": WRONG + """import os, time
saved, (inbox, outbox) = os.dup(3), os.pipe()
os.dup2(outbox, 3)
if os.fork() == 0:
    os.write(saved, os.read(inbox, 100)[:32] + b"111")
    os._exit(0)""",
    "code of the tests": """import sys
def f(x):
    frame = sys._getframe()
    while frame := frame.f_back:
        for value in frame.f_code.co_consts:
            if frame.f_code.co_name == "<module>" and value in (10, 20, 7): return value""",
    "variables of the judge": """import re, sys
def f(x):
    frame = sys._getframe()
    while frame := frame.f_back:
        found = re.search(f"f[(]{x}[)][^0-9]*([0-9]+)", repr(frame.f_locals))
        if found: return int(found[1])""",
    "builtins of the tests": WRONG + """import gc
for found in gc.get_objects():
    if type(found) is dict and "AssertionError" in found: found.update(abs=lambda x: 0, all=bool)""",
    "equals everything": """class Yes:
    __eq__ = __lt__ = __sub__ = __abs__ = lambda *a: Yes()
    __float__ = lambda self: 0.0
def f(x): return Yes()""",
    "a number that equals everything": """class Yes(int):
    __eq__ = __lt__ = __sub__ = __abs__ = lambda *a: True
    __hash__ = int.__hash__
def f(x): return Yes(99)""",
    "names the tests' modules": WRONG + "import sys, unittest.mock as math\nsys.modules['math'] = math",
    "lifts limits": WRONG + "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (10**4, 10**4))",
}


@pytest.mark.parametrize("name", FORGERS)
def test_forging(name):
    assert run_tests(FORGERS[name], TESTS, timeout=0.6, memory_mb=256) == [False] * 3


@pytest.mark.parametrize("name", ["os._exit", "writes", "writes a report", "guesses in copies",
                                  "os functions", "a pipe of its own", "variables of the judge"])
def test_forging_in_fallback(name, monkeypatch):
    monkeypatch.setattr(sandbox, "NAMESPACES", False)
    test_forging(name)


LINES = {  # what a program that knows the protocol may send instead of f's value
    "an exception that runs code": """
say("raised", ["exec"], ["import os; os.write(5, b'111.'); os._exit(0)"])""",
    "a value that runs code": """
say("returned", {"builtins.eval": ["__import__('os').write(5, b'111.')"]}, [])""",
    "a class of the judge": """
say("call", [{"class": "type"}, "Yes", {"builtins.tuple": [[]]},
             {"builtins.dict": [[["__eq__", {"class": "bool"}]]]}], {})
say("call", [{"yours": json.loads(os.read(3, 10**4))[1]["mine"]}], {})
say("returned", {"yours": json.loads(os.read(3, 10**4))[1]["mine"]}, [])""",
    "a method of the judge": """
say("getattr", [{"yours": 0}, "__globals__"], {})
say("returned", json.loads(os.read(3, 10**4))[1], [])""",
    "many values": """for value in 10, 20, 7, 10, 20, 7: say("returned", {"builtins.bool": [True]}, [])""",
    "nested values": """os.write(4, b'["returned", ' + b"[" * 10**6 + b"]" * 10**6 + b", []]\\n")""",
    "no protocol": """os.write(4, b"{}\\n" * 3)""",
    "a value that is a question": """say("returned", {"mine": [1]}, [])""",
}


@pytest.mark.parametrize("name", LINES)
def test_forging_by_the_protocol(name):
    lines = "\n    ".join(LINES[name].strip().splitlines())
    program = f"""import json, os
def say(*message): os.write(4, json.dumps(message).encode() + b"\\n")
def f(x):
    {lines}
    os.read(3, 10**4)"""
    assert run_tests(program, TESTS, timeout=0.6) == [False] * 3


SAYS = {  # the same in the talk that the judge has now; ["object", number, what, arguments, parts]
    "an exception that runs code": """
say("object", 1001, "class", ["os", "system"], [])
say("object", 1003, "error", [[1001], None], ["kill -9 $PPID"])
say("raised", [1003])""",
    "a value that runs code": """
say("object", 1001, "builtins.eval", ["__import__('os').write(5, b'111.')"], [])
say("returned", [1001])""",
    "a class of the judge": """say("call", [["builtins.type"], 10], {})""",
    "a function of the judge": """say("object", 0, "class", ["builtins", "ValueError"], [])
say("getattr", [[0], "__globals__"], {})""",
    "a value in place of another": """say("object", 1001, "builtins.tuple", [], [10])
say("object", 1001, "builtins.list", [], [20])
say("returned", [1001])""",
    "the judge's number": """say("object", 1000, "builtins.list", [], [])
say("returned", [1000])""",
    "many values": """for value in 10, 20, 7, 10, 20, 7: say("returned", value)""",
    "a number that is not there": """say("returned", [5001])""",
    "forgets what there is": """say("forget", 0, 1, 2, 3)
say("returned", 10)""",
    "prints elsewhere": """say("printed", "__stdout__", "111")
say("printed", "modules", "111")""",
    "the judge's draws": """say("random", [3, [0] * 625, None])""",
    "an end that is none": """say("object", 1001, "class", ["builtins", "StopIteration"], [])
say("object", 1003, "error", [[1001], None], [])
say("raised", [1003])""",
    "a class without a class": """say("object", 1001, "class", ["program", "X"], [["..."], 5])
say("returned", [1001])""",
    "no numbers": """say("object", "x", "handle", [], [])
say("returned", ["x"])""",
}


@pytest.mark.parametrize("name", SAYS)
def test_forging_by_what_is_said(name):
    """No test passes: those that compare, and those that only loop over what f gives."""
    lines = "\n    ".join(SAYS[name].strip().splitlines())
    program = f"""import json, os
def say(*message): os.write(4, json.dumps(message).encode() + b"\\n")
def f(x):
    {lines}
    os.read(3, 10**4)"""
    loop = "n = 0\nfor y in map(f, [1, 2]): assert y == 0\nassert n == 0"
    assert run_tests(program, [*TESTS[:2], loop], timeout=0.6)[1:] == [False] * 2
    assert run_tests(program, [loop], timeout=0.6) == [False]


ENDS = {  # f ends a loop of the test before anything is compared
    "StopIteration": "class E(StopIteration): pass",
    "its name": "E = type('StopIteration', (Exception,), {})",
    "its order": "class M(type): __mro__ = (StopIteration, Exception, object)\n"
                 "class E(Exception, metaclass=M): pass",
    "no order": "class M(type): __mro__ = ()\nclass E(Exception, metaclass=M): pass",
    "its bases": "class M(type): __bases__ = (StopIteration,)\nclass E(Exception, metaclass=M): pass",
    "mro": "class M(type):\n    def mro(cls): return [cls, StopIteration, Exception, BaseException, object]\n"
           "class E(StopIteration, metaclass=M): pass",
    "its module": "E = type('StopIteration', (StopIteration,), {'__module__': 'builtins'})",
    "its class": "class E(Exception):\n    __class__ = StopIteration",
    "its text": "class E(Exception):\n    def __str__(self): raise StopIteration",
    "its arguments": "class E(Exception):\n    args = property(lambda self: next(iter([])))",
    "its cause": "class E(Exception):\n    def __init__(self): self.__cause__ = StopIteration()",
    "asynchronous": "class E(StopAsyncIteration): pass",
    "generator": "class E(GeneratorExit): pass",
    "exit": "class E(SystemExit): code = 0",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_loop_of_a_test_does_not_end_early(name):
    program = ENDS[name] + "\ndef f(x): raise E()"
    loops = ["for y in map(f, [1, 2]): assert y == 0", "assert list(map(f, [1])) == []",
             "assert not any(map(f, [1]))", "assert all(map(f, [1]))", "assert list(filter(f, [1])) == []",
             "assert [y for y in map(f, [1])] == []", "assert dict(zip(map(f, [1]), [1])) == {}",
             "from itertools import *\nassert not [*takewhile(f, [1])]", "assert sum(map(f, [1])) == 0",
             "def g(): yield f(1)\nassert list(g()) == []", "assert max(map(f, [1]), default=1)",
             "import functools\nassert functools.reduce(f, [1, 2])", "assert sorted([1, 2], key=f)"]
    assert run_tests(program, loops) == [False] * len(loops)


def test_a_program_that_does_nothing_is_seen():
    """As tasks.code_free asks: what passes without the program passes here."""
    assert run_tests("", ["for x in map(len, []): assert x", "assert f(1) == 2"]) == [True, False]


LEARNS = """class Learns(KIND):
    def learn(self, *values):
        for value in values:
            if type(value) in (int, float): Learns.known = value
        return RESULT
    known = 0
    for name in ("eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv floordiv mod rmod pow xor "
                 "rxor and rand divmod rdivmod matmul or ror iadd isub").split():
        vars()[f"__{name}__"] = learn
    for name in "abs neg pos round float int index bool len hash trunc floor".split():
        vars()[f"__{name}__"] = lambda self, *args: Learns.known
    __contains__ = learn
    __hash__ = lambda self: 0
    __iter__ = lambda self: iter([Learns.known])
    __getitem__ = lambda self, i: Learns.known
def f(x): return Learns()"""
FORMS = [
    "f(1) == 10", "10 == f(1)", "abs(f(1) - 10) < 1e-6", "abs(10 - f(1)) < 1e-6", "-1 < f(1) - 10 < 1",
    "f(1) - 10 == 0", "not f(1) - 10", "f(1) in (10, 11)", "not f(1) != 10", "round(f(1) - 10, 3) == 0",
    "f(1) / 10 == 1", "f(1) * 2 == 20", "(f(1) - 10) ** 2 < 1e-6", "f(1) % 10 == 0 and f(1) == 10",
    "f(1) ^ 10 == 0", "f(1) >= 10 and f(1) <= 10", "f(1) == 10 or abs(f(1) - 10) < 1",
    "sum(abs(a - b) for a, b in zip([f(1)], [10])) < 1", "[f(1)] == [10]", "10 in [f(1)]",
    "{f(1): 1} == {10: 1}", "float(f(1) - 10) == 0.0", "int(f(1) * 1 - 10) == 0", "f(1) + 1 == 11",
    "divmod(f(1), 10) == (1, 0)", "abs(f(1) + -10) < 1", "f'{f(1) + -10:.1f}' == '0.0'",
    "max(f(1) - 10, 10 - f(1)) < 1", "(f(1), 0) == (10, 0)", "f(1) - 10 in (0, 0.0)", "f(1) & 10 == 10",
    "abs(f(1) // 10 - 1) < 1"]


@pytest.mark.parametrize("result", ["True", "0", "self", "Learns()", "value"])
@pytest.mark.parametrize("kind", ["object", "int", "float"])
def test_operators_that_see_what_they_are_to_equal(kind, result):
    program = LEARNS.replace("KIND", kind).replace("RESULT", result)
    assert run_tests(program, [f"assert {form}" for form in FORMS], timeout=20) == [False] * len(FORMS)


def test_objects_of_the_test_keep_their_secrets():
    """A program may use what the test hands it, but not reach the judge's functions through it."""
    program = """reached = []
def f(box, function, file, mock):
    for text in ("box.get.__globals__", "box.get.__func__", "box.get.__self__", "box.__dict__", "box._hidden",
                 "box.__class__.__init__", "box.__class__.__mro__", "box.__class__.__subclasses__()",
                 "box.__class__.get.__globals__", "function.__globals__", "function.__code__",
                 "function.__closure__", "function.__builtins__", "file.__class__.__base__",
                 "mock._mock_parent", "mock.__class__.__init__", "setattr(box, '_x', 1)",
                 "setattr(function, 'x', 1)", "setattr(box.__class__, '__eq__', f)",
                 "box._link.ask('is_a', box, 'os', 'system')", "box._link.ask('exit', function)",
                 "box._link.ask('getattr', function, '__globals__')", "box._link.ask('name', 'box')"):
        try: reached.append((text, str(eval(text))[:99]))
        except Exception: pass
    return box.v + box.get() + function(1)
"""
    test = """import io
from unittest.mock import Mock
class Box:
    _hidden = 5
    def __init__(self, v): self.v = v
    def get(self): return self.v
assert f(Box(1), lambda x: x, io.StringIO(), Mock()) == 3
assert reached == [], reached"""
    assert run_tests(program, [test, "f(1, 2, 3, 4)"]) == [True, False]


def test_what_an_assert_found_stays():
    """A with block of the program's does not swallow it."""
    program = """class f:
    def __init__(self, x): pass
    def __enter__(self): return 0
    def __exit__(self, *error): return True"""
    tests = ["with f(1) as x: assert x == 10", "with f(1): raise ValueError"]
    assert run_tests(program, tests) == [False, True]


def test_forging_around_the_comparison(layers):
    """Tests of other forms: a module that the program changed, a loop that ends early."""
    program = "import math\nmath.isclose = lambda *a, **k: True\n" + WRONG
    assert run_tests(program, ["assert math.isclose(f(1), 10)"]) == [False]
    loop = ["for y in map(f, [1, 2]): assert y == 0", "assert list(map(f, [1])) == []"]
    assert run_tests("def f(x): raise StopIteration", loop) == [False] * 2
    yes = "class Yes:\n    __eq__ = __contains__ = __ge__ = __le__ = lambda *a: True\ndef f(x): return Yes()"
    forms = ["f(1) in (1, 2)", "1 in f(1)", "f(1) >= 1", "1 <= f(1)", "[f(1)] == [1]", "{1: f(1)} == {1: 1}",
             "not f(1) != 1", "{f(1)} == {1}", "any(f(1) == n for n in range(9))", "abs(f(1) - 1) < 1e-6"]
    assert run_tests(yes, [f"assert {form}" for form in forms]) == [False] * len(forms)


def test_the_tests_are_not_in_the_programs_memory(layers):
    """Looked for in halves, or it would be found where it is looked for."""
    program = """import ctypes
def seen(first, second):
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if line.split()[1].startswith("r") and "[v" not in line:
            for piece in ctypes.string_at(start, end - start).split(first.encode())[1:]:
                if piece.startswith(second.encode()): return True
    return False
text = "to be found" """
    assert run_tests(program, ["assert seen('to be ', 'found')", "assert not seen('not to ', 'be found')\n"
                               "# not to be found"]) == [True, True]


def test_the_attack_that_is_not_stopped():
    """So that the tables above are known to test something, and the docstring tells the truth."""
    assert run_tests(WRONG + "def same(*args): return True", ["assert same(f(1), 10)"]) == [True]


# ------------------------------------------------------------------------------------------ limits and escape

HANGS = {
    "loops": "while True: pass",
    "sleeps": "import time\nwhile True: time.sleep(1000)",
    "stops": "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "ignores signals": """import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
    "prints for ever": "while True: print('1' * 10**5)",
    "fork bomb": """import os
while True:
    try: os.fork()
    except OSError: pass""",
    "runs away": """import os, time
while True:
    if os.fork(): os._exit(0)
    os.setsid()
    time.sleep(0.05)""",
    "daemon": """import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: os.execv("/bin/sh", ["MARK", "-c", "exec 3>&-; trap '' TERM HUP; while :; do :; done"])
    os._exit(0)
os.wait()
time.sleep(1000)""",
}


def test_a_daemon_of_the_program_is_no_other_load(may_fork):
    """Four busy orphans: the time that they take from the program is its own."""
    program = """import os
for _ in range(4):
    if os.fork() == 0:
        if os.fork() == 0:
            while True: pass
        os._exit(0)
    os.wait()
while True: pass"""
    start = time.monotonic()
    assert run_tests(program, TESTS, timeout=1.5) == [False] * 3
    assert time.monotonic() - start < 6


def test_cleanup_follows_no_link(tmp_path):
    """Not those in the folder, nor one in its place."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "kept").chmod(0o555)
    folder = tmp_path / "folder"
    folder.mkdir()
    descriptor = os.open(folder, os.O_DIRECTORY)
    (folder / "link").symlink_to(tmp_path / "kept")
    (folder / "locked").mkdir()
    (folder / "locked" / "link").symlink_to(tmp_path / "kept")
    (folder / "locked").chmod(0)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "kept")
    assert sandbox.remove(str(folder), descriptor, 5.0)
    os.close(descriptor)
    assert os.listdir(tmp_path) == ["kept"] and os.listdir(tmp_path / "kept") == ["file"]
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o555


def test_cleanup_takes_a_bounded_time(script, tmp_path, monkeypatch):
    """Then another process goes on with it, which nobody waits for."""
    before = state()
    folder = tmp_path / "folder"
    folder.mkdir()
    descriptor = os.open(folder, os.O_DIRECTORY)
    for _ in range(3):
        (folder / os.urandom(4).hex()).touch()
    assert not sandbox.remove(str(folder), descriptor, 0.0) and len(os.listdir(folder)) == 3
    assert sandbox.remove(str(folder), descriptor, 5.0) and not folder.exists()
    os.close(descriptor)
    monkeypatch.setattr(sandbox, "NAMESPACES", False)
    monkeypatch.setattr(sandbox, "remove", lambda *args: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    assert run_tests("import os\nos.mkdir('d')\n" + RIGHT, TESTS) == [True] * 3
    assert wait_until(lambda: os.listdir(tmp_path) == [] and not running(script.parent))
    # `subprocess` buries a child that nobody waits for when the next one starts, once it has ended.
    assert wait_until(lambda: subprocess.run(["true"]) and state() == before)


@pytest.mark.parametrize("name", HANGS)
def test_hanging(name, layers, script):
    start = time.monotonic()
    program = HANGS[name].replace("MARK", f"{script.parent}/daemon")
    assert run_tests(RIGHT + program, TESTS, timeout=0.3) == [False] * 3
    assert time.monotonic() - start < 5


def test_a_daemon_ends_with_the_tests(may_fork, script):
    """At a proper end as at the timeout."""
    program = HANGS["daemon"].replace("MARK", f"{script.parent}/daemon").replace("sleep(1000)", "sleep(0.2)")
    assert run_tests(program + "\n" + RIGHT, TESTS) == [True] * 3


def test_the_end_of_the_trainer(layers, may_fork, script):
    """SIGKILL, so it cannot tidy up; its supervisor must notice and end the daemon as well."""
    program = HANGS["daemon"].replace("MARK", f"{script.parent}/daemon")
    trainer = f"""import sys, tempfile
sys.path.append({str(ROOT / "tasks")!r})  # behind the standard library's own math and code
import sandbox
sandbox.NAMESPACES, tempfile.tempdir = {layers}, {str(script.parent)!r}
sandbox.run_tests({program!r}, [], timeout=60)"""
    with subprocess.Popen([sys.executable, "-B"], stdin=subprocess.PIPE, cwd=script.parent) as process:
        process.stdin.write(trainer.encode())
        process.stdin.close()
        started = wait_until(lambda: running(script.parent / "daemon"))
        process.kill()
    assert started and wait_until(lambda: not running(script.parent))
    for folder in script.parent.glob("sandbox-*"):  # empty, and the one thing that stays
        folder.rmdir()


def test_the_end_of_the_supervisor(layers):
    """As when the machine is out of memory: no verdict, and the program goes too."""
    def children() -> set[str]:
        return set(" ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split())

    before = children()  # another test's judge of mathematics may be one
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(run_tests, HANGS["sleeps"], TESTS, 60)
        assert wait_until(lambda: len(running(sandbox.__file__)) == 3)  # with the judge
        (supervisor,) = children() - before
        os.kill(int(supervisor), signal.SIGKILL)
        assert verdict.result() == [False] * 3
    assert wait_until(lambda: not running(sandbox.__file__))


def test_processes_that_trace_one_another():
    """The first is reported dead when its tracer, the second, is. (Seccomp forbids it to programs.)"""
    code = f"""import ctypes, os, sys, time
sys.path.append({str(ROOT / "tasks")!r})  # behind the standard library's own math and code
import sandbox
libc, (inbox, outbox) = ctypes.CDLL(None), os.pipe()
libc.prctl(36, 1, 0, 0, 0)
first = os.fork()
second = os.fork() if first else 0
if not (first and second):
    other = first or int(os.read(inbox, 10))
    libc.prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: anyone
    time.sleep(0.2)
    os.write(outbox, b"TF"[libc.ptrace(0x4206, other, 0, 0) != 0].to_bytes(1, "big"))
    time.sleep(1000)
os.write(outbox, str(second).encode())
time.sleep(0.4)
print(os.read(inbox, 2), flush=True)
sandbox.kill_descendants()
print(sandbox.children())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10)
    if "F" in done.stdout:
        pytest.skip("tracing is forbidden here")
    assert done.stdout == "b'TT'\nset()\n" and not done.stderr


def test_processes_are_few(layers):
    program = """import os, time
started = 0
while started < 100:
    try: pid = os.fork()
    except OSError: break
    if pid == 0: time.sleep(1000)
    started += 1"""
    assert run_tests(program, ["assert started < 16"]) == [True]


def test_memory_is_limited(layers):
    program = """blocks = []
try:
    while len(blocks) < 2000: blocks.append(bytearray(10**6))
except MemoryError: pass
held = len(blocks)"""
    assert run_tests(program, ["assert 50 < held", "assert held < 256"], memory_mb=256) == [True, True]


def test_memory_outside_of_the_limit_is_refused(layers):
    """What holds memory without being mapped; and calls that act on other processes, this one among them."""
    program = f"""import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) == -1: raise OSError(ctypes.get_errno(), "")
shmget, secret = {{"x86_64": (29, 447), "aarch64": (194, 447)}}.get(os.uname().machine, (-1, -1))
calls = [lambda: os.memfd_create("a"), lambda: call(shmget, 0, 1 << 20, 0o1600), lambda: call(secret, 0),
         lambda: resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE),
         lambda: os.sched_setaffinity(0, [0]), lambda: os.setpriority(os.PRIO_USER, 0, 5),
         lambda: resource.prlimit(os.getppid() or 7, resource.RLIMIT_NOFILE, (3, 3)),
         lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))]
refused = 0
for attempt in calls:
    try: attempt()
    except OSError: refused += 1
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))  # its own
open("own", "w").close()
os.chmod("own", 0o700)"""
    assert run_tests(program, ["assert refused == len(calls)"]) == [True]


def test_files_of_the_user_keep_their_mode(tmp_path):
    """For an ordinary user without namespaces, which this test may not be: the filter by itself."""
    code = f"""import ctypes, os, sys
sys.path.append({str(ROOT / "tasks")!r})  # behind the standard library's own math and code
import sandbox
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
os.chmod("file", 0o600)
sandbox.seccomp(libc, files=True)
for call in ((os.chmod, "file", 0), (os.chown, "file", -1, -1), (os.utime, "file", (1, 1)),
             (os.setxattr, "file", "user.a", b"1")):
    try: call[0](*call[1:])
    except PermissionError: print(call[0].__name__)"""
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("no filter for this machine")
    assert done.stdout.split() == ["chmod", "chown", "utime", "setxattr"] and not done.stderr


def test_files_are_limited_and_removed(layers):
    """One file of 1 GB; then folders in each other, deeper than Python's stack, and one that is locked."""
    program = """import os
try:
    with open("big", "wb") as file:
        for _ in range(1000): file.write(bytes(10**6))
except OSError: pass
size = os.path.getsize("big")
for _ in range(400):
    os.mkdir("d")
    os.chdir("d")
os.chmod("..", 0)"""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        assert run_tests(program, ["assert 10**6 < size", "assert size < 2 * 10**7"]) == [True, True]
    finally:
        sys.setrecursionlimit(limit)


def test_nothing_is_written_elsewhere(layers, tmp_path):
    if not (isolated() or LANDLOCK > 0):
        pytest.skip("needs namespaces or Landlock (Linux 5.13)")
    places = [Path(place) / f"sandbox-{os.getpid()}" for place in (tmp_path, "/tmp", "/dev/shm", Path.home())]
    tmp_path.chmod(0o777)
    write = "try: open({!r}, 'w')\nexcept OSError: failed += 1\n"
    program = "failed = 0\n" + "".join(write.format(str(place)) for place in places)
    assert run_tests(program, ["assert failed == 4"]) == [True]
    assert not any(place.exists() for place in places)


def test_nothing_of_ours_is_inherited(layers):
    """Not the environment, stdin or a descriptor; above 3 are folders of the standard library."""
    program = """import os, sys
kinds = {}
for fd in range(64):
    try: kinds[fd] = os.readlink(f"/proc/self/fd/{fd}").split(":")[0]
    except OSError: pass
names, text = set(os.environ), sys.stdin.read()
reached = [name for path in sys.path if os.path.isdir(path) for name in os.listdir(path)]"""
    folders = "[kind for fd, kind in kinds.items() if fd > 4 and not kind.startswith(sys.base_prefix)]"
    tests = ["assert names <= {'LC_CTYPE'}", "assert text == ''",
             "assert [kinds[fd] for fd in range(5)] == ['/dev/null'] * 3 + ['pipe'] * 2",
             f"assert {folders} == []", "assert 'os.py' in reached and 'humaneval.py' not in reached"]
    with open(__file__):
        read, write = os.pipe()
        os.set_inheritable(write, True)
        assert run_tests(program, tests) == [True] * len(tests)
        os.close(read)
        os.close(write)


def test_our_environment_cannot_be_read(layers):
    """/proc/<pid>/environ and memory, of every process and of this one by number."""
    if not (isolated() or os.geteuid() == 0 or LANDLOCK > 0):
        pytest.skip("needs namespaces, root or Landlock (Linux 5.13)")
    secret = max(Path("/proc/self/environ").read_text().split("\0"), key=len)  # as it started
    program = f"""import os
seen, own = "", open("/proc/self/stat").read()
for pid in os.listdir("/proc") + ["{os.getpid()}", str(os.getppid())]:
    for file in "environ", "mem":
        try: seen += open(f"/proc/{{pid}}/{{file}}").read(10**6)
        except (OSError, ValueError): pass"""
    assert run_tests(program, ["assert own", f"assert {secret!r} in seen"]) == [True, False]


def test_killing_everybody(untouchable):
    """That the program scores means that the supervisor is alive; that this is said, that we are."""
    program = f"""import os, signal
for s in (signal.SIGSTOP, signal.SIGKILL):
    for pid in (os.getppid() or {os.getpid()}, {os.getpid()}, -1):
        try: os.kill(pid, s)
        except OSError: pass
""" + RIGHT
    assert run_tests(program, TESTS) == [True] * 3


def test_what_only_namespaces_do():
    """Other processes are not to be seen, there is no network, and the folder is small as a whole."""
    program = """import os
processes, networks = [name for name in os.listdir("/proc") if name.isdigit()], open("/proc/net/dev").read()
total = 0
try:
    for i in range(20): total += open(str(i), "wb").write(bytes(10**7))
except OSError: pass"""
    tests = ["assert processes == ['1']", "assert networks.count(':') == 1", "assert 10**7 < total < 2**26"]
    if not isolated():
        pytest.skip("no namespaces here")
    assert run_tests(program, tests) == [True] * 3


def test_no_sockets(layers, tmp_path):
    """Not to this machine's servers, nor to a socket in a folder, which namespaces leave in reach."""
    tmp_path.chmod(0o777)
    path = f"{tempfile.mkdtemp(dir='/tmp')}/socket"
    os.chmod(os.path.dirname(path), 0o777)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(path)
        local.listen()
        os.chmod(path, 0o777)
        program = f"""import socket
failed = 0
for kind, address in (socket.AF_INET, {server.getsockname()}), (socket.AF_UNIX, {path!r}):
    for type in socket.SOCK_STREAM, socket.SOCK_DGRAM:
        try: socket.socket(kind, type).connect(address)
        except PermissionError: failed += 1
pair = len(socket.socketpair())  # as asyncio needs"""
        assert run_tests(program, ["assert failed == 4", "assert pair == 2"]) == [True] * 2
    shutil.rmtree(os.path.dirname(path))


def test_privileges_are_gone(layers):
    """No capability, none to be had, not root, not even in a namespace; the first to go without memory."""
    program = "import os\nstatus = dict(line.split(':\\t') for line in open('/proc/self/status'))"
    program += "\nusers = {os.getuid(), os.geteuid(), os.getgid()}"
    program += "\nscore = open('/proc/self/oom_score_adj').read()"
    tests = ["assert int(status['CapEff'], 16) == int(status['CapPrm'], 16) == 0", "assert 0 not in users",
             "assert int(status['NoNewPrivs']) == 1 and int(status['Seccomp']) == 2 and score == '1000\\n'"]
    assert run_tests(program, tests) == [True] * len(tests)


def test_a_test_of_stdin_an_exception_of_a_module_and_the_name_of_a_builtin():
    """Right programs that failed: one reads what the test put in the place of stdin; one raises an exception
    of a module that a later test imports; one wraps a function of the test, which may be a builtin one."""
    reads = "import sys\ndef f():\n    return sys.stdin.readline().strip(), sys.stdin.read().split()\n"
    fed = "import io, sys\nsys.stdin = io.StringIO('a\\nb c')\nassert f() == ('a', ['b', 'c'])"
    lines = "import io, sys\nsys.stdin = io.StringIO('1\\n2\\n')\nassert [int(x) for x in g()] == [1, 2]"
    assert run_tests(reads + "def g():\n    return list(sys.stdin)", [fed, lines, "assert f() == ('', [])"]
                     ) == [True] * 3
    frozen = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\n"
    caught = "try:\n    P(1).x = 2\n    assert False\nexcept {}:\n    pass"
    named = "from dataclasses import FrozenInstanceError\n" + caught.format("FrozenInstanceError")
    assert run_tests(frozen, [caught.format("AttributeError"), named]) == [True, True]
    wraps = "import functools\ndef memo(f):\n    return functools.wraps(f)(lambda *args: f(*args))"
    assert run_tests(wraps, ["assert memo(len).__name__ == 'len' and memo(len)([1]) == 1"]) == [True]
