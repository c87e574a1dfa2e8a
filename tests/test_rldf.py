"""RLDF: its canvases are the sampler's own, the draw of steps has its distribution, a whole update has the
gradient of the paper's formula, in slow loops."""

import itertools
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (NotedRun, exact_model, generators, gradient, padded_prompts, record_calls,
                     relative_error, sharp_model, slow_logits, toy_task, up_to_eos)

import common
import egspo
import rldf
from common import canvas, denoise, group_noise, score
from rldf import advantage, canvas_logp, clean_state_mask, draw_steps, step_surprise, token_loss

L, BLOCK, G = 12, 4, 4
OFTEN = 1.0  # added to the EOS logit: some rows end early, some late, some never


def rollout(model, **options):
    """3 groups of 4 rows, prompts of three lengths, as RLDF decodes them."""
    options = {"L": L, "S": L, "block": BLOCK, "order": "confidence", "threshold": 0.5} | options
    return denoise(model, *padded_prompts(model, G), generators(), **options)


def logp_of_hidden(model, roll, hidden: torch.Tensor) -> torch.Tensor:
    """canvas_logp on the canvases that hide `hidden` (B, L), at the temperature of the updates below."""
    return canvas_logp(model, canvas(roll, hidden), roll, hidden, 0.7)


def steps_of(roll, b: int) -> list[int]:
    """The steps row b took."""
    return sorted(set(roll.revealed_at[b].tolist()) - {roll.S})


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_shares(found: torch.Tensor, expected: torch.Tensor):
    """Shares of found (N, ...) booleans are the expected ones: |z| < 5. False alarm: 6e-7 per share."""
    z = (found.double().mean(0) - expected) / (expected * (1 - expected) / len(found)).sqrt()
    assert z.abs().max() < 5, z


# ---------------------------------------------------------------------------------------- a whole update

SPIES = ("roll_out", "reward_rows", "draw_steps", "canvas_logp", "clean_state_mask", "token_loss")
SHAPE = dict(prompts=4, G=4, L=8, S=8, block=4, K=3, threshold=0.5, temperature=0.7, minibatches=1, lr=0.0)


def equal_rewards() -> common.Task:
    task = toy_task()
    task.reward = lambda text, row: (0.9, {"correct": 0.0, "parse_fail": 0.0})
    return task


def policy() -> common.Denoiser:
    return sharp_model(OFTEN, torch.float64)


def exact() -> common.Denoiser:
    """A policy, whose rows end early now and then."""
    return exact_model(-1.0)


def other_model() -> common.Denoiser:
    """A reference unlike the policy."""
    model = exact_model(OFTEN)
    model.network.decoder.bias.data += noise(len(model.network.decoder.bias))
    return model


@pytest.fixture
def update(monkeypatch):
    """Make one update that moves nothing (lr 0): what each of SPIES was given and gave, the optimizer steps,
    and the metrics."""
    monkeypatch.setattr(common.Denoiser, "frozen", lambda m: replace(m, network=other_model().network))
    seen = {name: record_calls(monkeypatch, rldf, name) for name in SPIES}

    def go(task=toy_task, model=policy, **changes):
        for calls in seen.values():
            calls.clear()
        run, trained = NotedRun(updates=1), model()
        rldf.train(rldf.Args(**SHAPE | changes), trained, task(), run)
        counts = {k: trained.counts[k] for k in ("nfe_rollout", "nfe_update", "nfe_update_full")}
        return SimpleNamespace(metrics=run.logged[0] | counts, steps=run.steps,
                               gradients=[step.gradient for step in run.steps],
                               **{name: list(calls) for name, calls in seen.items()})

    return go


def slow_logp(model, roll, b: int, hidden: list[int]) -> torch.Tensor:
    """(L,) log-probs of row b's tokens; its canvas alone in a forward, its prompt without padding."""
    shown = torch.tensor([model.mask_id if i in hidden else t
                          for i, t in enumerate(roll.completion[b].tolist())])
    logits = slow_logits(model, roll.prompt[b], roll.prompt_mask[b], shown)
    return (logits / 0.7).log_softmax(1).gather(1, roll.completion[b, :, None])[:, 0]


def slow_update(model, seen, p_min: float, beta: float, old=None):
    """The formula of an update in slow loops, the tempting mean over canvases of each canvas's mean, and the
    number of scored tokens. old: the policy before the first of several passes."""
    ((_, roll),), ((_, (reward, _, _)),), ((_, steps),) = seen.roll_out, seen.reward_rows, seen.draw_steps
    reference, per_canvas = other_model(), []
    for b, j in itertools.product(range(len(steps)), range(3)):
        s = steps[b, j].item()
        group = reward[b // 4 * 4 : b // 4 * 4 + 4].double().tolist()
        adv = (reward[b].item() - statistics.mean(group)) / max(statistics.stdev(group), 0.01)
        hidden = [i for i in range(8) if roll.revealed_at[b, i] >= s]
        logp = slow_logp(model, roll, b, hidden)
        logp_ref = slow_logp(reference, roll, b, hidden).detach() if beta else logp
        logp_old = slow_logp(old, roll, b, hidden).detach() if old else None
        losses = []
        for i in up_to_eos(roll.completion[b], model.eos_id):
            p = (logp_old if old else logp)[i].exp()
            if i in hidden and (p >= p_min or roll.revealed_at[b, i] == s):
                gain = adv * logp[i]
                if old:
                    ratio = (logp[i] - logp_old[i]).exp()
                    gain = torch.minimum(ratio * adv, ratio.clamp(1 - 0.2, 1 + 0.2) * adv)
                d = logp_ref[i] - logp[i]
                losses.append(-gain + beta * (d.exp() - d - 1))
        per_canvas.append(torch.stack(losses))
    count = sum(map(len, per_canvas))
    mean_of_means = sum(losses.mean() for losses in per_canvas) / len(per_canvas)
    return sum(losses.sum() for losses in per_canvas) / count, mean_of_means, count


@pytest.mark.parametrize("p_min, beta", [(0.0, 0.0), (2.0, 0.0), (0.3, 0.4)])
def test_an_update_has_the_loss_and_the_gradient_of_the_formula(update, float64, p_min, beta):
    """One canvas at a time, one normaliser for all. A normaliser for each canvas is rejected."""
    seen = update(model=exact, p_min=p_min, beta=beta, seed=10)
    model = exact()
    assert seen.metrics["equal_groups"] == 0
    loss, wrong, count = slow_update(model, seen, p_min, beta)
    (step,), metrics = seen.steps, seen.metrics
    assert relative_error(gradient(model.network.parameters(), loss), step.gradient) < 1e-10
    assert metrics["scored_tokens"] == count and step.loss == pytest.approx(loss.item(), rel=1e-10)
    assert metrics["loss"] == step.loss
    assert metrics["nfe_update"] < metrics["nfe_update_full"] == 16 * 3 * (2 if beta else 1)
    if p_min < 1:  # else nearly every canvas scores one token, and the two agree
        assert relative_error(gradient(model.network.parameters(), wrong), step.gradient) > 0.02
    roll = seen.roll_out[0][1]
    assert metrics["nfe_rollout"] < (roll.revealed_at < roll.S).sum()  # adaptive: several tokens a step
    ((_, _, valid, revealed, _), _), hidden = seen.clean_state_mask[0], seen.canvas_logp[0][0][3]
    fewest, most = (revealed & valid).sum(), (hidden & valid).sum()
    assert fewest < most and {0.0: count == most, 0.3: fewest < count < most, 2.0: count == fewest}[p_min]


def test_two_passes_have_the_gradient_of_the_clipped_ratio(update, float64):
    """The old policy is that before the first pass, for the ratio and for what is scored."""
    seen = update(model=exact, passes=2, p_min=0.3, beta=0.4, lr=1e-2, seed=10)
    model, old = exact(), exact()
    for number, step in enumerate(seen.steps):
        model.network.load_state_dict(step.weights)
        loss, _, count = slow_update(model, seen, 0.3, 0.4, old)
        found = gradient(model.network.parameters(), loss)
        assert relative_error(found, step.gradient) < 1e-10
        assert step.loss == pytest.approx(loss.item(), rel=1e-10)
        not_clipped = gradient(model.network.parameters(), slow_update(model, seen, 0.3, 0.4)[0])
        assert (relative_error(found, not_clipped) > 0.01) == (number == 1)
    assert len(seen.steps) == 2


# ------------------------------------------------------------------------------------------- the rollout


def test_the_canvas_before_s_is_the_samplers_own_input(monkeypatch):
    """At every position, of every row, at every step it took, and no row that had ended."""
    model = sharp_model(OFTEN)
    seen = record_calls(monkeypatch, model, "body")
    roll = rollout(model)
    leaks = 0
    for b in range(3 * G):
        for s in steps_of(roll, b):
            inputs = seen[s][0][0].tolist()  # the distinct canvases of the rows at work
            hidden = roll.revealed_at >= s
            assert canvas(roll, hidden)[b].tolist() in inputs
            tail = roll.revealed_at == roll.S  # behind an EOS: the released code shows it
            released = hidden & ~tail if s else hidden
            leaks += canvas(roll, released)[b].tolist() not in inputs
    for s, (inputs, _) in enumerate(seen):
        at_work = [b for b in range(3 * G) if s in steps_of(roll, b)]
        assert len(inputs[0]) == len(canvas(roll, roll.revealed_at >= s)[at_work].unique(dim=0))
    assert leaks > 0  # that canvas gives the answer's length away
    assert len({len(steps_of(roll, b)) for b in range(3 * G)}) > 2  # rows left the batch at various times


def test_a_finished_row_costs_nothing_more(monkeypatch):
    model = sharp_model(OFTEN)
    seen = record_calls(monkeypatch, model, "body")
    forwards = []  # per row and block
    for threshold in (1e-9, 0.3, 0.6, None):
        seen.clear()
        roll = rollout(model, threshold=threshold)
        taken = [len(steps_of(roll, b)) for b in range(3 * G)]
        made, full = model.counts.pop("nfe_rollout"), model.counts.pop("nfe_rollout_full")
        assert made == sum(len(inputs[0]) for inputs, _ in seen)
        assert made < full == sum(taken) < 3 * G * len(seen)
        blocks = ((roll.revealed_at < roll.S).sum(1) // BLOCK).tolist()  # decoded
        assert all(n <= steps <= BLOCK * n for n, steps in zip(blocks, taken, strict=True))
        forwards.append(sum(taken) / sum(blocks))
    assert 1 == forwards[0] < forwards[1] < forwards[2] < forwards[3] == BLOCK


def test_every_valid_token_was_recorded():
    """The released code never writes Dream's probabilities; its surprise is the same at every step."""
    roll = rollout(sharp_model(OFTEN))
    assert (roll.logp[roll.valid] < 0).all() and (roll.logp[roll.valid].exp() > 0).all()
    w, candidates = step_surprise(roll)
    assert all(len(set(w[b, candidates[b]].tolist())) == candidates[b].sum() for b in range(3 * G))


def test_all_steps_together_are_egspos_trajectory_log_prob_of_the_valid_tokens(monkeypatch):
    model = sharp_model(OFTEN, torch.float64)
    roll = rollout(model, temperature=0.7)
    times = (roll.revealed_at[:, None] == torch.arange(roll.S)[:, None]).sum(1)
    assert (times[roll.valid] == 1).all()  # each valid token is revealed at exactly one step
    steps = roll.revealed_at[roll.revealed_at < roll.S].unique()

    def egspo_logp():
        return sum(egspo.step_logp(model, canvas(roll, roll.revealed_at >= s), roll, s.expand(3 * G), 0.7)
                   for s in steps)

    with torch.no_grad():
        ours = sum(logp_of_hidden(model, roll, roll.revealed_at >= s) * (roll.revealed_at == s)
                   for s in steps).sum(1)
        unrestricted = egspo_logp()
        monkeypatch.setattr(egspo, "score", lambda *inputs: score(*inputs) * roll.valid)
        torch.testing.assert_close(ours, egspo_logp(), atol=1e-10, rtol=0)
    torch.testing.assert_close(ours, (roll.logp * roll.valid).sum(1), atol=1e-4, rtol=0)
    assert (unrestricted - ours).abs().max() > 0.1  # a block goes on behind its EOS


def test_step_surprise_against_loops():
    roll = rollout(sharp_model(OFTEN))
    w, candidates = step_surprise(roll)
    wrong = 0.0
    for b, s in itertools.product(range(3 * G), range(roll.S)):
        revealed = [i for i in range(L) if roll.revealed_at[b, i] == s]
        valid = [i for i in revealed if i in up_to_eos(roll.completion[b].tolist(), 1)]
        assert candidates[b, s] == (len(valid) > 0)
        if valid:
            mean = -sum(roll.logp[b, i].item() for i in valid) / len(valid)
            assert w[b, s].item() == pytest.approx(mean, rel=1e-5)
            every = -sum(roll.logp[b, i].item() for i in revealed) / len(revealed)
            wrong = max(wrong, abs(every - mean))
    assert wrong > 0.1
    taken = torch.tensor([len(steps_of(roll, b)) for b in range(3 * G)])
    assert (candidates.sum(1) < taken).any()  # a step that revealed nothing valid


# ------------------------------------------------------------------------------------- the draw of steps

W = torch.tensor([[0.3, 2.0, 0.0, 1.1, 0.9]])
SOME = torch.tensor([[True, True, False, True, True]])
N = 20_000


def draws(w, candidates, k: int, tau: float) -> torch.Tensor:
    """N independent draws: (N, k)."""
    rows = torch.zeros(N, dtype=torch.long)
    return draw_steps(w[rows], candidates[rows], k, tau, noise(N, 1 + k, w.shape[1]))


def softmax(w: torch.Tensor, candidates: torch.Tensor, tau: float) -> list[float]:
    weights = [math.exp(x / tau) * c for x, c in zip(w[0].tolist(), candidates[0].tolist(), strict=True)]
    return [x / sum(weights) for x in weights]


def test_one_step_is_drawn_with_probability_softmax_of_w_over_tau():
    """20,000 draws, |z| < 5; false alarm: 4 steps, about 2e-6. The tempting wrong ones are far away."""
    p = torch.tensor(softmax(W, SOME, 0.7), dtype=torch.float64)
    found = draws(W, SOME, 1, 0.7) == torch.arange(5)
    assert_shares(found[:, SOME[0]], p[SOME[0]])
    assert not found[:, 2].any()  # no candidate, whatever its weight
    for other in (softmax(W, SOME, 1.0), softmax(W, SOME, 1 / 0.7), softmax(-W, SOME, 0.7)):
        assert (found.double().mean(0) - torch.tensor(other)).abs().max() > 0.05


def test_two_steps_are_drawn_one_after_the_other_without_replacement():
    """Every ordered pair, |z| < 5; false alarm: 12 pairs, about 7e-6."""
    p, drawn = softmax(W, SOME, 1.0), draws(W, SOME, 2, 1.0)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for i, j in itertools.permutations([0, 1, 3, 4], 2):
        expected = torch.tensor(p[i] * p[j] / (1 - p[i]), dtype=torch.float64)
        assert_shares((drawn == torch.tensor([i, j])).all(1), expected)


def test_large_tau_is_uniform_and_small_tau_is_the_top_k():
    """Uniform: false alarm 4 steps, about 2e-6."""
    found = draws(W, SOME, 1, 1e6) == torch.arange(5)
    assert_shares(found[:, SOME[0]], torch.full((4,), 0.25, dtype=torch.float64))
    assert (draws(W, SOME, 3, 1e-3) == torch.tensor([1, 3, 4])).all()  # most surprising first
    assert draws(W, SOME, 3, 1.0).sort(1).values.unique(dim=0).shape == (4, 3)  # at tau 1 any three of four


def test_fewer_candidates_are_all_taken_and_the_rest_is_filled_from_them():
    """The fill: from the same softmax, each place on its own. False alarm: 5 shares, about 3e-6."""
    two = torch.tensor([[True, False, False, True, False]])
    drawn = draws(W, two, 4, 1.0)
    assert (drawn[:, :2].sort(1).values == torch.tensor([0, 3])).all()
    assert drawn.unique().tolist() == [0, 3]
    p = torch.tensor(softmax(W, two, 1.0), dtype=torch.float64)[3]
    assert_shares(drawn == 3, torch.stack([p, 1 - p, p, p]))  # second place: what the first left
    assert_shares((drawn[:, 2:] == 3).all(1), p**2)
    only = torch.tensor([[False, False, True, False, False]])
    assert (draws(W, only, 4, 1.0) == 2).all()


def test_a_draw_does_not_depend_on_batch_mates():
    w, candidates = step_surprise(rollout(sharp_model(OFTEN)))
    w[:] = w[:1]  # twelve equal rows draw differently, because their noise differs
    candidates[:] = True
    drawn = draw_steps(w, candidates, 3, 1.0, group_noise(generators(), 3 * G, (4, L)))
    assert len(drawn.unique(dim=0)) == 3 * G
    for g in range(3):
        rows = slice(g * G, (g + 1) * G)
        alone = group_noise(generators()[g : g + 1], G, (4, L))
        assert torch.equal(draw_steps(w[rows], candidates[rows], 3, 1.0, alone), drawn[rows])
    w[G:] += torch.arange(L)
    changed = draw_steps(w, candidates, 3, 1.0, group_noise(generators(), 3 * G, (4, L)))
    assert torch.equal(changed[:G], drawn[:G]) and not torch.equal(changed[G:], drawn[G:])


# ---------------------------------------------------------------------------------- what is scored, and how


def test_clean_state_mask_against_loops():
    roll = rollout(sharp_model(OFTEN))
    hidden, revealed, p = roll.revealed_at >= 1, roll.revealed_at == 1, noise(3 * G, L)
    expected = torch.zeros(3 * G, L, dtype=torch.bool)
    for b, i in itertools.product(range(3 * G), range(L)):
        is_hidden, is_valid = roll.revealed_at[b, i] >= 1, i in up_to_eos(roll.completion[b].tolist(), 1)
        if is_hidden and is_valid:
            expected[b, i] = p[b, i] >= 0.6 or roll.revealed_at[b, i] == 1
    assert torch.equal(clean_state_mask(p, hidden, roll.valid, revealed, 0.6), expected)
    visible_too, invalid_too = (p >= 0.6) & roll.valid | revealed, hidden & (p >= 0.6) | revealed
    precedence = hidden & roll.valid & (p >= 0.6) | revealed
    for wrong in (visible_too, invalid_too, precedence, hidden & roll.valid & (p >= 0.6)):
        assert not torch.equal(wrong, expected)
    for p_min in (0.0, -1.0):
        assert torch.equal(clean_state_mask(p, hidden, roll.valid, revealed, p_min), hidden & roll.valid)
    for p_min in (1.01, 2.0):
        assert torch.equal(clean_state_mask(p, hidden, roll.valid, revealed, p_min), revealed & roll.valid)


def test_advantage_by_hand():
    """Group 1: std 1, not the 0.816 of ddof 0. Group 2: std 0.0017 counts as 0.01, not as 0.0117."""
    reward = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.5, 0.503])
    adv = advantage(reward, 3)
    torch.testing.assert_close(adv, torch.tensor([-1.0, 0.0, 1.0, -0.1, -0.1, 0.2]), atol=1e-5, rtol=0)
    group = reward.view(2, 3)
    centred = group - group.mean(1, keepdim=True)
    ddof_0, added = group.std(1, keepdim=True, correction=0), group.std(1, keepdim=True)
    for wrong in (centred / ddof_0.clamp(min=0.01), centred / (added + 0.01)):
        assert (wrong.flatten() - adv).abs().max() > 0.005


def test_equal_rewards_have_exactly_no_advantage():
    """Subtracting the mean is not enough: in fp32 the mean of six times 0.9 is not 0.9."""
    reward = torch.full((6,), 0.9)
    assert ((reward - reward.mean()) / reward.std().clamp(min=0.01)).abs().max() > 0
    assert advantage(reward, 6).abs().max() == 0
    beside_others = advantage(torch.cat([reward, reward.cumsum(0)]), 6)
    assert beside_others[:6].abs().max() == 0 and beside_others[6:].abs().min() > 0.1


def test_hand_computed_example():
    """2 canvases of 3 tokens, A = 1 and -2, four of them scored: (1 + 3 - 2 * 0.5 - 2 * 2) / 4."""
    logp = torch.tensor([[-1.0, -7.0, -3.0], [-0.5, -2.0, -9.0]], requires_grad=True)
    m = torch.tensor([[1, 0, 1], [1, 1, 0]])
    loss = token_loss(logp, None, torch.tensor([1.0, -2.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([[1.0, 7.0, 3.0], [-1.0, -4.0, -18.0]]))
    total = (loss * m).sum() / m.sum()
    assert total.item() == pytest.approx(-0.25)
    total.backward()  # descending raises the good row's tokens and lowers the bad one's
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.25, 0, -0.25], [0.5, 0.5, 0]]))


def test_ppo_by_hand():
    """The pessimistic of the clipped and the plain ratio, clip [0.8, 1.2]; a row is one advantage."""
    ratio = torch.tensor([[1.0, 2.0, 0.5, 1.1], [1.0, 2.0, 0.5, 1.1]])
    expected = torch.tensor([[-1.0, -1.2, -0.5, -1.1], [3.0, 6.0, 2.4, 3.3]])  # A = 1, A = -3
    logp_old = -noise(2, 4).float()
    adv = torch.tensor([1.0, -3.0])
    logp = (logp_old + ratio.log()).requires_grad_()
    loss = token_loss(logp, logp_old, adv, 0.2)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert (logp.grad == 0).tolist() == [[False, True, False, False], [False, False, True, False]]
    clipped = ratio.clamp(0.8, 1.2) * adv[:, None]
    optimistic = torch.max(ratio * adv[:, None], clipped)
    assert (-clipped - expected).abs().max() > 0.1 and (-optimistic - expected).abs().max() > 0.1


def test_reinforce_and_ppo_have_the_same_gradient_at_the_old_policy():
    logp, adv = -noise(3, 5).requires_grad_(), torch.tensor([1.0, -0.4, 0.0], dtype=torch.float64)
    plain, clipped = token_loss(logp, None, adv, 0.2), token_loss(logp, logp.detach(), adv, 0.2)
    assert torch.equal(clipped, -adv[:, None].expand(3, 5))  # ratio 1
    expected = torch.autograd.grad(plain.sum(), logp)[0]
    assert torch.equal(torch.autograd.grad(clipped.sum(), logp)[0], expected)
    assert torch.equal(expected, -adv[:, None].expand(3, 5))


def test_k3_estimates_the_kl_to_the_reference():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close((p * rldf.k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())
    assert (p * rldf.k3(q.log(), p.log())).sum().item() != pytest.approx((p * (p / q).log()).sum().item())
    assert rldf.k3(p.log(), p.log()).abs().max() == 0


# ------------------------------------------------------------------------------ more of whole updates


def test_the_gradient_does_not_depend_on_the_budget(update):
    whole = update()
    assert len(whole.token_loss) == 1
    ((_, roll),), ((_, steps),) = whole.roll_out, whole.draw_steps
    x = canvas(roll, roll.revealed_at[:, None] >= steps[..., None])
    canvases = len(x.flatten(0, 1).unique(dim=0))
    for budget in (1, 100):
        forwards = math.ceil(canvases / max(1, budget // x.shape[2]))
        seen = update(budget=budget)
        assert len(seen.token_loss) == forwards
        assert relative_error(whole.gradients[0], seen.gradients[0]) < 1e-12
        assert seen.metrics["nfe_update"] == canvases < seen.metrics["nfe_update_full"] == 48
    wrong = 0.0  # a normaliser per forward
    for (scored, _), (inputs, _), (_, m) in zip(seen.canvas_logp, seen.token_loss, seen.clean_state_mask,
                                                strict=True):
        loss = token_loss(canvas_logp(*scored), *inputs[1:])
        wrong = wrong + gradient(scored[0].network.parameters(), (loss * m).sum() / m.sum()) / forwards
    assert relative_error(whole.gradients[0], wrong) > 0.01


def test_a_canvas_with_nothing_to_score_adds_nothing(update):
    """Random canvases of short answers, one canvas per forward and all in one."""
    whole, seen = update(masks="random"), update(masks="random", budget=1)
    assert any(not m.any() for _, m in seen.clean_state_mask)
    assert relative_error(whole.gradients[0], seen.gradients[0]) < 1e-12


def test_minibatches_are_whole_groups_each_with_its_own_normaliser(update):
    whole, seen = update(), update(minibatches=2)
    counts = [m.sum().item() for _, m in seen.clean_state_mask]
    assert len(counts) == len(seen.gradients) == 2 and counts[0] != counts[1]
    together = sum(n * g for n, g in zip(counts, seen.gradients, strict=True)) / sum(counts)
    assert relative_error(whole.gradients[0], together) < 1e-12
    groups = [inputs[2].prompt.unique(dim=0).tolist() for inputs, _ in seen.canvas_logp]
    assert [len(g) for g in groups] == [2, 2] and not any(prompt in groups[1] for prompt in groups[0])
    assert all(len(inputs[2].prompt) == 2 * 4 * 3 for inputs, _ in seen.canvas_logp)


def test_equal_rewards_leave_the_kl_alone(update, float64):
    nothing = update(equal_rewards)
    assert nothing.gradients == []
    assert nothing.metrics["nfe_update"] == 0
    seen = update(equal_rewards, exact, beta=0.4, p_min=0.3)
    model = exact()
    kl_alone, _, _ = slow_update(model, seen, 0.3, 0.4)
    assert seen.gradients[0].norm() > 0.1
    assert relative_error(gradient(model.network.parameters(), kl_alone), seen.gradients[0]) < 1e-10
    assert seen.metrics["kl"] == pytest.approx(kl_alone.item() / 0.4, rel=1e-10)


def test_select_decides_the_weights_of_the_draw(update):
    """Uniform: all weights equal, the candidates as before."""
    surprise, uniform = update(), update(select="uniform")
    w, candidates = step_surprise(surprise.roll_out[0][1])
    (w_surprise, candidates_surprise, *_), drawn = surprise.draw_steps[0]
    (w_uniform, candidates_uniform, *_), drawn_uniform = uniform.draw_steps[0]
    assert torch.equal(w_surprise, w) and w[candidates].std() > 0.1 and (w_uniform == 0).all()
    assert torch.equal(candidates_surprise, candidates) and torch.equal(candidates_uniform, candidates)
    assert not torch.equal(drawn, drawn_uniform)


def test_random_canvases_hide_and_score_30_percent(update):
    """|z| < 5 over some 5000 tokens: false alarm about 6e-7. Nothing else but the tail is hidden."""
    seen = update(masks="random", G=60, p_min=2, budget=100000)
    (((_, _, roll, hidden, _), _),), ((_, m),) = seen.canvas_logp, seen.clean_state_mask
    assert_shares(hidden[roll.valid], torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(m, hidden & roll.valid)  # all of it is scored, whatever p_min
    tail = roll.revealed_at == roll.S
    behind = ~roll.valid & ~tail  # the rest of the block of the EOS
    assert tail.any() and hidden[tail].all() and behind.any() and not hidden[behind].any()
    of_a_row = hidden.view(-1, 3, 8)[roll.valid.view(-1, 3, 8).all((1, 2))]
    assert (of_a_row[:, 0] != of_a_row[:, 1]).any(1).double().mean() > 0.9  # each canvas has its own mask


def test_the_old_policy_is_the_one_before_the_first_pass(update):
    """The ratio is 1 in the first pass, not in the second; both score the same tokens."""
    seen = update(passes=2, lr=1e-2, p_min=0.3, model=lambda: sharp_model(OFTEN))
    ((_, x, roll, hidden, T), logp_old), *_ = seen.canvas_logp
    (_, _, valid, revealed, _), mask = seen.clean_state_mask[0]
    with torch.no_grad():
        before = canvas_logp(sharp_model(OFTEN), x, roll, hidden, T)
    torch.testing.assert_close(logp_old, before)
    own = revealed & valid  # what a step revealed was sampled with this probability: one temperature
    torch.testing.assert_close(logp_old[own], roll.logp[own], atol=1e-4, rtol=0)
    (first, old_first), (second, old_second) = (inputs[:2] for inputs, _ in seen.token_loss)
    assert torch.equal(old_first, logp_old) and torch.equal(old_second, logp_old)
    torch.testing.assert_close(first, logp_old, atol=1e-5, rtol=0)
    assert (second - logp_old)[mask].abs().max() > 0.01
    assert torch.equal(seen.clean_state_mask[1][1], mask)
    assert not torch.equal(clean_state_mask(second.exp(), hidden, valid, revealed, 0.3), mask)  # moved policy
    plain = update(p_min=0.3, model=lambda: sharp_model(OFTEN))
    assert plain.token_loss[0][0][1] is None  # one pass: REINFORCE, which has the gradient of PPO's first
    assert relative_error(plain.gradients[0], seen.gradients[0]) < 1e-5
    assert seen.metrics["nfe_update_full"] == 3 * plain.metrics["nfe_update_full"] == 3 * 48
    assert seen.metrics["nfe_update"] == 3 * plain.metrics["nfe_update"] < 3 * 48


def test_a_run_with_every_option_completes():
    model, run = sharp_model(OFTEN), NotedRun(updates=2)
    options = dict(passes=2, minibatches=2, beta=0.1, masks="random", select="uniform", lr=2e-4)
    rldf.train(rldf.Args(**SHAPE | options), model, toy_task(), run)
    assert len(run.logged) == 2 and len(run.steps) == 2 * 2 * 2
    assert all(math.isfinite(value) for update in run.logged for value in update.values())
    assert all(step.gradient.isfinite().all() for step in run.steps)  # none of them was skipped
    assert model.counts["nfe_update_full"] == 2 * 48 * (1 + 2 * 2)  # old policy once; policy, reference twice
    assert run.logged[0]["kl"] >= 0 and run.logged[1]["kl"] > 1e-6
