"""The gradient study: its enumerations against samples, and that it finds exact what is exact, biased what is
not."""

import pytest
import torch

from benchmarks import gradients, tabular
from common import denoise, distinct, generator

EXACT = ("EGSPO", "EGSPO-SA", "EGSPO, K 2 of 3, uniform", "EGSPO, K 2 of 3, importance",
         "EGSPO, K 1 of 3, importance", "JustGRPO, no std")
BIASED = "EGSPO-SA, rank", "EGSPO, K 2 of 3", "EGSPO, order confidence", "JustGRPO"


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_what_is_exact_and_what_is_not(kind):
    found = gradients.measure(kind, 0, EXACT + BIASED)
    for name in EXACT:
        cosine, bias, noise = found[name]
        assert abs(cosine - 1) < 1e-12 and bias < 1e-12 and noise > 1, name
    for name in BIASED:
        cosine, bias, _ = found[name]
        assert cosine < 0.9999 and bias > 0.01, name


@pytest.mark.parametrize("order, threshold, block", [
    ("top_prob", None, 3), ("confidence", None, 3), ("confidence", 0.7, 3), ("top_prob", None, 1)])
def test_every_rollout_is_what_the_sampler_does(order, threshold, block):
    """20,000 rows. False alarm: some 200 shares, |z| > 5, about 1e-4."""
    model = tabular.random_model("own", generator("cpu", 0))
    every, p = tabular.every_rollout(model, order, threshold, block)
    assert abs(p.sum().item() - 1) < 1e-12
    assert (len(p) == 27) == (order == "top_prob")
    none = torch.zeros(20_000, 0, dtype=torch.long)
    roll = denoise(model, none, none.bool(), [generator("cpu", 1)], L=3, S=3, block=block,
                   order=order, threshold=threshold)
    paths = torch.cat([torch.cat([part.completion, part.revealed_at], 1) for part in (every, roll)])
    _, which = distinct(paths)
    count = torch.bincount(which[len(p) :], minlength=len(p))
    assert len(count) == len(p)  # it takes no other path
    z = (count - 20_000 * p) / (20_000 * p * (1 - p)).sqrt()
    assert z[20_000 * p > 20].abs().max() < 5


@pytest.mark.parametrize("name", [
    "EGSPO-SA, K 2 of 3, rank", "EGSPO, K 2 of 3, uniform", "EGSPO, K 2 of 3, importance", "RLDF",
    "wd1", "GDSD-TLC", "GDSD, elbo", "diffu-GRPO", "ESPO", "JustGRPO"])
def test_moments_against_samples(name, monkeypatch):
    """10,000 groups, each row an outcome of its own. False alarm: |z| > 5 of two numbers, about 1e-6."""
    honest, seen = gradients.moments, []

    def spy(completion, p, logp, loss, table):
        h = [torch.autograd.grad(value, table, retain_graph=True)[0].flatten() for value in logp.flatten()]
        seen.extend([p, logp, loss, torch.stack(h), *honest(completion, p, logp, loss, table)])
        return seen[-2:]

    monkeypatch.setattr(gradients, "moments", spy)
    gradients.measure("shared", 0, [name])
    p, logp, loss, h, mean, variance = seen
    G = gradients.G
    o = torch.multinomial(p, 10_000 * G, replacement=True, generator=generator("cpu", 2))
    at = logp.detach()[o].requires_grad_()
    c = -torch.autograd.grad(loss(at, o).sum(), at)[0]  # (rows, D)
    h = h.view(*logp.shape, -1)
    u = torch.einsum("rd,rdp->rp", c, h[o]).view(10_000, G, -1).sum(1)
    along = u @ mean / mean.norm()
    assert abs(along.mean() - mean.norm()) < 5 * along.std() / 100
    square = (u - mean).pow(2).sum(1)
    assert abs(square.mean() - variance) < 5 * square.std() / 100


@pytest.mark.parametrize("name", ["EGSPO-SA", "GDSD"])
def test_moments_of_drawn_groups(name, monkeypatch):
    """For an update whose moments are known. The mean of 65,536 groups is off by its standard error."""
    seen = []

    def spy(completion, *args):
        seen.append(honest(completion, *args) if not seen else gradients.sampled_moments(*args))
        return seen[-1]

    honest = gradients.moments
    monkeypatch.setattr(gradients, "moments", spy)
    for _ in range(2):
        gradients.measure("shared", 0, [name])
    (mean, variance), (drawn_mean, drawn_variance) = seen
    error = (variance / 2**16) ** 0.5
    assert 0.3 * error < (drawn_mean - mean).norm() < 3 * error  # some dozen numbers: near 1
    assert abs(drawn_variance / variance - 1) < 0.02


def test_a_sampled_y_takes_every_value_with_its_probability():
    """Of what no step has revealed yet: two tokens before the first step, one before the second. None is more
    confident than what the step reveals, so all of them together have the probability of the path."""
    model = tabular.random_model("own", generator("cpu", 0))
    roll, p = tabular.every_rollout(model, "confidence", None)
    row, draw = torch.cartesian_prod(torch.arange(len(p)), torch.arange(27)).T
    value = torch.rand(27, generator=generator("cpu", 1), dtype=torch.float64)
    share, logp, _, _ = gradients.wd1_update(model, roll[row], draw, value, K=3, y_sampled=True)
    share = share.view(-1, 27).sum(1)
    assert (share * roll.logp.sum(1).exp() - p).abs().max() < 1e-12
    assert 0 < share.min() < 0.9
    # log pi(y | x) of the first step holds the revealed token's probability beside those of the share.
    assert len(logp[:27, 0].unique()) == 9 and len(logp[:27, 2].unique()) == 1
