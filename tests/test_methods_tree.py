"""A group is a tree: with each distinct canvas evaluated once, all is as if every row were evaluated."""

import importlib

import pytest
import torch
from helpers import METHODS, NotedRun, exact_model, recording, sharp_model, toy_task

import common

OFTEN = 1.0  # added to the EOS logit: some rows end early, some late, some never
# Cold: rows part late. Prompts of four lengths, two blocks.
SHAPE = dict(prompts=4, G=6, L=8, S=4, block=4, lr=0.0, temperature=0.3, budget=300, seed=1)
CASES = [("egspo", dict(passes=2, K=3)), ("egspo", dict(select="uniform", order="random", beta=0.1)),
         ("rldf", dict(threshold=0.6, passes=1)), ("rldf", dict(threshold=0.0, passes=2, beta=0.1)),
         ("wd1", dict(passes=2)), ("wd1", dict(plusplus=True, K=4, passes=1, minibatches=2)),
         ("gdsd", dict(minibatches=2)), ("gdsd", dict(minibatches=2, match="tlc", beta=0.1)),
         ("baselines.diffu_grpo", dict(beta=0.1)), ("baselines.espo", dict(beta=0.1)),
         ("baselines.just_grpo", dict(passes=2))]


def every_row(rows):
    """Instead of common.distinct: no two rows are the same."""
    everything = torch.arange(len(rows))
    return everything, everything


def update(method: str, settings: dict, model: common.Denoiser, shared: bool):
    """One update: its rollout and rewards, the gradient of each optimizer step, and the model's counts."""
    module, run, seen = importlib.import_module(method), NotedRun(updates=1), {}
    with pytest.MonkeyPatch.context() as patch:
        if not shared:
            patch.setattr(common, "distinct", every_row)
        for name in ("roll_out", "reward_rows"):
            patch.setattr(module, name, recording(getattr(module, name), seen.setdefault(name, [])))
        module.train(module.Args(**SHAPE | settings), model, toy_task(), run)
    return seen["roll_out"][0], seen["reward_rows"][0][0], [step.gradient for step in run.steps], model.counts


@pytest.mark.parametrize("method, settings", CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_sharing_changes_nothing(method, settings, exact, request):
    if exact:
        request.getfixturevalue("float64")
    new, eos, tolerance = (exact_model, 0.5, 1e-10) if exact else (sharp_model, OFTEN, 1e-5)
    apart, together = (update(method, settings, new(eos), shared) for shared in (False, True))
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
def test_a_minibatch_that_moves_no_weight_makes_no_optimizer_step(method):
    """AdamW would go on by momentum and decay. GDSD regresses to the old score: it always moves."""
    rows = [{"prompt": text} for text in ("1=", "2=", "3=", "4=")]

    def reward(text: str, row: dict):  # equal in the groups of 1, 2 and 3
        return len(set(text)) / 9 * (row["prompt"] == "4="), {"correct": 0.0, "parse_fail": 0.0}

    module, model, run = importlib.import_module(method), sharp_model(), NotedRun(updates=2)
    own = {"egspo": {"lam": 0.0}}.get(method, {})
    args = module.Args(prompts=4, G=4, L=8, S=4, block=4, passes=1, minibatches=4, **own)
    module.train(args, model, common.Task(rows, rows, reward, lambda text, row: [text]), run)
    assert len(run.logged) == 2 and all(step.gradient.isfinite().all() for step in run.steps)
    assert len(run.steps) == (8 if method == "gdsd" else 2)
    if method != "gdsd":
        assert model.counts["nfe_update"] <= model.counts["nfe_update_full"] / 4


def test_a_rollout_of_a_certain_model_is_one_row():
    """Every group is one path: a forward per group and step. Two prompts never share, whatever they show."""
    model = sharp_model()
    model.network.decoder.bias.data[7] += 1000
    prompt, prompt_mask = common.encode(model, ["12="] * 8)
    gens = [common.generator("cpu", g) for g in range(2)]
    roll = common.denoise(model, prompt, prompt_mask, gens, L=8, S=4, block=4)
    assert (roll.completion == 7).all()
    assert (model.counts["nfe_rollout"], model.counts["nfe_rollout_full"]) == (2 * 4, 8 * 4)
