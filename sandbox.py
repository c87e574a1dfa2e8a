"""Run a program that a language model wrote against tests and say which pass. Linux, standard library only.

    trainer: run_tests -- supervisor: supervise -- program and tests: judge -- whatever they start

1. The program gets a fresh interpreter without site-packages, no environment, no capabilities, an empty
   folder and none of our descriptors but a pipe for the report. If the trainer is root, it is another user.
2. Limits on CPU time, memory, processes, open files and file size of each process; if the machine runs out of
   memory, the kernel takes these processes first.
3. In the end, at the timeout or when the trainer is gone, the supervisor kills every descendant.
4. Landlock (Linux 5.13): no writing outside the folder, no reading of other processes; 6.7: no TCP; 6.12: no
   signals to other processes.
5. Namespaces (if root or allowed): no network, other processes do not exist, all end with the first, and the
   folder is a small memory disk.
6. The report starts with a secret and scores only if complete: to exit, print or hang earns nothing.

What it does not stop: values that equal everything (`__eq__`); taking the secret from a stack frame or the
heap; writing into memory (ctypes); changing a module that a test imports; reading what its user may read; 16
processes of `memory_mb` each. Without 5: UDP, sockets in the file system, a full disk until the end, shared
memory left behind. Without 4 and 5, unless root: reading and killing processes of the same user.
"""

import builtins
import contextlib
import ctypes
import json
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


def run_tests(program: str, tests: list[str], timeout: float = 5.0, memory_mb: int = 1024) -> list[bool]:
    """Which of `tests` pass after `program`: one bool per test. Never raises for anything the program does.

    All are Python source; each test runs in a copy of the program's global names. A program that does not
    compile, raises, exits or needs more than `timeout` seconds with its tests (wall clock, the start of the
    interpreter not counted) passes none. Threads may call it. RuntimeError: no sandbox can be set up here."""
    import subprocess  # here, because the supervisor starts faster without
    import tempfile

    folder = tempfile.mkdtemp(prefix="sandbox-")
    job = json.dumps([program, tests, timeout, memory_mb, NAMESPACES, os.getpid()]).encode()
    command = [sys.executable, "-I", "-S", "-W", "ignore", os.path.abspath(__file__)]
    try:
        done = subprocess.run(command, input=job, capture_output=True, timeout=timeout + 10, cwd=folder,
                              env={}, start_new_session=True)
    except subprocess.TimeoutExpired:  # even the supervisor hangs
        return [False] * len(tests)
    finally:  # not shutil.rmtree: it raises RecursionError if the program has nested a thousand folders
        subprocess.run(["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', folder], stderr=subprocess.DEVNULL)
    if done.stderr:  # the supervisor's; the program cannot write there
        raise RuntimeError(f"the sandbox failed:\n{done.stderr.decode(errors='replace')}")
    marks = done.stdout if len(done.stdout) == len(tests) else b"0" * len(tests)
    return [mark == ord("1") for mark in marks]


# ------------------------------------------------------------------------------------------------ supervisor


def supervise():
    """Read a job from stdin, run it, print a 0 or 1 for each test, or nothing."""
    program, tests, timeout, memory_mb, namespaces, trainer = json.load(sys.stdin)
    libc = ctypes.CDLL(None)
    isolated = namespaces and new_namespaces(libc)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: a descendant that loses its parent becomes our child
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no process of the same user looks into this one
    nonce = os.urandom(16).hex().encode()
    user = 1_900_000_000 + os.getpid()  # nobody else's, not even another run's
    inbox, outbox = os.pipe()
    if os.fork() == 0:
        confine(libc, isolated, user, outbox, int(timeout) + 1, memory_mb << 20)  # what it raises is printed
        judge(program, tests, nonce)
    os.close(outbox)
    os.read(inbox, 1)  # confined: the time starts
    report, end = b"", time.monotonic() + timeout
    while len(report) < len(nonce) + len(tests) and time.monotonic() < end and os.getppid() == trainer:
        if select.select([inbox], [], [], 0.05)[0]:
            piece = os.read(inbox, 4096)
            if not piece:
                break
            report += piece
    kill_descendants()
    if report.startswith(nonce):
        sys.stdout.write(report.removeprefix(nonce).decode(errors="replace"))


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


def children() -> set[int]:
    """Process ids of this process's children, the dead among them."""
    with open("/proc/thread-self/children") as file:
        return set(map(int, file.read().split()))


def kill_descendants():
    """With namespaces all die with the first. Without, orphans (daemons) become children of this process.

    The dead are buried last: until then they count for RLIMIT_NPROC, and a fork bomb cannot replace them."""
    dead = set()
    while living := children() - dead:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        dead |= living
    for pid in dead:
        os.waitpid(pid, 0)


# -------------------------------------------------------------------------------------- the program's process


def confine(libc: ctypes.CDLL, isolated: bool, user: int, outbox: int, seconds: int, memory: int):
    """Give up all that the program is not to have; `outbox` becomes descriptor 3."""
    os.setsid()
    attributes = struct.pack("4Q", 1, 0, 1 << 18, 0)  # MOUNT_ATTR_RDONLY, MS_PRIVATE: none is seen elsewhere
    # CLONE_NEWNS; mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, ...) needs Linux 5.12
    if isolated and libc.unshare(0x20000) == 0 and libc.syscall(442, -100, b"/", 0x8000, attributes, 32) == 0:
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
    landlock(libc)
    os.dup2(outbox, 3)
    os.closerange(4, 64)
    if os.geteuid() == 0:
        leave_root(user)
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the supervisor
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(3, b".")  # raises if the supervisor died before it was said that we die with it


def leave_root(user: int):
    """Become an ordinary user without files or processes. (RLIMIT_NPROC, against fork bombs, spares root.)"""
    for paths in [sys.path] + [m.__path__ for m in sys.modules.values() if hasattr(m, "__path__")]:
        # an open folder stays in reach: the standard library may lie in /root
        paths[:] = [f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in paths if os.path.isdir(path)]
    for number in (user, 65534):  # a container may have no numbers above 65535
        with contextlib.suppress(OSError):
            os.chown(".", number, number)
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            return
    with open("/proc/self/uid_map") as file:
        if file.read().split()[1] == "0":  # else root is an ordinary user outside of the container
            raise PermissionError("root needs CAP_CHOWN, CAP_SETUID, CAP_SETGID; or start as another user")


def landlock(libc: ctypes.CDLL):
    """Forbid writing outside the working folder, and what else this kernel's Landlock can."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset; -1: no Landlock
    writes = 0x1FF2 | (version >= 3) << 14  # write, remove and make files of every kind, truncate
    forbid = struct.pack("3Q", writes, 3 * (version >= 4), 3 * (version >= 6))  # TCP; sockets, signals
    rules = libc.syscall(444, forbid, len(forbid), 0)
    for path, allowed in ((".", writes), ("/dev/null", writes & 0x4002)):
        rule = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        libc.syscall(445, rules, 1, rule, 0)  # landlock_add_rule
    libc.syscall(446, rules, 0)  # landlock_restrict_self


def judge(program: str, tests: list[str], nonce: bytes):
    """Run the program and the tests; write the nonce and a 0 or 1 for each to descriptor 3. Never returns.

    Once the program runs, builtins and modules are what it makes of them: what is used is a local variable,
    and tests get the builtins of before. A name like `abs` is the builtin in a test, also if the program has
    its own, unless the test names nothing else of the program: one of MBPP's 498 functions is named `sum`."""
    run, leave, write, who, anything = exec, os._exit, os.write, os.getpid, BaseException
    me, marks, before = os.getpid(), b"", dict(vars(builtins))
    checks = [(test, set(re.findall(r"\w+", test))) for test in tests]
    module = types.ModuleType("program")  # not "__main__": what it does as a script is not wanted
    sys.modules["program"] = sys.modules["__main__"] = module  # where dataclasses look
    space = vars(module)
    try:
        run(program, space)
        for test, names in checks:
            scope = {**space, "__builtins__": {**before}}
            if (names - before.keys()) & space.keys():
                scope |= {name: before[name] for name in names & before.keys()}
            try:
                run(test, scope)
                marks += b"1"
            except anything:
                marks += b"0"
        if who() == me:  # a forked copy may have tried another answer
            write(3, nonce + marks)
    finally:
        leave(1)


if __name__ == "__main__":
    supervise()
