"""The mathematics the four methods share: sampler, scoring, prompts and rewards.

Everything two papers could disagree about is in the method's own file. Here is what must be equal for a
comparison to be fair: 1 legend, 2 model, 3 sampler, 4 scoring, 5 prompts and rewards. Flags, folders and
plots are in run.py, checkpoints of models in models.py, tasks in tasks/.

1 LEGEND
    B rows of a batch = prompts * G, the rows of one prompt adjacent    G samples (a group) per prompt
    P prompt length, left-padded    L completion length    V vocabulary    T temperature
    S denoising steps    n = L / S tokens revealed per step    s one step, 0 first
    K steps of each row an update looks at again    k one of them    M canvases scored in one forward
    update: a rollout and the optimizer steps made on it
    x canvas: prompt and completion with some tokens replaced by the mask token
    hidden (bool): True where the canvas shows the mask token
    valid (bool): True up to and including the first EOS
    NFE: forward evaluations of the network, counted in rows (a batch of 8 rows is 8)

THE ONE PICTURE. A rollout keeps, for every completion position, the denoising step that revealed it:

    completion   3 1 4 2        state before step 0   _ _ _ _      hidden = step >= 0
    step         1 0 1 0        state before step 1   _ 1 _ 2      hidden = step >= 1

So any intermediate state can be rebuilt from the finished row, and no trajectory is ever stored.
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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import parallel
from parallel import refuse as refuse  # all but parallel.py import it from here

LOGITS = 2**26  # most logits made at once while scoring: 256 MiB in fp32


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A private random generator that is a function of `key`, e.g. (seed, "rollout", update, prompt index).

    Nothing else decides a draw: no generator state has to be saved, the global generator is never touched."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------------------------------- 2 model


@dataclass
class Denoiser:
    """A bidirectional network that predicts every masked token at once, and the ids a sampler needs."""

    network: torch.nn.Module  # a stock transformers class, always in eval mode: no dropout
    tokenizer: Callable  # of transformers, too
    mask_id: int
    eos_id: int  # fills what lies behind the end of an answer
    pad_id: int
    end_ids: tuple[int, ...]  # an answer ends with any of these; eos_id is one of them
    shift: bool  # True (Dream): the prediction for position i sits at position i - 1
    forwards: Counter = dataclasses.field(default_factory=Counter)  # "rows" so far, of frozen copies too
    twin: torch.nn.Module | None = None  # of a sharded network, in the same shards, where one will be needed

    def frozen(self) -> "Denoiser":
        """A copy of the network as it is now, to compare with."""
        if self.twin is None:
            return dataclasses.replace(self, network=copy.deepcopy(self.network))
        self.twin.load_state_dict(self.network.state_dict())  # FSDP2 copies no module
        return dataclasses.replace(self, network=self.twin, twin=None)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def V(self) -> int:
        return self.network.config.vocab_size

    def autocast(self):
        """bf16 matrix products on CUDA over fp32 weights; plain fp32 on a CPU.

        No cache of bf16 weights: a forward uses each weight once, so it would only cost memory."""
        on = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16, enabled=on, cache_enabled=False)

    def body(self, x: Tensor, attn: Tensor | None) -> Tensor:
        """Canvas (B, P+L) to hidden states (B, P+L, d) that predict each position; attn False: padding."""
        self.forwards["rows"] += len(x)
        positions = None
        if attn is not None:  # the first real token has position 0, padded or not: RoPE rounds alike in both
            positions = (attn.cumsum(1) - 1).clamp(min=0)
        with self.autocast():
            h = parallel.body(self.network, x, attn, positions)
        return torch.cat([h[:, :1], h[:, :-1]], 1) if self.shift else h

    def head(self, h: Tensor) -> Tensor:
        """Hidden states (..., d) to logits (..., V) in at least fp32, the mask token excluded (-inf).

        No bf16 here: it would round log p by up to 0.05 nats, and the head runs at few positions."""
        net = self.network
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        z = net.lm_head(h) if hasattr(net, "lm_head") else net.decoder(net.head(h))  # else: ModernBERT
        z[..., self.mask_id] = -math.inf
        return z


# -------------------------------------------------------------------------------------------------- 3 sampler


@dataclass
class Rollout:
    """B finished rows and how they came about. Index it with rows (slice, ids, bool) for a smaller one."""

    prompt: Tensor  # (B, P) left-padded
    prompt_mask: Tensor  # (B, P) False = padding
    completion: Tensor  # (B, L) EOS everywhere behind the block that held the first EOS
    step: Tensor  # (B, L) the denoising step that revealed it; S where none did (the tail behind an EOS)
    logp: Tensor  # (B, L) of the token under the distribution it was sampled from; 0 where step == S
    entropy: Tensor  # (B, L) of that distribution, nats
    valid: Tensor  # (B, L) up to and including the first EOS
    guess: Tensor | None  # (B, S, L) greedy one-step completion of the state before each step
    mask_id: int
    S: int
    nfe: int  # canvases evaluated
    nfe_full: int  # the same, had every row been evaluated: the papers' count

    def __getitem__(self, rows) -> "Rollout":
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        """With every tensor changed."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Rollout(**{k: change(v) if isinstance(v, Tensor) else v for k, v in fields.items()})

    @staticmethod
    def join(parts: list["Rollout"]) -> "Rollout":
        """The rows of all parts, which were denoised alike."""
        if len(parts) == 1:
            return parts[0]
        fields = {}
        for f in dataclasses.fields(Rollout):
            values = [getattr(part, f.name) for part in parts]
            fields[f.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
        counts = {name: sum(getattr(part, name) for part in parts) for name in ("nfe", "nfe_full")}
        return Rollout(**fields | counts)


def trim(x: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns that are padding in every row: the group of one prompt then needs no mask at all."""
    start = int((prompt_mask.any(0).cumsum(0) == 0).sum())
    return x[:, start:], prompt_mask[:, start:]


def attention(prompt_mask: Tensor, L: int) -> Tensor | None:
    """(B, P) to (B, P+L) for the network; None when nothing is padded: its fastest kernel."""
    return None if prompt_mask.all() else torch.nn.functional.pad(prompt_mask, (0, L), value=True)


def until_eos(tokens: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """(..., L) tokens to `valid`: True up to and including the first EOS, that is, any of end_ids."""
    eos = torch.isin(tokens, torch.tensor(end_ids, device=tokens.device)).long()
    return eos.cumsum(-1) - eos == 0


def group_noise(gens: list[torch.Generator], B: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float64 noise (B, *shape): each group's from its own generator, for all its rows.

    float64 because Gumbel noise made from bf16 or fp32 uniforms cuts the tail of the distribution off."""
    draw = (B // len(gens), *shape)
    return torch.cat([torch.rand(draw, generator=g, dtype=torch.float64, device=g.device) for g in gens])


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of (R, ...) integers: where each of N stands first (N,), in order; which each row is
    (R,)."""
    found, which = rows.flatten(1).unique(dim=0, return_inverse=True)
    here = torch.arange(len(rows), device=rows.device)
    first, order = here.new_full((len(found),), len(rows)).scatter_reduce(0, which, here, "amin").sort()
    return first, order.argsort()[which]


@torch.no_grad()
def denoise(
    model: Denoiser, prompt: Tensor, prompt_mask: Tensor, gens: list[torch.Generator], *,
    L: int, S: int, block: int, temperature: float = 1.0, order: str = "top_prob",
    threshold: float | None = None, guess: bool = False, budget: int | None = None,
) -> Rollout:
    """Sample completions by iterative unmasking (LLaDA, arXiv 2502.09992), block by block, left to right.

    Each step evaluates the network once, samples a token for every hidden position of a row's current block
    and reveals the n = L/S most confident. Nothing is masked again. A row is done when a finished block holds
    an EOS: what follows becomes EOS with step = S and costs no forward. A group is a tree: its rows start
    from one canvas and part where a sample differs, and each distinct canvas is evaluated once.

    prompt, prompt_mask: (B, P), left-padded. gens: one per group of adjacent rows; may be empty when nothing
    is drawn (temperature 0, order not random). block must divide L, L / block must divide S, S must divide L.
    order: "most confident" is the position of highest probability
        "confidence"  of the token just sampled (LLaDA): the positions depend on the sampled tokens
        "top_prob"    of its most likely token: the positions depend on the state alone
        "random"      positions in random order
    threshold: reveal every position whose probability reaches it, else the single best (Fast-dLLM, arXiv
        2505.22618), instead of n. Rows then take from L / block to L steps, and S is taken to be L. Needs an
        order that has a probability.
    guess: also keep the greedy one-step completion of the state before each step (no extra forward).
    budget: most tokens in one forward; more rows are denoised in parts, each of at least one whole group.
        The ranks share the groups. Without a budget all is denoised here and at once.
    """
    assert order in ("confidence", "top_prob", "random"), order
    assert not (threshold and order == "random"), "a random order has no probability to compare"
    B, G = len(prompt), len(prompt) // (len(gens) or len(prompt))
    if budget:
        each, parts = max(1, budget // (G * (prompt.shape[1] + L))), []  # groups in a part
        mine = parallel.share(B // G)
        todo = mine or range(1)  # fewer groups than ranks: keep the others company with the first
        with parallel.rollout(model):
            one = each >= len(todo)
            for g in tqdm(todo[::each], desc="denoising", unit="part", leave=False, disable=one):
                groups = slice(g, min(g + each, todo.stop))
                part = slice(groups.start * G, groups.stop * G)
                parts.append(denoise(
                    model, prompt[part], prompt_mask[part], gens[groups], L=L, S=S, block=block,
                    temperature=temperature, order=order, threshold=threshold, guess=guess))
        if parallel.world() == 1:
            return Rollout.join(parts)
        shares = parallel.joined([Rollout.join(parts).each(Tensor.cpu)] if mine else [])
        return Rollout.join(shares).each(lambda tensor: tensor.to(prompt.device))
    n, T = L // S, temperature or 1.0  # greedy (T = 0) records the log-probs of T = 1
    S = L if threshold else S
    shown, shown_mask = trim(prompt, prompt_mask)  # what the network sees of the prompt
    P, attn = shown.shape[1], attention(shown_mask, L)
    ends = torch.tensor(model.end_ids, device=prompt.device)
    x = torch.full((B, L), model.mask_id, device=prompt.device)
    step = torch.full_like(x, S)
    logp = torch.zeros(B, L, dtype=torch.float64, device=x.device)
    entropy = torch.zeros_like(logp)
    guesses = torch.full((B, S, L), -1, device=x.device) if guess else None
    first = torch.zeros(B, dtype=torch.long, device=x.device)  # first column of each row's current block
    rows = torch.arange(B, device=x.device)  # rows still at work
    nfe = nfe_full = 0
    for s in range(S):
        if len(rows) == 0:
            break
        which, node = distinct(torch.cat([rows[:, None] // G, x[rows]], 1))  # N canvases; (R,)
        nodes = rows[which]  # (N,) a row at each
        nfe, nfe_full = nfe + len(nodes), nfe_full + len(rows)
        h = model.body(torch.cat([shown[nodes], x[nodes]], 1), None if attn is None else attn[nodes])
        h = h[:, P:]  # (N, L, d)
        if guess:
            guesses[rows, s] = greedy_fill(model, x[nodes], h)[node]
        cols = first[nodes, None] + torch.arange(block, device=x.device)  # (N, block)
        logits = model.head(h.gather(1, cols[..., None].expand(-1, -1, h.shape[-1])))  # (N, block, V)
        logprobs = logits.double().div_(T).log_softmax(-1)
        at_node = torch.broadcast_tensors(node[:, None], torch.arange(block, device=x.device))  # (R, block)
        if temperature:  # Gumbel-max: the argmax of log p + Gumbel noise is a sample from p
            noise = group_noise(gens, B, logits.shape[1:])[rows].log_().neg_().log_()  # minus Gumbel
            token = noise.neg_().add_(logprobs[node]).argmax(-1)  # (R, block)
        else:
            token = logprobs.argmax(-1)[node]
        token_logp = logprobs[*at_node, token]
        if order == "random":
            confidence = group_noise(gens, B, (block,))[rows]
        else:
            confidence = token_logp if order == "confidence" else logprobs.amax(-1)[node]
        cols = cols[node]  # (R, block)
        hidden = x[rows].gather(1, cols) == model.mask_id  # (R, block)
        confidence = confidence.masked_fill(~hidden, -math.inf)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the most confident
        reveal = rank < n
        if threshold:
            reveal = hidden & ((confidence >= math.log(threshold)) | (rank == 0))
        at = rows[:, None].expand_as(cols)[reveal], cols[reveal]
        x[at], step[at], logp[at] = token[reveal], s, token_logp[reveal]
        revealed = logprobs[at_node[0][reveal], at_node[1][reveal]]  # (R * n, V)
        entropy[at] = torch.special.entr(revealed.exp()).sum(-1)  # entr(0) = 0
        block_done = ~(hidden & ~reveal).any(1)
        first[rows] += block * block_done
        done = block_done & ((first[rows] == L) | torch.isin(x[rows], ends).any(1))
        rows = rows[~done]
    x = x.masked_fill(x == model.mask_id, model.eos_id)  # only rows that ended early have masks left
    if guess:  # before a step it never took, a row was complete
        guesses = torch.where(guesses < 0, x[:, None], guesses)
    return Rollout(prompt, prompt_mask, x, step, logp.to(logits.dtype), entropy.to(logits.dtype),
                   until_eos(x, model.end_ids), guesses, model.mask_id, S, nfe, nfe_full)


def greedy_fill(model: Denoiser, x: Tensor, h: Tensor) -> Tensor:
    """Fill each hidden position of x (R, L) with its most likely token, given hidden states h (R, L, d).

    The head runs in parts, so that a real vocabulary never makes (R, L, V) logits."""
    hidden = x == model.mask_id
    filled = x.clone()
    parts = h[hidden].split(max(1, LOGITS // model.V))
    filled[hidden] = torch.cat([model.head(part).argmax(-1) for part in parts])
    return filled


# -------------------------------------------------------------------------------------------------- 4 scoring


def canvas(rollout: Rollout, hidden: Tensor) -> Tensor:
    """The rows of a rollout with the completion positions `hidden` (B, L) masked again: (B, P+L). Or, for K
    canvases of each row, (B, K, L): (B, K, P+L).

    hidden = rollout.step >= s[:, None] is exactly what the sampler saw before step s."""
    prompt, completion = rollout.prompt, rollout.completion
    if hidden.dim() == 3:
        prompt = prompt[:, None].expand(-1, hidden.shape[1], -1)
        completion = completion[:, None]
    return torch.cat([prompt, torch.where(hidden, rollout.mask_id, completion)], -1)


def log_prob(logits: Tensor, at: Tensor, token: Tensor) -> Tensor:
    """log p (m,) of `token` (m,) at row `at` (m,) of logits (D, V), without ever holding (D, V) of them."""
    return logits[at, token] - logits.logsumexp(1)[at]


def score(
    model: Denoiser, x: Tensor, prompt_mask: Tensor, target: Tensor, where: Tensor, temperature: float,
    read: Callable[[Tensor, Tensor, Tensor], Tensor] = log_prob,
) -> Tensor:
    """log p(target | canvas) at the positions `where`, 0 elsewhere: (M, L). One forward.

    x: (M, P+L) canvases, of which each distinct one is evaluated once. target, where: (M, L).
    The distribution is the sampler's: same temperature, no mask token. The head runs once at each scored
    position of a canvas, in parts whose logits backward computes again, so that (M, V) of a real vocabulary
    never live at once. read: a function like log_prob, in its place."""
    L = target.shape[1]
    first, node = distinct(torch.cat([x, prompt_mask], 1))  # N canvases; (M,)
    shown, shown_mask = trim(x[first], prompt_mask[first])
    h = model.body(shown, attention(shown_mask, L))[:, -L:]  # (N, L, d)
    row, col = where.nonzero().T  # (m,)
    place, at = (node[row] * L + col).unique(return_inverse=True)  # D places for the head; (m,) which
    h, token = h.flatten(0, 1)[place], target[where]

    def found_part(h: Tensor, at: Tensor, token: Tensor) -> Tensor:
        return read(model.head(h).div_(temperature or 1.0), at, token)

    size = max(1, LOGITS // model.V)
    if len(h) <= size:
        found = found_part(h, at, token)
    else:
        order = at.argsort()  # tokens in the order of their places, to be split alike
        counts = torch.bincount(at // size).tolist()
        parts = zip(h.split(size), (at[order] % size).split(counts), token[order].split(counts), strict=True)
        again = dict(use_reentrant=False, preserve_rng_state=False)
        found = torch.cat([checkpoint(found_part, *part, **again) for part in parts])[order.argsort()]
    out = found.new_zeros(where.shape)
    out[where] = found
    return out


def micro_batches(pairs: Tensor, x: Tensor, budget: int) -> Iterator[Tensor]:
    """This rank's share of `pairs` (M, 2), a row and one of its canvases x (B, K, ...), split so that one
    forward holds at most `budget` tokens, and at least one canvas. Equal canvases stay together, count once.

    The method calls backward on each part's share of a loss whose normaliser was counted over the whole
    batch, so the gradient depends neither on the budget nor on the ranks, which sum theirs. All ranks get
    the same number of parts, some perhaps of no pair: a loss of 0, whose backward goes along."""
    if len(pairs) == 0:
        return
    canvases = x[pairs[:, 0], pairs[:, 1]].flatten(1)  # (M, tokens)
    first, node = distinct(canvases)
    size, mine = max(1, budget // canvases.shape[1]), parallel.share(len(first))
    for i in range(0, -(-len(first) // parallel.world()), size):
        part = mine[i : i + size]
        yield pairs[(part.start <= node) & (node < part.stop)]


def per_step(values: Tensor, step: Tensor, S: int) -> Tensor:
    """Sum per-token values (B, L) over the tokens each step revealed: (B, S). The tail (step = S) is out."""
    return values.new_zeros(len(values), S + 1).scatter_add(1, step, values)[:, :S]


# -------------------------------------------------------------------------------------- 5 prompts and rewards


@dataclass
class Task:
    """Prompts and the reward of what is answered; its parts always have `correct` and `parse_fail`."""

    train: list[dict]  # each row has "prompt", a user's message, and what the reward reads; may be empty
    test: list[dict]  # held out
    reward: Callable[[str, dict], tuple[float, dict[str, float]]]
    draw: Callable[[str, dict], list[str]]  # a completion as a person would want to see it, line by line
    parallel: bool = False  # the reward waits for other processes: rows may be scored in many threads at once


def draw_prompts(args, count: int, update: int) -> list[int]:
    """Which of `count` prompts an update trains on: an epoch is one permutation, none twice in an update."""
    epoch, batch = divmod(update, count // args.prompts)
    order = torch.randperm(count, generator=generator("cpu", args.seed, "prompts", epoch))
    return order[batch * args.prompts : (batch + 1) * args.prompts].tolist()


def minibatches(args, pairs: Tensor, update: int, epoch: int) -> Iterator[Tensor]:
    """Split `pairs` (M, 2), a row and one more index, into the minibatches of a pass over a rollout: each
    holds all pairs of its groups, and the groups are shuffled anew in every pass. Groups without any pair
    make none: an optimizer step there would be momentum and weight decay alone."""
    gen = generator("cpu", args.seed, "pass", update, epoch)
    shuffle = torch.randperm(args.prompts, generator=gen)
    for groups in shuffle.to(pairs.device).chunk(args.minibatches):
        batch = pairs[torch.isin(pairs[:, 0] // args.G, groups)]
        if len(batch):
            yield batch


def chat_prompt(model: Denoiser, message: str) -> str:
    """A user's message in the model's own chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": message}]
    return model.tokenizer.apply_chat_template(  # enable_thinking: Qwen3's; other templates do not read it
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def encode(model: Denoiser, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts to left-padded ids (B, P) and their mask (B, P), False = padding. Nothing is ever cut.

    A model with a chat template is asked in it: the one place, for training and evaluation alike."""
    if model.tokenizer.chat_template:
        texts = [chat_prompt(model, text) for text in texts]
    ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    P = max(map(len, ids))
    tokens = torch.tensor([[model.pad_id] * (P - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in ids], device=model.device)
    return tokens, mask


def reward_rows(
    model: Denoiser, task: Task, tokens: Tensor, rows: list[dict]
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Rewards (B,), their parts (B,) and the texts, of completions (B, L) that answer `rows`."""
    valid = until_eos(tokens, model.end_ids).tolist()
    ids = [list(itertools.compress(*pair)) for pair in zip(tokens.tolist(), valid, strict=True)]
    texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    mine = [(texts[i], rows[i]) for i in parallel.share(len(rows))]
    if task.parallel:  # the reward waits for other processes
        with ThreadPoolExecutor(max(1, 4 * os.cpu_count() // parallel.on_this_machine())) as pool:
            scored = list(pool.map(lambda pair: task.reward(*pair), mine))
    else:
        scored = [task.reward(*pair) for pair in mine]
    scored = parallel.joined(scored)
    parts = {k: torch.tensor([p[k] for _, p in scored]) for k in scored[0][1]}
    return torch.tensor([total for total, _ in scored], device=tokens.device), parts, texts


def rollout_metrics(roll: Rollout, reward: Tensor, parts: dict[str, Tensor], G: int) -> dict:
    """What every method logs of a rollout."""
    groups = reward.view(-1, G)
    return {
        "reward": reward.mean().item(),
        **{f"reward_{name}": values.mean().item() for name, values in parts.items()},
        "equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        "entropy": roll.entropy[roll.valid].mean().item(),
        "length": roll.valid.sum(1).float().mean().item(),
    }


# --------------------------------------------------------------------------- rewards of the two tiny tasks


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
