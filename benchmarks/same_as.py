"""Does this tree still compute what an earlier commit computed? Metrics and weights, bit for bit.

Three updates of every method on both tiny tasks, in this tree and in a checkout of the earlier commit, with
default settings and with several passes and a KL. Countdown has padding, EOS and two blocks. What may differ
is the clock. One line for each command; exit status 1 if one differs.

python benchmarks/same_as.py COMMIT
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = ["egspo.py", "egspo.py --lam 0", "rldf.py", "wd1.py", "wd1.py --plusplus", "gdsd.py",
           "gdsd.py --match tlc", "baselines/diffu_grpo.py", "baselines/espo.py", "baselines/just_grpo.py"]
VARIANTS = ["", "--passes 2 --beta 0.1"]  # wd1 has no KL
SMALL = "--updates 3 --prompts 8 --G 4 --eval_rows 16 --budget 1500 --save_every 3"
CLOCK = re.compile("seconds|tokens_per_second|peak_memory")


def commands() -> list[str]:
    """Every command line, without model and folder."""
    found = []
    for method in METHODS:
        for task in ("sudoku", "countdown"):
            for variant in VARIANTS:
                flags = variant.replace("--beta 0.1", "") if "wd1" in method else variant
                found.append(f"{method} --task {task} {SMALL} {flags}".strip())
    return found


def outcome(tree: Path, command: str, out: Path) -> tuple[list[dict], str]:
    """metrics.jsonl without the clock, and a digest of the final weights."""
    script, *flags = command.split()
    base = ROOT / "plumbing" / "bases" / (re.search(r"--task (\w+)", command)[1] + "-0")
    done = subprocess.run(
        [sys.executable, script, *flags, "--model", base, "--out", out], cwd=tree, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{tree}: python {command}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = (out / "model" / "model.safetensors").read_bytes()
    return ([{k: v for k, v in line.items() if not CLOCK.search(k)} for line in lines],
            hashlib.sha256(weights).hexdigest())


def main(commit: str) -> int:
    """Compare all commands; returns the exit status."""
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        add = ["git", "worktree", "add", "--quiet", "--detach", before, commit]
        subprocess.run(add, cwd=ROOT, check=True)
        try:
            for number, command in enumerate(commands()):
                old, new = (outcome(tree, command, Path(scratch) / f"{number}-{name}")
                            for name, tree in (("old", before), ("new", ROOT)))
                print("same    " if old == new else "DIFFERENT", command, flush=True)
                status |= old != new
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
