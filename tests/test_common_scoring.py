"""Scoring: the state rebuilt from the step map is the sampler's own, and so are its log-probs."""

import pytest
import torch
from helpers import evaluated, generators, padded_prompts, sharp_model

import common
from common import (attention, canvas, denoise, distinct, micro_batches, minibatches, per_step, score,
                    worth_scoring)

L, S, BLOCK, G = 12, 6, 4, 4
OFTEN = 1.0  # added to the EOS logit: some rows end early, some late, some never
CASES = [{}, {"order": "random", "block": L}, {"order": "confidence", "threshold": 0.5}]


def rollout(model, **options):
    options = {"L": L, "S": S, "block": BLOCK} | options
    return denoise(model, *padded_prompts(model, G), generators(), **options)


def rescored(model, roll, temperature: float) -> torch.Tensor:
    """Each token's log-prob on the canvas rebuilt before its step: (B, L)."""
    total = 0.0
    for s in roll.revealed_at[roll.revealed_at < roll.S].unique():
        x = canvas(roll, roll.revealed_at >= s)
        total += score(model, x, roll.prompt_mask, roll.completion, roll.revealed_at == s, temperature)
    return total


@pytest.mark.parametrize("options", CASES)
def test_the_rebuilt_state_is_what_the_sampler_saw(options, monkeypatch):
    model = sharp_model(OFTEN)
    seen, real = [], model.body

    def recording(x, attn):
        seen.append(x)
        return real(x, attn)

    monkeypatch.setattr(model, "body", recording)
    roll = rollout(model, **options)
    leaks = 0
    for s, x in enumerate(seen):
        at_work = (roll.revealed_at == s).any(1)  # a row still at work reveals at least one token
        assert torch.equal(canvas(roll, roll.revealed_at >= s)[at_work].unique(dim=0), x.unique(dim=0))
        tail = roll.revealed_at == roll.S  # behind an EOS: the released RLDF code shows it
        tail_visible = canvas(roll, (roll.revealed_at >= s) & ~tail)
        leaks += not torch.equal(tail_visible[at_work].unique(dim=0), x.unique(dim=0))
    assert not (roll.revealed_at[roll.revealed_at < roll.S] >= len(seen)).any()
    assert roll.revealed_at.max() == roll.S or options.get("block") == L
    assert (leaks > 0) == (roll.revealed_at.max() == roll.S)  # that canvas gives the answer's length away


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", CASES)
def test_recorded_log_probs_equal_rescored_ones(options, temperature):
    model = sharp_model(OFTEN)
    model.network.head.norm.weight.data.mul_(0.5)  # logits up to 3: rounding grows with them
    roll = rollout(model, temperature=temperature, **options)
    with torch.no_grad():
        torch.testing.assert_close(rescored(model, roll, temperature), roll.logp, atol=1e-6, rtol=1e-6)
        other = rescored(model, roll, 1.7 - temperature)  # the released EGSPO: sampled at 0.9, scored at 1
    assert (other - roll.logp).abs().max() > 0.1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_the_head_is_not_rounded(device, monkeypatch):
    """With a body in bf16 (on a CPU by its own autocast) log-probs are those of an exact head; a bf16 head is
    off by hundredths, and the first ratio of an update would not be 1."""
    model = sharp_model(OFTEN)
    model.network.to(device)
    if device == "cpu":
        bf16 = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        monkeypatch.setattr(common.Denoiser, "autocast", lambda self: bf16)
    prompt, mask = padded_prompts(model, G)
    gens = [common.generator(device, g) for g in range(3)]
    roll = denoise(model, prompt, mask, gens, L=L, S=S, block=BLOCK)
    with torch.no_grad():
        assert (rescored(model, roll, 1.0) - roll.logp).abs().max() < 2e-3
        h = model.body(canvas(roll, roll.revealed_at >= 0), attention(mask, L))
        exact = model.network.decoder.double()(model.network.head.double()(h.double()))[..., 4:]
        model.network.float()
        assert (model.head(h)[..., 4:] - exact).abs().max() < 1e-4
        with model.autocast():
            assert (model.network.decoder(model.network.head(h))[..., 4:] - exact).abs().max() > 1e-2


def test_the_mask_token_has_no_share_in_a_log_prob():
    model = sharp_model()
    model.network.decoder.bias.data[model.mask_id] += 50
    roll = rollout(model)
    logp = rescored(model, roll, 1.0)
    torch.testing.assert_close(logp, roll.logp, atol=1e-6, rtol=1e-6)
    logp.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.network.parameters())
    x, where = canvas(roll, roll.revealed_at >= 0), roll.revealed_at == 0
    h = model.body(x, attention(roll.prompt_mask, L))[:, -L:]
    raw = model.network.decoder(model.network.head(h)).log_softmax(-1)  # the mask token left in
    wrong = raw.gather(2, roll.completion[..., None])[..., 0]
    assert (wrong - roll.logp)[where].abs().min() > 10


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_equals_full_logits_gathered(temperature):
    model = sharp_model()
    roll = rollout(model)
    x = canvas(roll, roll.revealed_at >= 2)
    where = torch.rand(x.shape[0], L, generator=torch.Generator().manual_seed(0)) < 0.4
    where[3] = False
    logits = model.head(model.body(x, attention(roll.prompt_mask, L)))[:, -L:]
    full = (logits / temperature).log_softmax(-1).gather(2, roll.completion[..., None])[..., 0]
    found = score(model, x, roll.prompt_mask, roll.completion, where, temperature)
    torch.testing.assert_close(found, full * where, atol=2e-6, rtol=1e-6)
    assert (found[~where] == 0).all()


def test_equal_canvases_are_evaluated_once():
    """One canvas for each of three groups of four rows, each row with tokens and places of its own: value and
    gradient of rows scored alone, at 1/4 of the forwards; the head runs once at each place."""
    model = sharp_model(dtype=torch.float64)
    prompt, prompt_mask = padded_prompts(model, G)
    x = torch.cat([prompt, torch.full((3 * G, L), model.mask_id)], 1)
    gen = torch.Generator().manual_seed(0)
    target = torch.randint(4, 14, (3 * G, L), generator=gen)
    where = torch.rand(3 * G, L, generator=gen) < 0.7
    weight = torch.randn(3 * G, L, generator=gen, dtype=torch.float64)
    seen, places, head = evaluated(model), [], model.head
    model.head = lambda h: places.append(len(h)) or head(h)
    together = score(model, x, prompt_mask, target, where, 0.7)
    assert sum(seen) == model.counts["nfe_update"] == 3 and model.counts["nfe_update_full"] == 3 * G
    assert places == [where.view(3, G, L).any(1).sum().item()]
    grads = torch.autograd.grad((together * weight).sum(), list(model.network.parameters()))
    apart = torch.cat([score(model, *(t[b : b + 1] for t in (x, prompt_mask, target, where)), 0.7)
                       for b in range(3 * G)])
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=1e-12)
    apart_grads = torch.autograd.grad((apart * weight).sum(), list(model.network.parameters()))
    for one, other in zip(grads, apart_grads, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()  # ModernBERT rotates in fp32, whatever its weights


def test_equal_tokens_under_unequal_masks_are_two_canvases():
    """A prompt that begins with the padding token's id is not a padded one."""
    model = sharp_model()
    prompt = torch.tensor([[model.pad_id, 5, 6], [model.pad_id, 5, 6]])
    prompt_mask = torch.tensor([[False, True, True], [True, True, True]])
    x = torch.cat([prompt, torch.full((2, L), model.mask_id)], 1)
    found = score(model, x, prompt_mask, torch.full((2, L), 4), torch.ones(2, L, dtype=torch.bool), 1.0)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_distinct():
    rows = torch.tensor([[3, 1], [0, 2], [3, 1], [0, 2], [0, 0], [3, 1]])
    first, which = distinct(rows)
    assert first.tolist() == [0, 1, 4] and which.tolist() == [0, 1, 0, 1, 2, 0]


def test_nothing_to_score():
    """A micro-batch may hold canvases without a single scored token."""
    model = sharp_model()
    prompt, prompt_mask = padded_prompts(model, 1)
    x = torch.cat([prompt, torch.full((3, L), model.mask_id)], 1)
    nothing = torch.zeros(3, L, dtype=torch.bool)
    found = score(model, x, prompt_mask, torch.full((3, L), 4), nothing, 1.0)
    assert torch.equal(found, torch.zeros(3, L))
    found.sum().backward()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_padding_changes_no_score(dtype, tolerance):
    model = sharp_model(dtype=dtype)
    roll = rollout(model)
    x, everywhere = canvas(roll, roll.revealed_at >= 3), torch.ones_like(roll.valid)
    with torch.no_grad():
        padded = score(model, x, roll.prompt_mask, roll.completion, everywhere, 1.0)
        no_mask = score(model, x, torch.ones_like(roll.prompt_mask), roll.completion, everywhere, 1.0)
        for b, mask in enumerate(roll.prompt_mask):
            kept = torch.cat([mask, everywhere[b]])
            row = slice(b, b + 1)
            alone = score(model, x[row, kept], mask[None, mask], roll.completion[row], everywhere[row], 1.0)
            torch.testing.assert_close(padded[row], alone, atol=tolerance, rtol=0)
    padding = ~roll.prompt_mask.all(1)
    assert (padded - no_mask)[padding].abs().amax(1).min() > 0.1  # the attention mask is what does it
    assert torch.equal(padded[~padding], no_mask[~padding])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_gradient_does_not_depend_on_the_budget(dtype, tolerance):
    model = sharp_model(OFTEN, dtype)
    roll = rollout(model, order="confidence", threshold=0.5)
    count = per_step(torch.ones_like(roll.logp), roll.revealed_at, roll.S)
    b, s = (count > 0).nonzero().T  # every step taken
    weight = torch.randn(len(b), generator=torch.Generator().manual_seed(0), dtype=dtype)
    each = roll.prompt.shape[1] + L

    def gradient(budget: int, global_normaliser: bool = True) -> torch.Tensor:
        model.network.zero_grad()
        pairs = torch.stack([b, s], 1)
        states = torch.stack([canvas(roll, roll.revealed_at >= s) for s in range(roll.S)], 1)  # (B, S, P+L)
        parts = list(micro_batches(model, pairs, states, budget))
        place = {tuple(pair): m for m, pair in enumerate(pairs.tolist())}
        for part in ([place[tuple(pair)] for pair in part.tolist()] for part in parts):
            row, step = roll[b[part]], s[part][:, None]
            revealed = row.revealed_at == step
            x = canvas(row, row.revealed_at >= step)
            logp = score(model, x, row.prompt_mask, row.completion, revealed, 1.0)
            loss = (logp.sum(1) * weight[part]).sum() / revealed.sum().clamp(min=1) / len(parts)
            if global_normaliser:
                loss = (logp.sum(1) * weight[part]).sum() / (roll.revealed_at < roll.S).sum()
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.network.parameters()])

    whole = gradient(10**6)
    for budget in (20 * each, 7 * each + 1):
        assert (gradient(budget) - whole).norm() <= tolerance * whole.norm()
        assert (gradient(budget, False) - whole).norm() > 0.01 * whole.norm()  # counted per micro-batch


def test_micro_batches_cover_everything_once_within_the_budget():
    """17 canvases of 10 tokens, 7 of them twice over the rows: equal ones stay together."""
    gen, model = torch.Generator().manual_seed(0), sharp_model()
    x = torch.rand(8, 3, 10, generator=gen)
    x[4:6] = x[:2]
    x[7, 0] = x[6, 1]
    pairs = torch.ones(8, 3).nonzero()[torch.randperm(24, generator=gen)]
    for budget, most in ((70, 7), (79, 7), (10_000, 17), (3, 1)):
        parts = list(micro_batches(model, pairs, x, budget))
        assert sorted(torch.cat(parts).tolist()) == sorted(pairs.tolist())
        held = [x[part[:, 0], part[:, 1]].unique(dim=0) for part in parts]
        assert max(map(len, held)) == most and sum(map(len, held)) == 17
    assert list(micro_batches(model, pairs[:0], x, 70)) == []


def test_minibatches_are_whole_groups_each_once():
    """Six groups of two rows in three minibatches; a group without a pair, and one with a single pair."""
    pairs = torch.tensor([[row, k] for row in range(12) for k in range(3) if row // 2 != 4 and row != 10])

    def batches(seed: int) -> list[list[list[int]]]:
        gen = torch.Generator().manual_seed(seed)
        return [batch.tolist() for batch in minibatches(pairs, 6, 2, 3, gen)]

    found = batches(0)
    assert sorted(sum(found, [])) == pairs.tolist() and len(found) == 3
    groups = [{row // 2 for row, _ in batch} for batch in found]
    assert all(len(held) == 2 - (4 in missing) for held, missing in zip(groups, drawn_groups(0), strict=True))
    assert sum(map(len, groups)) == len(set.union(*groups)) == 5
    for batch, held in zip(found, groups, strict=True):
        assert batch == [pair for pair in pairs.tolist() if pair[0] // 2 in held]  # all of it, in their order
    assert found == batches(0) and found != batches(1)  # the generator decides, alone
    assert len(list(minibatches(pairs, 6, 2, 1, torch.Generator()))[0]) == len(pairs)


def drawn_groups(seed: int) -> list[set[int]]:
    """The groups of each of three minibatches of six, with or without pairs."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    return [set(order[i : i + 2]) for i in (0, 2, 4)]


def test_groups_without_a_pair_make_no_minibatch():
    pairs = torch.tensor([[0, 0], [0, 1], [1, 0]])  # all in group 0
    found = list(minibatches(pairs, 4, 2, 4, torch.Generator().manual_seed(0)))
    assert len(found) == 1 and torch.equal(found[0], pairs)
    assert list(minibatches(pairs[:0], 4, 2, 2, torch.Generator())) == []


@pytest.mark.parametrize("prompts, G, count", [(5, 2, 4), (4, 1, 2)])
def test_unequal_minibatches_and_groups_of_one_are_refused(prompts, G, count):
    """Also where a method's file is copied and no command line is there to check."""
    with pytest.raises(AssertionError):
        list(minibatches(torch.zeros(1, 2, dtype=torch.long), prompts, G, count, torch.Generator()))


def test_what_is_not_worth_scoring_is_counted_all_the_same():
    model, pairs = sharp_model(), torch.tensor([[0, 0], [0, 1], [3, 0], [5, 2]])
    moves = torch.tensor([True, False, False, True])
    assert worth_scoring(model, pairs, moves, 3).tolist() == [[0, 0], [5, 2]]
    assert model.counts["nfe_update_full"] == 2 * 3 and model.counts["nfe_update"] == 0


def test_per_step_equals_a_loop():
    roll = rollout(sharp_model(OFTEN), threshold=0.5)
    expected = torch.zeros(3 * G, roll.S)
    for b, i in (roll.revealed_at < roll.S).nonzero().tolist():
        expected[b, roll.revealed_at[b, i]] += roll.logp[b, i]
    torch.testing.assert_close(per_step(roll.logp, roll.revealed_at, roll.S), expected)
    tail = (roll.revealed_at == roll.S).float()
    assert tail.sum() > 0 and (per_step(tail, roll.revealed_at, roll.S) == 0).all()


@pytest.mark.parametrize("size", [1, 5, 10**6])
def test_logits_are_read_in_parts_and_made_again_for_backward(size, monkeypatch):
    model = sharp_model(OFTEN, torch.float64)
    roll = rollout(model, temperature=0.7)
    where = (roll.revealed_at >= 2) & roll.valid
    x = canvas(roll, roll.revealed_at >= 2)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.network.zero_grad()
        found = score(model, x, roll.prompt_mask, roll.completion, where, 0.7)
        found.sum().backward()
        return found.detach(), torch.cat([p.grad.flatten() for p in model.network.parameters()])

    monkeypatch.setattr(common, "LOGITS", 10**9)
    value, whole = gradient()
    monkeypatch.setattr(common, "LOGITS", size * model.V)
    calls, real = [], model.head
    monkeypatch.setattr(model, "head", lambda h: calls.append(len(h)) or real(h))
    found, parts = gradient()
    torch.testing.assert_close(found, value, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=1e-10)
    used = torch.zeros(len(distinct(x)[0]), L, dtype=torch.bool)
    used[distinct(x)[1][where.nonzero()[:, 0]], where.nonzero()[:, 1]] = True
    M = int(used.sum())  # places of distinct canvases
    in_forward = -(-M // size)
    assert max(calls) == min(size, M)
    assert len(calls) == (1 if in_forward == 1 else 2 * in_forward)
