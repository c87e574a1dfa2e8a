"""Attacks on the sandbox: none may score, survive, or leave anything behind in the process that calls it."""

import contextlib
import ctypes
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

import sandbox
from sandbox import run_tests

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
    return run_tests("import os", ["assert os.getpid() == 1"]) == [True]


# ----------------------------------------------------------------------------------------------------- honest


def test_each_test_counts_for_itself(layers):
    assert run_tests("def f(x): return 2 * x", ["assert f(2) == 4", "assert f(2) == 5", "assert f(3) == 6"]) \
        == [True, False, True]
    assert run_tests(RIGHT, TESTS) == [True] * 3
    assert run_tests(RIGHT, []) == []
    assert run_tests(RIGHT, ["assert g(1)", "x = (", "raise SystemExit", "1 / 0", "assert f(1) == 10"]) \
        == [False] * 4 + [True]


def test_tests_do_not_see_each_other():
    assert run_tests(RIGHT, ["f = len", "assert f(1) == 10", "del f", "assert f(1) == 10"]) == [True] * 4


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
if __name__ == "__main__":
    raise ValueError
"""
    tests = ["assert Point(1) == Point(1)", "assert open('note').read() == 'kept' and first == []",
             "assert 'é'.encode('latin-1') == b'\\xe9'", "assert hashlib.md5(b'').hexdigest()[:4] == 'd41d'"]
    assert run_tests(program, tests) == [True] * 4


def test_threads_get_the_same_verdicts():
    programs = [f"def f(x): return {'x * 10' if i % 2 else 'exit'}\n" + ("while 1: 1" if i == 4 else "")
                for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda program: run_tests(program, TESTS, timeout=1), programs))
    assert verdicts == [[bool(i % 2), bool(i % 2), False] for i in range(8)]


def test_what_is_not_the_programs_fault_is_raised(monkeypatch):
    monkeypatch.setattr(sandbox, "__file__", "/nowhere/sandbox.py")
    with pytest.raises(RuntimeError, match="nowhere"):
        run_tests(RIGHT, TESTS)


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
    "floods the report": WRONG + "import os\nwhile True: os.write(3, b'1' * 65536)",
    "writes marks": "import os; os.write(3, b'111'); os._exit(0)",
    "writes a report": "import os; os.write(3, b'0' * 32 + b'111'); os._exit(0)",
    "closes everything": RIGHT + "import os; os.closerange(0, 64)",
    "atexit": WRONG + "import atexit, os; atexit.register(os.write, 3, b'111'); raise ValueError",
    "__del__": WRONG + """import os
class D:
    def __del__(self, write=os.write): write(3, b"111")
d = D()""",
    "a thread that goes on": WRONG + """import threading, os
def again():
    while True: os.write(3, b"1")
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
    "lifts limits": WRONG + "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (10**4, 10**4))",
}


@pytest.mark.parametrize("name", FORGERS)
def test_forging(name):
    assert run_tests(FORGERS[name], TESTS, timeout=2, memory_mb=256) == [False] * 3


@pytest.mark.parametrize("name", ["os._exit", "writes", "writes a report",
                                  "guesses in copies", "os functions"])
def test_forging_in_fallback(name, monkeypatch):
    monkeypatch.setattr(sandbox, "NAMESPACES", False)
    test_forging(name)


def test_the_attack_that_is_not_stopped():
    """So that the table above is known to test something, and the docstring tells the truth."""
    assert run_tests("class Yes:\n    __eq__ = lambda *a: True\ndef f(x): return Yes()", TESTS[:1]) == [True]


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
    trainer = f"""import sandbox, tempfile
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
        assert wait_until(lambda: len(running(sandbox.__file__)) == 2)
        (supervisor,) = children() - before
        os.kill(int(supervisor), signal.SIGKILL)
        assert verdict.result() == [False] * 3
    assert wait_until(lambda: not running(sandbox.__file__))


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
    except OSError: pass"""
    folders = "[kind for fd, kind in kinds.items() if fd > 3 and not kind.startswith(sys.base_prefix)]"
    tests = ["assert set(os.environ) <= {'LC_CTYPE'}", "assert sys.stdin.read() == ''",
             "assert [kinds[fd] for fd in range(4)] == ['/dev/null'] * 3 + ['pipe']",
             f"assert {folders} == []",
             "assert not any('tasks.py' in os.listdir(p) for p in sys.path if os.path.isdir(p))"]
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
    program = """import os, socket
processes, networks = [name for name in os.listdir("/proc") if name.isdigit()], socket.if_nameindex()
total = 0
try:
    for i in range(20): total += open(str(i), "wb").write(bytes(10**7))
except OSError: pass"""
    tests = ["assert processes == ['1']", "assert len(networks) == 1", "assert 10**7 < total < 2**26"]
    if not isolated():
        pytest.skip("no namespaces here")
    assert run_tests(program, tests) == [True] * 3


def test_no_network(layers):
    if not (isolated() or LANDLOCK >= 4):
        pytest.skip("needs namespaces or Landlock 4 (Linux 6.7)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""import socket
try: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)
except OSError as error: failed = True"""
        assert run_tests(program, ["assert failed"]) == [True]


def test_privileges_are_gone(layers):
    """No capability, none to be had, not root, not even in a namespace; the first to go without memory."""
    program = "import os\nstatus = dict(line.split(':\\t') for line in open('/proc/self/status'))"
    tests = ["assert int(status['CapEff'], 16) == int(status['CapPrm'], 16) == 0",
             "assert open('/proc/self/oom_score_adj').read() == '1000\\n'",
             "assert int(status['NoNewPrivs']) == 1", "assert os.getuid() and os.geteuid() and os.getgid()"]
    assert run_tests(program, tests) == [True] * len(tests)
