"""What the methods share: the sampler, how a canvas is scored, prompts, rewards, and the loop around it all.

What a method alone does is in its own file. Here is what must be equal for a comparison to be fair. This file
imports nothing of ours: copy it together with a method's file, and the method runs in your project. In order:
1 legend, 2 model, 3 sampler, 4 scoring, 5 prompts and rewards, 6 run.

1 LEGEND
    B rows of a batch = prompts * G, the rows of one prompt adjacent    G samples (a group) per prompt
    P prompt length, left-padded    L completion length    V vocabulary    T temperature
    S denoising steps    n = L / S tokens revealed in each    s one step, counted from 0
    K steps of each row that an update looks at again    k one of them
    pair: a row and the number of what is scored for it, mostly one of its canvases    M pairs
    update: one rollout and the optimizer steps made on it    pass: all pairs of a rollout once
    minibatch: the groups of one optimizer step    micro-batch: the pairs of one forward and backward
    x canvas: prompt and completion, with some tokens replaced by the mask token
    hidden (bool): True where the canvas shows the mask token
    valid (bool): True up to and including the first EOS
    NFE: number of forward evaluations of the network; a batch of 8 canvases counts as 8

THE ONE PICTURE. A rollout keeps, for every position of the completion, the denoising step that revealed it:

    completion    3 1 4 2       state before step 0   _ _ _ _      hidden = revealed_at >= 0
    revealed_at   1 0 1 0       state before step 1   _ 1 _ 2      hidden = revealed_at >= 1

So every intermediate state can be rebuilt from the finished row, and no canvas has to be stored.
"""

import ast
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import math
import operator
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

LOGITS = 2**26  # the most logits that scoring makes at once: 256 MiB in fp32


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A private random generator that depends on `key` alone, e.g. (seed, "rollout", update, prompt index).

    So no generator state has to be saved, and the global generator is never touched. The same key gives the
    same numbers on every CPU; on CUDA they depend on the card."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------------------------------- 2 model


@dataclass
class Denoiser:
    """A bidirectional network that predicts every masked token at once, and the token ids a sampler needs."""

    network: torch.nn.Module  # a stock transformers class in eval mode: dropout would change log p
    tokenizer: Callable  # a transformers tokenizer
    mask_id: int
    eos_id: int  # fills the positions behind the end of an answer
    pad_id: int
    end_ids: tuple[int, ...]  # an answer ends with any of these; eos_id is one of them
    shift: bool = False  # True (Dream): the prediction for position i sits at position i - 1
    excluded: tuple[int, ...] = ()  # ids that are no token of the tokenizer: never predicted, like the mask
    bf16: bool = False  # bf16 matrix products on a CPU, too; on CUDA they always are in bf16
    counts: Counter = dataclasses.field(default_factory=Counter)  # NFE and seconds so far, frozen copies' too

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def V(self) -> int:
        return self.network.config.vocab_size

    def frozen(self) -> "Denoiser":
        """A copy of the network as it is now, to compare with."""
        return dataclasses.replace(self, network=copy.deepcopy(self.network))

    def autocast(self):
        """bf16 matrix products over fp32 weights, on CUDA and where `bf16` asks for them; else plain fp32.

        bf16 copies of the weights are not cached: a forward uses each weight once, so a cache would only
        cost memory."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bf16 or kind == "cuda", cache_enabled=False)

    def body(self, x: Tensor, attn: Tensor | None) -> Tensor:
        """Canvases (B, P+L) to the hidden states (B, P+L, d) that predict each position.

        attn (B, P+L) is False at padding; None where nothing is padded."""
        positions = None
        if attn is not None:  # the first real token has position 0, padded or not: RoPE then rounds alike
            positions = (attn.cumsum(1) - 1).clamp(min=0)
        with self.autocast():
            h = self.last_hidden_state(x, attn, positions)
        return torch.cat([h[:, :1], h[:, :-1]], 1) if self.shift else h

    def last_hidden_state(self, x: Tensor, attn: Tensor | None, positions: Tensor | None) -> Tensor:
        """The transformers model without its head."""
        return self.network.model(x, attention_mask=attn, position_ids=positions).last_hidden_state

    def head(self, h: Tensor) -> Tensor:
        """Hidden states (..., d) to logits (..., V) in at least fp32; -inf at the mask token and `excluded`.

        The head does not run in bf16: that would round log p by up to 0.05 nats."""
        net = self.network
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        z = net.lm_head(h) if hasattr(net, "lm_head") else net.decoder(net.head(h))  # else: ModernBERT
        never = torch.tensor((self.mask_id, *self.excluded), device=z.device)
        return z.index_fill_(-1, never, -math.inf)

    def clip_gradient(self, max_norm: float) -> float:
        """Scale the gradient down to max_norm if it is longer; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), max_norm).item()

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to counts."""
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.counts[f"seconds_{phase}"] += time.perf_counter() - begin

    # Hooks for several processes (plumbing/parallel.py). Every process holds the whole batch and works on a
    # share of it. Alone, a process's share is everything and there is nobody to exchange with.

    processes = 1

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this process's."""
        return range(count)

    def gather(self, items: list) -> list:
        """The lists of all processes, one behind the other."""
        return items

    def total(self, values):
        """The sum over all processes, of a number, a dict of numbers or a tensor."""
        return values

    def rolling_out(self):
        """A context in which the processes may make different numbers of forwards."""
        return contextlib.nullcontext()


# -------------------------------------------------------------------------------------------------- 3 sampler


@dataclass
class Rollout:
    """B finished rows and how they came about. Index it with rows (slice, ids, bool) for a smaller one."""

    prompt: Tensor  # (B, P) left-padded
    prompt_mask: Tensor  # (B, P) False = padding
    completion: Tensor  # (B, L) EOS everywhere behind the block that held the first EOS
    revealed_at: Tensor  # (B, L) the denoising step that revealed it; S where none did (blocks behind an EOS)
    logp: Tensor  # (B, L) of the token, in the distribution it was sampled from; 0 where revealed_at == S
    entropy: Tensor  # (B, L) of that distribution, in nats
    valid: Tensor  # (B, L) True up to and including the first EOS
    guess: Tensor | None  # (B, S, L) one-step completion of the state before each step
    mask_id: int
    S: int

    def __getitem__(self, rows) -> "Rollout":
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        """The same rollout with every tensor changed."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Rollout(**{k: change(v) if isinstance(v, Tensor) else v for k, v in fields.items()})

    @staticmethod
    def join(rollouts: list["Rollout"]) -> "Rollout":
        """The rows of all of them, which were denoised with the same settings."""
        fields = {}
        for f in dataclasses.fields(Rollout):
            values = [getattr(rollout, f.name) for rollout in rollouts]
            fields[f.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
        return Rollout(**fields)


def trim(x: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns that are padding in every row. The group of one prompt then needs no mask at all."""
    start = int((prompt_mask.any(0).cumsum(0) == 0).sum())
    return x[:, start:], prompt_mask[:, start:]


def attention(prompt_mask: Tensor, L: int) -> Tensor | None:
    """The network's mask (B, P+L) for prompt_mask (B, P). None when nothing is padded: its fastest kernel."""
    return None if prompt_mask.all() else torch.nn.functional.pad(prompt_mask, (0, L), value=True)


def until_eos(tokens: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """`valid` of tokens (..., L): True up to and including the first of end_ids."""
    eos = torch.isin(tokens, torch.tensor(end_ids, device=tokens.device)).long()
    return eos.cumsum(-1) - eos == 0


def group_noise(gens: list[torch.Generator], B: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float64 noise (B, *shape): each group's from its own generator, for all of its rows.

    float64, because Gumbel noise made from bf16 or fp32 uniforms cuts the tail of the distribution off."""
    draw = (B // len(gens), *shape)
    return torch.cat([torch.rand(draw, generator=g, dtype=torch.float64, device=g.device) for g in gens])


def gumbel_noise(gens: list[torch.Generator], B: int, shape: tuple[int, ...]) -> Tensor:
    """-log(-log u) of uniform noise u. In place, since it is as large as the logits."""
    return group_noise(gens, B, shape).log_().neg_().log_().neg_()


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (M, ...) of integers: the index of each distinct row's first copy (N,), in increasing order;
    and for every row, which of the distinct rows it is (M,)."""
    found, which = rows.flatten(1).unique(dim=0, return_inverse=True)
    index = torch.arange(len(rows), device=rows.device)
    first, order = index.new_full((len(found),), len(rows)).scatter_reduce(0, which, index, "amin").sort()
    return first, order.argsort()[which]


@torch.no_grad()
def denoise(
    model: Denoiser, prompt: Tensor, prompt_mask: Tensor, gens: list[torch.Generator], *,
    L: int, S: int, block: int, temperature: float = 1.0, order: str = "top_prob",
    threshold: float | None = None, guess: str | None = None,
) -> Rollout:
    """Sample completions by iterative unmasking (LLaDA, arXiv 2502.09992), block by block, left to right.

    Each step samples a token for every hidden position of a row's current block and reveals the n = L/S most
    certain ones. Nothing is masked again. A row is done when a finished block holds an EOS: what follows
    becomes EOS with revealed_at = S and costs no forward. A group is a tree: its rows start from one canvas
    and part where a sample differs, and each distinct canvas is evaluated once.

    prompt, prompt_mask: (B, P), left-padded. gens: one for each group of adjacent rows; may be empty if
    nothing is drawn (temperature 0 and an order that is not random). AssertionError unless block divides L,
    L / block divides S, and S divides L.
    order: the most certain positions are those of the highest probability
        "confidence"  of the token just sampled (LLaDA): the positions then depend on the sampled tokens
        "top_prob"    of the most likely token: the positions depend on the state alone
        "random"      positions in random order
    threshold: in place of n positions, reveal every position whose probability reaches it, or else the single
        best one (Fast-dLLM, arXiv 2505.22618). Rows then take from L / block to L steps, and S is taken to be
        L. Not for a random order, which has no probability.
    guess: also keep a one-step completion of the state before each step. It needs no more forwards, and what
    the rollout samples does not depend on it. Every hidden position gets
        "greedy"      its most likely token
        "sampled"     a token sampled at the temperature; in the current block the one that the step itself
                      sampled there, so the completion contains what the step reveals
    At temperature 0 both are the same.
    """
    assert order in ("confidence", "top_prob", "random"), order
    assert guess in (None, "greedy", "sampled"), guess
    assert L % block == 0 and L % S == 0 and S % (L // block) == 0, f"L {L}, S {S}, block {block} do not fit"
    assert not (threshold and order == "random"), "a random order has no probability to compare"
    n, T = L // S, temperature or 1.0  # greedy decoding (temperature 0) records the log-probs of T = 1
    S = L if threshold else S
    B, G = len(prompt), len(prompt) // (len(gens) or len(prompt))
    shown, shown_mask = trim(prompt, prompt_mask)  # what the network sees of the prompt
    P, attn = shown.shape[1], attention(shown_mask, L)
    device = prompt.device
    ends = torch.tensor(model.end_ids, device=device)
    completion = torch.full((B, L), model.mask_id, device=device)
    revealed_at = torch.full_like(completion, S)
    logp = torch.zeros(B, L, dtype=torch.float64, device=device)
    entropy = torch.zeros_like(logp)
    guesses = torch.full((B, S, L), -1, device=device) if guess else None
    if guess == "sampled" and temperature == 0:
        guess = "greedy"
    if guess == "sampled":  # generators of their own, so that guesses do not change what the rollout samples
        guess_gens = [generator(gen.device, gen.initial_seed(), "guess") for gen in gens]
    start = torch.zeros(B, dtype=torch.long, device=device)  # first column of each row's current block
    rows = torch.arange(B, device=device)  # the U unfinished rows

    for s in range(S):
        if len(rows) == 0:
            break
        # Evaluate each distinct canvas of a group once: N canvases for U rows.
        first, canvas_of = distinct(torch.cat([rows[:, None] // G, completion[rows]], 1))  # (N,), (U,)
        one = rows[first]  # (N,) a row that stands on each canvas
        h = model.body(torch.cat([shown[one], completion[one]], 1), None if attn is None else attn[one])
        h = h[:, P:]  # (N, L, d)
        model.counts["nfe_rollout"] += len(one)
        model.counts["nfe_rollout_full"] += len(rows)  # what the papers count
        if guess == "greedy":
            guesses[rows, s] = greedy_fill(model, completion[one], h)[canvas_of]

        # Give every row the distribution of each position of its block.
        cols = start[one, None] + torch.arange(block, device=device)  # (N, block)
        logits = model.head(h.gather(1, cols[..., None].expand(-1, -1, h.shape[-1])))  # (N, block, V)
        logprobs = logits.double().div_(T).log_softmax(-1)[canvas_of]  # (U, block, V)
        cols = cols[canvas_of]  # (U, block)
        hidden = completion[rows].gather(1, cols) == model.mask_id  # (U, block)

        # Sample a token for each position: the argmax of log p + Gumbel noise is a sample from p.
        if temperature:
            token = gumbel_noise(gens, B, logprobs.shape[1:])[rows].add_(logprobs).argmax(-1)  # (U, block)
        else:
            token = logprobs.argmax(-1)
        token_logp = logprobs.gather(-1, token[..., None])[..., 0]
        if guess == "sampled":
            seen = completion[rows]
            seen.scatter_(1, cols, torch.where(hidden, token, seen.gather(1, cols)))
            noise = group_noise(guess_gens, B, (L,))[rows]
            guesses[rows, s] = sampled_fill(model, seen, h, canvas_of, temperature, noise)

        # Rank the hidden positions by how certain they are. Rank 0 is the most certain.
        if order == "random":
            certainty = group_noise(gens, B, (block,))[rows]
        else:
            certainty = token_logp if order == "confidence" else logprobs.amax(-1)
        certainty = certainty.masked_fill(~hidden, -math.inf)
        rank = certainty.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # inverse of the first

        # Reveal the n most certain ones, or all that reach the threshold.
        reveal = rank < n
        if threshold:
            reveal = hidden & ((certainty >= math.log(threshold)) | (rank == 0))
        at = rows[:, None].expand_as(cols)[reveal], cols[reveal]
        completion[at], revealed_at[at], logp[at] = token[reveal], s, token_logp[reveal]
        entropy[at] = torch.special.entr(logprobs[reveal].exp()).sum(-1)  # entr(0) = 0

        # Go on to the next block. A row is done after its last one, or when it has written an EOS.
        block_done = ~(hidden & ~reveal).any(1)
        start[rows] += block * block_done
        ended = torch.isin(completion[rows], ends).any(1)
        rows = rows[~(block_done & ((start[rows] == L) | ended))]

    # Only rows that an EOS ended have masks left.
    completion = completion.masked_fill(completion == model.mask_id, model.eos_id)
    if guess:  # a row was complete before a step that it never took
        guesses = torch.where(guesses < 0, completion[:, None], guesses)
    return Rollout(prompt, prompt_mask, completion, revealed_at, logp.to(logits.dtype),
                   entropy.to(logits.dtype), until_eos(completion, model.end_ids), guesses, model.mask_id, S)


def greedy_fill(model: Denoiser, tokens: Tensor, h: Tensor) -> Tensor:
    """Fill each hidden position of tokens (N, L) with its most likely token. h: hidden states (N, L, d).

    The head runs in parts, so that a real vocabulary never makes (N, L, V) logits."""
    hidden = tokens == model.mask_id
    filled = tokens.clone()
    parts = h[hidden].split(max(1, LOGITS // model.V))
    filled[hidden] = torch.cat([model.head(part).argmax(-1) for part in parts])
    return filled


def sampled_fill(
    model: Denoiser, tokens: Tensor, h: Tensor, canvas_of: Tensor, temperature: float, noise: Tensor
) -> Tensor:
    """Fill each hidden position of tokens (U, L) with a sample from its own distribution.

    h (N, L, d) are the hidden states of N canvases; canvas_of (U,) says which of them each row stands on.
    noise (U, L), uniform: the token is the first at which the cumulated probability exceeds the number. So a
    position needs one random number, not V of them. The head runs in parts, an eighth of what scoring takes
    at once: beside the logits there are three tensors of float64."""
    filled, size = tokens.clone(), max(1, LOGITS // (8 * model.V))
    for at in (tokens == model.mask_id).nonzero().split(size):
        row, col = at.T  # (m,)
        logits = model.head(h[canvas_of[row], col])  # (m, V)
        cumulated = logits.double().div_(temperature).softmax(-1).cumsum_(-1)
        cumulated = cumulated / cumulated[:, -1:]  # ends at exactly 1, which no number reaches
        filled[row, col] = torch.searchsorted(cumulated, noise[row, col, None], right=True)[:, 0]
    return filled


def roll_out(
    model: Denoiser, prompt: Tensor, prompt_mask: Tensor, gens: list[torch.Generator], *,
    budget: int, L: int, **sampling,
) -> Rollout:
    """denoise() for any number of rows: in parts of whole groups, and shared by the processes.

    budget: the most tokens in one forward. A part has at least one group. What is sampled depends neither on
    the budget nor on the number of processes."""
    G = len(prompt) // (len(gens) or len(prompt))
    groups_at_once = max(1, budget // (G * (prompt.shape[1] + L)))
    own = model.share(len(prompt) // G)
    todo = own or range(1)  # fewer groups than processes: keep the others company with the first group
    rollouts = []
    with model.timed("rollout"), model.rolling_out():
        for g in tqdm(todo[::groups_at_once], desc="denoising", unit="part", leave=False,
                      disable=len(todo) <= groups_at_once):
            end = min(g + groups_at_once, todo.stop)
            rows = slice(g * G, end * G)
            rollouts.append(denoise(model, prompt[rows], prompt_mask[rows], gens[g:end], L=L, **sampling))
    if model.processes == 1:
        return Rollout.join(rollouts)
    shares = model.gather([Rollout.join(rollouts).each(Tensor.cpu)] if own else [])
    return Rollout.join(shares).each(lambda tensor: tensor.to(prompt.device))


# -------------------------------------------------------------------------------------------------- 4 scoring


def canvas(rollout: Rollout, hidden: Tensor) -> Tensor:
    """The rows of a rollout with the completion positions `hidden` (B, L) masked again: (B, P+L). For K
    canvases of each row, hidden (B, K, L), it is (B, K, P+L).

    hidden = revealed_at >= s[:, None] gives exactly what the sampler saw before step s."""
    prompt, completion = rollout.prompt, rollout.completion
    if hidden.dim() == 3:
        prompt = prompt[:, None].expand(-1, hidden.shape[1], -1)
        completion = completion[:, None]
    return torch.cat([prompt, torch.where(hidden, rollout.mask_id, completion)], -1)


def log_prob(logits: Tensor, at: Tensor, token: Tensor) -> Tensor:
    """log p (m,) of `token` (m,) at row `at` (m,) of logits (D, V), without making (D, V) log-probs."""
    return logits[at, token] - logits.logsumexp(1)[at]


def score(
    model: Denoiser, x: Tensor, prompt_mask: Tensor, target: Tensor, where: Tensor, temperature: float,
    read_out: Callable[[Tensor, Tensor, Tensor], Tensor] = log_prob,
) -> Tensor:
    """log p(target | canvas) at the positions `where`, 0 elsewhere: (M, L). One forward.

    x: (M, P+L) canvases, of which each distinct one is evaluated once. target, where: (M, L).
    The distribution is the sampler's: the same temperature, no mask token. The head runs once at each scored
    position of a canvas. It runs in parts whose logits backward computes again, so that (M, V) logits of a
    real vocabulary never exist at once. read_out: what to read from the logits in place of log_prob; if it
    reads C numbers of each token, (m, C), the result is (M, L, C)."""
    L = target.shape[1]
    first, canvas_of = distinct(torch.cat([x, prompt_mask], 1))  # N canvases; (M,)
    shown, shown_mask = trim(x[first], prompt_mask[first])
    h = model.body(shown, attention(shown_mask, L))[:, -L:]  # (N, L, d)
    model.counts["nfe_update"] += len(first)
    model.counts["nfe_update_full"] += len(x)  # what the papers count
    row, col = where.nonzero().T  # (m,) the scored tokens
    place, at = (canvas_of[row] * L + col).unique(return_inverse=True)  # D places for the head; (m,) which
    h, token = h.flatten(0, 1)[place], target[where]

    def read_part(h: Tensor, at: Tensor, token: Tensor) -> Tensor:
        return read_out(model.head(h).div_(temperature or 1.0), at, token)

    size = max(1, LOGITS // model.V)
    if len(h) <= size:
        found = read_part(h, at, token)
    else:
        order = at.argsort()  # tokens in the order of their places, so that both can be split alike
        counts = torch.bincount(at // size).tolist()
        parts = zip(h.split(size), (at[order] % size).split(counts), token[order].split(counts), strict=True)
        again = dict(use_reentrant=False, preserve_rng_state=False)
        found = torch.cat([checkpoint(read_part, *part, **again) for part in parts])[order.argsort()]
    out = found.new_zeros(where.shape + found.shape[1:])
    out[where] = found
    return out


def worth_scoring(model: Denoiser, pairs: Tensor, moves: Tensor, times: int) -> Tensor:
    """Those of `pairs` (M, 2) whose loss can move a weight, which is where moves (M,) is True.

    The others are not evaluated. They are counted as in the papers' code: `times` forwards each."""
    model.counts["nfe_update_full"] += len(model.share(len(pairs) - int(moves.sum()))) * times
    return pairs[moves]


def minibatches(pairs: Tensor, prompts: int, G: int, count: int, gen: torch.Generator) -> Iterator[Tensor]:
    """Split `pairs` (M, 2), a row and one of its canvases, into `count` minibatches of a pass over a rollout.

    A minibatch holds all pairs of its groups, of which there are prompts / count, drawn by gen (on the CPU).
    A minibatch without any pair is left out: an optimizer step there would be momentum and weight decay
    alone. AssertionError for G below 2, since an advantage compares the samples of one prompt, and unless
    count divides prompts, since the normalisers of the methods need equal parts."""
    assert G >= 2, f"groups of {G} have nothing to compare"
    assert prompts % count == 0, f"{count} minibatches do not divide {prompts} prompts: groups stay whole"
    for groups in torch.randperm(prompts, generator=gen).to(pairs.device).chunk(count):
        batch = pairs[torch.isin(pairs[:, 0] // G, groups)]
        if len(batch):
            yield batch


def micro_batches(model: Denoiser, pairs: Tensor, x: Tensor, budget: int) -> Iterator[Tensor]:
    """Split this process's share of `pairs` (M, 2), a row and one of its canvases x (B, K, ...), so that one
    forward holds at most `budget` tokens, and at least one canvas. Equal canvases stay together and count
    once.

    The method calls backward on each micro-batch's share of a loss whose normaliser was counted over the
    whole minibatch. So the gradient depends neither on the budget nor on the number of processes, which add
    up their gradients. A process without work gets an empty micro-batch, because all must call backward
    equally often."""
    if len(pairs) == 0:
        return
    canvases = x[pairs[:, 0], pairs[:, 1]].flatten(1)  # (M, tokens)
    first, canvas_of = distinct(canvases)
    size, own = max(1, budget // canvases.shape[1]), model.share(len(first))
    for i in range(0, math.ceil(len(first) / model.processes), size):
        part = own[i : i + size]
        yield pairs[(part.start <= canvas_of) & (canvas_of < part.stop)]


def per_step(values: Tensor, revealed_at: Tensor, S: int) -> Tensor:
    """Sum values (B, L) over the tokens that each step revealed: (B, S). What no step revealed is left out.

    On the CPU: CUDA adds in any order, so processes would differ in the last bit and choose other steps."""
    sums = torch.zeros(len(values), S + 1, dtype=values.dtype)
    return sums.scatter_add(1, revealed_at.cpu(), values.cpu())[:, :S].to(values.device)


# -------------------------------------------------------------------------------------- 5 prompts and rewards


@dataclass
class Task:
    """Prompts, and the reward of an answer. The parts of a reward always have `correct` and `parse_fail`."""

    train: list[dict]  # each row has "prompt", a user's message, and what the reward reads; may be empty
    test: list[dict]  # held out
    reward: Callable[[str, dict], tuple[float, dict[str, float]]]
    draw: Callable[[str, dict], list[str]]  # an answer as a person would want to see it, line by line
    parallel: bool = False  # the reward waits for other processes: rows may be scored in many threads at once


def draw_prompts(count: int, prompts: int, seed: int, update: int) -> list[int]:
    """Which of `count` prompts an update trains on. An epoch is one permutation: none twice in an update."""
    epoch, batch = divmod(update, count // prompts)
    order = torch.randperm(count, generator=generator("cpu", seed, "prompts", epoch))
    return order[batch * prompts : (batch + 1) * prompts].tolist()


def chat_prompt(model: Denoiser, message: str) -> str:
    """A user's message in the model's own chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": message}]
    return model.tokenizer.apply_chat_template(  # enable_thinking is Qwen3's; other templates do not read it
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def encode(model: Denoiser, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts to left-padded ids (B, P) and their mask (B, P), False = padding. Nothing is ever cut.

    A model with a chat template is asked in it, in training and in evaluation."""
    if model.tokenizer.chat_template:
        texts = [chat_prompt(model, text) for text in texts]
    ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    P = max(map(len, ids))
    tokens = torch.tensor([[model.pad_id] * (P - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in ids], device=model.device)
    return tokens, mask


def answer_texts(model: Denoiser, tokens: Tensor) -> list[str]:
    """The texts of completions (B, L), each up to the token that ends it.

    All other special tokens stay visible. Left out, they would join what they separate: 1<|x|>8 is not 18."""
    ids = [list(itertools.takewhile(lambda token: token not in model.end_ids, row))
           for row in tokens.tolist()]
    return model.tokenizer.batch_decode(ids)


def reward_rows(
    model: Denoiser, task: Task, tokens: Tensor, rows: list[dict]
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Rewards (B,), their parts (B,) and the texts, of completions (B, L) that answer `rows`."""
    with model.timed("reward"):
        texts = answer_texts(model, tokens)
        own = [(texts[i], rows[i]) for i in model.share(len(rows))]
        if task.parallel:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
            with ThreadPoolExecutor(max(1, 4 * os.cpu_count() // here)) as pool:
                scored = list(pool.map(lambda pair: task.reward(*pair), own))
        else:
            scored = [task.reward(*pair) for pair in own]
        scored = model.gather(scored)
    parts = {k: torch.tensor([float(p[k]) for _, p in scored]) for k in scored[0][1]}
    return torch.tensor([float(reward) for reward, _ in scored], device=tokens.device), parts, texts


def rollout_metrics(roll: Rollout, reward: Tensor, parts: dict[str, Tensor], G: int) -> dict[str, float]:
    """What every method logs of a rollout."""
    groups = reward.view(-1, G)
    return {
        "reward": reward.mean().item(),
        **{f"reward_{name}": values.mean().item() for name, values in parts.items()},
        "equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        "entropy": roll.entropy[roll.valid].mean().item(),
        "length": roll.valid.sum(1).float().mean().item(),
    }


ROWS = [range(4 * r, 4 * r + 4) for r in range(4)]
COLUMNS = [range(c, 16, 4) for c in range(4)]
BOXES = [[4 * r + c, 4 * r + c + 1, 4 * r + c + 4, 4 * r + c + 5] for r in (0, 2) for c in (0, 2)]


def sudoku_solved(board: str) -> bool:
    """Whether every row, column and box of a board of 16 characters holds 1, 2, 3 and 4."""
    return all({board[i] for i in unit} == set("1234") for unit in (*ROWS, *COLUMNS, *BOXES))


def sudoku_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """1 for a board that keeps the clues and obeys the rules, be it the row's solution or another; else the
    share of the blanks filled as in the solution. 0 if a clue was changed or there are not exactly 16 digits.

    White space is ignored, so a board may be written as a grid."""
    board, puzzle = "".join(text.split()), row["puzzle"]
    if len(board) != 16 or not (board.isascii() and board.isdigit()):
        return 0.0, {"correct": 0.0, "parse_fail": 1.0}
    if any(p not in ("0", b) for p, b in zip(puzzle, board, strict=True)):
        return 0.0, {"correct": 0.0, "parse_fail": 0.0}
    if sudoku_solved(board):
        return 1.0, {"correct": 1.0, "parse_fail": 0.0}
    right = sum(p == "0" and b == s for p, b, s in zip(puzzle, board, row["solution"], strict=True))
    return right / puzzle.count("0"), {"correct": 0.0, "parse_fail": 0.0}


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def without_result(text: str) -> str:
    """An expression without the value it says it has: "30 - 7" of "30 - 7 = 23"."""
    return re.sub(r" ?= ?-?[0-9.]+$", "", " ".join(text.split()))


def countdown_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    """1 for an expression that hits the target, 0.1 for one over exactly the given numbers that misses it (or
    divides by zero), else 0. Only integers and binary + - * /: not 2**4, 7//2 or -3."""
    expression = without_result(text)
    nodes = []
    if len(expression) <= 200 and re.fullmatch(r"[0-9+\-*/() ]+", expression):  # "0x1e" is no number here
        with contextlib.suppress(SyntaxError, RecursionError, MemoryError):  # the latter: deep parentheses
            nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    if not nodes:
        return 0.0, {"correct": 0.0, "parse_fail": 1.0}
    used = sorted(node.value for node in nodes if isinstance(node, ast.Constant))
    allowed = {ast.Expression, ast.BinOp, ast.Constant, *OPERATORS}
    if not {type(node) for node in nodes} <= allowed or used != sorted(row["numbers"]):
        return 0.0, {"correct": 0.0, "parse_fail": 0.0}
    correct = 0.0
    with contextlib.suppress(ZeroDivisionError):
        correct = float(value_of(nodes[0].body) == int(row["answer"]))
    return max(correct, 0.1), {"correct": correct, "parse_fail": 0.0}


def value_of(node: ast.expr) -> Fraction:
    """The exact value of a tree of OPERATORS over integers."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))


# ------------------------------------------------------------------------------------------------------ 6 run


def step_means(infos: list[dict[str, float]]) -> dict[str, float]:
    """The means over the optimizer steps of an update; zeros if nothing could move a weight."""
    infos = infos or [{"loss": 0.0, "grad_norm": 0.0}]
    return {k: sum(info[k] for info in infos) / len(infos) for k in infos[0]}


class Run:
    """The loop around a method: its updates, the optimizer's steps, and a line about each update.

    plumbing/run.py extends it with a folder, checkpoints and evaluation."""

    def __init__(self, updates: int):
        self.wanted = updates
        self.counters = Counter()  # what a method adds up over the whole run

    def updates(self, model: Denoiser, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """Yield 0, 1, ... once for each update that the method is to make."""
        self.model, self.optimizer, self.lr = model, optimizer, optimizer.param_groups[0]["lr"]
        for update in range(self.wanted):
            self.update = update
            yield update

    def step(self, loss: float, max_grad_norm: float, warmup: int = 0) -> float:
        """Clip the gradient and make one optimizer step; returns the gradient's norm before clipping.

        Over the first `warmup` steps the learning rate rises to its value. No step is made if the loss or the
        norm is not finite."""
        norm = self.model.clip_gradient(max_grad_norm)
        if math.isfinite(norm) and math.isfinite(loss):
            self.counters["optimizer_steps"] += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, self.counters["optimizer_steps"] / max(1, warmup))
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def log(self, metrics: dict[str, float], infos: list[dict[str, float]]):
        """Print a line: metrics of its rollout, and the means of infos, one for each optimizer step."""
        metrics = metrics | step_means(infos)
        print(f"update {self.update + 1}:", *(f"{k} {v:.4g}" for k, v in metrics.items()))
