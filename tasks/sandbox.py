"""Run a program that a language model wrote against tests and say which pass. Linux, standard library only.

    trainer: run_tests -- supervisor: supervise -- the tests: judge, which decides
                                                -- the program: serve, which answers -- whatever it starts

1. The program's process never holds the tests nor what decides. To a test, names of the program are requests
   to that process. Values of the standard library pass as data, are compared in the judge, and stay the same
   objects: what one side changes, the other sees. All else stays where it is and passes as a Handle, which
   has every operator. The judge runs nothing of the program.
2. Both get a fresh interpreter without site-packages, no environment, no capabilities and none of our
   descriptors but the pipes between them. If the trainer is root, each is another user.
3. Limits on CPU time, memory, processes, open files and file size of each process; if the machine runs out of
   memory, the kernel takes these processes first.
4. In the end, at the timeout or when the trainer is gone, the supervisor kills every descendant.
5. Seccomp (x86-64, ARM64): no sockets, no ptrace, no limits, priority or memory of other processes, no memory
   without a mapping; for an ordinary user without 6, no chmod or chown of any file. Landlock (Linux 5.13): no
   writing outside the program's folder, no reading of other processes; 6.7: no TCP; 6.12: no signals to other
   processes.
6. Namespaces of the program (if root or allowed): no network, other processes do not exist, all end with the
   first, and the folder is a small memory disk.

What it does not stop: reading what its user may read, be it the tests, and locking it (flock); tests that
take the program's word (a function or method of its own compares, or both sides of an operator are its own);
16 processes of `memory_mb` each. Without 6: a full disk until the end; thousands of folders, which a process
removes that nobody waits for. Without 5 and 6: the network, shared memory left behind; unless root, reading,
changing and killing processes of the same user, and changing its files.

What a test cannot do, although plain Python can (such a test fails):
- compare an object of the program's class with a value, if its class has an operator of its own for that;
  take a difference of the two, or a number from any operator that was shown the value; use `in` for what has
  no items
- derive from what is the program's; pickle it; look at it with inspect or with the functions of dataclasses;
  give it to a function in C that wants a str, a list or the like and not what derives from it
- hand the program objects whose private names it uses, or which derive from builtin values, or of classes of
  the standard library that are neither in COPIED nor OPEN
- change a global name or a module for the program (but stdin, stdout, stderr, input, and random by its seed);
  share files, environment or event loop with it; call it in two threads at once that wait for one another
- see that two equal str, int or float are the same object, or read a name that the program hides behind a
  builtin one (see Names)
"""

import _thread
import abc
import builtins
import contextlib
import ctypes
import functools
import importlib
import io
import itertools
import json
import marshal
import math
import operator
import os
import re
import resource
import select
import signal
import struct
import sys
import time
import types

NAMESPACES = True  # False: the tests look at the other layers
PAUSES = 0, 0.2, 2  # seconds before each try to set up a sandbox
START = """import marshal, os, sys
code = b""
while len(code) < int(sys.argv[1]):  # no byte more: the rest of stdin is the tests
    code += os.read(0, int(sys.argv[1]) - len(code)) or sys.exit()
exec(marshal.loads(code))"""
health = {"works": False, "failures": 0}  # whether there was a sandbox in this process; programs without one


def run_tests(program: str, tests: list[str], timeout: float = 5.0, memory_mb: int = 1024,
              head: str = "") -> list[bool]:
    """Which of `tests` pass after `program`: one bool per test. Never raises for anything the program does.

    All are Python source; a test sees the program's global names, and no other test's. `head` runs before the
    program, in the same names (a program may begin with `from __future__`). A program that does
    not compile, raises, exits or needs more than `timeout` seconds with its tests passes none; starting the
    interpreter does not count, nor does waiting for a core that others use (until ten times `timeout`).
    Threads may call it. RuntimeError: no sandbox can be set up here. If one could before: a warning, and none
    passes."""
    for pause in PAUSES:
        time.sleep(pause)
        try:
            marks, error = start_supervisor([head, program], tests, timeout, memory_mb)
        except OSError as failure:  # no process, no memory, no disk: may pass
            marks, error = b"", str(failure)
        if not error:
            health["works"] = True
            return [mark == ord("1") for mark in marks] if len(marks) == len(tests) else [False] * len(tests)
    if not health["works"]:
        raise RuntimeError(f"the sandbox failed:\n{error}")
    health["failures"] += 1
    count, reason = health["failures"], error.splitlines()[-1]
    print(f"warning: no sandbox for {count} programs so far, which pass no test: {reason}", file=sys.stderr)
    return [False] * len(tests)


def start_supervisor(program: list[str], tests: list[str], timeout: float, memory_mb: int
                     ) -> tuple[bytes, str]:
    """What the supervisor prints: the marks, and what went wrong if there was no sandbox."""
    import subprocess  # here, because the supervisor starts faster without
    import tempfile

    path = os.path.abspath(__file__)
    code, folder = compiled(path), tempfile.mkdtemp(prefix="sandbox-")
    descriptor = os.open(folder, os.O_DIRECTORY)  # the folder itself, whatever the program puts in its place
    settings = json.dumps([len(tests), timeout, memory_mb, NAMESPACES, os.getpid()])
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", START, str(len(code)), path, settings]
    try:
        job = json.dumps([program, tests]).encode()
        done = subprocess.run(command, input=code + job, capture_output=True,
                              timeout=10 * timeout + 10, cwd=folder, env={}, start_new_session=True)
    except subprocess.TimeoutExpired:  # even the supervisor hangs
        return b"", ""
    finally:
        if not remove(folder, descriptor, 5.0):  # as many as it made in all its time: not for us to wait for
            rest = json.dumps({"folder": folder, "descriptor": descriptor, "seconds": 3600.0})
            subprocess.Popen([*command[:5], path, rest], pass_fds=[descriptor], env={},
                             start_new_session=True)
        os.close(descriptor)
    return done.stdout, done.stderr.decode(errors="replace")  # the program can write to neither


@functools.cache
def compiled(path: str) -> bytes:
    """This file's code. (To compile it for each program takes 20 ms.)"""
    with open(path) as file:
        return marshal.dumps(compile(file.read(), path, "exec"))


def remove(folder: str, descriptor: int, seconds: float) -> bool:
    """Remove the folder that is open as `descriptor`, and what stands in its place; whether that took less
    than `seconds`. No link is followed."""
    try:
        done = empty(descriptor, time.monotonic() + seconds)
    except OSError:  # somebody else's, or it still changes
        done = True
    for path in (os.readlink(f"/proc/self/fd/{descriptor}"), folder) if done else ():
        with contextlib.suppress(OSError):
            os.rmdir(path)
    with contextlib.suppress(OSError):
        os.unlink(folder)  # fails if it is a folder
    return done


def empty(top: int, deadline: float) -> bool:
    """Remove all that is in an open folder; False if the time is over before.

    Not shutil.rmtree, which raises RecursionError if there are a thousand nested folders: what is deeper is
    moved up into `top` first."""
    while names := os.listdir(top):
        for name in names:
            if time.monotonic() > deadline:
                return False
            if not unlinked(name, top):
                folder = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                for inner in os.listdir(folder):
                    if not unlinked(inner, folder):
                        os.rename(inner, os.urandom(8).hex(), src_dir_fd=folder, dst_dir_fd=top)
                os.close(folder)
                os.rmdir(name, dir_fd=top)
    return True


def unlinked(name: str, folder: int) -> bool:
    """Remove a file; False for a folder, which then is not locked."""
    try:
        os.unlink(name, dir_fd=folder)
        return True
    except IsADirectoryError:
        path = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY, dir_fd=folder)
        os.chmod(f"/proc/self/fd/{path}", 0o700)
        os.close(path)
        return False


# ------------------------------------------------------------------------------------------------ supervisor


def supervise():
    """Start the judge and the program's process, print the judge's marks, a 0 or 1 for each test, or nothing.

    Only the judge reads the job from stdin: the program's process is not to be a copy of one that did."""
    if type(settings := json.loads(sys.argv[-1])) is dict:
        os.nice(19)
        return remove(**settings)
    count, timeout, memory_mb, namespaces, trainer = settings
    libc = ctypes.CDLL(None)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: a descendant that loses its parent becomes our child
    users = 1_900_000_000 + 2 * os.getpid()  # this and the next: nobody else's, not even another run's
    limits = int(timeout) + 1, memory_mb << 20
    (requests, asks), (answers, tells), (inbox, outbox) = os.pipe(), os.pipe(), os.pipe()
    pids = [os.fork()]
    if pids == [0]:
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no process of the same user looks into this one
        job = json.load(sys.stdin)
        confine(libc, users, [answers, asks, outbox], *limits)  # what it raises is printed
        judge(*job)
    isolated = namespaces and new_namespaces(libc)
    libc.prctl(4, 0, 0, 0, 0)
    pids.append(os.fork())
    if pids[-1] == 0:
        confine(libc, users + 1, [requests, tells], *limits, isolated, own_folder=True)
        serve()
    for fd in requests, asks, answers, tells, outbox:
        os.close(fd)
    report = os.read(inbox, 1)  # both are confined: the time starts
    start = time.monotonic()
    while report and len(report) < count + 2 and os.getppid() == trainer:
        spent = time.monotonic() - start
        if spent - waited(pids) > timeout or spent > 10 * timeout:
            break
        if select.select([inbox], [], [], 0.05)[0]:
            piece = os.read(inbox, 4096)
            if not piece:
                break
            report += piece
    kill_descendants()
    sys.stdout.write(report[1:-1].decode())


def new_namespaces(libc: ctypes.CDLL) -> bool:
    """Give the next child its own process ids, network and IPC; False where the system does not allow it."""
    user, group = os.geteuid(), os.getegid()
    flags = 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC
    if libc.unshare(flags | (0x10000000 if user else 0)):  # CLONE_NEWUSER: gives others the right to
        return False
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in maps.items() if user else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def waited(pids: list[int]) -> float:
    """Seconds that these could have run, but other processes had the cores, if none of those is their own."""
    total = 0
    if children() - set(pids):  # what the program left behind; the dead count: they had their share
        return 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/schedstat") as file:
            if os.listdir(f"/proc/{pid}/task") == [str(pid)] and not children(f"{pid}/task/{pid}"):
                total += int(file.read().split()[1])
    return total / 1e9


def children(process: str = "thread-self") -> set[int]:
    """Process ids of a process's children, the dead among them."""
    with open(f"/proc/{process}/children") as file:
        return set(map(int, file.read().split()))


def kill_descendants():
    """With namespaces all die with the first. Without, orphans (daemons) become children of this process.

    All are killed before any is waited for: one that is traced is not reported dead while its tracer lives.
    The dead are buried last: until then they count for RLIMIT_NPROC, and a fork bomb cannot replace them."""
    ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while living := [pid for pid in children() if not os.waitid(os.P_PID, pid, ended)]:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    for pid in children():
        os.waitpid(pid, 0)


# ---------------------------------------------------------------------------------------------- confinement


def confine(libc: ctypes.CDLL, user: int, keep: list[int], seconds: int, memory: int, isolated: bool = False,
            own_folder: bool = False):
    """Give up all that this process is not to have; the descriptors `keep` become 3, 4, ..."""
    os.setsid()
    attributes = struct.pack("4Q", 1, 0, 1 << 18, 0)  # MOUNT_ATTR_RDONLY, MS_PRIVATE: none is seen elsewhere
    # CLONE_NEWNS; mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, ...) needs Linux 5.12
    isolated = isolated and libc.unshare(0x20000) == 0
    if isolated := isolated and libc.syscall(442, -100, b"/", 0x8000, attributes, 32) == 0:
        folder = os.fsencode(os.getcwd())
        libc.mount(b"proc", b"/proc", b"proc", 14, None)  # MS_NOSUID | MS_NODEV | MS_NOEXEC
        libc.mount(b"tmpfs", folder, b"tmpfs", 14, b"size=64m,nr_inodes=4k")
        os.chdir(folder)
    # NPROC counts threads too, and without namespaces all that the user has: then often none may be started
    limits = {"AS": memory, "CPU": seconds, "NPROC": 16, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        limit = min(value, resource.getrlimit(kind)[1] % 2**64)  # -1 is unlimited
        resource.setrlimit(kind, (limit, limit))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    landlock(libc, own_folder)
    for first in 50, 3:  # out of the way of one another
        keep = [os.dup2(fd, first + i, inheritable=False) for i, fd in enumerate(keep)]
    os.closerange(3 + len(keep), 64)
    root = os.geteuid() == 0
    if root:
        leave_root(user, own_folder)
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the supervisor
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    seccomp(libc, files=not (root or isolated))


def leave_root(user: int, own_folder: bool):
    """Become an ordinary user without files or processes. (RLIMIT_NPROC, against fork bombs, spares root.)"""
    for paths in [sys.path] + [m.__path__ for m in sys.modules.values() if hasattr(m, "__path__")]:
        # an open folder stays in reach: the standard library may lie in /root
        paths[:] = [f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in paths if os.path.isdir(path)]
    for number in (user, 65534):  # a container may have no numbers above 65535
        with contextlib.suppress(OSError):
            if own_folder:
                os.chown(".", number, number)
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            return
    with open("/proc/self/uid_map") as file:
        if file.read().split()[1] == "0":  # else root is an ordinary user outside of the container
            raise PermissionError("root needs CAP_CHOWN, CAP_SETUID, CAP_SETGID; or start as another user")


def landlock(libc: ctypes.CDLL, own_folder: bool):
    """Forbid writing outside the working folder, and what else this kernel's Landlock can."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset; -1: no Landlock
    writes = 0x1FF2 | (version >= 3) << 14  # write, remove and make files of every kind, truncate
    forbid = struct.pack("3Q", writes, 3 * (version >= 4), 3 * (version >= 6))  # TCP; sockets, signals
    rules = libc.syscall(444, forbid, len(forbid), 0)
    for path, allowed in ((".", writes * own_folder), ("/dev/null", writes & 0x4002)):
        rule = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        libc.syscall(445, rules, 1, rule, 0)  # landlock_add_rule; refused if it allows nothing
    libc.syscall(446, rules, 0)  # landlock_restrict_self


# System calls that a program may not make, on x86-64 and ARM64
SOCKETS = {"socket": (41, 198), "io_uring_setup": (425, 425)}  # the second makes them without the first
OTHERS = {  # act on other processes of the user
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218)}
MEMORY = {"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194)}  # outlives its mapping
FILES = {  # change files that the user owns, wherever they are; Landlock does not cover them
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469)}


def seccomp(libc: ctypes.CDLL, files: bool):
    """Forbid these system calls (sockets in the file system too: Docker and a session bus obey who connects),
    and prlimit on other processes; FILES only if the user's files are in reach."""
    machines = {"x86_64": (0xC000003E, 0, 302), "aarch64": (0xC00000B7, 1, 261)}
    if os.uname().machine not in machines or struct.calcsize("P") != 8:
        return
    machine, column, prlimit = machines[os.uname().machine]
    calls = SOCKETS | OTHERS | MEMORY | (FILES if files else {})
    forbidden = [numbers[column] for numbers in calls.values() if numbers[column] is not None]
    deny = 4 + len(forbidden) + 4  # the line; jumps count from the next line
    code = [(0x20, 0, 0, 4), (0x15, 0, deny - 2, machine)]  # system calls of another machine, like i386
    code += [(0x20, 0, 0, 0), (0x35, deny - 4, 0, 1 << 30)]  # and x86-64's second table
    code += [(0x15, deny - 5 - i, 0, number) for i, number in enumerate(forbidden)]
    code += [(0x15, 0, 2, prlimit), (0x20, 0, 0, 16), (0x15, 0, 1, 0)]  # its first argument: 0 is oneself
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # allow; EPERM
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    libc.prctl(22, 2, struct.pack("HxxxxxxP", len(code), ctypes.addressof(text)), 0, 0)  # PR_SET_SECCOMP


# ---------------------------------------------------------------------------- the talk of judge and program

# None, bool, float, str and small int pass as they are. All else has a number and is described once to the
# other side. If its class is one of these, the other side makes a copy of exactly that class: no method comes
# along.
SIMPLE = {  # the class, called with these arguments, makes the copy
    "builtins.int": lambda v: [hex(v), 16],  # Python reads no int of 4301 decimal digits
    "builtins.float": lambda v: [str(v)],  # nan, which is itself only
    "builtins.complex": lambda v: [v.real, v.imag],
    "builtins.bytes": lambda v: [v.decode("latin-1"), "latin-1"],
    "builtins.range": lambda v: [v.start, v.stop, v.step],
    "builtins.slice": lambda v: [v.start, v.stop, v.step],
    "decimal.Decimal": lambda v: [str(v)], "fractions.Fraction": lambda v: [str(v)],
    "uuid.UUID": lambda v: [str(v)]}
SIMPLE |= dict.fromkeys(
    ["datetime.date", "datetime.time", "datetime.datetime", "datetime.timedelta", "datetime.timezone",
     "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath"],
    lambda v: list(v.__reduce_ex__(4)[1]))  # as pickle makes it
GROUPS = {"builtins.tuple", "builtins.frozenset"}  # called with their items
CHANGING = dict.fromkeys([  # containers: made empty with these arguments, then filled
    "builtins.list", "builtins.set", "builtins.bytearray", "builtins.dict", "collections.OrderedDict",
    "collections.Counter"], lambda v: [])
CHANGING |= {"collections.defaultdict": lambda v: [v.default_factory],
             "collections.deque": lambda v: [(), v.maxlen]}
COPIED = SIMPLE.keys() | GROUPS | CHANGING.keys()
PLAIN = bool, int, float, complex, str, bytes, bytearray, tuple, list, range, set, frozenset, dict, type(None)
# classes that pass as their names
NAMED = COPIED | {"builtins.bool", "builtins.str", "builtins.NoneType", "builtins.object"}
UNMADE = {f"builtins.{kind.__name__}": kind for kind in (  # so do these, of which none can be made by a call
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, types.BuiltinFunctionType)}
OS_ERRORS = {kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, OSError)}
SINGLE = {"...": ..., "NotImplemented": NotImplemented}
# who may end a loop of a test
ENDS = {"next": StopIteration, "send": StopIteration, "await": StopAsyncIteration}
of_type = {name: vars(type)[name].__get__ for name in ("__module__", "__qualname__", "__bases__", "__mro__")}


def name_of(kind: type) -> str:
    """Module and name, whatever its metaclass says."""
    return f"{of_type['__module__'](kind)}.{of_type['__qualname__'](kind)}"


def changed(value, parts: list) -> bool:
    """Whether a container holds other objects than these."""
    now = parts_of(value)
    return len(now) != len(parts) or not all(map(operator.is_, now, parts))


def named(name: str):
    """The class of that name."""
    module, _, kind = name.rpartition(".")
    known = UNMADE | {"builtins.NoneType": type(None)}
    return known.get(name) or getattr(importlib.import_module(module), kind)


def parts_of(value) -> list:
    """What a container holds."""
    return [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)


class Link:
    """One end of the pipes between judge and program: `ask` the other side, `answer` what it asks.

    An object has the same number on both sides, so it stays the same object however often it passes. Lines
    ["object", number, kind, arguments, parts] say what is new or changed, and come before the message that
    needs them; in all of it, [number] stands for an object and [name] for a class of the standard library.
    What is not COPIED stays where it is and is a Handle (a class: a Mirror) on the other side."""

    def __init__(self, first: int, allowed: dict, judges: bool = False):
        self.reader, self.writer, self.owner = open(3, "rb"), open(4, "wb"), os.getpid()
        self.allowed = allowed  # what the other side may ask for
        self.judges = judges  # this is the judge's end
        self.free, self.first, self.lock = itertools.count(first, 2), first, _thread.RLock()
        self.own = {}  # number: object that stays here
        self.shared = {}  # number: copy of what the other side has, or Handle for it
        self.numbers = {}  # id: number of all these
        self.parts = {}  # number: what a shared container held when both sides last agreed
        self.fresh = []  # numbers that the next message is to describe
        self.news, self.empty = {}, []  # described by the other side, not yet made; made, not yet filled
        self.making, self.gone = 0, []  # how many messages are; what the other side forgot meanwhile
        self.printed, self.random = {}, None

    def send(self, what: str, *trees):
        """A message, after what is new. What nobody here but this table holds is forgotten on both sides."""
        printed = {name: text.decode(errors="replace") for name, text in self.printed.items() if text}
        lines = [["printed", *item] for item in printed.items()]
        for text in self.printed.values():
            text.clear()
        if self.random and self.random != (state := sys.modules["random"].getstate()):
            lines.append(["random", state])  # the test seeded: the program's draws are those of the seed
            sys.modules["random"].random()  # so that the same seed again is a change
            self.random = sys.modules["random"].getstate()
        self.fresh += [number for number, parts in self.parts.items() if changed(self.shared[number], parts)]
        while self.fresh:
            lines.append(self.describe(self.fresh.pop()))
        gone = [number for number in self.shared if sys.getrefcount(self.shared[number]) == 2]
        if gone and not self.making:
            self.gone += gone
            self.forget()
            lines.append(["forget", *gone])
        self.writer.write("".join(json.dumps(line) + "\n" for line in [*lines, [what, *trees]]).encode())
        self.writer.flush()

    def receive(self) -> list:
        """The next message, when all that it needs is made."""
        while True:
            line = self.reader.readline() or os._exit(0)  # the other side is gone: there is no verdict
            what, *rest = message = json.loads(line)
            if what == "object":
                self.news[rest[0]] = rest[1:]
            elif what == "forget":
                self.gone += rest
            elif what == "printed" and rest[0] in ("stdout", "stderr"):
                getattr(sys, rest[0]).write(rest[1])
            elif what == "random" and not self.judges:
                version, words, gauss = rest[0]
                importlib.import_module("random").setstate((version, tuple(words), gauss))
            else:
                break
        self.making += 1  # which may ask: a Handle that is a key for its hash
        try:
            while self.news or self.empty:
                if self.news:
                    self.make(next(iter(self.news)))
                else:
                    self.fill(*self.empty.pop())
        finally:
            self.making -= 1
        return message

    def ask(self, what: str, /, *args, **options):
        """What the other side's `what` returns or raises."""
        with self.lock:
            given = {name: self.encode(arg) for name, arg in options.items()}
            self.send(what, [self.encode(arg) for arg in args], given)
            while (message := self.receive())[0] not in ("returned", "raised"):
                self.answer(*message)  # it calls a function that the test gave it
            result = self.decode(message[1])
            self.forget()
        if message[0] == "returned":
            return result
        # or it would end the test's loop over map(f, ...)
        ends = isinstance(result, (StopIteration, StopAsyncIteration)) and type(result) is not ENDS.get(what)
        raise RuntimeError(str(result)) if ends or not isinstance(result, BaseException) else result

    def answer(self, what: str, args: list, options: dict):
        """Do what the other side asks for and send it the result, or the exception."""
        try:
            if what not in self.allowed:
                raise AttributeError(what)
            values = [self.decode(arg) for arg in args]
            options = {name: self.decode(arg) for name, arg in options.items()}
            self.forget()
            result = self.allowed[what](*values, **options)
            reply = "returned", self.encode(result)
        except BaseException as error:
            result = error.with_traceback(None)  # kept: what nobody holds is forgotten
            reply = "raised", self.encode(result)
        if os.getpid() != self.owner:
            os._exit(0)  # a forked copy that tried another answer
        self.send(*reply)

    def encode(self, value):
        """As JSON; what is new is told in the next message."""
        kind = type(value)
        if value is None or kind in (bool, str) or kind is int and abs(value) < 1 << 63 \
                or kind is float and value == value:
            return value
        if kind is type and (name := name_of(value)) in NAMED | UNMADE.keys() and named(name) is value:
            return [name]
        if value is ... or value is NotImplemented:
            return [str(value).replace("Ellipsis", "...")]
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = next(self.free)
            (self.shared if name_of(kind) in COPIED else self.own)[number] = value
            self.fresh.append(number)
        return [number]

    def describe(self, number: int) -> list:
        value = self.shared[number] if number in self.shared else self.own[number]
        what, start, parts = name_of(type(value)), [], []
        if number in self.own and issubclass(type(value), type):
            exceptions = [base for base in of_type["__bases__"](value) if issubclass(base, BaseException)]
            plain = [kind for kind in PLAIN if kind in of_type["__mro__"](value)][:1]
            what, start = "class", [of_type["__module__"](value), of_type["__qualname__"](value)]
            parts = exceptions or plain
        elif number in self.own and issubclass(type(value), BaseException):
            attributes = parts_of(object.__getattribute__(value, "__dict__"))
            what, start = "error", [type(value), BaseException.__cause__.__get__(value), *attributes]
            parts = value.__reduce__()[1] if type(value) in OS_ERRORS else BaseException.args.__get__(value)
        elif number in self.own:
            what = "handle"
        elif what in SIMPLE:
            start = SIMPLE[what](value)
        else:
            parts = parts_of(value)
            if what in CHANGING:
                start, self.parts[number] = CHANGING[what](value), parts
        start, parts = ([self.encode(part) for part in group] for group in (start, parts))
        return ["object", number, what, start, parts]

    def decode(self, tree):
        if type(tree) is not list:
            return tree
        (name,) = tree
        if name in SINGLE:
            return SINGLE[name]
        if name in NAMED or name in UNMADE:
            return named(name)
        if name in self.own:
            return self.own[name]
        if name not in self.shared:
            self.make(name)
        return self.shared[name]

    def make(self, number: int):
        """What the other side described."""
        what, start, parts = self.news.pop(number)
        if number in self.shared:
            value = self.shared[number]
            if name_of(type(value)) != what or what not in CHANGING:
                raise RuntimeError(f"not a change of a {what}")
            self.parts.pop(number, None)
            self.empty.append((number, parts))
            return
        if number % 2 == self.first % 2:
            raise RuntimeError("not the other side's number")
        start = [self.decode(part) for part in start]
        if what in CHANGING:
            value = named(what)(*start)
            self.empty.append((number, parts))
        elif what in SIMPLE:
            value = named(what)(*start)
        elif what in GROUPS:
            value = named(what)([self.decode(part) for part in parts])
        elif what == "class":
            value = mirror(self, number, *start, [self.decode(part) for part in parts])
        elif what == "error":
            value = stand_in(start[0], [self.decode(part) for part in parts], start[1], start[2:])
        elif what == "handle":
            value = Handle(self, number)
        else:
            raise RuntimeError(what)
        self.shared[number] = value
        self.numbers.setdefault(id(value), number)

    def fill(self, number: int, parts: list):
        value, parts = self.shared[number], [self.decode(part) for part in parts]
        if not isinstance(value, dict):
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(parts)
        else:
            if list(value) != parts[::2]:  # else a loop over it may go on
                value.clear()
            for key, item in zip(parts[::2], parts[1::2], strict=True):
                value[key] = item
        self.parts[number] = parts_of(value)

    def forget(self):
        """What the other side forgot, unless a message that may name it is still being read."""
        while self.gone and not self.making:
            number = self.gone.pop()
            value = (self.shared if number in self.shared else self.own).pop(number)
            self.numbers.pop(id(value), None)
            self.parts.pop(number, None)


class Handle:
    """An object on the other side. What is done to it is done there.

    The judge's end is careful with operators: what a program's object equals is not for the program to say.
    To compare, it counts as the builtin value that it extends (a namedtuple is a tuple), or as unlike all but
    other handles. Of arithmetic with a value of the test the program sees that value, so what it gives must
    be another object, which is not taken for a number: how near its answer comes is not for it to say.
    `x in handle` looks at the items."""

    __slots__ = "_link", "_number", "_shown"

    def __init__(self, link: Link, number: int):
        for name, value in ("_link", link), ("_number", number), ("_shown", ""):
            object.__setattr__(self, name, value)

    def __call__(self, /, *args, **options):
        return self._link.ask("call", self, *args, **options)

    def __getattribute__(self, name):
        if name not in ("__doc__", "__module__"):
            return object.__getattribute__(self, name)
        return self._link.ask("getattr", self, name)

    def __getattr__(self, name):
        if name in ("send", "throw"):
            return functools.partial(self._link.ask, name, self)
        return self._link.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._link.ask("setattr", self, name, value)

    def __delattr__(self, name):
        self._link.ask("delattr", self, name)

    @property
    def __class__(self):
        kind = self._link.ask("class", self)
        return kind if isinstance(kind, type) else Handle

    def __exit__(self, kind, error, traceback):
        """What an assert found is not for the program to swallow."""
        return self._link.ask("exit", self, error) and not isinstance(error, AssertionError)

    def __await__(self):
        return self._link.ask("await", self)
        yield

    def __aexit__(self, kind, error, traceback):
        return self._link.ask("aexit", self, error)

    def __contains__(self, item):
        """By the items, and the program's word must agree."""
        if not self._link.judges or type(item) is Handle:
            return self._link.ask("contains", self, item)
        found = any(item is part or item == part for part in self)
        if self._link.ask("contains", self, item) not in (found, None):
            raise RuntimeError("the items of the program's object are others than it says")
        return found

    def __copy__(self):
        return self._link.ask("copy", self)

    def __deepcopy__(self, memo):
        return self._link.ask("deepcopy", self)

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle what is the program's")


class Mirror(type):
    """The class of what stands here for a class of the other side."""

    def __new__(cls, name, bases, space):
        if "_link" not in space:
            raise TypeError("a class of the other side cannot be extended here")
        return super().__new__(cls, name, bases, space)

    def __getattribute__(cls, name):
        return mirrored(cls, "getattr", name)

    def __setattr__(cls, name, value):
        mirrored(cls, "setattr", name, value)

    def __call__(cls, /, *args, **options):
        return mirrored(cls, "call", *args, **options)

    def __instancecheck__(cls, value):
        link = type.__getattribute__(cls, "_link")
        return type.__instancecheck__(cls, value) or link.ask("isinstance", value, cls)

    def __subclasscheck__(cls, kind):
        link = type.__getattribute__(cls, "_link")
        return type.__subclasscheck__(cls, kind) or link.ask("issubclass", kind, cls)

    def __getitem__(cls, key):
        return mirrored(cls, "getitem", key)

    def __iter__(cls):
        return mirrored(cls, "iter")

    def __len__(cls):
        return mirrored(cls, "len")


def mirrored(cls: Mirror, what: str, /, *args, **options):
    """What the other side's `what` makes of its class."""
    return type.__getattribute__(cls, "_link").ask(what, cls, *args, **options)


def mirror(link: Link, number: int, module: str, name: str, bases: list) -> type:
    """Stands for a class of the other side. An exception of the standard library is that of this side."""
    standard = module.partition(".")[0] in sys.stdlib_module_names
    known = getattr(sys.modules.get(module), name, None) if standard else None
    if isinstance(known, type) and issubclass(known, BaseException):
        return known
    bases = [base for base in bases if base not in (bool, range, type(None))]
    if any(issubclass(base, (StopIteration, StopAsyncIteration)) for base in bases):
        bases = [RuntimeError]
    space = {"_link": link, "_number": number}
    if any(issubclass(base, BaseException) for base in bases):
        space |= {"__str__": lambda self: link.ask("str", self),
                  "__getattr__": lambda self, name: link.ask("getattr", self, name)}
    return Mirror(name, tuple(bases), space)


def stand_in(kind: type, args: list, cause, attributes: list) -> BaseException:
    """An exception like that of the other side. Nothing of the program's runs to make it."""
    if not (isinstance(kind, type) and type.__subclasscheck__(BaseException, kind)):
        raise RuntimeError("not an exception")
    known = next(base for base in of_type["__mro__"](kind) if type(base) is type)
    if known is kind and kind.__module__ == "builtins":
        error = kind(*args)
    else:
        error = known.__new__(kind, *args)
        error.args = args
    error.__cause__ = cause
    vars(error).update(zip(attributes[::2], attributes[1::2], strict=True))
    return error


def plain(value, operation: str = "") -> list:
    """The builtin value that an object extends, in a list, which is empty if there is none, or if its class
    has an `operation` of its own."""
    if type(value) in VIEWS:
        return [set(value)]
    kinds = [kind for kind in PLAIN if kind in of_type["__mro__"](type(value))][:1]  # bool is an int, too
    exact = {str: str.__str__, int: int.__int__, float: float.__float__}  # str(value) is what its class says
    method = getattr(type(value), operation, None)
    own = operation and any(method != getattr(kind, operation, None) for kind in kinds)
    return [] if own else [exact.get(kind, kind)(value) for kind in kinds]


def call(function, /, *args, **options):
    return function(*args, **options)


def leave(manager, error):
    """The end of a with block."""
    return type(manager).__exit__(manager, type(error) if error else None, error, None)


def advance(iterator):
    """`next`, with which an event loop of a test runs a coroutine: its first step is all of it."""
    if type(iterator) is types.CoroutineType:
        raise StopIteration(wait_for(iterator))
    return next(iterator)


def wait_for(value):
    """What `await value` gives."""
    import asyncio  # takes long

    async def wait():
        return await value
    return asyncio.run(wait())


def is_a(value, module: str, name: str) -> bool:
    return isinstance(value, getattr(importlib.import_module(module), name))


def contains(value, item):
    """None if only the items say it."""
    return item in value if hasattr(type(value), "__contains__") else None


def shallow(value):
    import copy  # takes long
    return copy.copy(value)


def deep(value):
    import copy
    return copy.deepcopy(value)


VIEWS = type({}.keys()), type({}.items())
OPEN = "test", "_io", "re", "types", "argparse", "unittest.mock"  # whose objects it may look at
DECOYS = set(PLAIN) - {type(None), range}
# What each side may ask of the other's objects. More than CALLS a program may ask only of objects of the
# test's classes (see ours).
CALLS = {"call": call, "iter": iter, "next": advance, "isinstance": isinstance, "issubclass": issubclass,
         "copy": shallow, "deepcopy": deep, "callable": callable}
OPERATIONS = {"getattr": getattr, "setattr": setattr, "delattr": delattr, "class": type, "plain": plain,
              "exit": leave, "send": lambda generator, *args: generator.send(*args),
              "throw": lambda generator, *args: generator.throw(*args),
              "await": wait_for, "contains": contains,
              "aexit": lambda manager, error: type(manager).__aexit__(manager, type(error), error, None)}


def seen(result, operator_name: str):
    """`result` follows from a value of the test that an operator of the program saw: if it were a number it
    could be an answer to the test."""
    if type(result) is not Handle:
        raise RuntimeError(f"{operator_name} of the program saw a value of the test: it gives no number")
    object.__setattr__(result, "_shown", operator_name)
    return result


def unlike(handle: Handle, name: str, other):
    """NotImplemented, or what the program raises for a value like `other`, which it does not see. Whatever
    else it says, a test cannot rely on it."""
    answer = handle._link.ask(name, handle, type(other)() if type(other) in DECOYS else None)
    if name not in ("eq", "ne") or answer is not (name == "ne"):
        raise RuntimeError(f"{name} of the program is to compare with a value of the test")
    return NotImplemented


def forwarded(name: str, function):
    """Give Handle an operation that no other object takes part in."""
    def operation(self, *args):
        result = self._link.ask(name, self, *args)
        hides = self._link.judges and self._shown and (name in NUMBERS or name == "format" and args[0])
        return seen(result, self._shown) if hides else result

    OPERATIONS[name] = function
    setattr(Handle, f"__{name}__", operation)


def compared(name: str, function):
    """Give Handle a comparison."""
    def operation(self, other):
        if not self._link.judges or type(other) is Handle:
            return self._link.ask(name, self, other)
        value = seen(None, self._shown) if self._shown else self._link.ask("plain", self, f"__{name}__")
        if value:
            return function(value[0], other)
        return unlike(self, name, other)

    OPERATIONS[name] = function
    setattr(Handle, f"__{name}__", operation)


def combined(name: str, function, shows: bool):
    """Give Handle an operator that makes something of it and another."""
    def operation(self, other, *rest):
        if not self._link.judges or type(other) is Handle and not (self._shown or other._shown):
            return self._link.ask(name, self, other, *rest)
        value = [] if self._shown else self._link.ask("plain", self, f"__{name}__")
        if value:
            return function(value[0], other, *rest)
        return seen(self._link.ask(name, self, other, *rest), name) if shows else unlike(self, name, other)

    OPERATIONS[name] = function
    setattr(Handle, f"__{name}__", operation)


NUMBERS = "abs round neg pos invert int float complex index bool trunc floor ceil".split()
forwarded("next", advance)
for function in (iter, len, str, repr, bool, hash, int, float, complex, abs, round, reversed, format, dir,
                 bytes, math.trunc, math.floor, math.ceil):
    forwarded(function.__name__, function)
for name in "index neg pos invert getitem setitem delitem".split():
    forwarded(name, getattr(operator, name))
forwarded("enter", lambda manager: type(manager).__enter__(manager))
forwarded("aiter", aiter)
forwarded("anext", anext)
forwarded("aenter", lambda manager: type(manager).__aenter__(manager))
for name in "eq ne lt le gt ge".split():
    compared(name, getattr(operator, name))
for name in "add sub mul truediv floordiv mod pow divmod lshift rshift and or xor matmul".split():
    function = {"divmod": divmod, "pow": pow}.get(name) or getattr(operator, f"__{name}__")
    shows = name not in ("sub", "xor", "and", "divmod")  # whose natural use is to compare
    combined(name, function, shows)
    combined(f"r{name}", lambda value, other, function=function: function(other, value), shows)
    if name != "divmod":
        combined(f"i{name}", getattr(operator, f"__i{name}__"), shows)


def ours(what: str, function):
    """An operation that a program may ask for, on an object that the test made; no private names."""
    def operation(value, *args):
        kind = type(value)
        public = what not in ("getattr", "setattr", "delattr") or args[0][:1] != "_" or args[0] == "__class__"
        described = what == "getattr" and args[0] in ("__name__", "__qualname__", "__doc__", "__module__")
        module = of_type["__module__"](value if kind is type else kind)
        own = module in OPEN or kind in (*VIEWS, type({}.values()))
        named = kind in (type, types.FunctionType, types.BuiltinFunctionType)
        if not (own and public or described and named):
            raise AttributeError(what)
        return function(value, *args)
    return operation


class Printed(io.RawIOBase):
    """Where a program prints to: the test may look at it."""

    def __init__(self):
        self.text = bytearray()

    def writable(self):
        return True

    def write(self, data):
        if len(self.text) < 1 << 20:
            self.text += data
        return len(data)


def serve():
    """The program's process: run the program when told to, then do what tests ask for. Never returns."""
    module = types.ModuleType("program")  # not "__main__": what it does as a script is not wanted
    sys.modules["program"] = sys.modules["__main__"] = module  # where dataclasses look
    space = vars(module)

    def run(*sources: str) -> dict[str, str]:
        """The global names, each with the name of the module that it stands for, if any."""
        for source in sources:
            exec(source, space)
        return {k: v.__name__ if type(v) is types.ModuleType else "" for k, v in space.items()}

    try:
        link = Link(1, CALLS | OPERATIONS | {"run": run, "name": space.__getitem__, "is_a": is_a})
        for name in "stdout", "stderr":
            printed = Printed()
            link.printed[name] = printed.text
            setattr(sys, name, io.TextIOWrapper(printed, "utf-8", "replace", write_through=True))
        builtins.input = lambda *prompt: link.ask("input", *prompt)
        sys.stdin = Asked(link)
        while True:
            link.answer(*link.receive())
    finally:
        os._exit(1)


class Asked(io.TextIOBase):
    """A program's stdin: what the test put in the place of its own."""

    def __init__(self, link: Link):
        self.link = link

    def readable(self):
        return True

    def read(self, *size):
        return self.link.ask("read", *size)

    def readline(self, *size):
        return self.link.ask("readline", *size)


class Names(dict):
    """The global names of a test: its own, and those of the program, as they are when the test looks. Modules
    of the standard library are the judge's, whatever the program did to its own.

    A name like `abs` is the builtin in a test, also if the program has its own, unless the test names nothing
    else of the program: one of MBPP's 498 functions is named `sum`."""

    def __init__(self, link: Link, test: str, names: dict[str, str]):
        own = {"type": Type, "callable": is_callable, "isinstance": is_instance}
        super().__init__(__builtins__=vars(builtins) | own, __name__="test")
        known = names.keys() & set(re.findall(r"\w+", test))
        self.link, self.names = link, names
        others = known - vars(builtins).keys()
        self.hidden = vars(builtins).keys() - (set() if others else known)

    def __missing__(self, name: str):
        if name in self.hidden:
            raise KeyError(name)
        module = self.names.get(name, "")
        known = module in sys.stdlib_module_names
        return importlib.import_module(module) if known else self.link.ask("name", name)


def is_callable(value) -> bool:
    """A test's `callable`: Handle has all methods there are."""
    return value._link.ask("callable", value) if type(value) is Handle else callable(value)


def is_instance(value, kinds) -> bool:
    """A test's `isinstance`: collections.abc.Iterator and the like are not to look at Handle's methods."""
    if type(kinds) is tuple:
        return any(is_instance(value, kind) for kind in kinds)
    if type(value) is Handle and type(kinds) is abc.ABCMeta and kinds.__module__ != "test":
        return value._link.ask("is_a", value, kinds.__module__, kinds.__qualname__)
    return isinstance(value, kinds)


class Types(type):
    def __instancecheck__(cls, value):
        return isinstance(value, type)

    def __eq__(cls, other):
        return other is type or other is cls

    __hash__ = type.__hash__


class Type(type, metaclass=Types):
    """A test's `type`, which knows the classes of the program's objects."""

    def __new__(cls, *args, **options):
        value = args[0]
        if len(args) == 1:
            return value.__class__ if type(value) is Handle else type(value)
        return super().__new__(cls, *args, **options)


def judge(program: list[str], tests: list[str]):
    """Have the program run and run the tests; write a 0 or 1 for each to descriptor 5. Never returns."""
    try:
        allowed = {what: ours(what, function) for what, function in OPERATIONS.items()}
        asked = {"input": lambda *prompt: input(*prompt), "read": lambda *size: sys.stdin.read(*size),
                 "readline": lambda *size: sys.stdin.readline(*size)}
        link = Link(0, allowed | CALLS | asked, judges=True)
        import_of(tests)
        link.ask("run", "")  # returns: the program's process is confined
        os.write(5, b".")
        names, marks = link.ask("run", *program), b""
        for test in tests:
            prepare(link, test)
            try:
                exec(test, Names(link, test, names))
                marks += b"1"
            except BaseException:
                marks += b"0"
        os.write(5, marks + b".")
    finally:
        os._exit(0)


def import_of(tests: list[str]):
    """Import what the tests will: an exception of a module that is not there yet when the program raises it
    would be no exception of that module for any test."""
    for module in set(re.findall(r"^\s*(?:from|import)\s+([\w.]+)", "\n".join(tests), re.MULTILINE)):
        if module.partition(".")[0] in sys.stdlib_module_names:
            with contextlib.suppress(Exception):
                importlib.import_module(module)


def prepare(link: Link, test: str):
    """Before a test: the streams are those of the start again, whatever the last test put in their place. And
    the state of `random` is noted, if this test uses it: a seed that it sets is then set for the program."""
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    if "random" in test and not link.random:
        import random
        link.random = random.getstate()


if __name__ == "__main__":
    supervise()
