"""wd1 and wd1++: a whole update against the formulas of the docstring; then the weights, the two
log-likelihoods and what is drawn, each against slow loops."""

import itertools
import math

import pytest
import torch
from helpers import (TEXTS, NotedRun, Tabular, evaluated, exact_model, generators, gradient, padded_prompts,
                     recording, relative_error, sharp_model, slow_logits, slow_rewards, toy_task, up_to_eos)

import common
import wd1
from common import canvas, denoise, encode, group_noise
from wd1 import clean_predictions, draw_steps, group_weights, hide_tokens, one_step_logp

L, G = 12, 4
OFTEN = 1.0  # added to the EOS logit: some rows end early, some late, some never
T = 0.7


def every(reward: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(reward, dtype=torch.bool)


def random_rewards(*shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow_weights(rewards: list[float], psi: float, positive_only: bool) -> list[float]:
    """w- - w+ of one group, from Eq. 9."""
    mean = sum(rewards) / len(rewards)
    up = [math.exp(psi * (r - mean)) for r in rewards]
    down = [0.0 if positive_only else math.exp(-psi * (r - mean)) for r in rewards]
    return [d / (sum(down) or 1) - u / sum(up) for u, d in zip(up, down, strict=True)]


def slow_logp(model, prompt, prompt_mask, shown, y, temperature: float) -> torch.Tensor:
    """sum of log p(y) over hidden and valid positions, divided by the hidden share: Eq. 10, and with
    everything hidden Eq. 8."""
    logits = slow_logits(model, prompt, prompt_mask, shown)
    hidden = [i for i in range(len(y)) if shown[i] == model.mask_id]
    counted = [i for i in up_to_eos(y, model.eos_id) if i in hidden]
    total = sum((logits[i] / temperature).log_softmax(0)[y[i]] for i in counted)
    return total / (len(hidden) / len(y))


def slow_clean_prediction(model, roll, b: int, s: int, y: str) -> torch.Tensor:
    """The completion of the canvas before step s, greedy or what the sampler drew; of the row's last step,
    the finished row."""
    if s == max(step for step in roll.revealed_at[b].tolist() if step < roll.S):
        return roll.completion[b]
    shown = roll.completion[b].masked_fill(roll.revealed_at[b] >= s, model.mask_id)
    best = slow_logits(model, roll.prompt[b], roll.prompt_mask[b], shown).argmax(1)
    return torch.where(shown == model.mask_id, best if y == "greedy" else roll.guess[b, s], shown)


def steps_taken(roll) -> list[tuple[int, int]]:
    revealed_at = roll.revealed_at.tolist()
    return [(b, s) for b, row in enumerate(revealed_at) for s in range(roll.S) if s in row]


@pytest.fixture
def in_float64(monkeypatch):
    """ModernBERT rotates in fp32 whatever its weights are, and l_s is fp32: here both are float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# ---------------------------------------------------------------------------------------- a whole update


SHAPE = dict(prompts=4, G=3, L=8, S=4, block=4, temperature=T, order="top_prob", minibatches=1, lr=0.0,
             seed=4)


@pytest.fixture
def update(monkeypatch):
    """Make one update that moves nothing (lr 0), in float64: the run, the model, and what was drawn."""
    drawn = {name: [] for name in ("roll_out", "hide_tokens", "draw_steps")}
    for name, found in drawn.items():
        monkeypatch.setattr(wd1, name, recording(getattr(wd1, name), found))

    def go(**changes):
        model, run = exact_model(), NotedRun(updates=1)
        seen = evaluated(model)
        wd1.train(wd1.Args(**SHAPE | changes), model, toy_task(), run)
        assert model.counts["nfe_rollout"] + model.counts["nfe_update"] == sum(seen)
        return run, model, drawn

    return go


def slow_loss(model, roll, rows: list, psi: float, positive_only: bool) -> torch.Tensor:
    """Mean over 4 prompts of sum (w- - w+) log pi. rows: (row b, prompt tokens, canvas, completion that is
    scored) of every member."""
    total = 0.0
    for p in range(4):
        members = [row for row in rows if row[0] // 3 == p]
        rewards = []
        for b, _, _, y in members:
            rewards += slow_rewards(model, roll[b : b + 1], y[None])
        weights = slow_weights(rewards, psi, positive_only)
        for weight, (b, prompt, shown, y) in zip(weights, members, strict=True):
            total = total + weight * slow_logp(model, prompt, roll.prompt_mask[b], shown, y, T)
    return total / 4


@pytest.mark.parametrize("positive_only", [False, True])
def test_an_update_of_wd1_has_the_loss_and_the_gradient_of_eq_8(update, float64, positive_only):
    """Two passes of two minibatches, one canvas in a forward; a row costs 1/G of a forward. The whole prompt
    shown, and the other weights, are rejected."""
    run, model, drawn = update(psi=2.0, passes=2, minibatches=2, hide_prompt=0.5, budget=13,
                               positive_only=positive_only)
    (roll,), masks = drawn["roll_out"], drawn["hide_tokens"]
    assert (model.counts["nfe_update"], model.counts["nfe_update_full"]) == (2 * 4, 2 * len(roll.prompt))
    first = roll.revealed_at == 0
    x = canvas(roll, roll.revealed_at >= 0)
    sampled = common.score(model, x, roll.prompt_mask, roll.completion, first, T)
    torch.testing.assert_close(sampled, roll.logp * first)  # rolled out at the temperature of scoring
    assert len(masks) == 2 and not torch.equal(*masks)  # redrawn
    last_two = (masks[0][:, -2:] == model.mask_id).tolist()
    assert any(row != last_two[0] for row in last_two)  # every prompt has its own
    nothing = torch.full((8,), model.mask_id)
    assert len(run.steps) == 4
    losses = []
    for k, shown in enumerate(masks):
        halves = run.steps[2 * k : 2 * k + 2]
        found = sum(step.gradient for step in halves) / 2
        rows = [(b, shown[b // 3], nothing, roll.completion[b]) for b in range(12)]
        loss = slow_loss(model, roll, rows, 2.0, positive_only)
        assert relative_error(gradient(model.network.parameters(), loss), found) < 1e-10
        assert sum(step.loss for step in halves) / 2 == pytest.approx(loss.item(), rel=1e-10)
        losses.append(loss.item())
        all_shown = [(b, roll.prompt[b], nothing, roll.completion[b]) for b in range(12)]
        for wrong in (slow_loss(model, roll, all_shown, 2.0, positive_only),
                      slow_loss(model, roll, rows, 2.0, not positive_only)):
            assert relative_error(gradient(model.network.parameters(), wrong), found) > 0.01
            assert loss.item() != pytest.approx(wrong.item(), rel=1e-2)
    assert run.logged[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-10) and abs(sum(losses)) > 0.1


@pytest.mark.parametrize("y", ["sampled", "greedy"])
@pytest.mark.parametrize("K", [2, 4])
def test_an_update_of_plusplus_has_the_loss_and_the_gradient_of_eq_10(update, float64, K, y):
    """In several forwards. The other y, or the finished row scored at every step, is rejected."""
    run, model, drawn = update(plusplus=True, K=K, y=y, psi=2.0, passes=1, budget=182)
    (roll,), ((steps, member),) = drawn["roll_out"], drawn["draw_steps"]
    kept = [(b, steps[b, k].item()) for b, k in member.nonzero().tolist()]
    assert model.counts["nfe_update"] <= model.counts["nfe_update_full"] == len(kept)
    assert K < 4 or sorted(kept) == steps_taken(roll)
    rows, others = [], []
    for b, s in kept:
        shown = roll.completion[b].masked_fill(roll.revealed_at[b] >= s, model.mask_id)
        rows.append((b, roll.prompt[b], shown, slow_clean_prediction(model, roll, b, s, y)))
        if y == "sampled":
            others.append((*rows[-1][:3], slow_clean_prediction(model, roll, b, s, "greedy")))
    loss, (step,) = slow_loss(model, roll, rows, 2.0, False), run.steps
    assert step.loss == pytest.approx(loss.item(), rel=1e-10) and abs(loss.item()) > 0.1
    assert relative_error(gradient(model.network.parameters(), loss), step.gradient) < 1e-10
    finished = [(*row[:3], roll.completion[row[0]]) for row in rows]
    for members in filter(None, (finished, others)):
        wrong = slow_loss(model, roll, members, 2.0, False)
        assert relative_error(gradient(model.network.parameters(), wrong), step.gradient) > 0.01


# ----------------------------------------------------------------------------------------- the weights


def test_hand_computed_example():
    """psi = ln 2. Group 1: A = 1, 0, -1, w+ = (4, 2, 1) / 7, w- = (1, 2, 4) / 7.
    Group 2: A = 2, -1, -1, w+ = (8, 1, 1) / 10, w- = (1, 8, 8) / 17."""
    reward = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.0, -4.0]])
    weight = group_weights(reward, every(reward), math.log(2), False)
    expected = torch.tensor([[-3 / 7, 0, 3 / 7], [-126 / 170, 63 / 170, 63 / 170]])
    torch.testing.assert_close(weight, expected)
    assert (weight * logp).sum().item() / 2 == pytest.approx((-6 / 7 - 63 / 170) / 2)
    positive = group_weights(reward, every(reward), math.log(2), True)
    assert (positive * logp).sum().item() / 2 == pytest.approx((11 / 7 + 21 / 10) / 2)


@pytest.mark.parametrize("positive_only", [False, True])
def test_weights_against_loops_and_what_they_sum_to(positive_only):
    reward = random_rewards(3, 5)
    weight = group_weights(reward, every(reward), 2.0, positive_only)
    expected = [slow_weights(group, 2.0, positive_only) for group in reward.tolist()]
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0)
    logp = -random_rewards(3, 5)
    moved = (weight * (logp + 100)).sum() - (weight * logp).sum()  # a constant added to every log-likelihood
    assert moved.item() == pytest.approx(-300 if positive_only else 0, abs=1e-10)


def test_small_psi_is_the_centred_reward_and_psi_is_odd():
    """w+ - w- = (2 psi / G) A + O(psi^3): halving psi divides the rest by 8."""
    reward = random_rewards(2, 5)
    adv = reward - reward.mean(1, keepdim=True)

    def rest(psi):
        return (-group_weights(reward, every(reward), psi, False) - 2 * psi / 5 * adv).norm()

    assert 7.9 < rest(0.02) / rest(0.01) < 8.1
    weight, opposite = (group_weights(reward, every(reward), psi, False) for psi in (1.5, -1.5))
    torch.testing.assert_close(weight, -opposite, atol=1e-15, rtol=0)


def test_invariant_to_a_constant_and_equivariant_to_a_permutation():
    reward, order = random_rewards(2, 5), [3, 0, 4, 2, 1]
    weight = group_weights(reward, every(reward), 2.0, False)
    shifted = group_weights(reward + 7, every(reward), 2.0, False)
    torch.testing.assert_close(shifted, weight, atol=1e-14, rtol=0)
    permuted = group_weights(reward[:, order], every(reward), 2.0, False)
    torch.testing.assert_close(permuted, weight[:, order], atol=1e-15, rtol=0)


def test_groups_do_not_mix():
    reward = random_rewards(2, 4) + torch.tensor([[0.0], [3.0]])  # an easy and a hard prompt
    adv = reward - reward.mean(1, keepdim=True)
    together = group_weights(reward, every(reward), 3.0, False)
    for g in range(2):
        apart = group_weights(reward[g : g + 1], every(reward[:1]), 3.0, False)
        assert torch.equal(together[g : g + 1], apart)
    released = ((-3 * adv).flatten().softmax(0) - (3 * adv).flatten().softmax(0)).view(2, 4)  # over the batch
    assert (2 * released - together).abs().max() > 0.01  # 2: two groups share one softmax


def test_who_is_no_member_has_no_weight_and_no_influence():
    reward = torch.tensor([[0.2, 1e6, 0.9, 0.5], [0.9, 0.9, 0.1, 0.9]])
    member = torch.tensor([[True, False, True, True], [True, True, False, True]])
    for positive_only in (False, True):
        weight = group_weights(reward, member, 1.0, positive_only)
        assert (weight[~member] == 0).all()
        for g in range(2):
            alone = group_weights(reward[g, member[g]][None], torch.ones(1, 3, dtype=torch.bool), 1.0,
                                  positive_only)
            torch.testing.assert_close(weight[g, member[g]], alone[0])
    assert group_weights(reward, member, 1.0, False)[1].abs().max() == 0  # its members are equal


def test_equal_rewards_teach_exactly_nothing():
    model = Tabular(V=3, L=2, seed=0)
    reward = torch.full((1, 6), 0.9)
    rounding = reward - reward.mean(1, keepdim=True)
    assert rounding.abs().max() > 0  # the mean of six times 0.9 is not 0.9 in fp32, and -2 psi / G A not 0
    completion = torch.tensor([[[0, 0], [0, 1], [1, 2], [2, 2], [1, 1], [2, 0]]])
    weight = group_weights(reward, every(reward), 1.0, False)
    assert weight.abs().max() == 0
    loss = (weight * tabular_logp(model, completion)).sum()
    assert loss.item() == 0 and torch.autograd.grad(loss, model.table)[0].abs().max() == 0
    positive = group_weights(reward, every(reward), 1.0, True)
    torch.testing.assert_close(positive, torch.full((1, 6), -1 / 6))  # it imitates all six alike


def tabular_logp(model, completion: torch.Tensor) -> torch.Tensor:
    """Completions (1, G, L) to their one-step log-likelihoods (1, G); no prompt."""
    none = torch.zeros(1, 0, dtype=torch.long)
    return group_logp(model, none, none.bool(), completion, 1.0)


def group_logp(model, prompt, prompt_mask, completion, temperature: float) -> torch.Tensor:
    """log pi(o_i | q) of completions (prompts, G, L), all of them hidden: (prompts, G)."""
    prompts, G, L = completion.shape
    x = torch.cat([prompt, torch.full((prompts, L), model.mask_id)], 1).repeat_interleave(G, 0)
    y, mask = completion.flatten(0, 1), prompt_mask.repeat_interleave(G, 0)
    return one_step_logp(model, x, mask, y, temperature).view(prompts, G)


@pytest.mark.parametrize("positive_only", [False, True])
def test_a_gradient_step_raises_the_good_and_lowers_the_bad(positive_only):
    model = Tabular(V=3, L=2, seed=0)
    completion, reward = torch.tensor([[[0, 0], [1, 1], [2, 2]]]), torch.tensor([[1.0, 0.5, 0.0]])
    weight = group_weights(reward, every(reward), 1.0, positive_only)
    before = tabular_logp(model, completion)
    (weight * before).sum().backward()
    with torch.no_grad():
        model.table -= 0.1 * model.table.grad
    change = (tabular_logp(model, completion) - before)[0]
    assert change[0] > 0
    assert positive_only or change[2] < 0


def test_the_population_minimiser_of_positive_only_is_the_tilted_old_policy():
    """pi_old exp(psi A) / Z, by exact minimisation: a group with every outcome as often as pi_old has it IS
    the expectation under pi_old. Two independent tokens, each with its own share of the reward."""
    psi, counts, value = 1.3, [[1, 2, 3], [3, 1, 1]], [[0.0, 1.0, -0.5], [0.3, 0.0, 2.0]]
    pairs = list(itertools.product(range(3), repeat=2))
    group = [(a, b) for a, b in pairs for _ in range(counts[0][a] * counts[1][b])]  # 6 * 5 members
    reward = torch.tensor([[value[0][a] + value[1][b] for a, b in group]], dtype=torch.float64)
    weight = group_weights(reward, every(reward), psi, True)
    model = Tabular(V=3, L=2, seed=0)
    optimizer = torch.optim.LBFGS([model.table], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = (weight * tabular_logp(model, torch.tensor([group]))).sum()
        total.backward()
        return total

    optimizer.step(loss)
    for i in range(2):
        found = model.table[3, 3, i, :3].softmax(0).tolist()  # everything hidden: state (mask, mask)
        tilted = [c * math.exp(psi * v) for c, v in zip(counts[i], value[i], strict=True)]
        assert found == pytest.approx([t / sum(tilted) for t in tilted], abs=1e-6)
        forgetful = [math.exp(psi * v) for v in value[i]]  # pi_old forgotten: each outcome once
        assert found != pytest.approx([t / sum(forgetful) for t in forgetful], abs=0.05)


# ---------------------------------------------------------------------------- wd1: one canvas per prompt


def test_one_forward_per_prompt_equals_G_forwards(in_float64):
    """Left-padded prompts of three lengths, partly hidden; completions that end in different places."""
    model = sharp_model(dtype=torch.float64)
    prompt, prompt_mask = encode(model, TEXTS)
    shown = hide_tokens(prompt, prompt_mask, 0.5, model.mask_id, generators())
    assert not torch.equal(shown, prompt)
    gen = torch.Generator().manual_seed(0)
    completion = torch.randint(4, 14, (3, G, L), generator=gen)
    for p, i, place in [(0, 0, 0), (0, 1, 5), (1, 0, 5), (1, 1, 8), (1, 2, 3), (1, 3, 0), (2, 2, 11)]:
        completion[p, i, place] = model.eos_id
    completion[0, 1, 9] = model.eos_id  # a second one counts for nothing
    weight = torch.randn(3, G, generator=gen, dtype=torch.float64)

    seen = evaluated(model)
    together = group_logp(model, shown, prompt_mask, completion, T)
    assert sum(seen) == 3
    nothing = torch.full((L,), model.mask_id)
    pairs = list(itertools.product(range(3), range(G)))
    apart = [slow_logp(model, shown[p], prompt_mask[p], nothing, completion[p, i], T) for p, i in pairs]
    apart = torch.stack(apart).view(3, G)
    torch.testing.assert_close(together, apart, atol=1e-10, rtol=0)
    expected = gradient(model.network.parameters(), (weight * apart).sum())
    found = gradient(model.network.parameters(), (weight * together).sum())
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)

    wrong = [group_logp(model, prompt, prompt_mask, completion, T),  # nothing of the prompt hidden
             group_logp(model, shown, prompt_mask, completion, 1.0)]  # another temperature
    model.end_ids = (-1,)
    wrong += [group_logp(model, shown, prompt_mask, completion, T)]  # behind the EOS too
    assert all((w - apart).abs().max() > 0.1 for w in wrong)


def test_hidden_share_and_never_padding():
    """18,000 real tokens, share 0.15: |z| < 5. False alarm: about 6e-7."""
    prompt = torch.full((200, 100), 5)
    prompt_mask = torch.ones_like(prompt, dtype=torch.bool)
    prompt_mask[:100, :20] = False
    gens = [common.generator("cpu", g) for g in range(200)]
    hidden = hide_tokens(prompt, prompt_mask, 0.15, 2, gens) == 2
    n = prompt_mask.sum().item()
    assert not hidden[~prompt_mask].any()
    assert abs(hidden.sum().item() / n - 0.15) < 5 * (0.15 * 0.85 / n) ** 0.5
    assert len({tuple(row) for row in hidden.tolist()}) == 200  # every prompt has its own mask


def test_hidden_tokens_by_hand():
    """The first number drawn decides the last token, and so on; a padding token's number is drawn for
    nothing."""
    prompt = torch.tensor([[0, 0, 7, 8, 9]])
    draws = torch.rand(5, generator=common.generator("cpu", 3)).tolist()
    share = sorted(draws[:3])[1] + 1e-6  # the two smallest of the three real tokens' numbers
    expected = [0, 0] + [2 if draws[4 - i] < share else prompt[0, i].item() for i in (2, 3, 4)]
    shown = hide_tokens(prompt, prompt > 0, share, 2, [common.generator("cpu", 3)])
    assert shown.tolist() == [expected] and expected.count(2) == 2
    assert hide_tokens(prompt, prompt > 0, 0.0, 2, [common.generator("cpu", 3)]).equal(prompt)
    assert hide_tokens(prompt, prompt > 0, 1.0, 2, [common.generator("cpu", 3)]).tolist() == [[0, 0, 2, 2, 2]]


def test_a_prompt_mask_is_a_function_of_the_prompts_own_generator():
    """Neither the other prompts of the batch nor further padding change which tokens are hidden."""
    model = sharp_model()
    prompt, prompt_mask = encode(model, TEXTS)
    shown = hide_tokens(prompt, prompt_mask, 0.5, model.mask_id, generators())
    for p in range(3):
        alone = prompt[p : p + 1, prompt_mask[p]]
        kept = hide_tokens(alone, alone >= 0, 0.5, model.mask_id, generators()[p : p + 1])
        assert torch.equal(kept[0], shown[p, prompt_mask[p]])
    wider = torch.nn.functional.pad(prompt, (40, 0), value=model.pad_id)
    wider = hide_tokens(wider, torch.nn.functional.pad(prompt_mask, (40, 0)), 0.5, model.mask_id,
                        generators())
    assert torch.equal(wider[:, 40:], shown)
    other = hide_tokens(prompt, prompt_mask, 0.5, model.mask_id, generators(1))
    assert not torch.equal(other, shown)


# ------------------------------------------------------------------------------- wd1++: the trajectory


def rollout(model, S=6, block=4, guess="greedy"):
    """12 rows; some end early."""
    return denoise(model, *padded_prompts(model, G), generators(), L=L, S=S, block=block, temperature=T,
                   guess=guess)


@pytest.mark.parametrize("guess", ["greedy", "sampled"])
def test_clean_predictions_and_one_step_logp_against_loops(guess, in_float64):
    model = sharp_model(OFTEN, torch.float64)
    roll = rollout(model, guess=guess)
    b, s = torch.tensor(steps_taken(roll)).T
    last = roll.revealed_at.masked_fill(roll.revealed_at == roll.S, -1).amax(1)
    early = last < roll.S - 1
    assert 0 < early.sum() < len(early)

    y = clean_predictions(roll[b], s[:, None])[:, 0]
    pairs = list(zip(b.tolist(), s.tolist(), strict=True))
    expected_y = torch.stack([slow_clean_prediction(model, roll, i, j, guess) for i, j in pairs])
    assert torch.equal(y, expected_y)
    assert torch.equal(y[s == last[b]], roll.completion)
    last_of_all = torch.where((s == roll.S - 1)[:, None], roll.completion[b], roll.guess[b, s])
    assert not torch.equal(last_of_all[early[b]], y[early[b]])  # a row that ended early has its own last step

    x = canvas(roll[b], roll.revealed_at[b] >= s[:, None])
    logp = one_step_logp(model, x, roll.prompt_mask[b], y, T)
    rows = zip(roll.prompt[b], roll.prompt_mask[b], x[:, -L:], y, strict=True)
    slow = torch.stack([torch.as_tensor(slow_logp(model, *row, T)) for row in rows])
    torch.testing.assert_close(logp, slow, atol=1e-10, rtol=0)
    weight = random_rewards(len(b)) - 0.5
    expected = gradient(model.network.parameters(), (weight * slow).sum())
    found = gradient(model.network.parameters(), (weight * logp).sum())
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)

    share = (roll.revealed_at[b] >= s[:, None]).double().mean(1)
    assert (logp * share - slow).abs().max() > 0.1  # without 1 / l_s
    behind_eos = common.score(model, x, roll.prompt_mask[b], y, x[:, -L:] == model.mask_id, T).sum(1) / share
    assert (behind_eos - slow).abs().max() > 0.1
    of_the_row = one_step_logp(model, x, roll.prompt_mask[b], roll.completion[b], T)  # o_i at every step
    assert (of_the_row - slow).abs().max() > 0.1


def test_draw_steps_only_steps_taken_and_all_of_them():
    roll = rollout(sharp_model(OFTEN))
    noise = group_noise(generators(), 3 * G, (roll.S,))
    for K in (1, 4, roll.S):
        steps, member = draw_steps(roll, K, noise)
        for b in range(3 * G):
            taken = [s for i, s in steps_taken(roll) if i == b]
            drawn = steps[b, member[b]].tolist()
            assert len(set(drawn)) == len(drawn) == min(K, len(taken))
            assert set(drawn) <= set(taken)
    steps, member = draw_steps(roll, 4, torch.zeros_like(noise))  # rand can return 0
    assert member.sum(1).tolist() == [min(4, len(set(row) - {roll.S})) for row in roll.revealed_at.tolist()]


def test_draw_steps_is_uniform():
    """20,000 draws of 2 steps, of a row that took 6 and of one that took 4: every pair equally often.
    False alarm: |z| > 5 for one of 21 pairs, about 1e-5."""
    roll = rollout(sharp_model())[torch.zeros(20_000, dtype=torch.long)]
    noise = torch.rand(20_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count in (6, 4):
        step = torch.arange(L) // 2
        roll.revealed_at = step.masked_fill(step >= count, roll.S).expand(20_000, L)
        steps, member = draw_steps(roll, 2, noise)
        assert member.all()
        low, high = steps.sort(1).values.T
        found = torch.bincount(low * count + high, minlength=count**2) / 20_000
        for i, j in itertools.combinations(range(count), 2):
            p = 1 / math.comb(count, 2)
            assert abs(found[i * count + j] - p) < 5 * (p * (1 - p) / 20_000) ** 0.5


def test_plusplus_with_one_step_is_wd1_with_the_whole_prompt_shown(in_float64):
    model = sharp_model(OFTEN, torch.float64)
    roll = rollout(model, S=1, block=L)
    assert 0 < (~roll.valid).sum()
    reward = random_rewards(3, G)
    weight = group_weights(reward, every(reward), 1.0, False)

    shown = hide_tokens(roll.prompt[::G], roll.prompt_mask[::G], 0.0, model.mask_id, generators())
    one = group_logp(model, shown, roll.prompt_mask[::G], roll.completion.view(3, G, L), T)
    steps, member = draw_steps(roll, 1, group_noise(generators(), 3 * G, (1,)))
    assert member.all()
    x = canvas(roll, roll.revealed_at >= steps)
    two = one_step_logp(model, x, roll.prompt_mask, clean_predictions(roll, steps)[:, 0], T).view(3, G)
    torch.testing.assert_close(two, one, atol=1e-10, rtol=0)
    expected = gradient(model.network.parameters(), (weight * one).sum() / 3)
    found = gradient(model.network.parameters(), (weight * two).sum() / 3)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)

    greedy = one_step_logp(model, x, roll.prompt_mask, roll.guess[:, 0], T).view(3, G)  # y = o_i forgotten
    assert (greedy - one).abs().max() > 0.1


# ---------------------------------------------------------------------- wd1++: completions that are sampled

SAMPLERS = [dict(S=6, block=4), dict(S=12, block=12, order="confidence"), dict(S=4, block=6, order="random"),
            dict(S=12, block=4, threshold=0.5)]


def guessed(model, guess: str | None, seed: int = 0, **sampling) -> common.Rollout:
    return denoise(model, *padded_prompts(model, G), generators(seed), L=L, temperature=T, guess=guess,
                   **sampling)


@pytest.mark.parametrize("sampling", SAMPLERS, ids=lambda s: s.get("order", "top_prob"))
def test_asking_for_a_guess_changes_nothing_else(sampling):
    """What is sampled, when, how likely it was, and of how many forwards."""
    model = sharp_model(OFTEN)
    found, forwards = [], []
    for guess in (None, "greedy", "sampled"):
        before = model.counts["nfe_rollout"]
        found.append(guessed(model, guess, **sampling))
        forwards.append(model.counts["nfe_rollout"] - before)
    assert forwards[0] == forwards[1] == forwards[2]
    for name in ("completion", "revealed_at", "logp", "entropy", "valid"):
        first, *others = (getattr(roll, name) for roll in found)
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(found[1].guess, found[2].guess)


@pytest.mark.parametrize("sampling", SAMPLERS, ids=lambda s: s.get("order", "top_prob"))
def test_a_sampled_guess_contains_what_was_shown_and_what_the_step_reveals(sampling):
    model = sharp_model(OFTEN)
    roll = guessed(model, "sampled", **sampling)
    for s in range(roll.S):
        there = roll.revealed_at <= s  # shown before step s, or revealed by it
        assert torch.equal(roll.guess[:, s][there], roll.completion[there])
    assert not (roll.guess == model.mask_id).any()
    last = roll.revealed_at.masked_fill(roll.revealed_at == roll.S, -1).amax(1)
    final = roll.guess[torch.arange(len(last)), last]  # so before a row's last step, the finished row
    assert torch.equal(final[roll.valid], roll.completion[roll.valid])
    greedy = guessed(model, "greedy", **sampling)  # need not contain what the step reveals
    assert any((greedy.guess[:, s] != greedy.completion)[greedy.revealed_at == s].any()
               for s in range(roll.S))


def test_at_temperature_0_a_sample_is_the_most_likely_token():
    model = sharp_model(OFTEN)
    prompt, prompt_mask = padded_prompts(model, G)
    greedy, sampled = (denoise(model, prompt, prompt_mask, [], L=L, S=6, block=4, temperature=0, guess=guess)
                       for guess in ("greedy", "sampled"))
    assert torch.equal(greedy.guess, sampled.guess)
    with pytest.raises(AssertionError):
        guessed(model, "random", S=6, block=4)


def test_a_groups_guesses_depend_neither_on_other_groups_nor_on_the_parts_of_the_head(monkeypatch):
    model = sharp_model(OFTEN)
    together = guessed(model, "sampled", S=6, block=4)
    rows = slice(G, 2 * G)
    alone = denoise(model, *(part[rows] for part in padded_prompts(model, G)), generators()[1:2], L=L, S=6,
                    block=4, temperature=T, guess="sampled")
    assert torch.equal(alone.guess, together.guess[rows])
    assert not torch.equal(guessed(model, "sampled", seed=1, S=6, block=4).guess, together.guess)
    monkeypatch.setattr(common, "LOGITS", 3 * model.V)
    assert torch.equal(guessed(model, "sampled", S=6, block=4).guess, together.guess)


def test_a_sampled_guess_has_the_distribution_of_its_state():
    """12,000 rows of one prompt, at the state before step 0 and at the most frequent state before step 2,
    which reveals in the second of three blocks. Every position is sampled from its own softmax, in the
    current block and behind it, and independently of its neighbour. What is less likely than 1 % is not
    compared. False alarm: |z| > 5.5 for one of some 500 numbers, about 1e-5."""
    model, N = sharp_model(), 12_000
    prompt, prompt_mask = encode(model, ["4="] * N)
    roll = denoise(model, prompt, prompt_mask, [common.generator("cpu", 5)], L=6, S=6, block=2,
                   temperature=T, guess="sampled")

    def z(found, p, n):
        often = p > 0.01
        return ((found - p)[often] / (p * (1 - p) / n)[often].sqrt()).abs().max().item()

    for s in (0, 2):
        states = roll.completion.masked_fill(roll.revealed_at >= s, model.mask_id)
        distinct, which, counts = states.unique(dim=0, return_inverse=True, return_counts=True)
        here, n = which == counts.argmax(), counts.max().item()
        logits = slow_logits(model, prompt[0], prompt_mask[0], distinct[counts.argmax()])[s:].double()
        p = (logits / T).softmax(1)  # of the positions that are hidden
        y = torch.nn.functional.one_hot(roll.guess[here, s, s:], model.V).double()  # (n, 6 - s, V)
        assert n > 500 and z(y.mean(0), p, n) < 5.5
        assert z(y.mean(0), logits.softmax(1), n) > 5.5  # temperature 1
        assert z(y.mean(0), p.flip(0), n) > 5.5  # another position's
        for i in range(5 - s):
            both = torch.einsum("nv,nw->vw", y[:, i], y[:, i + 1]) / n
            assert z(both, p[i, :, None] * p[i + 1], n) < 5.5


@pytest.mark.parametrize("eos_id", [None, 1])
def test_what_a_push_on_y_expects(eos_id, in_float64):
    """Exactly, over the 9 completions y of a state that shows one token of three. A constant weight on a
    sampled y pushes nothing on average, even though y counts to its first EOS alone; on a greedy y it pushes
    the most likely tokens. A weight that is the reward of y pushes along the gradient of its expectation."""
    model = Tabular(V=3, L=3, seed=5, eos_id=eos_id)
    y = torch.tensor([(a, 2, b) for a, b in itertools.product(range(3), repeat=2)])
    x = torch.tensor([[model.mask_id, 2, model.mask_id]])
    p = model.head(model.body(x, None))[0].softmax(1)  # (3, V)
    probability = p[0, y[:, 0]] * p[2, y[:, 2]]
    share = probability.detach()
    reward = random_rewards(9)
    if eos_id is not None:  # which cannot depend on what stands behind the EOS
        reward[y[:, 0] == eos_id] = 0.3

    def push(y, weight):
        none = torch.zeros(len(y), 0, dtype=torch.bool)
        logp = one_step_logp(model, x.expand(len(y), -1), none, y, 1.0)
        return torch.autograd.grad((weight * logp).sum(), model.table)[0]

    expected = torch.autograd.grad((probability * reward).sum(), model.table, retain_graph=True)[0]
    assert push(y, share).abs().max() < 1e-15
    greedy = torch.where(x == model.mask_id, p.argmax(1), x)
    assert push(greedy, 1.0).abs().max() > 0.1
    torch.testing.assert_close(push(y, share * reward), expected * 3 / 2, atol=1e-14, rtol=0)  # 1 / l


def trajectories(model, state: list[int], probability=1.0, members=()):
    """Every trajectory of the sampler by top_prob, one token a step, with every y that its steps can sample:
    (probability with its graph, [(state, y) of each step])."""
    if model.mask_id not in state:
        yield probability, members
        return
    p = model.head(model.body(torch.tensor([state]), None))[0, :, :3].softmax(1)
    hidden = [i for i in range(3) if state[i] == model.mask_id]
    revealed = max(hidden, key=lambda i: p[i].max().item())
    for tokens in itertools.product(range(3), repeat=len(hidden)):
        y = list(state)
        for i, token in zip(hidden, tokens, strict=True):
            y[i] = token
        after = [y[i] if i == revealed else state[i] for i in range(3)]
        sampled = probability * math.prod(p[i, y[i]] for i in hidden)
        yield from trajectories(model, after, sampled, (*members, (state, y)))


def test_the_expected_update_is_nearly_the_gradient_of_the_expected_reward_of_y(in_float64):
    """Groups of two rows, all 729 * 729 of them, K = S = 3: at a cosine of 0.95 and more with
    sum over s of E[R(y_s) grad log pi(y_s | x_s) / l_s]. Not exactly: the mean reward of the members knows
    later steps of the same row."""
    value = torch.rand(27, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed in range(3):
        model = Tabular(V=3, L=3, seed=seed)
        probability, members = zip(*trajectories(model, [model.mask_id] * 3), strict=True)
        share = torch.stack(probability).detach()
        assert len(share) == 729 and share.sum().item() == pytest.approx(1)
        x, y = torch.tensor(members).unbind(2)  # (729, 3, 3) each
        reward = value[(y * torch.tensor([9, 3, 1])).sum(2)]  # (729, 3)
        weight = torch.zeros_like(reward)
        for one in range(729):
            both = torch.cat([reward[one].expand(729, 3), reward], 1)
            weight[one] = share @ group_weights(both, every(both), 1.0, False)[:, :3]
        none = torch.zeros(729 * 3, 0, dtype=torch.bool)
        logp = one_step_logp(model, x.flatten(0, 1), none, y.flatten(0, 1), 1.0).view(729, 3)
        update, ideal = (torch.autograd.grad((share[:, None] * push * logp).sum(), model.table,
                                             retain_graph=True)[0].flatten() for push in (-weight, reward))
        assert torch.cosine_similarity(update, ideal, 0) > 0.95
