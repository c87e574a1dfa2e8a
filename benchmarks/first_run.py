"""One call that answers on a GPU whatever nobody could measure without one.

python benchmarks/first_run.py            one H200 with 16 CPU cores: at most 8 minutes
python benchmarks/first_run.py small      the same code in tiny sizes, on a CPU: a minute

Every figure is a line of JSON as soon as it is known, printed and, where $OUT names a folder, added to
first_run.jsonl there. What fails leaves its error in place of the figure, and the rest goes on: each part is
a process of its own with a limit of time. Needs torch, transformers, matplotlib and pytest; no tyro, no
datasets and no network.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
LIMITS = {"methods": 95, "small_model": 160, "large_model": 110, "sharded": 60, "tests": 45}  # seconds
SMALL = "small" in sys.argv
METHODS = {"egspo": "a2d-qwen3", "rldf": "llada", "gdsd": "dream", "wd1": "a2d-qwen2",
           "baselines.diffu_grpo": "modernbert", "baselines.espo": "a2d-llama",
           "baselines.just_grpo": "llada"}
RUN = ("--task gsm8k --prompts 2 --G 4 --L 8 --S 4 --block 4 --budget 600 --minibatches 1 --passes 2 "
       "--eval_rows 2 --eval_every 9 --save_every 1").split()


def start_parts():
    """Every part in turn, each with torch fresh in a new process."""
    began = time.perf_counter()
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for part, limit in LIMITS.items():
        command = [sys.executable, __file__, part, *(["small"] if SMALL else [])]
        if part == "sharded":
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        process = subprocess.Popen(command, env=os.environ | quiet, start_new_session=True)
        try:
            if process.wait(limit * (3 if SMALL else 1)):
                say(part, error=f"ended with status {process.returncode}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's child, too
            process.wait()
            say(part, error=f"not done after {limit} seconds")
    say("all", seconds=time.perf_counter() - began)


def say(part: str, **row):
    """One figure: a line of JSON, here and in $OUT."""
    row = {"part": part} | {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(row), flush=True)
    if "OUT" in os.environ:
        with open(Path(os.environ["OUT"]) / "first_run.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def figure(part: str, what: str, work: Callable[[], dict], inside=None) -> dict:
    """Say what work() finds inside a context, with the peak of its memory, or why it failed; returns what it
    found."""
    import torch

    found, said, cuda = {}, io.StringIO(), torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), (
                inside or contextlib.nullcontext()):
            found = work()
        if cuda:
            found |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                      "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
        say(part, what=what, **found)
    except (Exception, SystemExit) as error:  # of any kind: the next figure may be found
        say(part, what=what, error=f"{type(error).__name__}: {str(error)[:300]}",
            where=traceback.format_exc()[-400:], said=said.getvalue()[-300:])
    return found


# --------------------------------------------------------------- what a machine without tyro needs instead


class Whole:
    """In place of tyro.conf.OmitArgPrefixes: OmitArgPrefixes[Args] is Args."""

    def __class_getitem__(cls, kind: type) -> type:
        return kind


def cli(kind: type, default):
    """In place of tyro.cli, as far as it is needed here: --name value, or --name alone for a bool."""
    words = sys.argv[1:]
    while words:
        name = words.pop(0).removeprefix("--")
        part = default.method if hasattr(default.method, name) else default.run
        before = getattr(part, name)
        if isinstance(before, bool):
            setattr(part, name, True)
        else:
            setattr(part, name, str(words.pop(0)) if before is None else type(before)(words.pop(0)))
    return default


def with_a_reward(load: Callable) -> Callable:
    """tasks.load, with a number that depends on the text added to each reward: random weights earn none."""
    def changed(name: str, **options):
        task = load(name, **options)

        def reward(text: str, row: dict):
            total, parts = task.reward(text, row)
            return total + sum(map(ord, text)) % 7 / 6, parts

        return dataclasses.replace(task, reward=reward)

    return changed


def train_and_resume(method: str, layout: str, folder: Path, *flags: str) -> dict:
    """Two updates of a tiny checkpoint, and a third one by --resume."""
    import checkpoints
    import helpers

    rows = [{"question": f"What is {a} plus {a + 1}?" + " Think." * (a % 3),
             "ground_truth_answer": str(2 * a + 1)} for a in range(20)]
    (folder / "data.json").write_text(json.dumps(rows))
    if not (folder / layout).exists():
        checkpoints.write(layout, folder / layout)
    out = folder / f"{method}{''.join(flags)}"
    argv = ["--model", folder / layout, "--data", folder / "data.json", *RUN, "--updates", 2, "--out", out]
    settings = {field.name for field in dataclasses.fields(importlib.import_module(method).Args)}
    for name, value in (("beta", 0.1), ("K", 2)):
        argv += [f"--{name}", value] if name in settings else []
    began = time.perf_counter()
    helpers.launch(method, *argv, *flags)
    helpers.launch(method, "--resume", out, "--updates", 3, *flags)
    lines = [row for row in helpers.complete_lines(out / "metrics.jsonl") if "loss" in row]
    assert [row["update"] for row in lines] == [1, 2, 3], [row["update"] for row in lines]
    seconds, logged = time.perf_counter() - began, ("loss", "grad_norm", "kl", "clip_frac", "peak_memory_gib")
    return {"layout": layout, "seconds": seconds, "skipped": lines[-1]["skipped"],
            **{k: [row[k] for row in lines] for k in logged if k in lines[0]}}


# ------------------------------------------------------------------------------ what is compared with what


def twice(work: Callable) -> dict:
    """Seconds of the first call, in which kernels are chosen, and of the second."""
    from benchmarks import gpu

    took = []
    for _ in range(2):
        gpu.synchronize()
        began = time.perf_counter()
        work()
        gpu.synchronize()
        took.append(time.perf_counter() - began)
    return {"first_s": took[0], "again_s": took[1]}


def sharp(model):
    """Random weights whose predictions differ by context, as a trained network's do."""
    import torch

    with torch.no_grad():
        for name, p in model.network.named_parameters():
            if p.dim() == 2:
                p.normal_(0, (1.0 if "embed" in name or "lm_head" in name else 1.5) / p.shape[1] ** 0.5)
    return model


def disagreement(model) -> dict:
    """|log p| as sampled minus as scored again with the same weights: what bf16 makes of a ratio of 1."""
    import torch

    import common
    from benchmarks import gpu

    roll, found = gpu.rollout(model, steps=gpu.BLOCK // 2), []
    with torch.no_grad():
        for x, rows, where in gpu.canvases(model, roll, 8192):
            logp = common.score(model, x, rows.prompt_mask, rows.completion, where, 1.0)
            found.append((logp - rows.logp)[where])
    found = torch.cat(found).abs()
    return {"mean": found.mean().item(), "max": found.max().item(), "tokens": len(found),
            "entropy": roll.entropy.mean().item()}


def head_error(model) -> dict:
    """|log p| of a drawn token by the head in TF32 and in bf16, against fp32; the hidden states are equal."""
    import torch

    from benchmarks import gpu

    x = torch.randint(model.V - 3, (2, gpu.P + gpu.L), device=gpu.DEVICE)
    with torch.no_grad():
        h = model.body(x, None)[:, -gpu.BLOCK:]
        exact = model.head(h).log_softmax(-1)
        token = exact.exp().flatten(0, 1).multinomial(1).view(2, -1, 1)
        with tf32_head(model):
            found = {"tf32": model.head(h).log_softmax(-1)}
        found["bf16"] = gpu.Naive(**vars(model)).head(h).float().log_softmax(-1)
    wrong = {name: (logp - exact).gather(-1, token).abs() for name, logp in found.items()}
    return {f"{name}_{of}": getattr(value, of)().item() for name, value in wrong.items()
            for of in ("mean", "max")}


@contextlib.contextmanager
def tf32_head(model) -> Iterator[None]:
    """The matrix products of the head in TF32, forward and backward, and no others: a RoPE in TF32 would be
    wrong."""
    import torch

    def product(a, b):
        settings = torch.backends.cuda.matmul
        before, settings.fp32_precision = settings.fp32_precision, "tf32"
        try:
            return a @ b
        finally:
            settings.fp32_precision = before

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight):
            ctx.save_for_backward(h, weight)
            return product(h, weight.T)

        @staticmethod
        def backward(ctx, grad):
            h, weight = ctx.saved_tensors
            return product(grad, weight), product(grad.flatten(0, -2).T, h.flatten(0, -2))

    head = model.network.lm_head
    head.forward = lambda h: Product.apply(h, head.weight)
    try:
        yield
    finally:
        del head.forward


@contextlib.contextmanager
def cudnn_attention() -> Iterator[None]:
    """With cuDNN's attention, which plumbing/parallel.py switches off."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def cast_once(model):
    """The model with the matrices of its layers in bf16, which autocast else makes anew in each forward."""
    import torch

    network = copy.deepcopy(model.network)
    for module in network.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    return dataclasses.replace(model, network=network)


def timed_rollout(model, groups: int = 1, steps: int | None = None, guess: str | None = "greedy") -> dict:
    """Seconds and speed of gpu.rollout."""
    from benchmarks import gpu

    found = twice(lambda: gpu.rollout(model, groups, steps, guess=guess))
    tokens = groups * gpu.G * (gpu.BLOCK if steps else gpu.L)
    return found | {"tokens_per_s": tokens / found["again_s"]}


def compare_rollouts(part: str, model, steps: int | None):
    """The same rollout in several ways."""
    from benchmarks import gpu

    def with_one_cast():
        cast = cast_once(model)
        one, other = (gpu.rollout(of, steps=gpu.BLOCK // 2).completion for of in (model, cast))
        return timed_rollout(cast, steps=steps) | {"the same tokens": bool((one == other).all())}

    figure(part, "rollout", lambda: timed_rollout(model, steps=steps))
    figure(part, "rollout, TF32 head", lambda: timed_rollout(model, steps=steps), tf32_head(model))
    figure(part, "rollout, weights cast once", with_one_cast)
    for groups in (1, 4):
        figure(part, f"rollout of one block, groups at once: {groups}",
               lambda groups=groups: timed_rollout(model, groups, gpu.BLOCK // 2))


# ------------------------------------------------------------------------------------------------ the parts


def methods():
    """Every method end to end on a tiny checkpoint: loads, trains, saves, resumes."""
    with tempfile.TemporaryDirectory() as folder:
        for method, layout in METHODS.items():
            figure("methods", method, lambda m=method, n=layout: train_and_resume(m, n, Path(folder)))


def small_model():
    """The 0.6 B architecture: speed against the naive way, and what precision costs."""
    from benchmarks import gpu

    part, size = "small_model", gpu.SMALL if SMALL else gpu.QWEN
    peak = figure(part, "bf16 matmul", lambda: {"tflops": gpu.matmul_peak() / 1e12})
    model = sharp(gpu.build(size))
    model.bf16 = True  # on a CPU, too
    figure(part, "sampled against scored", lambda: disagreement(model))
    figure(part, "sampled against scored, cuDNN attention", lambda: disagreement(model), cudnn_attention())
    figure(part, "error of the head", lambda: head_error(model))
    compare_rollouts(part, model, steps=None)
    figure(part, "rollout, cuDNN attention", lambda: timed_rollout(model), cudnn_attention())
    figure(part, "rollout, no guess", lambda: timed_rollout(model, guess=None))
    figure(part, "rollout, naive", lambda: twice(lambda: gpu.naive_rollout(model)))
    roll, optimizer = gpu.rollout(model), gpu.optimizer_of(model)

    def update(budget: int = 8192) -> dict:
        found = twice(lambda: gpu.optimizer_step(model, optimizer, lambda: gpu.updates(model, roll, budget)))
        share = gpu.share_of_peak(size, found["again_s"], peak["tflops"] * 1e12) if peak else None
        return found | {"canvases": gpu.G * gpu.K, "budget": budget, "share_of_peak": share}

    def naive_update() -> dict:
        return twice(lambda: gpu.optimizer_step(model, optimizer, lambda: gpu.naive_updates(model, roll)))

    def compiled() -> dict:
        for layer in model.network.model.layers:
            layer.compile(dynamic=True, backend="eager" if SMALL else "inductor")
        return update()

    figure(part, "update", update)
    figure(part, "update, budget 4096", lambda: update(4096))
    figure(part, "update, TF32 head", update, tf32_head(model))
    figure(part, "update, cuDNN attention", update, cudnn_attention())
    figure(part, "update, naive", naive_update)
    figure(part, "update, layers compiled", compiled)  # last, since the layers stay compiled


def large_model():
    """The 8 B architecture: does an update fit, and was its peak predicted?"""
    from benchmarks import gpu
    from plumbing.models import checkpoint_layers, predict_memory, reserve

    part, budget = "large_model", 4096
    model = gpu.build({k: v for k, v in gpu.SMALL.items() if k != "head_dim"} if SMALL else gpu.LLADA)
    model.bf16 = True  # on a CPU, too
    checkpoint_layers(model.network)
    parts = predict_memory(model.network.config, L=gpu.L, S=gpu.S, block=gpu.BLOCK, G=gpu.G, rows=gpu.G,
                           budget=budget, gradient_checkpointing=True, reference=False, train=True, bf16=True)
    figure(part, "predicted", lambda: {"gib": sum(parts.values()), "reserve": reserve(parts), **parts})
    compare_rollouts(part, model, gpu.BLOCK // 2)
    roll, optimizer = gpu.rollout(model, steps=gpu.BLOCK // 2), gpu.optimizer_of(model)
    before = model.network.lm_head.weight[0, :8].clone()

    def update() -> dict:
        found = twice(lambda: gpu.optimizer_step(model, optimizer, lambda: gpu.updates(model, roll, budget)))
        return found | {"trained": bool((before != model.network.lm_head.weight[0, :8]).any()),
                        "predicted_gib": sum(parts.values())}

    figure(part, "update", update)
    figure(part, "update, TF32 head", update, tf32_head(model))


def sharded():
    """One process under torchrun: do shards train and resume, and what do they cost alone?"""
    import torch

    from benchmarks import gpu
    from plumbing import parallel

    part, device = "sharded", parallel.start()
    with tempfile.TemporaryDirectory() as folder:
        figure(part, "egspo --shard", lambda: train_and_resume("egspo", "a2d-qwen3", Path(folder), "--shard"))

    def shards():
        whole = gpu.build(gpu.SMALL if SMALL else gpu.QWEN, torch.device("cpu"))
        model = parallel.spread(whole, device, sharded=True, keep_whole=True, with_twin=False)
        with model.rolling_out():
            rollouts = twice(lambda: gpu.rollout(model, guess="greedy"))
            roll = gpu.rollout(model)
        optimizer = gpu.optimizer_of(model)
        updates = twice(lambda: gpu.optimizer_step(model, optimizer, lambda: gpu.updates(model, roll, 8192)))
        return {f"{name}_{k}": v for name, found in (("rollout", rollouts), ("update", updates))
                for k, v in found.items()}

    figure(part, "0.6 B", shards)


def tests():
    """The tests that need a GPU."""
    import pytest

    outcomes = Counter()

    class Said:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                say("tests", what=report.nodeid, error=str(report.longrepr)[-600:])
            outcomes[report.outcome] += report.when == "call" or report.skipped

    os.environ["TEST_CUDA"] = "1"
    file = str(ROOT / "tests" / "test_cuda.py")
    status = pytest.main(["-p", "no:cacheprovider", "-p", "no:terminal", file], plugins=[Said()])
    say("tests", **outcomes)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        say("tests", error=f"pytest ended with {status!r}")


def main(part: str):
    """One part, in a process of its own."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.modules["tyro"] = SimpleNamespace(cli=cli, conf=SimpleNamespace(OmitArgPrefixes=Whole))
    import tasks
    from benchmarks import gpu
    from plumbing import parallel

    if SMALL:
        gpu.shrink()
    parallel.start()  # with the settings of a run
    tasks.load = with_a_reward(tasks.load)
    globals()[part]()


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word in LIMITS]
    main(chosen[0]) if chosen else start_parts()
