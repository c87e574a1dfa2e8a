"""GDSD: whole updates against the formula of the docstring, what centred logits can do that their softmax
cannot, then each function against slow loops."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import (NotedRun, Tabular, as_rollout, exact_model, generators, gradient, launch, lines,
                     padded_prompts, record_calls, recording, relative_error, sharp_model, slow_rewards,
                     toy_task)
from torch.nn.functional import cross_entropy

import common
from plumbing import models
import gdsd
from plumbing import pretrain
from common import Rollout, canvas, denoise, group_noise, log_prob, until_eos
from gdsd import advantage, centred_logit, distillation_loss, mask_pairs

L, G, T = 12, 4, 0.7
MATCHES = ["logp", "tlc"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollout(model) -> Rollout:
    """12 rows behind left-padded prompts, their first EOS at 0, 2, 5 or nowhere, anything behind it."""
    roll = denoise(model, *padded_prompts(model, G), generators(), L=L, S=6, block=4)
    x = torch.randint(3, 14, roll.completion.shape, generator=seeded())
    for column, position in enumerate((0, 2, 5)):
        x[column::G, position] = model.eos_id
    roll.completion, roll.valid = x, until_eos(x, model.end_ids)
    assert roll.valid.sum(1).tolist() == [1, 3, 6, L] * 3 and not roll.prompt_mask.all()
    return roll


def all_at_once(model, completion) -> Rollout:
    """Completions that one step revealed."""
    completion = torch.as_tensor(completion).tolist()
    return as_rollout(model, completion, [[0] * len(row) for row in completion], 1)


def draw(roll: Rollout, pairs: int, seed: int = 0) -> torch.Tensor:
    """hidden (B, pairs, 2, L)"""
    B, width = roll.completion.shape
    noise = torch.rand(B, pairs, width + 1, generator=seeded(seed), dtype=torch.float64)
    return mask_pairs(roll.valid, noise)


def pair_score(model, roll: Rollout, hidden: torch.Tensor, match: str, temperature: float, **how):
    """c (B,) of gdsd.pair_score on the canvases of the mask pairs hidden (B, 2, L)."""
    return gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, match, temperature, **how)[0]


def record(monkeypatch, name: str) -> list:
    """What gdsd's function of this name returns from now on."""
    found = []
    monkeypatch.setattr(gdsd, name, recording(getattr(gdsd, name), found))
    return found


# ---------------------------------------------------------------------------------------- a whole update


def slow_score(model, roll, b: int, pair, match: str, temperature: float, weights="pair", topk=99) -> tuple:
    """c and l of row b: token by token up to the EOS, each on the canvas of `pair` (2, L) that hides it, its
    prompt without padding."""
    y = roll.completion[b].tolist()
    end = y.index(model.eos_id) + 1 if model.eos_id in y else len(y)
    c = l = 0.0
    for i in range(end):
        (mask,) = [m for m in pair.tolist() if m[i]]
        shown = [model.mask_id if m else t for m, t in zip(mask, y, strict=True)]
        assert shown[end:] == [model.mask_id] * (len(y) - end)
        x = torch.cat([roll.prompt[b][roll.prompt_mask[b]], torch.tensor(shown)])
        z = model.head(model.body(x[None], None))[0, len(x) - len(y) + i] / temperature
        rest = torch.stack([z[v] for v in range(len(z)) if v != model.mask_id])
        logp = z[y[i]] - rest.exp().sum().log()
        read_out = logp if match == "logp" else z[y[i]] - rest.sort(descending=True).values[:topk].mean()
        weight = 1.0 if weights == "pair" else (end + 1) / sum(mask[:end]) / 2
        c, l = c + weight * read_out, l + weight * logp
    return c / end, l / end


def slow_advantages(model, roll) -> list[float]:
    """R minus the mean of the others of its group of three."""
    rewards = slow_rewards(model, roll)
    groups = [rewards[b // 3 * 3 : b // 3 * 3 + 3] for b in range(len(rewards))]
    return [r - (sum(group) - r) / 2 for r, group in zip(rewards, groups, strict=True)]


SHAPE = dict(prompts=4, G=3, L=8, S=4, block=4, temperature=T, num_mc=2, seed=2)


@pytest.mark.parametrize("match, how", [
    ("logp", {}), ("tlc", {}), ("logp", {"weights": "elbo"}), ("tlc", {"weights": "elbo", "topk": 3})])
def test_updates_have_the_loss_and_the_gradient_of_the_formula(match, how, float64, monkeypatch):
    """Two updates of three passes: the scores of old, reference and policy are of different networks.
    Rejected: the other read-out, the other weights, a KL of centred logits, a mean over the group with
    the row itself, and a sum over the two masks."""
    rolls, masks = record(monkeypatch, "roll_out"), record(monkeypatch, "mask_pairs")
    run = NotedRun(updates=2)
    args = gdsd.Args(**SHAPE | dict(prompts=2, match=match, passes=3, minibatches=1, psi=2.0, beta=0.3,
                                    budget=100, lr=1e-2) | how)
    gdsd.train(args, exact_model(), toy_task(), run)
    assert rolls[0].valid.sum(1).unique().numel() > 3 and len(run.steps) == 2 * 3
    model = exact_model()
    start = {k: v.clone() for k, v in model.network.state_dict().items()}

    def scores(weights, roll, hidden, match=match, how=how):
        """c and l of every row and pair."""
        model.network.load_state_dict(weights)
        return [slow_score(model, roll, b, hidden[b, j], match, T, **how) for b in range(6) for j in range(2)]

    for update in range(2):
        roll, hidden, losses = rolls[update], masks[update], []
        steps = run.steps[3 * update : 3 * update + 3]
        adv = slow_advantages(model, roll)
        with torch.no_grad():
            ref, old = (scores(weights, roll, hidden) for weights in (start, steps[0].weights))

        def loss_of(new, adv, scale=1.0, kl_of=1, old=old, ref=ref):
            squares = [(scale * (new[k][0] - old[k][0]) - 2 * adv[k // 2]) ** 2
                       + 0.3 * (scale * (new[k][kl_of] - ref[k][kl_of])) ** 2 for k in range(12)]
            return sum(squares) / 12

        for step in steps:
            new = scores(step.weights, roll, hidden)
            loss = loss_of(new, adv)
            mistakes = [loss_of(new, [a * 2 / 3 for a in adv]), loss_of(new, adv, scale=2.0)]
            if match == "tlc" and step is not run.steps[0]:  # there the policy is the reference: no KL
                mistakes.append(loss_of(new, adv, kl_of=0))
            right, *wrong = (gradient(model.network.parameters(), value) for value in (loss, *mistakes))
            assert relative_error(right, step.gradient) < 1e-10
            assert all(relative_error(step.gradient, found) > 0.01 for found in wrong)
            assert step.loss == pytest.approx(loss.item(), rel=1e-10)
            other_weights = how | {"weights": "pair" if how else "elbo"}
            for other in ({"match": {"tlc": "logp", "logp": "tlc"}[match]}, {"how": other_weights}):
                value = loss_of(scores(step.weights, roll, hidden, **other), adv)
                found = gradient(model.network.parameters(), value)
                assert relative_error(step.gradient, found) > 0.01
            losses.append(loss.item())
        assert run.logged[update]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-10)
        assert abs(losses[1] - losses[0]) > 1e-3  # the weights moved, c_old did not


# -------------------------------------------------------------------------------------- the read-outs


def test_cross_entropy_undoes_the_centring():
    """Why the centring of the authors' code did nothing in May 2026 (commit 3fb6780; it does something since
    0c0bd6c), and why our `tlc` has no softmax."""
    z = 3 * torch.randn(7, 11, generator=seeded(), dtype=torch.float64)
    token = torch.arange(7)
    torch.testing.assert_close(cross_entropy(z - z.mean(1, keepdim=True), token), cross_entropy(z, token))
    at = torch.arange(7)
    torch.testing.assert_close(log_prob(z, at, token).mean(), -cross_entropy(z, token))
    assert (centred_logit(z, at, token) - log_prob(z, at, token)).abs().min() > 0.1


def test_centred_logit_leaves_the_mask_token_out_and_ignores_a_shift():
    z = torch.randn(5, 6, generator=seeded(), dtype=torch.float64)
    z[:, 4] = -math.inf
    z.requires_grad_()
    at, token = torch.tensor([0, 1, 2, 2, 3, 4, 4]), torch.tensor([0, 1, 3, 2, 5, 2, 3])
    found = centred_logit(z, at, token)
    for m, (row, v) in enumerate(zip(at.tolist(), token.tolist(), strict=True)):
        mean = sum(z[row, u].item() for u in (0, 1, 2, 3, 5)) / 5
        assert found[m].item() == pytest.approx(z[row, v].item() - mean, abs=1e-14)
    torch.testing.assert_close(centred_logit(z + torch.arange(5.0)[:, None], at, token), found)
    found[0].backward()
    assert z.grad[0].tolist() == pytest.approx([0.8, -0.2, -0.2, -0.2, 0, -0.2])
    over_all = z.detach()[at, token] - z.detach().nan_to_num(neginf=0.0).mean(1)[at]
    assert (over_all - found).abs().max() > 0.01


def test_centring_on_the_largest_logits():
    """Value and gradient; as many as there are, or more, are all of them."""
    z = torch.tensor([[4.0, 1.0, -math.inf, 3.0, 2.0]], dtype=torch.float64, requires_grad=True)
    at, token = torch.tensor([0, 0]), torch.tensor([1, 3])
    found = centred_logit(z, at, token, 2)
    assert found.tolist() == [1 - 3.5, 3 - 3.5]
    found[0].backward()
    assert z.grad.tolist() == [[-0.5, 1.0, 0.0, -0.5, 0.0]]
    for topk in (4, 5, 99):
        torch.testing.assert_close(centred_logit(z, at, token, topk), centred_logit(z, at, token))


# ------------------------------------------------------------------------ one token, minimised exactly

VISITED, REWARD = [0, 0, 1, 2], torch.tensor([1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
RARE = torch.tensor([0.05, 0.5, 0.2, 0.15, 0.1], dtype=torch.float64)  # p_old; nobody visits tokens 3 and 4
COMMON = RARE[[1, 0, 2, 3, 4]]  # token 0, the rewarded one, is common
P_REF = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64)
PSI = 2.0


def minimiser(match: str, p_old, beta: float, kl_of: int = 1) -> tuple[torch.Tensor, float]:
    """p (V,) where the loss of a group that visited four tokens is smallest, and that loss. kl_of: the KL is
    of log p (1) or of what is regressed (0)."""
    model = Tabular(5, 1, seed=0)
    roll = all_at_once(model, torch.tensor(VISITED)[:, None])
    hidden, adv = draw(roll, 1)[:, 0], advantage(REWARD, 4)

    def scores():
        return gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, match, 1.0)

    model.table.data[5, 0, :5] = P_REF.log() + 0.3
    ref = scores()[kl_of].detach()
    model.table.data[5, 0, :5] = p_old.log() + 0.3
    c_old = scores()[0].detach()

    def loss():
        optimizer.zero_grad()
        both = scores()
        value = distillation_loss(both[0], c_old, adv, PSI, both[kl_of], ref, beta).mean()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS([model.table], max_iter=200, tolerance_grad=1e-13, tolerance_change=0,
                                  line_search_fn="strong_wolfe")
    optimizer.step(loss)
    return model.table[5, 0, :5].softmax(0).detach(), loss().item()


def log_ratios(p: torch.Tensor) -> torch.Tensor:
    """Of the visited tokens to the first."""
    return (p[:3] / p[0]).log()


def tilted(p_old, beta: float) -> torch.Tensor:
    """p_old^(1 / (1 + beta)) p_ref^(beta / (1 + beta)) exp(psi A / (1 + beta)) of the visited tokens."""
    adv = torch.tensor([1 - 1.5 / 3, 0 - 2.5 / 3, 0.5 - 2 / 3], dtype=torch.float64)
    return (p_old[:3] * P_REF[:3] ** beta * (PSI * adv).exp()) ** (1 / (1 + beta))


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("p_old", [RARE, COMMON], ids=["rare", "common"])
def test_tlc_reaches_the_optimum_without_a_normaliser(p_old, beta):
    """With a KL only where that, too, is of centred logits."""
    p, loss = minimiser("tlc", p_old, beta, kl_of=0)
    torch.testing.assert_close(log_ratios(p), log_ratios(tilted(p_old, beta)), atol=1e-6, rtol=0)
    assert beta or loss < 1e-14
    first_order = p_old[:3] ** (1 - beta) * P_REF[:3] ** beta * tilted(p_old, 0) / p_old[:3]
    assert ((log_ratios(p) - log_ratios(first_order)).abs().max() > 0.1) == (beta > 0)


@pytest.mark.parametrize("p_old", [RARE, COMMON], ids=["rare", "common"])
def test_with_a_kl_on_log_p_tlc_misses_the_optimum_by_a_little(p_old):
    """The KL brings the normaliser back."""
    p, _ = minimiser("tlc", p_old, 0.5)
    assert 0.01 < (log_ratios(p) - log_ratios(tilted(p_old, 0.5))).abs().max() < 0.1


def test_logp_cannot_where_the_tilted_mass_exceeds_one():
    """p_old exp(psi A) of the visited tokens is what their probabilities should become: no room above 1."""
    p, loss = minimiser("logp", RARE, 0.0)
    assert tilted(RARE, 0).sum() < 1 and loss < 1e-14
    torch.testing.assert_close(log_ratios(p), log_ratios(tilted(RARE, 0)), atol=1e-6, rtol=0)

    p, loss = minimiser("logp", COMMON, 0.0)
    target = tilted(COMMON, 0)
    assert target.sum() > 1 and loss > 0.03
    assert (log_ratios(p) - log_ratios(target)).abs().max() > 0.1
    times = torch.tensor([2, 1, 1])  # visited; it is the minimum: Lagrange's condition under sum p = 1
    multiplier = times * (p[:3] / target).log() / p[:3]
    torch.testing.assert_close(multiplier, multiplier.mean().expand(3), rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------- the advantage


def test_advantage_is_the_reward_minus_the_mean_of_the_others():
    reward = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 3.0])
    expected = torch.tensor([0.75, -0.75, 0.0, -1.5, -1.5, 3.0])  # 1 - 0.5 / 2, 0 - 1.5 / 2, ...
    torch.testing.assert_close(advantage(reward, 3), expected)
    centred = (reward.view(2, 3) - reward.view(2, 3).mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(advantage(reward, 3), 3 / 2 * centred)
    assert (advantage(reward, 3) - centred).abs().max() > 0.2


def test_equal_rewards_give_exactly_no_advantage():
    """Subtracting is not enough: in fp32 the mean of five times 0.7 is not 0.7."""
    reward = torch.full((6,), 0.7)
    assert (reward - (reward.sum() - reward) / 5).abs().max() > 0
    assert advantage(reward, 6).abs().max() == 0
    both = advantage(torch.cat([reward, torch.arange(6.0)]), 6)
    assert both[:6].abs().max() == 0 and both[6:].abs().min() > 0.1


# ------------------------------------------------------------------------------------------ the masks


def test_number_hidden_is_uniform():
    """20,000 pairs per row. False alarm: |z| > 5 in one of 2 + 6 + 13 counts, about 1e-5."""
    n_valid = torch.tensor([1, 5, 12])
    valid = torch.arange(L) < n_valid[:, None]
    hidden = mask_pairs(valid, torch.rand(3, 20_000, L + 1, generator=seeded(), dtype=torch.float64))
    counts = (hidden[:, :, 0] & valid[:, None]).sum(2)
    for row, n in zip(counts, n_valid.tolist(), strict=True):
        share, p = torch.bincount(row, minlength=n + 1) / 20_000, 1 / (n + 1)
        assert len(share) == n + 1 and ((share - p).abs() < 5 * (p * (1 - p) / 20_000) ** 0.5).all()


def test_every_subset_of_a_size_is_equally_likely():
    """20,000 masks among 3 valid of 5 positions. False alarm: |z| > 5 in one of 8 subsets, 5e-6."""
    roll = all_at_once(Tabular(2, 5, seed=0, eos_id=1), [[0, 0, 1, 1, 1]])
    found = Counter(map(tuple, draw(roll, 20_000)[0, :, 0].int().tolist()))
    for subset in itertools.product((0, 1), repeat=3):
        p = 1 / 4 / math.comb(3, sum(subset))
        assert abs(found.pop((*subset, 1, 1)) / 20_000 - p) < 5 * (p * (1 - p) / 20_000) ** 0.5
    assert not found  # the tail is always hidden


def test_masks_are_complements_among_the_valid_and_hide_the_tail_in_both():
    roll = rollout(sharp_model())
    hidden = draw(roll, 50)
    assert hidden.shape == (3 * G, 50, 2, L)
    for b, pair in itertools.product(range(3 * G), range(50)):
        for i in range(L):
            times = hidden[b, pair, :, i].sum()
            assert times == (1 if roll.valid[b, i] else 2)


def test_masks_of_a_group_depend_on_its_own_generator_only():
    valid = rollout(sharp_model()).valid
    gens = [common.generator("cpu", 9, g) for g in range(3)]
    gens[1] = generators()[1]
    everyone = mask_pairs(valid, group_noise(generators(), 3 * G, (2, L + 1)))
    others = mask_pairs(valid, group_noise(gens, 3 * G, (2, L + 1)))
    alone = mask_pairs(valid[G : 2 * G], group_noise(generators()[1:2], G, (2, L + 1)))
    assert torch.equal(everyone[G : 2 * G], others[G : 2 * G]) and torch.equal(everyone[G : 2 * G], alone)
    assert not torch.equal(everyone[:G], others[:G])
    assert len(set(map(repr, alone[:, :, 0].flatten(0, 1).tolist()))) > G  # rows and pairs differ


# ------------------------------------------------------------------------------------------ the score


@pytest.mark.parametrize("match, how", [
    ("logp", {}), ("tlc", {}), ("logp", {"weights": "elbo"}), ("tlc", {"weights": "elbo", "topk": 3})])
def test_pair_score_against_slow_loops(match, how):
    """Values and gradients; row 0 has one valid token, row 1's first mask hides nothing and row 2's
    everything."""
    model = sharp_model(dtype=torch.float64)
    roll = rollout(model)
    hidden = draw(roll, 1)[:, 0]
    everything = torch.ones(L, dtype=torch.bool)
    hidden[1] = torch.stack([~roll.valid[1], everything])
    hidden[2] = torch.stack([everything, ~roll.valid[2]])
    both = gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, match, T, **how)
    slow = zip(*[slow_score(model, roll, b, hidden[b], match, T, **how) for b in range(3 * G)], strict=True)
    slow = [torch.stack(values) for values in slow]
    weight = torch.randn(3 * G, generator=seeded(), dtype=torch.float64)
    for fast, value in zip(both, slow, strict=True):
        torch.testing.assert_close(fast, value, atol=1e-6, rtol=1e-6)  # ModernBERT rotates in fp32
        found, expected = (gradient(model.network.parameters(), (weight * t).sum()) for t in (fast, value))
        assert found.isfinite().all() and (found - expected).norm() < 1e-6 * expected.norm()
    assert (match == "logp") == torch.equal(*both)
    one = pair_score(model, roll[:1], hidden[:1], match, T, **how)  # a batch of that row alone
    torch.testing.assert_close(one, both[0][:1], atol=1e-6, rtol=1e-6)
    assert gradient(model.network.parameters(), one.sum()).isfinite().all()

    tail_shown = pair_score(model, roll, hidden & roll.valid[:, None], match, T, **how)
    every_token = roll[:]
    every_token.valid = torch.ones_like(roll.valid)
    behind_eos = pair_score(model, every_token, hidden, match, T, **how)
    other = {"weights": "pair" if how else "elbo"} | {k: v for k, v in how.items() if k != "weights"}
    for wrong in (tail_shown, behind_eos, both[0] * roll.valid.double().mean(1),
                  pair_score(model, roll, hidden, match, 1.0, **how),
                  pair_score(model, roll, hidden, match, T, **other)):
        assert (wrong - slow[0]).abs().max() > 0.1


def test_what_the_two_weights_estimate():
    """Over every mask of one completion of 5 tokens: n E[c] is the ELBO, which is the mean over all orders of
    log p along the order, or twice E_t[log p(x0 | x_t)]. The two numbers were found by enumeration of the
    authors' formula and of ours on this table; those of (n / k) and of no halving are others."""
    model, y = Tabular(4, 5, seed=0), [2, 0, 3, 1, 1]
    gen = seeded()
    model.table.data[..., :4] = 1.5 * torch.randn((5,) * 5 + (5, 4), generator=gen, dtype=torch.float64)
    logp = model.table[..., :4].log_softmax(-1).detach()

    def log_p(hidden: list[int], i: int) -> float:
        """Of token i where `hidden` are hidden."""
        return logp[tuple(4 if j in hidden else t for j, t in enumerate(y))][i, y[i]].item()

    elbo = 0.0
    for order in itertools.permutations(range(5)):
        elbo += sum(log_p(order[s:], i) for s, i in enumerate(order)) / 120
    subsets = [[i for i in range(5) if m[i]] for m in itertools.product((0, 1), repeat=5)]
    share = torch.tensor([1 / 6 / math.comb(5, len(m)) for m in subsets], dtype=torch.float64)
    pair = sum(2 * p.item() * sum(log_p(m, i) for i in m) for p, m in zip(share, subsets, strict=True))

    mask = torch.tensor([[i in m for i in range(5)] for m in subsets])
    roll, pairs = all_at_once(model, [y] * 32), torch.stack([mask, ~mask], 1)
    found = {weights: 5 * (share * pair_score(model, roll, pairs, "logp", 1.0, weights=weights)).sum().item()
             for weights in ("pair", "elbo")}
    assert found == pytest.approx({"pair": pair, "elbo": elbo}, abs=1e-12)
    assert found == pytest.approx({"pair": -9.8127, "elbo": -10.3221}, abs=5e-5)


@pytest.mark.parametrize("match", MATCHES)
def test_the_authors_loss_is_num_mc_times_ours(match):
    """Of their commits 2211b60 and 0c0bd6c, without the clamp, for answers without an EOS: written for S, a
    completion's sum, and summed over the masks. Value and gradient, and what it is easily mistaken for."""
    model, mc, psi, beta = sharp_model(dtype=torch.float64), 2, 0.3, 0.2
    roll = denoise(model, *padded_prompts(model, G), generators(), L=L, S=6, block=4)[::3]
    roll.completion = torch.randint(3, 14, roll.completion.shape, generator=seeded())
    roll.valid = torch.ones_like(roll.valid)
    hidden, adv = draw(roll, mc), torch.tensor([0.5, -1.0, 0.25, 0.25], dtype=torch.float64)
    S_old, S_ref = 3 * torch.randn(2, 4, mc, generator=seeded(), dtype=torch.float64)

    def theirs(match=match, kl_on=1, **how):
        """kl_on: 1 is log p, 0 what is regressed."""
        policy = kl = 0.0
        for b, j in itertools.product(range(4), range(mc)):
            scores = slow_score(model, roll, b, hidden[b, j], match, T, **({"weights": "elbo"} | how))
            S, S_kl = L * scores[0], L * scores[kl_on]
            policy = policy + ((S - S_old[b, j]) / L - psi * adv[b]) ** 2 / 4
            kl = kl + (S_kl - S_ref[b, j]) ** 2 / 2 / (4 * mc * L)
        return policy + beta * kl

    def ours(beta=beta * L / (2 * mc)):
        rows, halves = roll[torch.arange(4).repeat_interleave(mc)], hidden.flatten(0, 1)
        c, logp = gdsd.pair_score(model, canvas(rows, halves), rows, halves, match, T, "elbo")
        adv_of = adv.repeat_interleave(mc)
        loss = distillation_loss(c, S_old.flatten() / L, adv_of, psi, logp, S_ref.flatten() / L, beta)
        return mc * loss.mean()

    def error(one, other):
        return (one - other).norm() / other.norm()

    right, found = theirs(), ours()
    assert error(found, right) < 1e-6  # ModernBERT rotates in fp32
    right_gradient = gradient(model.network.parameters(), right)
    assert error(gradient(model.network.parameters(), found), right_gradient) < 1e-5
    for wrong in (theirs(weights="pair"), ours(beta), *([theirs(kl_on=0)] if match == "tlc" else [])):
        assert error(gradient(model.network.parameters(), wrong), right_gradient) > 0.05


def test_pair_score_scores_every_valid_token_once(monkeypatch):
    model, asked, real = sharp_model(), [], gdsd.score
    roll = rollout(model)
    monkeypatch.setattr(gdsd, "score", lambda *inputs: asked.append(inputs[4]) or real(*inputs))
    with torch.no_grad():
        pair_score(model, roll, draw(roll, 1)[:, 0], "tlc", T)
    (where,) = asked
    assert torch.equal(where.view(3 * G, 2, L).sum(1), roll.valid.long())


# ------------------------------------------------------------------------------------------- the loss


def test_two_rows_of_three_tokens_by_hand():
    model = Tabular(2, 3, seed=0)
    with torch.no_grad():  # centred: +-1, +-2, 0, whatever is hidden
        model.table[..., :2] = torch.tensor([[2.0, 0.0], [3.0, 7.0], [5.0, 5.0]])
    roll = all_at_once(model, [[0, 1, 0], [1, 1, 1]])
    c = pair_score(model, roll, draw(roll, 1)[:, 0], "tlc", 1.0)
    assert c.tolist() == pytest.approx([(1 + 2 + 0) / 3, (-1 + 2 + 0) / 3])
    adv = advantage(torch.tensor([1.0, 0.0]), 2)
    assert adv.tolist() == [1, -1]
    c_old, logp, logp_ref = torch.tensor([0.5, 0.0]), torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5])
    loss = distillation_loss(c, c_old, adv, 0.25, logp, logp_ref, 0.1)
    by_hand = [(1 - 1 / 2 - 1 / 4) ** 2 + 0.1 * 2**2, (1 / 3 - 0 + 1 / 4) ** 2 + 0.1 * (1 / 2) ** 2]
    assert loss.tolist() == pytest.approx(by_hand)


def test_a_positive_advantage_raises_c_until_the_target_and_no_further():
    c_old, adv = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.5, -1.0, 0.0])
    c = c_old.clone().requires_grad_()
    (at_old,) = torch.autograd.grad(distillation_loss(c, c_old, adv, 2.0, c, c_old, 0.0).sum(), c)
    assert at_old.tolist() == [-2.0, 4.0, 0.0]  # downhill: up, down, stay
    c = (c_old + 2.0 * adv).requires_grad_()
    (at_target,) = torch.autograd.grad(distillation_loss(c, c_old, adv, 2.0, c, c_old, 0.0).sum(), c)
    assert at_target.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("match", MATCHES)
def test_gradient_at_theta_old(match):
    """-2 psi mean(A grad c), with beta = 0 or a reference equal to old; a different reference is felt."""
    model = sharp_model(dtype=torch.float64)
    roll = rollout(model)
    hidden = draw(roll, 1)[:, 0]
    c, logp = gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, match, T)
    adv = advantage(torch.rand(3 * G, generator=seeded(), dtype=torch.float64), G)
    expected = gradient(model.network.parameters(), -2 * PSI * (adv * c).mean())

    def found(logp_ref, beta):
        loss = distillation_loss(c, c.detach(), adv, PSI, logp, logp_ref, beta).mean()
        return gradient(model.network.parameters(), loss)

    for logp_ref, beta in ((logp.detach() + 9, 0.0), (logp.detach(), 0.7)):
        assert (found(logp_ref, beta) - expected).norm() < 1e-12 * expected.norm()
    assert (found(logp.detach() + 0.1, 0.7) - expected).norm() > 0.01 * expected.norm()


def test_a_group_of_equal_rewards_contributes_only_the_beta_term():
    model = sharp_model()
    roll = rollout(model)[: 2 * G]
    hidden = draw(roll, 1)[:, 0]
    c, logp = gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, "tlc", T)
    adv = advantage(torch.tensor([0.9] * G + [0.0, 1.0, 1.0, 0.3]), G)
    logp_ref = logp.detach() + torch.linspace(0.1, 1.0, 2 * G)

    def equal_group(beta):
        loss = distillation_loss(c, c.detach(), adv, 10.0, logp, logp_ref, beta)
        return gradient(model.network.parameters(), loss[:G].sum())

    assert equal_group(0.0).abs().max() == 0
    expected = gradient(model.network.parameters(), (0.2 * (logp - logp_ref) ** 2)[:G].sum())
    assert torch.equal(equal_group(0.2), expected) and expected.norm() > 0.1


def test_the_expected_loss_does_not_depend_on_num_mc():
    """4000 rows against the sum over all masks of 3 tokens. False alarm: |z| > 5 in one of three, 2e-6."""
    old, new = Tabular(3, 3, seed=1), Tabular(3, 3, seed=2)
    one = all_at_once(new, [[2, 0, 1]])

    def loss(roll, hidden):
        c_old, c = (pair_score(m, roll, hidden, "tlc", 1.0).detach() for m in (old, new))
        return distillation_loss(c, c_old, torch.ones_like(c), 0.3, c, 0 * c, 0.2), c, c_old

    exact = 0.0
    for subset in itertools.product((False, True), repeat=3):
        mask = torch.tensor(subset)
        exact += loss(one, torch.stack([mask, ~mask])[None])[0].item() / 4 / math.comb(3, sum(subset))
    roll = one[torch.zeros(4000, dtype=torch.long)]
    for num_mc in (1, 2, 4):
        every = roll[torch.arange(4000).repeat_interleave(num_mc)]
        values, c, c_old = loss(every, draw(roll, num_mc).flatten(0, 1))
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - exact) < 5 * error
    c, c_old = (t.view(-1, 4).mean(1) for t in (c, c_old))
    averaged = distillation_loss(c, c_old, torch.ones_like(c), 0.3, c, 0 * c, 0.2)
    assert averaged.mean() < exact - 20 * error  # the square of the mean over pairs, not the mean of squares


def test_the_released_clamp_stops_after_the_first_pass():
    """It clamps the sum over tokens to +-4e-4 before dividing by L (commits 3fb6780 and 7c152d3): the first
    step leaves that band."""
    found = {}
    for clamp in (4e-4, math.inf):
        model = Tabular(3, 4, seed=0)
        roll = all_at_once(model, [[0, 1, 2, 0], [2, 1, 1, 0]])
        hidden, adv = draw(roll, 1)[:, 0], torch.tensor([1.0, -1.0])
        c_old = pair_score(model, roll, hidden, "tlc", 1.0).detach()
        norms = []
        for _ in range(80):
            moved = 4 * (pair_score(model, roll, hidden, "tlc", 1.0) - c_old)  # summed over the tokens
            loss = ((moved.clamp(-clamp, clamp) / 4 - adv) ** 2).mean()
            (grad,) = torch.autograd.grad(loss, model.table)
            model.table.data -= grad
            norms.append(grad.norm().item())
        found[clamp] = norms, loss.item()
    norms, loss = found[4e-4]
    assert norms[0] > 0.1 and norms[1:] == [0.0] * 79 and loss > 0.99
    norms, loss = found[math.inf]
    assert norms[0] == found[4e-4][0][0] and norms[1] > 0.1 and loss < 1e-6


# ---------------------------------------------------------------------------------------- whole runs


def test_old_reference_and_every_pass_see_the_same_masks(monkeypatch):
    """And a minibatch is made of whole groups."""

    def seen(roll, hidden) -> list[str]:
        rows = zip(roll.prompt.tolist(), roll.completion.tolist(), hidden.tolist(), strict=True)
        return list(map(repr, rows))

    rolls, scored, real = record(monkeypatch, "roll_out"), [], gdsd.pair_score

    def pair_score(model, x, roll, hidden, *how):
        c, logp = real(model, x, roll, hidden, *how)
        scored.append((len(masks), model, c.requires_grad, (roll, hidden)))  # in which update, by whom, what
        return c, logp

    monkeypatch.setattr(gdsd, "pair_score", pair_score)
    masks = record_calls(monkeypatch, gdsd, "mask_pairs")
    policy, run = sharp_model(), NotedRun(updates=2)
    args = gdsd.Args(**SHAPE | dict(passes=2, minibatches=2, beta=0.1, budget=200, lr=1e-2))
    gdsd.train(args, policy, toy_task(("1=", "23=", "456=", "7=")), run)
    noise = [set(noise.flatten().tolist()) for (_, noise), _ in masks]
    assert len(noise) == 2 and noise[0].isdisjoint(noise[1])
    for update, (roll, (_, hidden)) in enumerate(zip(rolls, masks, strict=True), 1):
        assert not torch.equal(hidden[:, 0], hidden[:, 1])
        everything = Counter(seen(roll[torch.arange(12).repeat_interleave(2)], hidden.flatten(0, 1)))
        old, ref, new = [], [], []
        for at, model, grad, inputs in scored:
            if at == update:
                (new if grad else old if model is policy else ref).extend(seen(*inputs))
        for found in (old, ref, new[:24], new[24:]):
            assert Counter(found) == everything
        for start in range(0, 48, 12):
            assert len({row.split("]")[0] for row in new[start : start + 12]}) == 2  # of four prompts
    (reference,) = {id(m): m for _, m, _, _ in scored if m is not policy}.values()
    start = sharp_model().network.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in reference.network.state_dict().items())
    assert not all(torch.equal(v, start[k]) for k, v in policy.network.state_dict().items())
    canvases = sum(2 * len(hidden) for _, _, _, (_, hidden) in scored)
    full = policy.counts["nfe_update_full"]
    assert policy.counts["nfe_update"] <= full == canvases == 2 * (2 * 12 * 2) * (1 + 1 + 2)


def test_the_gradient_does_not_depend_on_the_budget(float64):
    """One pair per forward, some, or all. lr 0: Adam would blow the rounding up."""

    def gradients(minibatches: int, budget: int) -> list[torch.Tensor]:
        run = NotedRun(updates=1)
        args = gdsd.Args(**SHAPE | dict(passes=1, minibatches=minibatches, lr=0.0, beta=0.1, budget=budget))
        gdsd.train(args, exact_model(), toy_task(("1=", "23=", "456=", "7=")), run)
        return [step.gradient for step in run.steps]

    (whole,) = gradients(1, 10_000)
    halves = gradients(2, 10_000)
    assert (halves[0] - halves[1]).norm() > 0.1 * whole.norm()
    assert (sum(halves) / 2 - whole).norm() < 1e-12 * whole.norm()
    for budget in (1, 120):
        for grad, expected in zip(gradients(2, budget), halves, strict=True):
            assert (grad - expected).norm() < 1e-12 * expected.norm()


def test_drift_is_said(tmp_path, monkeypatch, capfd):
    models.save_model(pretrain.tiny_model(layers=1, width=32), tmp_path / "base")
    shape = "--prompts 2 --minibatches 2 --G 2 --S 4 --updates 2 --eval_threshold 0".split()
    for limit, said in ((20.0, False), (0.0, True)):
        monkeypatch.setattr(gdsd, "DRIFT", limit)
        out = tmp_path / f"run{limit}"
        launch("gdsd", "--model", tmp_path / "base", *shape, "--out", out)
        assert ("c has drifted" in capfd.readouterr().out) == said
        moves = [row["move_mean"] for row in lines(out) if "move_mean" in row]
        assert abs(lines(out)[-2]["drift"] - sum(moves)) < 1e-6 and any(moves)
