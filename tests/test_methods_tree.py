"""A group is a tree: with each distinct canvas evaluated once, all is as if every row were evaluated."""

import importlib
import itertools

import pytest
import torch
from helpers import METHODS, launch, lines, offer, recording, sharp_model, standing_in, toy_task

import common
from plumbing import models
from plumbing.run import FolderRun

OFTEN = 1.0  # added to the EOS logit: some rows end early, some late, some never
SHAPE = ("--task toy --prompts 4 --G 6 --L 8 --S 4 --block 4 --updates 1 --lr 0 --temperature 0.3 "
         "--budget 300 --eval_threshold 0")  # cold: rows part late; prompts of four lengths; two blocks
CASES = [("egspo", "--passes 2 --K 3"), ("egspo", "--select uniform --order random --beta 0.1"),
         ("rldf", "--threshold 0.6 --passes 1"), ("rldf", "--threshold 0 --passes 2 --beta 0.1"),
         ("wd1", "--passes 2"), ("wd1", "--plusplus --K 4 --passes 1"),
         ("gdsd", "--minibatches 2"), ("gdsd", "--minibatches 2 --match tlc --beta 0.1"),
         ("baselines.diffu_grpo", "--beta 0.1"), ("baselines.espo", "--beta 0.1"),
         ("baselines.just_grpo", "--passes 2")]


def every_row(rows):
    """Instead of common.distinct: no two rows are the same."""
    everything = torch.arange(len(rows))
    return everything, everything


@pytest.fixture
def update(monkeypatch, tmp_path):
    """Launch one update; returns its rollout and rewards, the gradient of each optimizer step, and its
    metrics."""
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
    number, real = itertools.count(), FolderRun.step

    def go(method: str, flags: str, shared: bool, dtype=torch.float32):
        module, seen, gradients = importlib.import_module(method), {}, []
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(common, "distinct", every_row)
            for name in ("roll_out", "reward_rows"):
                patch.setattr(module, name, recording(getattr(module, name), seen.setdefault(name, [])))

            def step(self, *inputs):
                gradients.append(torch.cat([p.grad.flatten() for p in self.model.network.parameters()
                                            if p.grad is not None]))
                return real(self, *inputs)

            patch.setattr(FolderRun, "step", step)
            patch.setattr(models, "load_model", lambda *_: sharp_model(OFTEN, dtype))
            patch.setattr(models, "plan", lambda *_: (False, False))
            offer(patch, "toy", toy_task)
            out = tmp_path / f"run{next(number)}"
            launch(method, *f"--model any {SHAPE} --out {out} {flags}".split())
        return seen["roll_out"][0], seen["reward_rows"][0][0], gradients, lines(out)[1]

    return go


@pytest.mark.parametrize("method, flags", CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_sharing_changes_nothing(method, flags, exact, update, monkeypatch):
    dtype, tolerance = (torch.float64, 1e-10) if exact else (torch.float32, 1e-5)
    if exact:
        monkeypatch.setattr(common.Denoiser, "body", standing_in)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(dtype)
    try:
        apart, together = (update(method, flags, shared, dtype) for shared in (False, True))
    finally:
        torch.set_default_dtype(torch.float32)
    for field in ("completion", "revealed_at", "valid", "guess"):
        one, other = (getattr(found[0], field) for found in (apart, together))
        assert one is other is None or torch.equal(one, other), field
    assert apart[0].valid.sum(1).unique().numel() > 2  # answers of several lengths
    assert torch.equal(apart[1], together[1]) and apart[1].unique().numel() > 2
    for field in ("logp", "entropy"):
        one, other = (getattr(found[0], field) for found in (apart, together))
        assert (one - other).norm() <= tolerance * one.norm()
    assert len(apart[2]) == len(together[2]) and max(g.norm() for g in apart[2]) > 1e-3
    for one, other in zip(apart[2], together[2], strict=True):
        assert (one - other).norm() <= tolerance * one.norm() + 1e-9  # 0: equal rewards, no KL yet
    for phase in ("rollout", "update"):
        full = together[3][f"nfe_{phase}_full"]
        assert together[3][f"nfe_{phase}"] < apart[3][f"nfe_{phase}"] <= full == apart[3][f"nfe_{phase}_full"]


@pytest.mark.parametrize("method", METHODS)
def test_a_minibatch_that_moves_no_weight_makes_no_optimizer_step(method, tmp_path, monkeypatch):
    """AdamW would go on by momentum and decay. GDSD regresses to the old score: it always moves."""
    models.save_model(sharp_model(), tmp_path / "model")
    rows = [{"prompt": text} for text in ("1=", "2=", "3=", "4=")]

    def reward(text: str, row: dict):  # equal in the groups of 1, 2 and 3
        return len(set(text)) / 9 * (row["prompt"] == "4="), {"correct": 0.0, "parse_fail": 0.0}

    offer(monkeypatch, "quarter", lambda: common.Task(rows, rows, reward, lambda text, row: [text]))
    flags = "--task quarter --prompts 4 --G 4 --L 8 --S 4 --block 4 --updates 2 --passes 1 --minibatches 4"
    own = {"egspo": "--lam 0"}.get(method, "")
    launch(method, "--model", tmp_path / "model", "--out", tmp_path / "out", *f"{flags} {own}".split())
    update = lines(tmp_path / "out")[2]
    assert update["update"] == 2 and update["skipped"] == 0
    assert update["optimizer_steps"] == (8 if method == "gdsd" else 2)
    if method != "gdsd":
        assert update["nfe_update"] <= update["nfe_update_full"] / 4


def test_a_rollout_of_a_certain_model_is_one_row():
    """Every group is one path: a forward per group and step. Two prompts never share, whatever they show."""
    model = sharp_model()
    model.network.decoder.bias.data[7] += 1000
    prompt, prompt_mask = common.encode(model, ["12="] * 8)
    gens = [common.generator("cpu", g) for g in range(2)]
    roll = common.denoise(model, prompt, prompt_mask, gens, L=8, S=4, block=4)
    assert (roll.completion == 7).all()
    assert (model.counts["nfe_rollout"], model.counts["nfe_rollout_full"]) == (2 * 4, 8 * 4)
