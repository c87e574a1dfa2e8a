"""EGSPO: a whole update against the formula of its docstring; the policy-gradient theorem, by enumeration;
then each function against its slow or hand-made version."""

import itertools

import pytest
import torch
from helpers import (NotedRun, Tabular, as_rollout, enumerate_rollouts, exact_model, gradient,
                     probabilities, recording, relative_error, slow_logits, toy_task)

import egspo
from common import Rollout, canvas, per_step
from plumbing.pretrain import tiny_model

V = 3


def slow_step_logp(model, roll, b: int, s: int, temperature: float = 0.7) -> torch.Tensor:
    """log p of what step s of row b revealed; its canvas alone in a forward, its prompt without padding."""
    shown = roll.completion[b].masked_fill(roll.revealed_at[b] >= s, model.mask_id)
    logits = slow_logits(model, roll.prompt[b], roll.prompt_mask[b], shown)
    logp = (logits / temperature).log_softmax(1)
    return sum(logp[i, roll.completion[b, i]] for i in range(len(shown)) if roll.revealed_at[b, i] == s)


def slow_loss(
    model, roll, logp_ref: dict, steps, taken, reward, guess_reward, baseline: str, linear: bool = False,
    importance: bool = False, count: int = 12 * 3 * 2, temperature: float = 0.7,
) -> torch.Tensor:
    """The formula, a row and a step at a time: B 12, G 3, K 3, S 4, n 2; divided by B K n."""
    total = 0.0
    for b, k in taken.nonzero().tolist():
        s, group = steps[b, k].item(), range(b // 3 * 3, b // 3 * 3 + 3)
        rank = [b2 for b2 in group if taken[b2, k]]
        same = {b2: guess_reward[b2, k2] for b2 in group for k2 in range(3)
                if taken[b2, k2] and steps[b2, k2] == s}  # a row once, however often it drew the step

        def ret(b2, k2):
            lam = 0.5 * steps[b2, k2].item() / 4 if linear else 0.5
            return (reward[b2] + lam * (reward[b2] - guess_reward[b2, k2])) / (1 + lam)

        adv = ret(b, k) - sum(ret(b2, k) for b2 in rank) / len(rank)
        if baseline == "step":
            lam = 0.5 * s / 4 if linear else 0.5
            R = reward[b] - sum(reward[b2] for b2 in group) / 3
            r = guess_reward[b, k] - sum(same.values()) / len(same)
            adv = R - r * lam / (1 + lam)
        old = sum(roll.logp[b, i] for i in range(8) if roll.revealed_at[b, i] == s)
        logp = slow_step_logp(model, roll, b, s, temperature)
        ratio, d = (logp - old).exp(), logp_ref[b, s] - logp
        gain = torch.minimum(ratio * adv, ratio.clamp(1 - 0.1, 1 + 0.2) * adv)
        at_step = [roll.entropy[b, i] for i in range(8) if roll.revealed_at[b, i] == s]
        weight = roll.entropy[b].sum() / sum(at_step) / 4 if importance else 1.0  # 1 / (S P(s))
        total = total + weight * (-gain + 0.3 * (d.exp() - d - 1)) / count
    return total


VARIANTS = {"step": {}, "rank": {}, "step, linear": dict(linear=True), "rank, linear": dict(linear=True),
            "step, importance": dict(importance=True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_has_the_loss_and_the_gradient_of_the_formula(variant, float64, monkeypatch):
    """Two passes: the ratio is 1 in the first, the clip bites in the second. Every other variant, another
    temperature of scoring and a mean over the kept pairs alone are rejected."""
    baseline, options = variant.partition(",")[0], VARIANTS[variant]
    draw = "draw_steps" if "importance" in options else "select_steps"
    seen = {name: [] for name in ("roll_out", draw, "reward_rows")}
    for name, found in seen.items():
        monkeypatch.setattr(egspo, name, recording(getattr(egspo, name), found))
    run = NotedRun(updates=1)
    args = egspo.Args(prompts=4, G=3, L=8, S=4, block=4, temperature=0.7, K=3, baseline=baseline, passes=2,
                      minibatches=1, beta=0.3, eps_lo=0.1, eps_hi=0.2, lr=1e-2, budget=200, order="top_prob",
                      lam_schedule="linear" if "linear" in options else "constant",
                      select="importance" if "importance" in options else "entropy")
    egspo.train(args, exact_model(3.0), toy_task(), run)
    (roll,), ((steps, taken, *_),) = seen["roll_out"], seen[draw]
    reward, guess_reward = (found[0] for found in seen["reward_rows"])
    assert (roll.revealed_at == roll.S).any() and (draw == "draw_steps" or not taken.all())
    assert len(run.steps) == 2
    model = exact_model(3.0)
    with torch.no_grad():
        logp_ref = {(b, s): slow_step_logp(model, roll, b, s) for b in range(12) for s in range(4)}
    inputs = roll, logp_ref, steps, taken, reward, guess_reward.view(12, 3)
    losses = []
    for step in run.steps:
        model.network.load_state_dict(step.weights)
        right = slow_loss(model, *inputs, baseline, **options)
        wrong = [slow_loss(model, *inputs, other.partition(",")[0], **changes)
                 for other, changes in VARIANTS.items() if other != variant]
        wrong.append(slow_loss(model, *inputs, baseline, **options, temperature=1.0))
        if not taken.all():
            wrong.append(slow_loss(model, *inputs, baseline, **options, count=int(taken.sum()) * 2))
        of = [gradient(model.network.parameters(), loss) for loss in (right, *wrong)]
        assert relative_error(of[0], step.gradient) < 1e-10
        assert all(relative_error(found, step.gradient) > 1e-5 for found in of[1:])
        assert step.loss == pytest.approx(right.item(), rel=1e-10)
        losses.append(step.loss)
    (update,) = run.logged
    assert update["loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert update["kl"] > 0 and update["clip_frac"] > 0


# ------------------------------------------------------------------------------ the theorem, by enumeration


def step_logp(model, roll: Rollout, s: torch.Tensor) -> torch.Tensor:
    """egspo.step_logp on the canvases before steps s (B,), at temperature 1."""
    x = canvas(roll, roll.revealed_at >= s[:, None])
    return egspo.step_logp(model, x, roll, s, 1.0)


def gradients(order: str, L: int, n: int, block: int, eos_id: int | None = None, baseline=False):
    """The exact grad E[R] and the sum over steps of E[(R - b) grad l_s], the latter through step_logp and
    policy_loss."""
    model = Tabular(V, L, seed=5, eos_id=eos_id)
    S = L // n
    probability, completions, steps = zip(*enumerate_rollouts(model, L, n, order, block), strict=True)
    probability = torch.stack(probability)
    assert abs(probability.sum().item() - 1) < 1e-12
    roll = as_rollout(model, completions, steps, S)
    gen = torch.Generator().manual_seed(0)
    value = torch.randn((V + 2) ** L, generator=gen, dtype=torch.float64)  # an arbitrary number per canvas
    code = (V + 2) ** torch.arange(L)
    reward = value[(roll.completion * code).sum(1)]
    exact = torch.autograd.grad((probability * reward).sum(), model.table, retain_graph=True)[0]
    total = torch.zeros((), dtype=torch.float64)
    for s in range(S):
        rows = (roll.revealed_at == s).any(1)  # a row ended by an EOS takes no further step
        at = torch.full((int(rows.sum()),), s)
        logp = step_logp(model, roll[rows], at)
        state = roll.completion[rows].masked_fill(roll.revealed_at[rows] >= s, model.mask_id)
        b = 3 * value[(state * code).sum(1)] if baseline else 0.0
        loss, _ = egspo.policy_loss(logp, logp.detach(), reward[rows] - b, 0.2, 0.5)
        total = total - (probability[rows].detach() * loss).sum()
    return exact, torch.autograd.grad(total, model.table)[0]


SHAPES = [dict(L=3, n=1, block=3), dict(L=4, n=2, block=4), dict(L=4, n=1, block=2, eos_id=1)]


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("order", ["top_prob", "random"])
@pytest.mark.parametrize("shape", SHAPES, ids=["n1", "n2", "eos"])
def test_theorem(order, shape, baseline):
    assert relative_error(*gradients(order, **shape, baseline=baseline)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES[:2], ids=["n1", "n2"])
def test_theorem_fails_with_the_llada_rule(shape):
    """The documented counter-example: with `confidence` the positions depend on the sampled tokens."""
    assert relative_error(*gradients("confidence", **shape)) > 0.1
    assert relative_error(*gradients("confidence", **shape, baseline=True)) > 0.1


def test_tokens_behind_an_eos_count_until_the_row_is_done():
    """Scoring valid tokens only, as one might, is off: later choices were conditioned on what stands behind
    the EOS."""
    model = Tabular(V, 4, seed=5, eos_id=1)
    found = zip(*enumerate_rollouts(model, 4, 1, "top_prob", 2), strict=True)
    probability, completions, steps = found
    roll = as_rollout(model, completions, steps, 4)
    probability = torch.stack(probability)
    reward = torch.randn(len(probability), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad((probability * reward).sum(), model.table, retain_graph=True)[0]
    every = torch.zeros(roll.completion.shape, dtype=torch.float64)
    for s in range(4):
        rows = (roll.revealed_at == s).any(1)
        hidden, at = roll.revealed_at[rows] >= s, roll.revealed_at[rows] == s
        part = roll[rows]
        logp = egspo.score(model, canvas(part, hidden), part.prompt_mask, part.completion, at, 1.0)
        every = every.index_add(0, rows.nonzero()[:, 0], logp)
    weight = (probability.detach() * reward)[:, None]
    right = torch.autograd.grad((weight * every).sum(), model.table, retain_graph=True)[0]
    wrong = torch.autograd.grad((weight * every * roll.valid).sum(), model.table)[0]
    assert relative_error(exact, right) < 1e-10
    assert relative_error(exact, wrong) > 0.05


def test_fewer_steps_than_all_are_biased_and_by_how_much():
    """K < S looks at the finished row to choose; K = S keeps every step and is exact."""
    model = Tabular(V, 3, seed=5)
    probability, completions, steps = zip(*enumerate_rollouts(model, 3, 1, "top_prob", 3), strict=True)
    probability = torch.stack(probability)
    roll = as_rollout(model, completions, steps, 3)
    for i, (completion, step) in enumerate(zip(completions, steps, strict=True)):
        for j in range(3):
            state = [t if u < step[j] else model.mask_id for t, u in zip(completion, step, strict=True)]
            roll.entropy[i, j] = torch.special.entr(probabilities(model, state)[j]).sum().detach()
    reward = torch.randn(27, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad((probability * reward).sum(), model.table, retain_graph=True)[0]
    error = {}
    for K in (1, 2, 3):
        chosen, kept = egspo.select_steps(roll, K, None)
        assert kept.all()
        logp = torch.stack([step_logp(model, roll, chosen[:, k]) for k in range(K)], 1)
        total = ((probability.detach() * reward)[:, None] * logp).sum()
        error[K] = relative_error(exact, torch.autograd.grad(total, model.table)[0])
    assert error[3] < 1e-10
    assert 0.02 < error[2] < error[1] < 2, error


def baseline_error(baseline: str, lam: float) -> float:
    """Of the gradient with G = 2, K = S and the stepwise baseline, over every pair of trajectories."""
    model = Tabular(V, 3, seed=5)
    probability, completions, steps = zip(*enumerate_rollouts(model, 3, 1, "top_prob", 3), strict=True)
    probability, N = torch.stack(probability), len(completions)
    roll = as_rollout(model, completions, steps, 3)
    value = torch.randn(5**3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    code = 5 ** torch.arange(3)
    guess_reward = torch.zeros(N, 3, dtype=torch.float64)
    for i, s in itertools.product(range(N), range(3)):
        state = [t if u < s else model.mask_id for t, u in zip(completions[i], steps[i], strict=True)]
        p = probabilities(model, state).detach()
        guess = [p[j].argmax() if t == model.mask_id else t for j, t in enumerate(state)]
        guess_reward[i, s] = value[(torch.tensor(guess) * code).sum()]
        roll.entropy[i, steps[i].index(s)] = torch.special.entr(p[steps[i].index(s)]).sum()
    reward = value[(roll.completion * code).sum(1)]
    exact = torch.autograd.grad((probability * reward).sum(), model.table, retain_graph=True)[0]
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N)).flatten()  # groups of two rows
    kept, taken = egspo.select_steps(roll[pairs], 3, None)
    ranked = guess_reward[pairs].gather(1, kept)
    adv = egspo.stepwise_advantage(reward[pairs], ranked, kept, taken, 2, 3, lam, baseline)
    logp = torch.stack([step_logp(model, roll, torch.full((N,), s)) for s in range(3)], 1)
    weight = probability.detach()[pairs].view(-1, 2).prod(1).repeat_interleave(2)[:, None]
    total = (weight * adv * logp[pairs].gather(1, kept)).sum()  # two rows, each with half of the gradient
    return relative_error(exact, torch.autograd.grad(total, model.table)[0])


def test_the_baseline_at_the_same_step_is_exact_and_at_the_same_rank_it_is_not():
    """A rank is known only once the row is finished. Without stepwise advantages there is nothing to it."""
    assert baseline_error("step", 0.5) < 1e-10
    assert 0.01 < baseline_error("rank", 0.5) < 0.5
    assert baseline_error("rank", 0.0) < 1e-10


def test_steps_without_entropy_contribute_exactly_nothing():
    model = Tabular(V, 3, seed=5)
    with torch.no_grad():
        model.table[..., :V] = 0.0
        model.table[..., 1] = 2000.0  # certain: every step has entropy 0
    roll = as_rollout(model, [[1, 1, 1]], [[2, 0, 1]], 3)
    for s in range(3):
        logp = step_logp(model, roll, torch.tensor([s]))
        assert torch.autograd.grad(logp.sum(), model.table)[0].abs().max() == 0


# -------------------------------------------------------------------------- which draws of steps are unbiased


def enumerated(L: int, n: int, block: int, eos_id: int | None = None) -> tuple:
    """A model, the probability (N,) of every trajectory, their rows with entropies, a reward (N,) of the
    completions and the exact gradient of E[R]."""
    model = Tabular(V, L, seed=5, eos_id=eos_id)
    found = zip(*enumerate_rollouts(model, L, n, "top_prob", block), strict=True)
    probability, completions, steps = found
    probability = torch.stack(probability)
    roll = as_rollout(model, completions, steps, L // n)
    for i, j in (roll.revealed_at < roll.S).nonzero().tolist():
        shown = roll.completion[i].masked_fill(roll.revealed_at[i] >= roll.revealed_at[i, j], model.mask_id)
        p = probabilities(model, shown.tolist())[j].detach()
        roll.entropy[i, j] = torch.special.entr(p).sum()
    value = torch.randn((V + 2) ** L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reward = value[(roll.completion * (V + 2) ** torch.arange(L)).sum(1)]
    exact = torch.autograd.grad((probability * reward).sum(), model.table, retain_graph=True)[0]
    return model, probability.detach(), roll, reward, exact


def every_draw(roll: Rollout, K: int):
    """(probability (N,), noise (N, K)) of all that K draws with replacement can be: P(s) = H_s / sum of H."""
    share = torch.zeros(len(roll.entropy), roll.S, dtype=torch.float64)
    for i, j in (roll.revealed_at < roll.S).nonzero().tolist():
        share[i, roll.revealed_at[i, j]] += roll.entropy[i, j]
    share /= share.sum(1, keepdim=True)
    middle = share.cumsum(1) - share / 2  # of the numbers that stand for a step
    for steps in itertools.product(range(roll.S), repeat=K):
        yield share[:, steps].prod(1), middle[:, steps]


@pytest.mark.parametrize("shape", SHAPES, ids=["n1", "n2", "eos"])
def test_importance_draws_are_unbiased(shape):
    """Two draws of two to four steps, over all trajectories and all draws. Without the weights, and with the
    weights of a uniform draw's steps, they are not."""
    model, probability, roll, reward, exact = enumerated(**shape)
    right, unweighted = torch.zeros(2, *exact.shape, dtype=torch.float64)
    for share, noise in every_draw(roll, 2):
        steps, taken, weight = egspo.draw_steps(roll, noise)
        assert taken[share > 0].all()
        logp = torch.stack([step_logp(model, roll, s) for s in steps.T], 1)  # (N, 2)
        loss = (share * probability * reward)[:, None] * logp * roll.S / 2
        right += torch.autograd.grad((loss * weight).sum(), model.table, retain_graph=True)[0]
        unweighted += torch.autograd.grad(loss.sum(), model.table)[0]
    assert relative_error(exact, right) < 1e-12
    assert relative_error(exact, unweighted) > 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=["n1", "n2", "eos"])
def test_uniform_draws_are_unbiased_unless_an_eos_ends_rows_early(shape):
    """One step of each row, by every order that the noise can have. A row of fewer steps than S has each of
    them drawn too often."""
    model, probability, roll, reward, exact = enumerated(**shape)
    orders = [torch.tensor(order) / roll.S for order in itertools.permutations(range(roll.S))]
    total = torch.zeros((), dtype=torch.float64)
    for noise in orders:
        steps, taken = egspo.select_steps(roll, 1, noise.expand(len(reward), -1))
        assert taken.all()
        total = total + (probability * reward * step_logp(model, roll, steps[:, 0])).sum() * roll.S
    error = relative_error(exact, torch.autograd.grad(total / len(orders), model.table)[0])
    assert error > 0.1 if "eos_id" in shape else error < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_importance_draws_are_unbiased_with_the_groups_baseline(lam):
    """Two rows in a group, one draw for each: all pairs of trajectories and draws. An arbitrary r_s for each
    state. The mean of two takes half of R and r_s away, whichever steps the other row kept."""
    model, probability, roll, reward, exact = enumerated(**SHAPES[0])
    N, S = len(reward), roll.S
    value = torch.randn((V + 2) ** 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = torch.where(roll.revealed_at[:, None] >= torch.arange(S)[:, None], model.mask_id,
                        roll.completion[:, None])  # (N, S, L)
    guess_reward = value[(state * (V + 2) ** torch.arange(3)).sum(2)]  # (N, S)
    logp = torch.stack([step_logp(model, roll, torch.full((N,), s)) for s in range(S)], 1)  # (N, S)
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N))  # (N * N, 2)
    total = torch.zeros((), dtype=torch.float64)
    draws = list(every_draw(roll, 1))
    for one, two in itertools.product(draws, draws):
        share = one[0][pairs[:, 0]] * two[0][pairs[:, 1]] * probability[pairs].prod(1)  # (N * N,)
        noise = torch.stack([one[1][pairs[:, 0]], two[1][pairs[:, 1]]], 1).view(-1, 1)
        rows = pairs.flatten()
        steps, taken, weight = egspo.draw_steps(roll[rows], noise)
        guess = guess_reward[rows].gather(1, steps)
        adv = egspo.stepwise_advantage(reward[rows], guess, steps, taken, 2, S, lam, "step")
        gain = adv * weight * logp[rows].gather(1, steps) * S
        total = total + (share.repeat_interleave(2)[:, None] * gain).sum()  # two rows, each half a gradient
    assert relative_error(exact, torch.autograd.grad(total, model.table)[0]) < 1e-12


# ----------------------------------------------------------------------------------------- the functions


def random_rollout(B=6, L=8, S=4, seed=0) -> Rollout:
    gen = torch.Generator().manual_seed(seed)
    step = torch.stack([torch.randperm(L, generator=gen) for _ in range(B)]) // (L // S)
    step[1, step[1] >= 2] = S  # this row was ended by an EOS after two steps
    entropy = torch.rand(B, L, generator=gen) * (step < S)
    x = torch.zeros(B, L, dtype=torch.long)
    return Rollout(x[:, :0], x[:, :0].bool(), x, step, -entropy, entropy, x == 0, None, 9, S)


def test_select_steps_against_loops():
    roll = random_rollout()
    steps, kept = egspo.select_steps(roll, 3, None)
    for b in range(6):
        mean = {}
        for s in range(4):
            at = [i for i in range(8) if roll.revealed_at[b, i] == s]
            if at:
                mean[s] = sum(roll.entropy[b, i].item() for i in at) / len(at)
        best = sorted(mean, key=lambda s: -mean[s])[:3]
        assert steps[b, kept[b]].tolist() == best
    assert kept.sum(1).tolist() == [3, 2, 3, 3, 3, 3]


def test_select_uniform_is_uniform_and_ranked_by_entropy():
    """20,000 rows, K = 2 of 4: each step is kept half the time. False alarm: |z| > 5, about 1e-6."""
    roll = random_rollout(B=2)[torch.zeros(20_000, dtype=torch.long)]
    noise = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    steps, kept = egspo.select_steps(roll, 2, noise)
    share = torch.bincount(steps.flatten(), minlength=4) / 20_000
    assert kept.all() and ((share - 0.5).abs() < 5 * (0.25 / 20_000) ** 0.5).all()
    entropy = per_step(roll.entropy, roll.revealed_at, 4).gather(1, steps)
    assert (entropy[:, 0] >= entropy[:, 1]).all()


def test_draw_steps_against_loops():
    roll = random_rollout()
    roll.entropy[2] = 0.0  # a row that was certain of everything
    noise = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[0, 0] = 0.0  # rand can return 0
    steps, taken, weight = egspo.draw_steps(roll, noise)
    for b in range(6):
        H = [0.0] * 4
        for i in range(8):
            if roll.revealed_at[b, i] < 4:
                H[roll.revealed_at[b, i]] += roll.entropy[b, i].item() / 2
        if b == 2:
            assert not taken[b].any() and not weight[b].any()
            continue
        drawn = []
        for u in noise[b].tolist():
            s = 0
            while sum(H[: s + 1]) <= u * sum(H):
                s += 1
            drawn.append(s)
        drawn.sort(key=lambda s: -H[s])
        assert taken[b].all() and steps[b].tolist() == drawn
        expected = [sum(H) / H[s] / 4 for s in drawn]
        torch.testing.assert_close(weight[b], torch.tensor(expected))
    assert (steps[1] < 2).all()  # of a row that an EOS ended after two steps, those alone


def test_linear_lambda():
    """lambda s / S, s the denoising step: at each kept step a number of its own, none at step 0."""
    gen = torch.Generator().manual_seed(0)
    R, r = torch.rand(4, generator=gen), torch.rand(4, 3, generator=gen)
    steps = torch.tensor([[2, 0, 3], [3, 2, 0], [0, 3, 2], [2, 3, 0]])
    lam = 0.5 * steps / 4
    adv = egspo.stepwise_advantage(R, r, steps, torch.ones_like(r, dtype=torch.bool), 4, 4, lam, "step")
    for b, k in itertools.product(range(4), range(3)):
        same = [r[c, j] for c in range(4) for j in range(3) if steps[c, j] == steps[b, k]]
        lam_s = 0.5 * steps[b, k].item() / 4
        expected = R[b] - R.mean() - lam_s / (1 + lam_s) * (r[b, k] - sum(same) / 4)
        assert adv[b, k].item() == pytest.approx(expected.item(), abs=1e-6)
    by_rank = egspo.stepwise_advantage(R, r, steps, torch.ones_like(r, dtype=torch.bool), 4, 4, lam, "rank")
    ret = (R[:, None] + lam * (R[:, None] - r)) / (1 + lam)
    torch.testing.assert_close(by_rank, ret - ret.mean(0))


def test_stepwise_advantage_identity():
    """A_s = (R - mean R) - lambda / (1 + lambda) (r_s - mean r_s); lambda = 0 is EGSPO."""
    gen = torch.Generator().manual_seed(0)
    R, r = torch.rand(8, generator=gen), torch.rand(8, 3, generator=gen)
    every = torch.ones(8, 3, dtype=torch.bool)

    def centred(t):
        return (t.view(2, 4, -1) - t.view(2, 4, -1).mean(1, keepdim=True)).view(8, -1)

    for lam in (0.0, 0.5, 2.0):
        adv = egspo.advantage(egspo.stepwise_return(R, r, lam), every, 4)
        torch.testing.assert_close(adv, centred(R) - lam / (1 + lam) * centred(r))


def test_advantage_by_hand_with_a_missing_step():
    ret = torch.tensor([[1.0, 0.5], [0.0, 0.7], [2.0, 9.0]])
    kept = torch.tensor([[True, True], [True, True], [True, False]])
    expected = torch.tensor([[0.0, -0.1], [-1.0, 0.1], [1.0, 0.0]])
    torch.testing.assert_close(egspo.advantage(ret, kept, 3), expected)


def test_equal_rewards_give_exactly_no_advantage():
    """Subtracting the mean is not enough: in fp32 the mean of six times 0.9 is not 0.9."""
    ret = torch.full((6, 1), 0.9)
    assert (ret - ret.mean(0)).abs().max() > 0
    assert egspo.advantage(ret, torch.ones(6, 1, dtype=torch.bool), 6).abs().max() == 0


def test_policy_loss_by_hand_and_against_its_tempting_wrong_versions():
    ratio = torch.tensor([1.0, 2.0, 0.5, 2.0, 0.5, 1.1])
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    #        clip is [0.8, 1.5]:     1 | 1.5 clipped | 0.5 | -2 not clipped | -0.8 clipped | -1.1
    expected = torch.tensor([-1.0, -1.5, -0.5, 2.0, 0.8, 1.1])
    loss, was_clipped = egspo.policy_loss(ratio.log(), torch.zeros(6), adv, 0.2, 0.5)
    torch.testing.assert_close(loss, expected)
    assert was_clipped.tolist() == [False, True, False, False, True, False]
    clipped_only = -ratio.clamp(0.8, 1.5) * adv
    optimistic = -torch.max(ratio * adv, ratio.clamp(0.8, 1.5) * adv)
    assert (clipped_only - expected).abs().max() > 0.1 and (optimistic - expected).abs().max() > 0.1


def test_first_pass_has_ratio_one_and_gradient_minus_advantage():
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    adv = torch.tensor([0.3, -0.7, 0.0])
    loss, was_clipped = egspo.policy_loss(logp, logp.detach(), adv, 0.2, 0.5)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -adv)
    assert not was_clipped.any()


def test_k3_is_an_unbiased_estimate_of_the_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close((p * egspo.k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())
    assert (egspo.k3(p.log(), q.log()) >= 0).all()
    assert egspo.k3(p.log(), p.log()).abs().max() == 0


def test_each_kept_step_is_scored_once_per_pass_and_k_of_s_cost_k_over_s(monkeypatch):
    seen, honest = [], egspo.step_logp

    def spy(model, x, roll, s, temperature):
        if torch.is_grad_enabled():  # else it is the reference's turn
            seen.extend((tuple(row.tolist()), step) for row, step in zip(roll.logp, s.tolist(), strict=True))
        return honest(model, x, roll, s, temperature)

    monkeypatch.setattr(egspo, "step_logp", spy)
    for K in (2, 4):
        seen.clear()
        model = tiny_model(layers=1, width=32)
        args = egspo.Args(prompts=4, G=2, S=4, minibatches=2, beta=1.0, K=K, passes=2)
        egspo.train(args, model, toy_task(), NotedRun(updates=1))
        assert len(set(seen)) == 8 * K and all(seen.count(pair) == 2 for pair in set(seen))
        assert model.counts["nfe_update_full"] == 2 * 2 * 8 * K
        assert model.counts["nfe_rollout_full"] == 8 * 4
