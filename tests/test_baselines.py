"""diffu-GRPO, ESPO and JustGRPO: whole updates against the formulas of their docstrings, and the tempting
wrong ones; what is exact by enumeration; the rest by hand. What every method must do is in
test_methods.py."""

import dataclasses
import inspect
import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers import (BASELINES, ROOT, NotedRun, Tabular, as_rollout, enumerate_rollouts, evaluated,
                     exact_model, generators, gradient, launch, lines, offer, padded_prompts, recording,
                     relative_error, sharp_model, slow_logits, toy_task, up_to_eos)

import common
import egspo
from plumbing import models
import wd1
from baselines import diffu_grpo, espo, just_grpo
from common import canvas, denoise

T, EPS, BETA, PASSES, L = 0.7, 0.1, 0.3, 2, 8

def centred(reward: torch.Tensor, G: int) -> torch.Tensor:
    return just_grpo.advantage(reward, G, "none")


def by_std(reward: torch.Tensor, G: int) -> torch.Tensor:
    return just_grpo.advantage(reward, G, "released")


ADVANTAGES = [diffu_grpo.advantage, espo.advantage, centred, by_std]


# ---------------------------------------------------------------------------------------- a whole update

# What each method scores of a row b, in pass k, token by token: (n,). `shown`: what it drew in this update.


def token_logps(model, roll, b: int, hidden, prompt=None) -> torch.Tensor:
    """(n,) log p of each valid token of row b, on a canvas of its own with `hidden` (L,) masked."""
    shown = roll.completion[b].masked_fill(torch.as_tensor(hidden), model.mask_id)
    prompt = roll.prompt[b] if prompt is None else prompt
    logp = (slow_logits(model, prompt, roll.prompt_mask[b], shown) / T).log_softmax(1)
    return torch.stack([logp[i, roll.completion[b, i]] for i in up_to_eos(roll.completion[b], model.eos_id)])


def diffu_values(model, roll, shown, b, k):
    return token_logps(model, roll, b, [True] * L, shown[k][b // 3])


def prompt_shown(model, roll, shown, b, k):
    return token_logps(model, roll, b, [True] * L)


def espo_values(model, roll, shown, b, k, weigh=True):
    """E of the docstring under the masks of pass k, token by token."""
    n, total = int(roll.valid[b].sum()), 0.0
    masks = shown[0][b].chunk(PASSES)[k]
    for scored in masks:
        hidden = scored | ~roll.valid[b]
        weight = (n + 1) / max(1, int(scored.sum())) if weigh else 1.0
        total = total + weight * scored[:n] * token_logps(model, roll, b, hidden) / len(masks)
    return total


def one_set_of_masks(model, roll, shown, b, k):
    return espo_values(model, roll, shown, b, 0)


def unweighed(model, roll, shown, b, k):
    return espo_values(model, roll, shown, b, k, False)


def just_values(model, roll, shown, b, k):
    n = int(roll.valid[b].sum())
    return torch.stack([token_logps(model, roll, b, [i >= t for i in range(L)])[t] for t in range(n)])


def only_itself_hidden(model, roll, shown, b, k):
    n = int(roll.valid[b].sum())
    return torch.stack([token_logps(model, roll, b, [i == t or i >= n for i in range(L)])[t]
                        for t in range(n)])


# The loss of a row of values new, old, ref (n,) and advantage A.


def clipped(log_ratio, A):
    ratio = log_ratio.exp()
    return torch.minimum(ratio * A, ratio.clamp(1 - EPS, 1 + EPS) * A)


def per_token(new, old, ref, A):
    return -clipped(new - old, A) + BETA * ((ref - new).exp() - (ref - new) - 1)


def token_mean(*values):
    return per_token(*values).mean()


def token_sum(*values):
    """Pooled: the sum over the tokens of all rows is divided by their number."""
    return per_token(*values).sum()


def over_L(*values):
    return per_token(*values).sum() / L


def whole_ratio(new, old, ref, A):
    return -clipped((new - old).sum(), A) + BETA * ((ref - new).exp() - (ref - new) - 1).mean()


def sequence(new, old, ref, A, length=None):
    ratio = (new - old).sum() / (length or len(new))
    return -clipped(ratio, A) + BETA * (new - ref).sum() ** 2 / (2 * len(new))


def not_normalised(*values):
    return sequence(*values, length=1)


def padded_length(*values):
    return sequence(*values, length=L)


def token_ratios(new, old, ref, A):
    return -clipped(new - old, A).mean() + BETA * (new - ref).sum() ** 2 / (2 * len(new))


def undivided_kl(new, old, ref, A):
    return sequence(new, old, new.detach(), A) + BETA * (new - ref).sum() ** 2 / 2


def k2_of_the_mean(new, old, ref, A):
    return sequence(new, old, new.detach(), A) + BETA * (new - ref).mean() ** 2 / 2


RIGHT = {"diffu_grpo": (diffu_values, token_mean), "espo": (espo_values, sequence),
         "just_grpo": (just_values, over_L)}
WRONG = {
    "diffu_grpo": [(prompt_shown, token_mean), (diffu_values, over_L), (diffu_values, whole_ratio),
                   (diffu_values, token_sum)],
    "espo": [(unweighed, sequence), (one_set_of_masks, sequence), (espo_values, token_ratios),
             (espo_values, not_normalised), (espo_values, padded_length), (espo_values, undivided_kl),
             (espo_values, k2_of_the_mean)],
    "just_grpo": [(only_itself_hidden, over_L), (just_values, token_mean), (just_values, whole_ratio)],
}


SHAPE = dict(prompts=4, G=3, L=8, S=4, block=4, temperature=T, minibatches=1, seed=4)


def trained(module, updates: int = 1, **settings) -> tuple[NotedRun, common.Denoiser]:
    """A run of the exact model, in whose rollouts rows end early."""
    run, model = NotedRun(updates), exact_model()
    own = {field.name for field in dataclasses.fields(module.Args)}
    args = module.Args(**{k: v for k, v in (SHAPE | settings).items() if k in own})
    module.train(args, model, toy_task(), run)
    return run, model


@pytest.mark.parametrize("module, own", [
    (diffu_grpo, {"hide_prompt": 0.5}), (espo, {}), (just_grpo, {}), (just_grpo, {"normalise": "none"})])
def test_updates_have_the_loss_and_the_gradient_of_the_formula(module, own, float64, monkeypatch):
    """Two updates of two passes: old, reference and policy are of different networks. What is tempting and
    wrong is rejected."""
    name = module.__name__.partition(".")[2]
    right, wrong = RIGHT[name], WRONG[name]
    seen = {function: [] for function in ("roll_out", "reward_rows", "hide_tokens", "antithetic_masks")}
    for function, found in seen.items():
        if hasattr(module, function):
            monkeypatch.setattr(module, function, recording(getattr(module, function), found))
    run, model = trained(module, 2, passes=PASSES, beta=BETA, eps=EPS, lr=1e-2, budget=100, **own)
    assert seen["roll_out"][0].valid.sum(1).unique().numel() > 2
    assert len(seen["hide_tokens"]) == 2 * PASSES * (name == "diffu_grpo")
    start = exact_model().network.state_dict()

    def values(value, weights, u, k):
        model.network.load_state_dict(weights)
        shown = seen["hide_tokens"][PASSES * u : PASSES * (u + 1)] or seen["antithetic_masks"][u : u + 1]
        return [value(model, seen["roll_out"][u], shown, b, k) for b in range(12)]

    for u in range(2):
        group = seen["reward_rows"][u][0].view(4, 3)
        centre = group.mean(1, keepdim=True)
        if name == "espo":
            centre = (group.sum(1, keepdim=True) - group) / 2
        scale = group.std(1, keepdim=True) + 1e-4 if name == "just_grpo" and not own else 1.0
        adv = ((group - centre) / scale).flatten()
        for k in range(PASSES):
            step, before = run.steps[PASSES * u + k], run.steps[PASSES * u]
            for value, loss in [right, *(wrong if (u, k) == (1, PASSES - 1) else [])]:
                with torch.no_grad():
                    ref = values(value, start, u, k)
                    old = values(value, before.weights, u, k)
                new = values(value, step.weights, u, k)
                count = sum(map(len, new)) if loss is token_sum else 12
                total = sum(loss(*row) for row in zip(new, old, ref, adv, strict=True)) / count
                error = relative_error(gradient(model.network.parameters(), total), step.gradient)
                assert error < 1e-9 if (value, loss) == right else error > 1e-3, (value, loss, error)
                if (value, loss) == right:
                    assert step.loss == pytest.approx(total.item(), rel=1e-9)
    assert run.logged[1]["kl"] > 0 and run.logged[1]["clip_frac"] > 0


@pytest.mark.parametrize("own, leave", [({}, True), ({"normalise": "none"}, False), ({"beta": 0.1}, False)])
def test_rows_of_advantage_0_leave_just_grpos_mean(own, leave, float64, monkeypatch):
    """One of the four groups has equal rewards. With a KL its rows are scored, so they count."""
    rolls, adv = [], []
    reward_rows = just_grpo.reward_rows

    def one_equal_group(*inputs):
        reward, *rest = reward_rows(*inputs)
        reward[3:6] = 0.5
        return reward, *rest

    monkeypatch.setattr(just_grpo, "reward_rows", one_equal_group)
    monkeypatch.setattr(just_grpo, "roll_out", recording(just_grpo.roll_out, rolls))
    monkeypatch.setattr(just_grpo, "advantage", recording(just_grpo.advantage, adv))
    run, _ = trained(just_grpo, passes=1, **own)
    (roll,), (adv,), (step,) = rolls, adv, run.steps
    left = int((adv != 0).sum())
    assert 0 < left < 12
    model = exact_model()  # no step has been made: the policy is the old and the reference
    total = sum(-A * just_values(model, roll, None, b, 0).sum() / L for b, A in enumerate(adv))
    sums = gradient(model.network.parameters(), total)
    for count in {left, 12}:
        right = count == (left if leave else 12)
        assert (relative_error(sums / count, step.gradient) < 1e-9) == right, count


@pytest.mark.parametrize("module", [diffu_grpo, espo, just_grpo])
def test_the_gradient_does_not_depend_on_the_budget(module, float64):
    """A row or canvas per forward, some, or all; half of the groups at a time. lr 0: Adam would blow the
    rounding up."""
    found = []
    for minibatches, budget in [(1, 10_000), (2, 10_000), (2, 1), (2, 120)]:
        run, _ = trained(module, lr=0.0, beta=0.1, passes=1, minibatches=minibatches, budget=budget)
        found.append([step.gradient for step in run.steps])
    (whole,), halves, *others = found
    assert (halves[0] - halves[1]).norm() > 0.1 * whole.norm()
    assert relative_error(whole, sum(halves) / 2) < 1e-12
    for other in others:
        assert all(relative_error(*pair) < 1e-12 for pair in zip(halves, other, strict=True))


def test_just_grpo_is_egspo_where_a_step_reveals_the_next_token(float64):
    """All of its steps kept and no stepwise advantage: the same rollouts, and the same gradients in two
    passes."""
    both = dict(passes=2, beta=0.1, lr=1e-2)
    ours, one = trained(just_grpo, eps=0.1, normalise="none", **both)
    theirs, two = trained(egspo, lam=0.0, select="all", S=8, block=1, eps_lo=0.1, eps_hi=0.1, **both)
    pairs = list(zip(ours.steps, theirs.steps, strict=True))
    assert len(pairs) == 2 and max(relative_error(a.gradient, b.gradient) for a, b in pairs) < 1e-9
    assert ours.logged[0]["clip_frac"] > 0
    assert all(ours.logged[0][k] == pytest.approx(theirs.logged[0][k]) for k in ("reward", "kl", "clip_frac"))
    assert all(one.counts[k] == two.counts[k] for k in ("nfe_rollout", "nfe_update", "nfe_update_full"))


def test_just_grpo_is_evaluated_as_every_method_is(tmp_path, monkeypatch):
    """With S and block of the command line; EGSPO that writes from left to right is evaluated so, too."""
    offer(monkeypatch, "toy", toy_task)
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
    models.save_model(sharp_model(1.0), tmp_path / "model")
    flags = "--task toy --prompts 4 --L 8 --updates 0 --eval_threshold 0 --minibatches 1"
    first = {}
    for method, own in (("baselines.just_grpo", "--S 4 --block 4"), ("wd1", "--S 4 --block 4"),
                        ("egspo", "--S 8 --block 1")):
        launch(method, "--model", tmp_path / "model", "--out", tmp_path / method, *f"{flags} {own}".split())
        first[method] = lines(tmp_path / method)[0]
    assert first["baselines.just_grpo"] == first["wd1"] != first["egspo"]


def test_diffu_grpo_takes_one_forward_a_prompt_and_pass(float64):
    run, model = trained(diffu_grpo, passes=3, lr=0.0, seed=11)
    update, made = run.logged[0], model.counts["nfe_update"]
    assert update["equal_groups"] == 0 and update["clip_frac"] == 0  # lr 0: the ratio is 1 in every pass
    assert model.counts["nfe_update_full"] == 12 * 3 * 2
    assert 4 * 3 < made <= 4 * 3 * 2  # fewer where two passes hide the same


# --------------------------------------------------------------------------------- exact, by enumeration


def left_to_right(eos_id: int | None):
    """Every completion of 3 tokens of a tabular denoiser: the rollout and its probabilities, from the
    sampler's rules; blocks of one token."""
    model = Tabular(3, 3, seed=5, eos_id=eos_id)
    p, completions, steps = zip(*enumerate_rollouts(model, 3, 1, "top_prob", 1), strict=True)
    return model, as_rollout(model, completions, steps, 3), torch.stack(p)


def all_tokens(model, roll) -> torch.Tensor:
    """token_logp of every valid token: (B, L)."""
    b, t = roll.valid.nonzero().T
    out = torch.zeros(roll.completion.shape, dtype=torch.float64)
    x = canvas(roll[b], torch.arange(roll.completion.shape[1]) >= t[:, None])
    return out.index_put((b, t), just_grpo.token_logp(model, x, roll[b], t, 1.0))


@pytest.mark.parametrize("eos_id", [None, 1])
def test_just_grpo_sums_to_the_log_likelihood_of_its_order(eos_id):
    model, roll, p = left_to_right(eos_id)
    assert len(p) == (27 if eos_id is None else 1 + 2 + 4 + 8) and abs(p.sum().item() - 1) < 1e-12
    torch.testing.assert_close(all_tokens(model, roll).sum(1), p.log(), atol=1e-12, rtol=0)
    only_itself = torch.eye(3, dtype=torch.bool)  # all other tokens shown: a pseudo-likelihood
    shown = [torch.where(hidden, model.mask_id, roll.completion) for hidden in only_itself]
    at = torch.arange(len(p))
    logp = torch.stack([model.head(model.body(x, None))[at, i, :3].log_softmax(1)[at, roll.completion[:, i]]
                        for i, x in enumerate(shown)], 1)
    assert ((logp * roll.valid).sum(1) - p.log()).abs().max() > 0.1


@pytest.mark.parametrize("eos_id", [None, 1])
def test_just_grpo_is_the_policy_gradient(eos_id):
    """Groups of two, every pair of completions: (G - 1) / G of grad E[R], over L, downhill. The group's std
    bends it, and so do the answers' lengths."""
    model, roll, p = left_to_right(eos_id)
    reward = torch.rand(len(p), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad((p * reward).sum(), model.table, retain_graph=True)[0]
    pairs = torch.cartesian_prod(*[torch.arange(len(p))] * 2).flatten()
    weight = p.detach()[pairs].view(-1, 2).prod(1).repeat_interleave(2)[:, None] / 2  # mean over the two rows
    logp, valid = all_tokens(model, roll), roll.valid

    def found(normalise: str, length=3) -> torch.Tensor:
        adv = just_grpo.advantage(reward[pairs], 2, normalise)[:, None]
        loss, _ = just_grpo.token_loss(logp[pairs], logp.detach()[pairs], adv, 0.2)
        total = (weight * loss * valid[pairs] / length).sum()
        return torch.autograd.grad(total, model.table, retain_graph=True)[0]

    assert relative_error(exact, -3 * 2 * found("none")) < 1e-10
    lengths = valid.sum(1, keepdim=True)[pairs]
    for bent in [-found("released")] + ([-found("none", lengths)] if eos_id else []):
        assert relative_error(exact, bent * (exact * bent).sum() / (bent * bent).sum()) > 0.05


def every_order(model, y: list[int]) -> torch.Tensor:
    """(n!,) log-likelihood of tokens y written in each order, the positions behind them hidden throughout."""
    found = []
    for order in itertools.permutations(range(len(y))):
        state, total = [model.mask_id] * 3, 0.0
        for i in order:
            total = total + model.head(model.body(torch.tensor([state]), None))[0, i, :3].log_softmax(0)[y[i]]
            state[i] = y[i]
        found.append(total)
    return torch.stack(found)


def elbo(model, rows, scored) -> torch.Tensor:
    """E (M,) on the canvases that hide what is scored (M, K, L), and the tail."""
    return espo.elbo(model, canvas(rows, scored | ~rows.valid[:, None]), rows, scored, 1.0)


@pytest.mark.parametrize("y", [[2, 0, 2], [0, 1], [1]])
def test_the_expected_elbo_is_exact(y):
    """Over all masks: the mean over orders of the log-likelihood in that order, a bound of their mixture."""
    model = Tabular(3, 3, seed=5, eos_id=1)
    roll = as_rollout(model, [y + [1] * (3 - len(y))], [[0] * 3], 1)
    assert roll.valid.sum() == len(y)
    counts = (torch.arange(len(y) + 1) + 0.5) / (len(y) + 1)
    orders = torch.tensor(list(itertools.permutations([0.1, 0.4, 0.7])))
    noise = torch.cat([counts.repeat_interleave(6)[:, None], orders.repeat(len(counts), 1)], 1)[:, None]
    rows = roll[torch.zeros(len(noise), dtype=torch.long)]
    scored = espo.antithetic_masks(rows.valid, noise)  # every draw once, (draws, 2, 3)
    found = elbo(model, rows, scored)
    exact = every_order(model, y)
    torch.testing.assert_close(found.mean(), exact.mean(), atol=1e-12, rtol=0)
    assert exact.mean() <= exact.logsumexp(0) - math.log(len(exact)) + 1e-12
    apart = torch.stack([elbo(model, rows, half[:, None]) for half in scored.unbind(1)])
    torch.testing.assert_close(apart.mean(1), exact.mean().expand(2), atol=1e-12, rtol=0)  # each half is
    if len(y) > 1:  # but a pair is less noisy; no weights, or n / l, would give another number
        assert found.var() < apart.var(1).max()
        n = scored.sum(2).clamp(min=1)
        logp = apart.T * n / (len(y) + 1)
        assert all((w * logp).mean() - exact.mean() > 0.01 for w in (torch.ones(()), len(y) / n))


def test_masks_are_complements_of_every_size():
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]).repeat_interleave(7000, 0)
    noise = torch.rand(14_000, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scored = espo.antithetic_masks(valid, noise)  # (rows, 4, 6)
    assert torch.equal(scored[:, ::2] ^ scored[:, 1::2], valid[:, None].expand(-1, 2, -1))
    assert not torch.equal(scored[:, 0], scored[:, 2])
    for row, n in ((0, 6), (7000, 4)):  # False alarm: 12 shares, |z| > 5, about 1e-5
        size = torch.bincount(scored[row : row + 7000, 0].sum(1), minlength=n + 1) / 7000
        assert ((size - 1 / (n + 1)).abs() < 5 * (n / (n + 1) ** 2 / 7000) ** 0.5).all()


def test_diffu_grpo_at_ratio_one_has_the_gradient_of_wd1s_likelihood():
    """With weights -A / |o| for w- - w+: left-padded prompts partly hidden, answers of several lengths."""
    model = sharp_model(1.0, torch.float64)
    roll = denoise(model, *padded_prompts(model, 4), generators(), L=L, S=4, block=4)
    assert roll.valid.sum(1).unique().numel() > 2
    some = diffu_grpo.hide_tokens(roll.prompt[::4], roll.prompt_mask[::4], 0.5, model.mask_id, generators())
    x = torch.cat([some.repeat_interleave(4, 0), torch.full((12, L), model.mask_id)], 1)
    reward = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adv = diffu_grpo.advantage(reward, 4)
    n = roll.valid.sum(1)
    weight = -adv / n
    seen = evaluated(model)
    logp = diffu_grpo.one_step_logp(model, x, roll, T)
    assert sum(seen) == 3  # of 12 rows
    loss, _ = diffu_grpo.token_loss(logp, logp.detach(), adv, 0.2)
    found = gradient(model.network.parameters(), ((loss * roll.valid).sum(1) / n).sum())
    one = wd1.one_step_logp(model, x, roll.prompt_mask, roll.completion, T)
    expected = gradient(model.network.parameters(), (weight * one).sum())
    assert relative_error(expected, found) < 1e-10
    other = gradient(model.network.parameters(), (-adv * one).sum())  # tokens of all answers weighed alike
    assert relative_error(found, other * (found @ other) / (other @ other)) > 0.05


# ----------------------------------------------------------------------------------------- by hand


def test_what_is_tested_elsewhere_is_the_same_text():
    for ours, theirs in ((diffu_grpo.hide_tokens, wd1.hide_tokens), (diffu_grpo.k3, egspo.k3),
                         (just_grpo.k3, egspo.k3)):
        assert inspect.getsource(ours) == inspect.getsource(theirs)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_equal_rewards_give_exactly_no_advantage(advantage):
    """Subtracting the mean is not enough: in fp32 the mean of six times 0.9 is not 0.9."""
    reward = torch.tensor([0.9] * 6 + [0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    adv = advantage(reward, 6)
    assert adv[:6].abs().max() == 0 and (adv[6:] * (reward[6:] - 0.5) > 0).all()


def test_advantage_by_hand():
    """diffu-GRPO: minus the mean. ESPO: minus the mean of the others. JustGRPO: over the std (that of G - 1)
    and 1e-4, which is felt where rewards hardly differ."""
    reward = torch.tensor([1.0, 0.0, 2.0, 0.3, 0.0, 0.0])
    expected = torch.tensor([0.0, -1.0, 1.0, 0.2, -0.1, -0.1])
    for advantage in (diffu_grpo.advantage, centred):
        torch.testing.assert_close(advantage(reward, 3), expected)
    torch.testing.assert_close(espo.advantage(reward, 3), torch.tensor([0.0, -1.5, 1.5, 0.3, -0.15, -0.15]))
    std = torch.tensor([1.0] * 3 + [0.03**0.5] * 3)
    torch.testing.assert_close(by_std(reward, 3), expected / (std + 1e-4))
    close = torch.tensor([0.0, 1e-4])
    torch.testing.assert_close(by_std(close, 2), torch.tensor([-5e-5, 5e-5]) / (1e-4 / 2**0.5 + 1e-4))


LOSSES = {
    "diffu_grpo": lambda ratio, adv: diffu_grpo.token_loss(ratio.log()[:, None], torch.zeros(6, 1), adv, 0.3),
    "espo": lambda ratio, adv: espo.sequence_loss(5 * ratio.log(), torch.zeros(6), torch.tensor(5), adv, 0.3),
    "just_grpo": lambda ratio, adv: just_grpo.token_loss(ratio.log(), torch.zeros(6), adv, 0.3),
}


@pytest.mark.parametrize("method", LOSSES)
def test_clip_by_hand_and_against_its_tempting_wrong_versions(method):
    """ESPO: five tokens, whose mean log-ratio counts."""
    ratio = torch.tensor([1.0, 2.0, 0.5, 2.0, 0.5, 1.1])
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    #        clip is [0.7, 1.3]:     1 | 1.3 clipped | 0.5 | -2 not clipped | -0.7 clipped | -1.1
    expected = torch.tensor([-1.0, -1.3, -0.5, 2.0, 0.7, 1.1])
    loss, was_clipped = (found.flatten() for found in LOSSES[method](ratio, adv))
    torch.testing.assert_close(loss, expected)
    assert was_clipped.tolist() == [False, True, False, False, True, False]
    clipped_only = -ratio.clamp(0.7, 1.3) * adv
    optimistic = -torch.max(ratio * adv, ratio.clamp(0.7, 1.3) * adv)
    assert (clipped_only - expected).abs().max() > 0.1 and (optimistic - expected).abs().max() > 0.1


# ------------------------------------------------------------------------------------------- the scripts


def test_a_file_runs_by_itself_from_anywhere(tmp_path):
    files = [ROOT / f"{method.replace('.', '/')}.py" for method in BASELINES]
    assert set(files) == set((ROOT / "baselines").glob("*.py"))
    start = [file.read_text().partition("import sys\n")[2].partition("from common")[0] for file in files]
    same = {text.replace(", replace", "").replace("from typing import Literal\n", "") for text in start}
    assert len(same) == 1 and "sys.path" in start[0]
    command = [sys.executable, "-P", str(files[1]), "--resume", "nowhere"]  # -P: not its folder on the path
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert "nowhere holds no run to resume" in done.stderr and done.returncode == 2
