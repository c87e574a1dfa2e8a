"""The plain run of common.py, and what every method logs of a rollout."""

import math

import pytest
import torch
from helpers import NotedRun, exact_model, generators, padded_prompts, sharp_model

from common import Run, denoise, rollout_metrics

G = 4


def test_rollout_metrics_by_loops():
    """Three groups, the second of equal rewards; nothing behind an EOS counts."""
    model = sharp_model(1.0)
    roll = denoise(model, *padded_prompts(model, G), generators(), L=12, S=6, block=4)
    reward = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9, 0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.5])
    parts = {"correct": (reward > 0.5).float(), "parse_fail": (reward == 0).float()}
    found = rollout_metrics(roll, reward, parts, G)
    counted = [(b, i) for b in range(12) for i in range(12) if model.eos_id not in roll.completion[b, :i]]
    assert 12 < len(counted) < 12 * 12
    expected = {"reward": 4.9 / 12 + 0.2 / 12, "reward_correct": 4 / 12, "reward_parse_fail": 3 / 12,
                "equal_groups": 1 / 3, "length": len(counted) / 12,
                "entropy": sum(roll.entropy[at].item() for at in counted) / len(counted)}
    assert found == pytest.approx(expected, rel=1e-5)
    every = roll.entropy.mean().item()
    assert found["entropy"] != pytest.approx(every, rel=1e-2)  # zeros behind the end would lower it


def steps(losses: list[float], lr: float = 0.5):
    """A run whose loss is the sum of the weights, times each of losses: the norms, and the model's weights
    before and after each step."""
    model, run, norms = exact_model(), Run(updates=len(losses)), []
    network = model.network
    optimizer = torch.optim.SGD(network.parameters(), lr)
    states = [torch.cat([p.detach().flatten().clone() for p in network.parameters()])]
    for update in run.updates(model, optimizer):
        (losses[update] * sum(p.sum() for p in network.parameters())).backward()
        norms.append(run.step(losses[update], 2.0))
        assert all(p.grad is None for p in network.parameters())
        states.append(torch.cat([p.detach().flatten().clone() for p in network.parameters()]))
    return norms, states


def test_a_step_is_clipped_and_told_as_it_was_before():
    norms, states = steps([1.0, 1e-6])
    N = len(states[0])
    assert norms == pytest.approx([N**0.5, 1e-6 * N**0.5], rel=1e-6)
    assert (states[1] - states[0]).norm().item() == pytest.approx(0.5 * 2.0, rel=1e-4)  # clipped to 2
    assert (states[2] - states[1]).norm().item() == pytest.approx(0.5 * 1e-6 * N**0.5, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_made(bad):
    _, states = steps([1.0, bad, 1.0])
    assert torch.equal(states[2], states[1])
    assert states[3].isfinite().all() and not torch.equal(states[3], states[2])


def test_a_line_about_each_update(capsys):
    run, model = NotedRun(updates=2), exact_model()
    optimizer = torch.optim.SGD(model.network.parameters(), 0.1)
    for update in run.updates(model, optimizer):
        infos = [{"loss": 1.0, "grad_norm": 3.0}, {"loss": 2.0, "grad_norm": 5.0}] if update else []
        run.log({"reward": 0.25}, infos)
    assert capsys.readouterr().out.splitlines() == [
        "update 1: reward 0.25 loss 0 grad_norm 0", "update 2: reward 0.25 loss 1.5 grad_norm 4"]
