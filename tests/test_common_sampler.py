"""The sampler: against a slow obvious version, its distribution, and what a rollout promises."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import TEXTS, Tabular, generators, padded_prompts, sharp_model

import common
from common import Denoiser, denoise, roll_out

L, S, BLOCK, G = 12, 6, 4, 4
OFTEN = 1.0  # added to the EOS logit: some rows end early, some late, some never


def rollout(model, seed=0, **options):
    """3 groups of 4 rows, prompts of three lengths."""
    options = {"L": L, "S": S, "block": BLOCK} | options
    return denoise(model, *padded_prompts(model, G), generators(seed), **options)


def nfe(model) -> tuple[int, int]:
    """Canvases evaluated in rollouts since this was last asked, and rows that stood on them."""
    return model.counts.pop("nfe_rollout"), model.counts.pop("nfe_rollout_full")


def record(model, monkeypatch, method: str) -> list[torch.Tensor]:
    """The first argument of each call of model.method from now on."""
    seen, real = [], getattr(model, method)

    def recording(x, *rest):
        seen.append(x)
        return real(x, *rest)

    monkeypatch.setattr(model, method, recording)
    return seen


# -------------------------------------------------------------------------------------------- a slow version


def softmax(logits: list[float], T: float) -> list[float]:
    """Of real tokens; the mask token comes with -inf and gets exactly 0."""
    top = max(logits)
    weights = [math.exp((z - top) / T) for z in logits]
    return [w / sum(weights) for w in weights]


def slow_row(model, prompt, gen, row, *, block, temperature, order, threshold):
    """One row alone, its prompt without padding, one position after the other, in Python numbers.

    The documented draws: per step one uniform number for each (row of the group, block position, token),
    then, for order random, one for each (row of the group, block position)."""
    T = temperature or 1.0
    most_steps = L if threshold else S
    x = [model.mask_id] * L
    step, logp, entropy, guess = [most_steps] * L, [0.0] * L, [0.0] * L, []
    first = 0
    while first < L and model.eos_id not in x:
        for _ in range(block):
            s = len(guess)
            logits = model.head(model.body(torch.tensor([prompt + x]), None))[0, len(prompt) :].tolist()
            V = len(logits[0])
            best = [max(range(V), key=logits[i].__getitem__) for i in range(L)]
            guess.append([best[i] if x[i] == model.mask_id else x[i] for i in range(L)])
            noise = order_noise = None
            if temperature:
                noise = torch.rand(G, block, V, generator=gen, dtype=torch.float64)[row].tolist()
            if order == "random":
                order_noise = torch.rand(G, block, generator=gen, dtype=torch.float64)[row].tolist()
            options = []  # (confidence, position, token, distribution) of the hidden positions of the block
            for i in range(first, first + block):
                if x[i] != model.mask_id:
                    continue
                p = softmax(logits[i], T)
                token = best[i]
                if temperature:
                    uniform = noise[i - first]
                    real = [v for v in range(V) if v != model.mask_id]
                    token = max(real, key=lambda v: math.log(p[v]) - math.log(-math.log(uniform[v])))
                sure = {"confidence": p[token], "top_prob": max(p)}
                options.append((sure[order] if order in sure else order_noise[i - first], i, token, p))
            options.sort(key=lambda option: -option[0])  # stable: of equals the leftmost
            revealed = options[: L // S]
            if threshold:
                revealed = options[:1] + [option for option in options[1:] if option[0] >= threshold]
            for _, i, token, p in revealed:
                x[i], step[i], logp[i] = token, s, math.log(p[token])
                entropy[i] = -sum(q * math.log(q) for q in p if q)
            if len(revealed) == len(options):
                break
        first += block
    nfe = len(guess)
    x = [model.eos_id if token == model.mask_id else token for token in x]
    guess += [x] * (most_steps - nfe)
    valid = [model.eos_id not in x[:i] for i in range(L)]
    return SimpleNamespace(completion=x, revealed_at=step, logp=logp, entropy=entropy, valid=valid,
                           guess=guess, nfe=nfe)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("block", [BLOCK, L])
@pytest.mark.parametrize("order, threshold", [
    ("top_prob", None), ("confidence", None), ("random", None), ("top_prob", 0.5), ("confidence", 0.5)])
def test_equals_a_slow_version(order, threshold, block, temperature):
    """Tokens, steps, guesses, log-probs, entropies, valid and NFE, for prompts of three lengths."""
    model = sharp_model(OFTEN, torch.float64)
    options = {"block": block, "temperature": temperature, "order": order, "threshold": threshold}
    roll = rollout(model, guess="greedy", **options)
    made, full = nfe(model)
    slow = [
        slow_row(model, roll.prompt[b][roll.prompt_mask[b]].tolist(), generators()[b // G], b % G, **options)
        for b in range(3 * G)
    ]
    for name in ("completion", "revealed_at", "guess", "valid"):
        assert getattr(roll, name).tolist() == [getattr(row, name) for row in slow], name
    for name in ("logp", "entropy"):
        expected = torch.tensor([getattr(row, name) for row in slow], dtype=torch.float64)
        torch.testing.assert_close(getattr(roll, name), expected, atol=1e-10, rtol=0)
    assert made < full == sum(row.nfe for row in slow)
    if block < L:  # the case is hard enough: rows end at different times
        assert 1 < len({row.nfe for row in slow})
        assert (roll.revealed_at == roll.S).any()


def test_the_options_matter():
    """So that a sampler which ignores one of them fails above."""
    model = sharp_model(OFTEN)
    for T in (0.0, 1.0):
        steps = {order: rollout(model, order=order, temperature=T).revealed_at
                 for order in ("top_prob", "confidence", "random")}
        assert torch.equal(steps["top_prob"], steps["confidence"]) == (T == 0)
        assert not torch.equal(steps["top_prob"], steps["random"])
    assert not torch.equal(rollout(model).completion, rollout(model, seed=1).completion)
    assert not torch.equal(*(rollout(model, threshold=p).revealed_at for p in (0.5, 0.9)))


# ---------------------------------------------------------------------------------------------- distribution


def exact(model: Tabular, T: float, order: str, state: tuple) -> Counter:
    """Every completion and its probability when one token is revealed per step: all draws, all choices."""
    hidden = [i for i, token in enumerate(state) if token == model.mask_id]
    if not hidden:
        return Counter({state: 1.0})
    p = (model.head(model.table[state]) / T).softmax(-1).tolist()
    total = Counter()
    for tokens in itertools.product(range(model.V), repeat=len(hidden)):
        drawn = dict(zip(hidden, tokens, strict=True))
        chance = math.prod(p[i][token] for i, token in drawn.items())
        if order == "random":
            chosen = hidden
        elif order == "confidence":
            chosen = [max(hidden, key=lambda i: p[i][drawn[i]])]
        else:
            chosen = [max(hidden, key=lambda i: max(p[i]))]
        for i in chosen:
            after = exact(model, T, order, state[:i] + (drawn[i],) + state[i + 1 :])
            for done, probability in after.items():
                total[done] += chance / len(chosen) * probability
    return total


def sample(model: Tabular, count: int, **options) -> Counter:
    prompt = torch.zeros(count, 1, dtype=torch.long)
    roll = denoise(model, prompt, prompt == 0, [common.generator("cpu", "chi-square")],
                   L=model.L, S=model.L, block=model.L, **options)
    return Counter(map(tuple, roll.completion.tolist()))


def chi_square_p(counts: Counter, expected: dict) -> float:
    """p-value of Pearson's test; P(chi-square with k degrees > q) is the regularised gamma Q(k/2, q/2)."""
    N = counts.total()
    assert min(expected.values()) * N > 5 and set(counts) <= set(expected)
    q = sum((counts[x] - N * p) ** 2 / (N * p) for x, p in expected.items())
    halves = torch.tensor([(len(expected) - 1) / 2, q / 2], dtype=torch.float64)
    return torch.special.gammaincc(*halves).item()


def test_distribution():
    """Chi-square over all 27 completions. Chance of a false alarm with other seeds: 4e-6 (they are fixed)."""
    model = Tabular(V=3, L=3, seed=3)
    start = (model.mask_id,) * 3
    cases = [(1.0, "top_prob"), (0.7, "top_prob"), (1.0, "random"), (1.0, "confidence")]
    truth = {case: exact(model, *case, start) for case in cases}
    for T, order in cases:
        counts = sample(model, 50_000, temperature=T, order=order)
        for case in cases:  # right, and distinguishable from every wrong temperature or order
            p = chi_square_p(counts, truth[case])
            assert p > 1e-6 if case == (T, order) else p < 1e-12, f"{(T, order)} against {case}: {p}"


def test_rare_tokens_are_sampled(monkeypatch):
    """Gumbel noise made from bf16 uniforms, the bug of the released trainers, cuts the tail off."""
    model = Tabular(V=3, L=1, seed=0)
    p = {(0,): 0.998, (1,): 0.0015, (2,): 0.0005}
    model.table.data[model.mask_id, 0, :3] = torch.tensor(list(p.values())).log()
    assert chi_square_p(sample(model, 100_000), p) > 1e-6
    noise = common.group_noise
    monkeypatch.setattr(common, "group_noise", lambda *key: (noise(*key) * 256).floor() / 256)  # 8 bits
    assert chi_square_p(sample(model, 100_000), p) < 1e-12


# ----------------------------------------------------------------------------------- what a rollout promises


@pytest.mark.parametrize("block", [2, 4, 12])
@pytest.mark.parametrize("order, threshold", [("top_prob", None), ("random", None), ("confidence", 0.5)])
def test_every_position_is_revealed_once_or_never_behind_a_finished_eos(order, threshold, block):
    model = sharp_model(OFTEN)
    roll = rollout(model, order=order, threshold=threshold, block=block)
    assert roll.S == (L if threshold else S)
    ended = 0
    for completion, step, logp, entropy, valid in zip(
            roll.completion.tolist(), roll.revealed_at.tolist(), roll.logp.tolist(), roll.entropy.tolist(),
            roll.valid.tolist(), strict=True):
        first_eos = completion.index(model.eos_id) if model.eos_id in completion else L
        end = min(L, (first_eos // block + 1) * block)
        ended += end < L
        assert valid == [i <= first_eos for i in range(L)]
        assert all(s < roll.S for s in step[:end])
        assert step[end:] == [roll.S] * (L - end)
        assert completion[end:] == [model.eos_id] * (L - end)
        assert logp[end:] == entropy[end:] == [0.0] * (L - end)
        assert all(value < 0 for value in logp[:end]) and all(value > 0 for value in entropy[:end])
        blocks = [step[i : i + block] for i in range(0, end, block)]
        assert all(max(a) < min(b) for a, b in itertools.pairwise(blocks))  # left to right
        per_step = Counter(step[:end])
        assert sorted(per_step) == list(range(len(per_step)))  # no step without a token
        if not threshold:
            assert set(per_step.values()) == {L // S}
    assert (ended > 0) == (block < L)
    if threshold:
        revealed = torch.stack([(roll.revealed_at == s).sum(1) for s in range(4)])
        assert len(set(revealed.flatten().tolist())) > 2


def test_the_mask_token_is_never_sampled():
    model = sharp_model()
    model.network.decoder.bias.data[model.mask_id] += 50
    prompt, prompt_mask = padded_prompts(model, G)
    h = model.body(prompt, prompt_mask)
    raw = model.network.decoder(model.network.head(h))
    assert (raw.argmax(-1) == model.mask_id).all()  # the network wants nothing else
    assert (model.head(h)[..., model.mask_id] == -math.inf).all()
    for options in ({}, {"temperature": 0.0}, {"order": "random"}, {"order": "confidence", "threshold": 0.5}):
        roll = rollout(model, guess="greedy", **options)
        assert (roll.completion != model.mask_id).all() and (roll.guess != model.mask_id).all()
        assert roll.logp.isfinite().all() and roll.entropy.isfinite().all()
        assert (roll.entropy < math.log(13) + 1e-6).all()  # 13 tokens are left


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_padding_changes_nothing(dtype, tolerance):
    model = sharp_model(OFTEN, dtype)
    prompt, prompt_mask = padded_prompts(model, 1)
    options = {"L": L, "S": S, "block": BLOCK, "temperature": 0.0}
    padded = denoise(model, prompt, prompt_mask, [], **options)
    no_mask = denoise(model, prompt, torch.ones_like(prompt_mask), [], **options)
    for b in range(len(prompt)):
        short = prompt[b][prompt_mask[b]][None]
        alone = denoise(model, short, torch.ones_like(short) == 1, [], **options)
        assert torch.equal(padded.completion[b], alone.completion[0])
        assert torch.equal(padded.revealed_at[b], alone.revealed_at[0])
        torch.testing.assert_close(padded.logp[b], alone.logp[0], atol=tolerance, rtol=0)
    most_padded = (~prompt_mask).sum(1).argmax()
    assert (padded.logp - no_mask.logp)[most_padded].abs().max() > 0.1  # the attention mask is what does it


@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"order": "confidence", "threshold": 0.5}])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(options):
    model = sharp_model(OFTEN)
    prompt, prompt_mask = padded_prompts(model, G)
    options = {"L": L, "S": S, "block": BLOCK} | options
    together = denoise(model, prompt, prompt_mask, generators(), **options)
    for g in range(3):
        rows = slice(g * G, (g + 1) * G)
        alone = denoise(model, prompt[rows], prompt_mask[rows], generators()[g : g + 1], **options)
        assert torch.equal(together[rows].completion, alone.completion)
        assert torch.equal(together[rows].revealed_at, alone.revealed_at)
        torch.testing.assert_close(together[rows].logp, alone.logp, atol=1e-5, rtol=0)
    last = together.revealed_at.masked_fill(together.revealed_at == together.S, -1).amax(1)
    steps_taken = (last + 1).view(3, G)
    assert (steps_taken != steps_taken[:, :1]).any()  # rows of one group finish apart
    shared = [common.generator("cpu", 0, 0)] * 3  # the tempting way: one generator for the whole batch
    assert not torch.equal(denoise(model, prompt, prompt_mask, shared, **options)[4:8].completion,
                           denoise(model, prompt[4:8], prompt_mask[4:8], shared[:1], **options).completion)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_nfe_counts_rows_and_guesses_are_free(threshold, monkeypatch):
    model = sharp_model(OFTEN)
    seen = record(model, monkeypatch, "body")
    roll = rollout(model, threshold=threshold)
    made, full = nfe(model)
    assert made == sum(len(x) for x in seen)
    at_work = [len(set(row) - {roll.S}) for row in roll.revealed_at.tolist()]
    assert made < full == sum(at_work) < 3 * G * roll.S
    forwards = len(seen)
    with_guess = rollout(model, threshold=threshold, guess="greedy")
    assert nfe(model) == (made, full) and len(seen) == 2 * forwards
    assert torch.equal(with_guess.completion, roll.completion) and torch.equal(with_guess.logp, roll.logp)
    assert roll.guess is None and with_guess.guess.shape == (3 * G, roll.S, L)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_budget_changes_nothing_but_the_size_of_the_forwards(threshold, monkeypatch):
    model = sharp_model(OFTEN)
    whole = rollout(model, threshold=threshold, guess="greedy")
    made = nfe(model)
    prompt, prompt_mask = padded_prompts(model, G)
    assert not prompt_mask.all()
    seen, masks, real = [], [], model.body

    def recording(x, attn):
        seen.append(x)
        masks.append(attn)
        return real(x, attn)

    monkeypatch.setattr(model, "body", recording)
    for budget, groups in [(1, 1), (G * (prompt.shape[1] + L), 1), (2 * G * (prompt.shape[1] + L), 2)]:
        seen.clear()
        masks.clear()
        roll = roll_out(model, prompt, prompt_mask, generators(), L=L, S=S, block=BLOCK, threshold=threshold,
                        guess="greedy", budget=budget)
        assert max(map(len, seen)) == groups * G  # a group is never split, however small the budget
        for field in ("prompt", "prompt_mask", "completion", "revealed_at", "valid", "guess"):
            assert torch.equal(getattr(roll, field), getattr(whole, field)), field
        for field in ("logp", "entropy"):
            torch.testing.assert_close(getattr(roll, field), getattr(whole, field), atol=1e-5, rtol=1e-5)
        assert nfe(model) == made and (roll.S, roll.mask_id) == (whole.S, whole.mask_id)
        if groups == 1:  # each group of one prompt is cut to its own length: nothing to mask
            assert all(mask is None for mask in masks)
            assert len({x.shape[1] for x in seen}) == len(TEXTS)
    options = {"L": L, "S": S, "block": BLOCK, "temperature": 0}
    greedy = (denoise(model, prompt, prompt_mask, [], **options),
              roll_out(model, prompt, prompt_mask, [], **options, budget=60))
    assert torch.equal(greedy[0].completion, greedy[1].completion)
    assert len(seen[-1]) <= 60 // (prompt.shape[1] + L) < G  # without noise rows are on their own


def test_any_end_token_ends_an_answer():
    tokens = torch.tensor([[5, 7, 6, 5], [7, 6, 5, 5], [5, 5, 5, 5], [6, 7, 7, 6]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(common.until_eos(tokens, (7, 6)), expected)
    assert not torch.equal(common.until_eos(tokens, (7,)), expected)
    model = sharp_model()
    model.end_ids = (model.eos_id, 6)  # "2" ends an answer as well: <|eot_id|> beside <|endoftext|>
    roll = rollout(model)
    early = 0
    for row, step in zip(roll.completion.tolist(), roll.revealed_at.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in model.end_ids]
        behind = L if not ends else -(-(ends[0] + 1) // BLOCK) * BLOCK
        assert row[behind:] == [model.eos_id] * (L - behind) and set(step[behind:]) <= {S}
        early += behind < L and row[ends[0]] == 6
    assert early


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_greedy_fill_in_chunks(chunk, monkeypatch):
    model = sharp_model()
    monkeypatch.setattr(common, "LOGITS", chunk * model.V)
    prompt, prompt_mask = padded_prompts(model, G)
    x = torch.randint(4, 14, (3 * G, L), generator=torch.Generator().manual_seed(0))
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = model.mask_id
    h = model.body(torch.cat([prompt, x], 1), common.attention(prompt_mask, L))[:, -L:]
    expected = torch.where(x == model.mask_id, model.head(h).argmax(-1), x)
    seen = record(model, monkeypatch, "head")
    assert torch.equal(common.greedy_fill(model, x, h), expected)
    assert max(len(part) for part in seen) <= chunk


def shifted_stub(shift: bool) -> Denoiser:
    """Like an autoregressive network: position i predicts the token of position i + 1, here digit i + 1."""
    def backbone(x, attention_mask, position_ids):
        following = (torch.arange(x.shape[1]) + 1) % 10
        return SimpleNamespace(last_hidden_state=20.0 * torch.eye(13)[following].expand(len(x), -1, -1))

    cpu = torch.device("cpu")
    network = SimpleNamespace(model=backbone, head=torch.clone, decoder=torch.clone, device=cpu,
                              config=SimpleNamespace(vocab_size=13))
    return Denoiser(network, tokenizer=None, mask_id=12, eos_id=11, pad_id=10, end_ids=(11,), shift=shift)


@pytest.mark.parametrize("order", ["top_prob", "random"])
def test_shift(order):
    prompt = torch.tensor([[0, 1, 2]])
    right = torch.tensor([[3, 4, 5, 6]])
    gens = [common.generator("cpu", 0)]
    options = {"L": 4, "S": 4, "block": 2, "order": order, "guess": "greedy"}
    roll = denoise(shifted_stub(shift=True), prompt, prompt >= 0, gens, **options)
    assert torch.equal(roll.completion, right) and (roll.guess == right[:, None]).all()
    wrong = denoise(shifted_stub(shift=False), prompt, prompt >= 0, gens, **options)
    assert torch.equal(wrong.completion, right + 1)


def test_until_eos_and_rows_of_a_rollout():
    tokens = torch.tensor([[5, 9, 5, 9], [9, 5, 5, 5], [5, 5, 5, 5]])
    assert common.until_eos(tokens, 9).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    roll = rollout(sharp_model(), guess="greedy")
    some = torch.tensor([5, 2])
    for rows in (some, slice(3, 7), torch.arange(12) % 5 == 0):
        part = roll[rows]
        assert torch.equal(part.revealed_at, roll.revealed_at[rows])
        assert torch.equal(part.guess, roll.guess[rows])
        assert (part.S, part.mask_id) == (roll.S, roll.mask_id)


def test_trim_drops_the_columns_that_are_padding_in_every_row():
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()
    x = torch.arange(14).view(2, 7)  # five columns of prompt, two of completion
    shown, shown_mask = common.trim(x, mask)
    assert shown.tolist() == x[:, 2:].tolist() and shown_mask.tolist() == mask[:, 2:].tolist()
    for longest in (torch.ones(2, 5).bool(), mask | torch.tensor([[True], [False]])):  # one row is not padded
        shown, shown_mask = common.trim(x, longest)
        assert torch.equal(shown, x) and torch.equal(shown_mask, longest)
    one_length, whole = common.trim(x, mask[:1].expand(2, -1))
    assert one_length.shape == (2, 5) and whole.all()  # nothing is left to mask
    none = torch.zeros(2, 0, dtype=torch.long)
    assert common.trim(none, none.bool())[0].shape == (2, 0)
