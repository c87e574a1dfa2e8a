"""Several processes compute what one does: the same weights, metrics and answers, whatever is shared out."""

import contextlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from helpers import (LLADA_8B, METHODS, ROOT, NotedRun, complete_lines, lines, settings, sharp_model,
                     toy_task)
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

import common
import egspo
import rldf
import wd1
from common import Denoiser, denoise, encode, generator, group_noise, micro_batches, score
from plumbing import models, parallel

# 5 groups of 3 rows and 7 held-out rows: neither two nor three divide them. Padding, EOS, two blocks.
SMALL = ("--task toy --prompts 5 --G 3 --L 8 --S 4 --block 4 --updates 2 --budget 200 --minibatches 1 "
         "--eval_every 2 --save_every 1 --lr 2e-4").split()
CASES = {
    "egspo": ("modernbert", "--beta 0.1 --K 2 --passes 2 --minibatches 5"),  # a group an optimizer step
    "rldf": ("modernbert", "--K 2 --threshold 0.5 --passes 2"),  # adaptive; tied embeddings, no reference
    "gdsd": ("a2d-qwen3", "--beta 0.1 --passes 2 --num_mc 2 --gradient_checkpointing"),
    # a shifted network; Adam divides by the gradient, where that is almost 0 rounding decides: small steps
    "wd1": ("dream", "--plusplus --K 2 --passes 2 --lr 5e-5"),
    "baselines.diffu_grpo": ("modernbert", "--beta 0.1 --passes 2"),
    "baselines.espo": ("modernbert", "--beta 0.1 --passes 2 --minibatches 5"),
    "baselines.just_grpo": ("modernbert", "--beta 0.1 --minibatches 5"),
}
# Not ModernBERT: its LayerNorm takes no bf16 weights under autocast on a CPU, as it does on CUDA.
BF16 = [("whole, bf16", "wd1"), ("in step, bf16", "gdsd")]
NODES = {2: ["replicated", "whole"], 3: ["replicated", "in step"]}
RUNS = [(count, mode, method) for count, modes in NODES.items() for mode in modes for method in CASES
        if count == 2 or not method.startswith("baselines")]


def command(jobs: list, count: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return [sys.executable, *(torchrun if count else []), str(ROOT / "tests" / "ranks.py"), json.dumps(jobs)]


def ranks(jobs: list, count: int = 0):
    """Run jobs in so many processes; 0: in one, without torchrun."""
    done = subprocess.run(command(jobs, count), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """All runs: folders MODE-METHOD-PROCESSES."""
    out, alone, by_count = tmp_path_factory.mktemp("runs"), [], {count: [] for count in NODES}
    models.save_model(sharp_model(eos=2.0), out / "modernbert")
    for layout in ("a2d-qwen3", "dream"):
        checkpoints.write(layout, out / layout)
    for method, (layout, flags) in CASES.items():
        argv = ["--model", str(out / layout), *SMALL, *flags.split()]
        alone.append(("alone", method, [*argv, "--out", str(out / f"alone-{method}-1")]))
    for count, mode, method in RUNS:
        argv = alone[list(CASES).index(method)][2][:-1]
        by_count[count].append((mode, method, [*argv, str(out / f"{mode}-{method}-{count}")]))
    for mode, method in (("averaged", "egspo"), ("own scores", "gdsd"), ("not finite", "wd1")):
        by_count[2] += [(mode, method, [*alone[list(CASES).index(method)][2][:-1], str(out / f"{mode}-2")])]
    for mode, method in BF16:
        argv = alone[list(CASES).index(method)][2][:-1]
        by_count[2].append((mode, method, [*argv, str(out / f"{mode}-{method}-2")]))
    half = [*alone[0][2][:-2], "--updates", "1"]  # EGSPO, to be resumed by one process and by three
    ranks([*alone, ("alone", "egspo", [*half, "--out", str(out / "half-1")])])
    by_count[2].append(("whole", "egspo", [*half, "--out", str(out / "half-2")]))
    ranks(by_count[2], 2)
    for whose, copy in (("half-2", "two-one"), ("half-2", "two-three"), ("half-1", "one-three")):
        shutil.copytree(out / whose, out / copy)
    go_on = {name: ["--resume", str(out / name), "--updates", "2"]
             for name in ("two-one", "two-three", "one-three")}
    ranks([("alone", "egspo", go_on["two-one"])])
    by_count[3] += [("replicated", "egspo", go_on["two-three"]), ("in step", "egspo", go_on["one-three"])]
    ranks(by_count[3], 3)
    return out


def same_run(one: Path, many: Path, masks: bool = False):
    """Weights to 1e-5, metrics to 1e-4 of their size, the same held-out answers, the same model/ folder."""
    state, other = (torch.load(out / "state.pt", weights_only=True) for out in (one, many))
    assert state["network"].keys() == other["network"].keys()
    for name, value in state["network"].items():
        torch.testing.assert_close(other["network"][name], value, rtol=0, atol=1e-5)
    for row, same in zip(lines(one), lines(many), strict=True):
        # GDSD, ESPO: equal canvases of two masks are evaluated once where they meet in one forward
        made, also = row.pop("nfe_update", 0), same.pop("nfe_update", 0)
        assert math.isclose(made, also, rel_tol=0.25 if masks else 0) and row.keys() == same.keys()
        for key, value in row.items():
            assert math.isclose(same[key], value, rel_tol=1e-4, abs_tol=1e-5), (key, value, same[key])
    answers = [complete_lines(out / "evals.jsonl")[-1]["answers"] for out in (one, many)]
    assert answers[0] == answers[1] and len(answers[0]) == 7
    kept = [load_file(out / "model" / "model.safetensors") for out in (one, many)]
    assert kept[0].keys() == kept[1].keys()  # tied weights stay one
    configs = [(out / "model" / "config.json").read_text() for out in (one, many)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("count, mode, method", RUNS)
def test_many_processes_are_one(count, mode, method, done):
    alone = done / f"alone-{method}-1"
    same_run(alone, done / f"{mode}-{method}-{count}", masks="gdsd" in method or "espo" in method)
    metrics = complete_lines(alone / "metrics.jsonl")
    assert max(row.get("grad_norm", 0) for row in metrics) > 0.1
    folders = done / CASES[method][0], alone / "model"
    start, end = (load_file(folder / "model.safetensors") for folder in folders)
    assert any((end[name] - start[name]).abs().max() > 2e-4 for name in end.keys() & start.keys())


@pytest.mark.parametrize("mode, method", [("averaged", "egspo"), ("own scores", "gdsd")])
def test_averages_and_unshared_scores_are_told_apart(mode, method, done):
    with pytest.raises(AssertionError):
        same_run(done / f"alone-{method}-1", done / f"{mode}-2")


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(done):
    """Had one of them made the step or not logged it, they would not be at the same collective any more."""
    all_made, one_less = (lines(done / name)[-2] for name in ("alone-wd1-1", "not finite-2"))
    assert one_less["skipped"] == 1 and one_less["optimizer_steps"] == all_made["optimizer_steps"] - 1


@pytest.mark.parametrize("mode, method", BF16)
def test_shards_in_bf16_train(mode, method, done):
    """As on CUDA. Rollouts are others then, so only what every run must show can be compared."""
    made, alone = done / f"{mode}-{method}-2", done / f"alone-{method}-1"
    steps, expected = (lines(out)[-2] for out in (made, alone))
    assert steps["update"] == 2 and steps["skipped"] == 0 and steps["optimizer_steps"] > 0
    assert lines(made)[0].keys() == lines(alone)[0].keys() and steps.keys() == expected.keys()
    start, end, fp32 = (load_file(folder / "model.safetensors")
                        for folder in (done / CASES[method][0], made / "model", alone / "model"))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in end.values())
    moved = {name: (end[name] - start[name]).abs().max() for name in end.keys() & start.keys()}
    assert max(moved.values()) > 2e-4
    assert any((end[name] != fp32[name]).any() for name in end)  # it was bf16


@pytest.mark.parametrize("resumed", ["two-one", "two-three", "one-three"])
def test_a_checkpoint_does_not_depend_on_the_number_of_processes(resumed, done):
    same_run(done / "alone-egspo-1", done / resumed)


# ------------------------------------------------------------------------------------ what ends a run early


@pytest.fixture
def running(tmp_path):
    """EGSPO in two processes, without end, and the ids of the two; its run folder."""
    out = tmp_path / "run"
    models.save_model(sharp_model(eos=2.0), tmp_path / "modernbert")
    argv = ["--model", str(tmp_path / "modernbert"), *SMALL, "--updates", "5000", "--eval_every", "5000",
            "--out", str(out)]
    with open(tmp_path / "said", "w") as said:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(command([("replicated", "egspo", argv)], 2), stdout=said, stderr=said)
    end = time.time() + 600  # on a busy machine
    while process.poll() is None and time.time() < end and not (out / "state.pt").exists():
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    yield process, [int(pid) for pid in children], out
    process.terminate()
    process.wait()


def test_one_rank_killed_ends_all_within_a_minute(running):
    process, children, out = running
    os.kill(children[1], signal.SIGKILL)
    assert process.wait(timeout=60) and "SIGKILL" in (out.parent / "said").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    state = torch.load(out / "state.pt", weights_only=True)
    logged = [row["update"] for row in complete_lines(out / "metrics.jsonl")]
    assert 1 <= state["update"] <= logged[-1]


def test_ctrl_c_of_one_rank_stops_all_at_the_same_update(running):
    """Whoever is told: rank 1 alone here, all by a terminal, all by torchrun when it gets a SIGTERM."""
    process, children, out = running
    os.kill(children[1], signal.SIGINT)
    process.wait(timeout=60)
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["update"] == complete_lines(out / "metrics.jsonl")[-1]["update"]


def test_an_error_of_all_ranks_is_told_by_rank_0(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append((seconds, capsys.readouterr().err)))
    for rank in (0, 1):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as stopped:
            parallel.refuse("no")
        assert stopped.value.code == 2 and capsys.readouterr().err == "error: no\n"
    assert slept == [(5, "")]  # rank 1: long enough for torchrun to end it, and before it says anything


# ------------------------------------------------------------------------------------- where it runs


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch, capsys):
    """A driver too old for torch's CUDA: torch says nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "Path", lambda name: SimpleNamespace(exists=lambda: name == "/dev/nvidia0"))
    assert parallel.start().type == "cpu"
    said = capsys.readouterr().err
    assert "driver" in said and "training on the CPU" in said and said.count("\n") == 1
    monkeypatch.setattr(parallel, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    assert parallel.start().type == "cpu" and capsys.readouterr().err == ""


def test_on_cuda_attention_is_not_cudnns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert parallel.start() == torch.device("cuda") and not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.get_float32_matmul_precision() == "highest"


def test_gpus_of_two_kinds_are_refused(monkeypatch, capsys):
    """Every process draws masks and steps for itself, and draws depend on the card."""
    for name, value in dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    for name, value in dict(is_available=True, device_count=1, set_device=None,
                            get_device_name="NVIDIA A100").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(parallel, "gather", lambda items: [*items, "NVIDIA H200"])
    with pytest.raises(SystemExit) as stopped:
        parallel.start()
    assert stopped.value.code == 2
    assert "NVIDIA A100, NVIDIA H200" in capsys.readouterr().err
    monkeypatch.setattr(parallel, "gather", lambda items: items * 2)
    assert parallel.start() == torch.device("cuda", 0)


class OtherTies(TorchFunctionMode):
    """Where torch promises no order among equals, they come in the opposite one."""

    def __torch_function__(self, function, types, inputs=(), options=None):
        options = options or {}
        if function not in (torch.Tensor.topk, torch.Tensor.argsort) or options.get("stable"):
            return function(*inputs, **options)
        x, *rest = inputs
        dim = options.get("dim", rest[0] if rest and function is torch.Tensor.argsort else -1)
        found, last = function(x.flip(dim), *rest, **options), x.shape[dim] - 1
        if function is torch.Tensor.argsort:
            return last - found
        return SimpleNamespace(values=found.values, indices=last - found.indices)


@pytest.mark.parametrize("method, flags", [*((method, {}) for method in METHODS),
                                           ("wd1", {"plusplus": True})])
def test_no_decision_hangs_on_an_order_among_equals(method, flags):
    """Every process decides for itself what is scored: had two chosen differently among equal entropies, they
    would wait for each other forever."""
    module = importlib.import_module(method)
    own = {"K": 2} if hasattr(module.Args, "K") else {}
    args = module.Args(prompts=2, G=4, L=8, S=4, block=8, minibatches=1, **own, **flags)
    found = []
    for context in (contextlib.nullcontext(), OtherTies()):
        model, run = sharp_model(), NotedRun(1)
        with torch.no_grad():
            for p in model.network.parameters():
                p.mul_(p.dim() < 2)  # every position has the same distribution, so all entropies are equal
        with context:
            module.train(args, model, toy_task(), run)
        found.append((run.logged, [step.gradient.tolist() for step in run.steps]))
    assert found[0] == found[1] and any(map(any, found[0][1]))


class OnAGpu(torch.Tensor):
    """A tensor in which nothing that is decided may be added in any order; .cpu() gives a plain one."""

    @classmethod
    def __torch_function__(cls, function, types, inputs=(), options=None):
        if function is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return inputs[0].as_subclass(torch.Tensor)
        in_any_order = ("scatter_add", "scatter_add_", "scatter_reduce", "index_add", "cumsum", "bincount")
        assert not (function.__name__ in in_any_order and inputs[0].is_floating_point()), function
        return super().__torch_function__(function, types, inputs, options or {})


def of_rows(roll: common.Rollout):
    """What the methods decide of a rollout."""
    noise = group_noise([generator("cpu", 3)], len(roll.logp), (3, roll.S)).as_subclass(type(roll.logp))
    return [*egspo.select_steps(roll, 2, None), *egspo.draw_steps(roll, noise[:, 0, :2]),
            rldf.draw_steps(*rldf.step_surprise(roll), 2, 1.0, noise), *wd1.draw_steps(roll, 2, noise[:, 0])]


def test_no_decision_hangs_on_an_order_of_adding(monkeypatch):
    """CUDA adds floats in any order where a scatter or a cumulated sum does it."""
    model = sharp_model(eos=2.0)
    prompt, prompt_mask = encode(model, ["1=", "23="])
    roll = denoise(model, prompt, prompt_mask, [generator("cpu", 0)], L=8, S=4, block=8)
    expected, real = of_rows(roll), common.per_step
    for module in (egspo, rldf, wd1):
        monkeypatch.setattr(module, "per_step", lambda *inputs: real(*inputs).as_subclass(OnAGpu))
    found = of_rows(roll.each(lambda tensor: tensor.as_subclass(OnAGpu)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    with pytest.raises(AssertionError):
        roll.logp.as_subclass(OnAGpu).cumsum(1)


# ------------------------------------------------------------------------------------------------ the shares


def of_rank(monkeypatch, rank: int, world: int):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(parallel, "world", lambda: world)


def replicated(model: Denoiser) -> parallel.Replicated:
    """The model as each of several processes has it."""
    return parallel.Replicated(**{field.name: getattr(model, field.name) for field in fields(Denoiser)})


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_everything_once(world, monkeypatch):
    x = torch.randint(3, (4, 3, 2), generator=torch.Generator().manual_seed(0))  # some of the 12 are equal
    pairs = torch.ones(4, 3).nonzero()
    shares, parts, model = [], [], replicated(sharp_model())
    for rank in range(world):
        of_rank(monkeypatch, rank, world)
        shares.append(model.share(5))
        parts.append(list(micro_batches(model, pairs, x, 4)))  # two canvases each
    assert [i for share in shares for i in share] == list(range(5))
    assert len({len(own) for own in parts}) == 1  # as many forwards on every rank
    all_pairs = torch.cat([part for own in parts for part in own])
    assert sorted(all_pairs.tolist()) == pairs.tolist()
    at = {}
    for number, part in enumerate(part for own in parts for part in own):
        canvases = {tuple(x[r, k].tolist()) for r, k in part.tolist()}
        assert len(canvases) <= 2 and all(at.setdefault(canvas, number) == number for canvas in canvases)
    assert (world == 7) != all(own[0].numel() for own in parts)  # one micro-batch is shared, too


@pytest.mark.parametrize("layout", ["modernbert", "dream"])
def test_a_part_without_pairs_is_a_loss_of_0_with_a_gradient_of_0_for_every_weight(layout, tmp_path):
    checkpoints.write(layout, tmp_path)
    model = replicated(models.load_model(str(tmp_path)))
    nothing = torch.zeros(0, 4, dtype=torch.long)
    logp = score(model, torch.zeros(0, 7, dtype=torch.long), torch.ones(0, 3, dtype=torch.bool), nothing,
                 nothing > 0, 1.0)
    assert logp.shape == (0, 4) and model.counts["nfe_update"] == model.counts["nfe_update_full"] == 0
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.network.parameters())


@pytest.mark.parametrize("have, world, flags, shards", [
    (135, 2, [], (False, False)), (135, 2, ["--shard"], (True, True)), (79, 2, [], (True, True)),
    (36, 8, [], (True, False)),  # in a rollout layer by layer
])
def test_what_does_not_fit_one_gpu_is_sharded(have, world, flags, shards, tmp_path, monkeypatch, capsys):
    """LLaDA-8B, by arithmetic."""
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (have * 2**30, 141 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * 2**30))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = settings(monkeypatch, "egspo", "--model", tmp_path, "--task", "gsm8k", "--beta", 0, *flags)
    monkeypatch.setattr(parallel, "total", lambda value, op: value)
    monkeypatch.setattr(parallel, "world", lambda: world)
    assert models.plan(args.model, args, torch.device("cuda")) == shards
    each = 29.86 / world if shards[0] else 29.86
    assert f"on each of {world} devices (weights {each:.1f}, gradients" in capsys.readouterr().out


def test_shards_need_torchrun(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        settings(monkeypatch, "egspo", "--shard")
    assert "torchrun --nproc_per_node" in capsys.readouterr().err
