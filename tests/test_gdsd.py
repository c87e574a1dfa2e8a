"""GDSD: what centred logits can do that the released code cannot, then each function against slow loops, then
whole runs."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import Tabular, generators, offer, padded_prompts, sharp_model, toy_task
from helpers import launch, lines
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


def tabular_rollout(model, completion) -> Rollout:
    x = torch.as_tensor(completion)
    none, zero = torch.zeros(len(x), 0, dtype=torch.long), torch.zeros(x.shape)
    valid = until_eos(x, model.end_ids)
    return Rollout(none, none.bool(), x, torch.zeros_like(x), zero, zero, valid, None, model.mask_id, 1)


def draw(roll: Rollout, pairs: int, seed: int = 0) -> torch.Tensor:
    """hidden (B, pairs, 2, L)"""
    B, width = roll.completion.shape
    noise = torch.rand(B, pairs, width + 1, generator=seeded(seed), dtype=torch.float64)
    return mask_pairs(roll.valid, noise)


def pair_score(model, roll: Rollout, hidden: torch.Tensor, match: str, temperature: float) -> torch.Tensor:
    """gdsd.pair_score on the canvases of the mask pairs hidden (B, 2, L)."""
    return gdsd.pair_score(model, canvas(roll, hidden), roll, hidden, match, temperature)


def gradient(parameters, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(parameters), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


# -------------------------------------------------------------------------------------- the read-outs


def test_cross_entropy_undoes_the_centring():
    """Why the released code's centring does nothing, and why our `tlc` has no softmax."""
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


# ------------------------------------------------------------------------ one token, minimised exactly

VISITED, REWARD = [0, 0, 1, 2], torch.tensor([1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
RARE = torch.tensor([0.05, 0.5, 0.2, 0.15, 0.1], dtype=torch.float64)  # p_old; nobody visits tokens 3 and 4
COMMON = RARE[[1, 0, 2, 3, 4]]  # token 0, the rewarded one, is common
P_REF = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64)
PSI = 2.0


def minimiser(match: str, p_old, beta: float) -> tuple[torch.Tensor, float]:
    """p (V,) where the loss of a group that visited four tokens is smallest, and that loss."""
    model = Tabular(5, 1, seed=0)
    roll = tabular_rollout(model, torch.tensor(VISITED)[:, None])
    hidden, adv = draw(roll, 1)[:, 0], advantage(REWARD, 4)
    scores = []
    for p in (P_REF, p_old):
        model.table.data[5, 0, :5] = p.log() + 0.3
        scores.append(pair_score(model, roll, hidden, match, 1.0).detach())
    c_ref, c_old = scores

    def loss():
        optimizer.zero_grad()
        c = pair_score(model, roll, hidden, match, 1.0)
        value = distillation_loss(c, c_old, c_ref, adv, PSI, beta).mean()
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
    p, loss = minimiser("tlc", p_old, beta)
    torch.testing.assert_close(log_ratios(p), log_ratios(tilted(p_old, beta)), atol=1e-6, rtol=0)
    assert beta or loss < 1e-14
    first_order = p_old[:3] ** (1 - beta) * P_REF[:3] ** beta * tilted(p_old, 0) / p_old[:3]
    assert ((log_ratios(p) - log_ratios(first_order)).abs().max() > 0.1) == (beta > 0)


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
    roll = tabular_rollout(Tabular(2, 5, seed=0, eos_id=1), [[0, 0, 1, 1, 1]])
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


def slow_score(model, roll, b: int, pair, match: str, temperature: float) -> torch.Tensor:
    """c of row b: token by token up to the EOS, each on the canvas of `pair` (2, L) that hides it, its prompt
    without padding."""
    y = roll.completion[b].tolist()
    end = y.index(model.eos_id) + 1 if model.eos_id in y else len(y)
    total = 0.0
    for i in range(end):
        (mask,) = [m for m in pair.tolist() if m[i]]
        shown = [model.mask_id if m else t for m, t in zip(mask, y, strict=True)]
        assert shown[end:] == [model.mask_id] * (len(y) - end)
        x = torch.cat([roll.prompt[b][roll.prompt_mask[b]], torch.tensor(shown)])
        z = model.head(model.body(x[None], None))[0, len(x) - len(y) + i] / temperature
        rest = [v for v in range(len(z)) if v != model.mask_id]
        total = total + z[y[i]] - (z[rest].mean() if match == "tlc" else z[rest].exp().sum().log())
    return total / end


@pytest.mark.parametrize("match", MATCHES)
def test_pair_score_against_slow_loops(match):
    """Value and gradient; row 0 has one valid token, row 1's first mask hides nothing and row 2's
    everything."""
    model = sharp_model(dtype=torch.float64)
    roll = rollout(model)
    hidden = draw(roll, 1)[:, 0]
    everything = torch.ones(L, dtype=torch.bool)
    hidden[1] = torch.stack([~roll.valid[1], everything])
    hidden[2] = torch.stack([everything, ~roll.valid[2]])
    c = pair_score(model, roll, hidden, match, T)
    slow = torch.stack([slow_score(model, roll, b, hidden[b], match, T) for b in range(3 * G)])
    torch.testing.assert_close(c, slow, atol=1e-6, rtol=1e-6)  # ModernBERT rotates in fp32
    weight = torch.randn(3 * G, generator=seeded(), dtype=torch.float64)
    found, expected = (gradient(model.network.parameters(), (weight * t).sum()) for t in (c, slow))
    assert found.isfinite().all() and (found - expected).norm() < 1e-6 * expected.norm()
    one = pair_score(model, roll[:1], hidden[:1], match, T)  # a batch of that row alone
    torch.testing.assert_close(one, c[:1], atol=1e-6, rtol=1e-6)
    assert gradient(model.network.parameters(), one.sum()).isfinite().all()

    tail_shown = pair_score(model, roll, hidden & roll.valid[:, None], match, T)
    every_token = roll[:]
    every_token.valid = torch.ones_like(roll.valid)
    behind_eos = pair_score(model, every_token, hidden, match, T)
    for wrong in (tail_shown, behind_eos, c * roll.valid.double().mean(1),
                  pair_score(model, roll, hidden, match, 1.0)):
        assert (wrong - slow).abs().max() > 0.1


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
    roll = tabular_rollout(model, [[0, 1, 0], [1, 1, 1]])
    c = pair_score(model, roll, draw(roll, 1)[:, 0], "tlc", 1.0)
    assert c.tolist() == pytest.approx([(1 + 2 + 0) / 3, (-1 + 2 + 0) / 3])
    adv = advantage(torch.tensor([1.0, 0.0]), 2)
    assert adv.tolist() == [1, -1]
    c_old, c_ref = torch.tensor([0.5, 0.0]), torch.tensor([0.0, 1.0])
    loss = distillation_loss(c, c_old, c_ref, adv, 0.25, 0.1)
    by_hand = [(1 - 1 / 2 - 1 / 4) ** 2 + 0.1 * 1**2, (1 / 3 - 0 + 1 / 4) ** 2 + 0.1 * (2 / 3) ** 2]
    assert loss.tolist() == pytest.approx(by_hand)


def test_a_positive_advantage_raises_c_until_the_target_and_no_further():
    c_old, adv = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.5, -1.0, 0.0])
    c = c_old.clone().requires_grad_()
    (at_old,) = torch.autograd.grad(distillation_loss(c, c_old, c_old, adv, 2.0, 0.0).sum(), c)
    assert at_old.tolist() == [-2.0, 4.0, 0.0]  # downhill: up, down, stay
    c = (c_old + 2.0 * adv).requires_grad_()
    (at_target,) = torch.autograd.grad(distillation_loss(c, c_old, c_old, adv, 2.0, 0.0).sum(), c)
    assert at_target.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("match", MATCHES)
def test_gradient_at_theta_old(match):
    """-2 psi mean(A grad c), with beta = 0 or a reference equal to old; a different reference is felt."""
    model = sharp_model(dtype=torch.float64)
    roll = rollout(model)
    c = pair_score(model, roll, draw(roll, 1)[:, 0], match, T)
    adv = advantage(torch.rand(3 * G, generator=seeded(), dtype=torch.float64), G)
    expected = gradient(model.network.parameters(), -2 * PSI * (adv * c).mean())

    def found(c_ref, beta):
        loss = distillation_loss(c, c.detach(), c_ref, adv, PSI, beta).mean()
        return gradient(model.network.parameters(), loss)

    for c_ref, beta in ((c.detach() + 9, 0.0), (c.detach(), 0.7)):
        assert (found(c_ref, beta) - expected).norm() < 1e-12 * expected.norm()
    assert (found(c.detach() + 0.1, 0.7) - expected).norm() > 0.01 * expected.norm()


def test_a_group_of_equal_rewards_contributes_only_the_beta_term():
    model = sharp_model()
    roll = rollout(model)[: 2 * G]
    c = pair_score(model, roll, draw(roll, 1)[:, 0], "tlc", T)
    adv = advantage(torch.tensor([0.9] * G + [0.0, 1.0, 1.0, 0.3]), G)
    c_ref = c.detach() + torch.linspace(0.1, 1.0, 2 * G)

    def equal_group(beta):
        loss = distillation_loss(c, c.detach(), c_ref, adv, 10.0, beta)
        return gradient(model.network.parameters(), loss[:G].sum())

    assert equal_group(0.0).abs().max() == 0
    expected = gradient(model.network.parameters(), (0.2 * (c - c_ref) ** 2)[:G].sum())
    assert torch.equal(equal_group(0.2), expected) and expected.norm() > 0.1


def test_the_expected_loss_does_not_depend_on_num_mc():
    """4000 rows against the sum over all masks of 3 tokens. False alarm: |z| > 5 in one of three, 2e-6."""
    old, new = Tabular(3, 3, seed=1), Tabular(3, 3, seed=2)
    one = tabular_rollout(new, [[2, 0, 1]])

    def loss(roll, hidden):
        c_old, c = (pair_score(m, roll, hidden, "tlc", 1.0).detach() for m in (old, new))
        return distillation_loss(c, c_old, 0 * c, torch.ones_like(c), 0.3, 0.2), c, c_old

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
    averaged = distillation_loss(*(t.view(-1, 4).mean(1) for t in (c, c_old, 0 * c)), 1.0, 0.3, 0.2)
    assert averaged.mean() < exact - 20 * error  # the square of the mean over pairs, not the mean of squares


def test_the_released_clamp_stops_after_the_first_pass():
    """It clamps the sum over tokens to +-4e-4 before dividing by L: the first step leaves that band."""
    found = {}
    for clamp in (4e-4, math.inf):
        model = Tabular(3, 4, seed=0)
        roll = tabular_rollout(model, [[0, 1, 2, 0], [2, 1, 1, 0]])
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


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Launch a small run from the sharp model; returns the metrics of its updates."""
    models.save_model(sharp_model(), tmp_path / "model")
    offer(monkeypatch, "toy", lambda: toy_task(("1=", "23=", "456=", "7=")))
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)  # it would take half of the time
    number = itertools.count()

    def go(flags: str) -> list[dict]:
        out = tmp_path / f"run{next(number)}"
        shape = "--task toy --prompts 4 --G 3 --L 8 --S 4 --block 4 --temperature 0.7 --eval_threshold 0"
        flags = f"{shape} --num_mc 2 {flags}"
        launch("gdsd", "--model", tmp_path / "model", "--out", out, *flags.split())
        return [row for row in lines(out) if "loss" in row]

    return go


def record(monkeypatch, name: str, note) -> list:
    """note(inputs, output) of every call of gdsd's function of this name from now on."""
    notes, real = [], getattr(gdsd, name)

    def recording(*inputs, **options):
        output = real(*inputs, **options)
        notes.append(note(inputs, output))
        return output

    monkeypatch.setattr(gdsd, name, recording)
    return notes


def test_old_reference_and_every_pass_see_the_same_masks(run, monkeypatch, tmp_path):
    """And a minibatch is made of whole groups."""

    def seen(roll, hidden) -> list[str]:
        rows = zip(roll.prompt.tolist(), roll.completion.tolist(), hidden.tolist(), strict=True)
        return list(map(repr, rows))

    def note(inputs, c):
        return len(masks), inputs[0], c.requires_grad, inputs[2:4]  # in which update, model, kind, rows

    rolls = record(monkeypatch, "roll_out", lambda _, roll: roll)
    masks = record(monkeypatch, "mask_pairs", lambda inputs, hidden: (inputs[1], hidden))
    calls = record(monkeypatch, "pair_score", note)
    updates = run("--updates 2 --passes 2 --minibatches 2 --beta 0.1 --budget 200 --lr 1e-2")
    noise = [set(noise.flatten().tolist()) for noise, _ in masks]
    assert len(noise) == 2 and noise[0].isdisjoint(noise[1])
    policy = next(model for _, model, grad, _ in calls if grad)
    for update, (roll, (_, hidden)) in enumerate(zip(rolls, masks, strict=True), 1):
        assert not torch.equal(hidden[:, 0], hidden[:, 1])
        everything = Counter(seen(roll[torch.arange(12).repeat_interleave(2)], hidden.flatten(0, 1)))
        old, ref, new = [], [], []
        for at, model, grad, inputs in calls:
            if at == update:
                (new if grad else old if model is policy else ref).extend(seen(*inputs))
        for found in (old, ref, new[:24], new[24:]):
            assert Counter(found) == everything
        for start in range(0, 48, 12):
            assert len({row.split("]")[0] for row in new[start : start + 12]}) == 2  # of four prompts
    (reference,) = {id(m): m for _, m, _, _ in calls if m is not policy}.values()
    start = models.load_model(str(tmp_path / "model")).network.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in reference.network.state_dict().items())
    assert not all(torch.equal(v, start[k]) for k, v in policy.network.state_dict().items())
    canvases = sum(2 * len(hidden) for _, _, _, (_, hidden) in calls)
    full = updates[-1]["nfe_update_full"]
    assert updates[-1]["nfe_update"] <= full == canvases == 2 * (2 * 12 * 2) * (1 + 1 + 2)


def slow_advantages(model, roll) -> list[float]:
    rewards = []
    for prompt, y, valid in zip(roll.prompt, roll.completion, roll.valid, strict=True):
        text, asked = (model.tokenizer.decode(t, skip_special_tokens=True) for t in (y[valid], prompt))
        rewards.append(toy_task().reward(text, {"prompt": asked})[0])
    groups = [rewards[b // 3 * 3 : b // 3 * 3 + 3] for b in range(len(rewards))]
    return [r - (sum(group) - r) / 2 for r, group in zip(rewards, groups, strict=True)]


@pytest.mark.parametrize("match", MATCHES)
def test_a_run_computes_the_papers_loss(run, exact, monkeypatch, tmp_path, match):
    """Two updates of three passes: the scores of old, reference and policy are of different networks."""
    rolls = record(monkeypatch, "roll_out", lambda _, roll: roll)
    masks = record(monkeypatch, "mask_pairs", lambda _, hidden: hidden)
    flags = "--prompts 2 --updates 2 --passes 3 --minibatches 1 --psi 2 --beta 0.3 --budget 100 --lr 1e-2"
    updates = run(f"--match {match} {flags}")
    assert rolls[0].valid.sum(1).unique().numel() > 3
    model = models.load_model(str(tmp_path / "model"))
    start = {k: v.clone() for k, v in model.network.state_dict().items()}

    def c(weights, roll, hidden):
        model.network.load_state_dict(weights)
        return [slow_score(model, roll, b, hidden[b, j], match, T) for b in range(6) for j in range(2)]

    for update in range(2):
        roll, hidden, losses = rolls[update], masks[update], []
        adv = slow_advantages(model, roll)
        with torch.no_grad():
            ref, old = (c(weights, roll, hidden) for weights in (start, exact[3 * update][1]))
        for grad, weights in exact[3 * update : 3 * update + 3]:
            loss = 0.0
            for k, c_new in enumerate(c(weights, roll, hidden)):
                loss = loss + ((c_new - old[k] - 2 * adv[k // 2]) ** 2 + 0.3 * (c_new - ref[k]) ** 2) / 12
            expected = torch.autograd.grad(loss, list(model.network.parameters()), allow_unused=True)
            expected = torch.cat([g.flatten() for g in expected if g is not None])
            assert (grad - expected).norm() < 1e-10 * expected.norm()
            losses.append(loss.item())
        assert updates[update]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-10)
        assert abs(losses[1] - losses[0]) > 1e-3  # the weights moved, c_old did not


def test_the_gradient_does_not_depend_on_the_budget(run, exact):
    """One pair per forward, some, or all. lr 0: Adam would blow the rounding up."""

    def gradients(minibatches: int, budget: int) -> list[torch.Tensor]:
        exact.clear()
        run(f"--passes 1 --minibatches {minibatches} --updates 1 --lr 0 --beta 0.1 --budget {budget}")
        return [grad for grad, _ in exact]

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
