"""What the four methods share: sampler, scoring, prompts and rewards, evaluation, runs.

Everything two papers could disagree about is in the method's own file. Here is what must be equal for a
comparison to be fair: 1 legend, 2 sampler, 3 scoring, 4 prompts and rewards, 5 runs. The model itself (a
network with its special tokens, from a checkpoint) is in models.py, the tasks are in tasks.py.

1 LEGEND
    B rows of a batch = prompts * G, the rows of one prompt adjacent    G samples (a group) per prompt
    P prompt length, left-padded    L completion length    V vocabulary    T temperature
    S denoising steps    n = L / S tokens revealed per step    s one step, 0 first
    x canvas: prompt and completion with some tokens replaced by the mask token
    hidden (bool): True where the canvas shows the mask token
    valid (bool): True up to and including the first EOS
    NFE: forward evaluations of the network, counted in rows (a batch of 8 rows is 8)

THE ONE PICTURE. A rollout keeps, for every completion position, the denoising step that revealed it:

    completion   3 1 4 2        state before step 0   _ _ _ _      hidden = step >= 0
    step         1 0 1 0        state before step 1   _ 1 _ 2      hidden = step >= 1

So any intermediate state can be rebuilt from the finished row, and no trajectory is ever stored.
"""

import ctypes
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tasks
from models import LOGITS, Denoiser, refuse, save_model
from tasks import Task


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A private random generator that is a function of `key`, e.g. (seed, "rollout", update, prompt index).

    Nothing else decides a draw: no generator state has to be saved, the global generator is never touched."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# -------------------------------------------------------------------------------------------------- 2 sampler


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
    nfe: int  # rows evaluated

    def __getitem__(self, rows) -> "Rollout":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Rollout(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in fields.items()})

    @staticmethod
    def join(parts: list["Rollout"]) -> "Rollout":
        """The rows of all parts, which were denoised alike."""
        fields = {}
        for f in dataclasses.fields(Rollout):
            values = [getattr(part, f.name) for part in parts]
            fields[f.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
        return Rollout(**fields | {"nfe": sum(part.nfe for part in parts)})


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


@torch.no_grad()
def denoise(
    model: Denoiser,
    prompt: Tensor,
    prompt_mask: Tensor,
    gens: list[torch.Generator],
    *,
    L: int,
    S: int,
    block: int,
    temperature: float = 1.0,
    order: str = "top_prob",
    threshold: float | None = None,
    guess: bool = False,
    budget: int | None = None,
) -> Rollout:
    """Sample completions by iterative unmasking (LLaDA, arXiv 2502.09992), block by block, left to right.

    Each step evaluates the network once, samples a token for every hidden position of a row's current block
    and reveals the n = L/S most confident. Nothing is masked again. A row is done when a finished block holds
    an EOS: what follows becomes EOS with step = S and costs no forward.

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
    """
    assert order in ("confidence", "top_prob", "random"), order
    assert not (threshold and order == "random"), "a random order has no probability to compare"
    B, G = len(prompt), len(prompt) // (len(gens) or len(prompt))
    each = max(1, budget // (G * (prompt.shape[1] + L))) if budget else B  # groups in a part
    if each * G < B:
        parts = []
        for g in tqdm(range(0, B // G, each), desc="denoising", unit="part", leave=False):
            part = slice(g * G, (g + each) * G)
            parts.append(denoise(
                model, prompt[part], prompt_mask[part], gens[g : g + each], L=L, S=S, block=block,
                temperature=temperature, order=order, threshold=threshold, guess=guess))
        return Rollout.join(parts)
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
    nfe = 0
    for s in range(S):
        if len(rows) == 0:
            break
        nfe += len(rows)
        canvas_rows = torch.cat([shown[rows], x[rows]], 1)
        h = model.hidden(canvas_rows, None if attn is None else attn[rows])[:, P:]  # (R, L, d)
        if guess:
            guesses[rows, s] = greedy_fill(model, x[rows], h)
        cols = first[rows, None] + torch.arange(block, device=x.device)  # (R, block)
        logits = model.head(h.gather(1, cols[..., None].expand(-1, -1, h.shape[-1])))  # (R, block, V)
        logprobs = logits.double().div_(T).log_softmax(-1)
        scores = logprobs
        if temperature:  # Gumbel-max: the argmax of log p + Gumbel noise is a sample from p
            noise = group_noise(gens, B, logits.shape[1:])[rows].log_().neg_().log_()  # minus Gumbel
            scores = noise.neg_().add_(logprobs)
        token = scores.argmax(-1)  # (R, block)
        token_logp = logprobs.gather(-1, token[..., None])[..., 0]
        if order == "random":
            confidence = group_noise(gens, B, (block,))[rows]
        else:
            confidence = token_logp if order == "confidence" else logprobs.amax(-1)
        hidden = x[rows].gather(1, cols) == model.mask_id  # (R, block)
        confidence = confidence.masked_fill(~hidden, -math.inf)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the most confident
        reveal = rank < n
        if threshold:
            reveal = hidden & ((confidence >= math.log(threshold)) | (rank == 0))
        at = rows[:, None].expand_as(cols)[reveal], cols[reveal]
        x[at], step[at], logp[at] = token[reveal], s, token_logp[reveal]
        entropy[at] = torch.special.entr(logprobs[reveal].exp()).sum(-1)  # entr(0) = 0
        block_done = ~(hidden & ~reveal).any(1)
        first[rows] += block * block_done
        done = block_done & ((first[rows] == L) | torch.isin(x[rows], ends).any(1))
        rows = rows[~done]
    x = x.masked_fill(x == model.mask_id, model.eos_id)  # only rows that ended early have masks left
    if guess:  # before a step it never took, a row was complete
        guesses = torch.where(guesses < 0, x[:, None], guesses)
    recorded = logits.dtype
    return Rollout(prompt, prompt_mask, x, step, logp.to(recorded), entropy.to(recorded),
                   until_eos(x, model.end_ids), guesses, model.mask_id, S, nfe)


def greedy_fill(model: Denoiser, x: Tensor, h: Tensor) -> Tensor:
    """Fill each hidden position of x (R, L) with its most likely token, given hidden states h (R, L, d).

    The head runs in parts, so that a real vocabulary never makes (R, L, V) logits."""
    hidden = x == model.mask_id
    filled = x.clone()
    parts = h[hidden].split(max(1, LOGITS // model.V))
    filled[hidden] = torch.cat([model.head(part).argmax(-1) for part in parts])
    return filled


# -------------------------------------------------------------------------------------------------- 3 scoring


def canvas(rollout: Rollout, hidden: Tensor) -> Tensor:
    """The rows of a rollout with the completion positions `hidden` (B, L) masked again: (B, P+L).

    hidden = rollout.step >= s[:, None] is exactly what the sampler saw before step s."""
    return torch.cat([rollout.prompt, rollout.completion.masked_fill(hidden, rollout.mask_id)], 1)


def log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """(M, V) logits and (M, G) tokens to log-probabilities (M, G), without ever holding (M, V) of them."""
    return logits.gather(1, token) - logits.logsumexp(1, keepdim=True)


def score(
    model: Denoiser, x: Tensor, prompt_mask: Tensor, target: Tensor, where: Tensor, temperature: float,
    read: Callable[[Tensor, Tensor], Tensor] = log_prob,
) -> Tensor:
    """log p(target | canvas) at the positions `where` (B, L), 0 elsewhere; one forward of B rows.

    x: (B, P+L) canvas. target: (B, L), or (B, G, L) if one canvas serves a whole group; the result alike.
    The distribution is the sampler's: same temperature, no mask token. The head runs at `where` alone, and in
    parts whose logits backward computes again, so that (M, V) of a real vocabulary never live at once.
    read: a function of (logits, token) like log_prob, in its place."""
    L = target.shape[-1]
    x, prompt_mask = trim(x, prompt_mask)
    h = model.hidden(x, attention(prompt_mask, L))[:, -L:][where]  # (M, d), M = where.sum()
    token = target.movedim(-1, 1)[where]  # (M,) or (M, G)

    def found_part(h: Tensor, token: Tensor) -> Tensor:
        return read(model.head(h).div_(temperature or 1.0), token[:, None].flatten(1)).view(token.shape)

    size = max(1, LOGITS // model.V)
    again = dict(use_reentrant=False, preserve_rng_state=False)
    found = torch.cat([
        checkpoint(found_part, *part, **again) if len(h) > size else found_part(*part)
        for part in zip(h.split(size), token.split(size), strict=True)])
    out = found.new_zeros(where.shape + token.shape[1:])  # (B, L) or (B, L, G)
    out[where] = found
    return out.movedim(1, -1)


def micro_batches(items: Tensor, tokens_each: int, budget: int) -> Iterator[Tensor]:
    """Split `items` (ids of canvases) so that one forward holds at most `budget` tokens, and at least one
    canvas.

    The method calls backward on each part's share of a loss whose normaliser was counted over the whole
    batch, so the gradient does not depend on the budget."""
    yield from items.split(max(1, budget // tokens_each))


def per_step(values: Tensor, step: Tensor, S: int) -> Tensor:
    """Sum per-token values (B, L) over the tokens each step revealed: (B, S). The tail (step = S) is out."""
    return values.new_zeros(len(values), S + 1).scatter_add(1, step, values)[:, :S]


# -------------------------------------------------------------------------------------- 4 prompts and rewards


def load_task(args, model: Denoiser) -> Task:
    """The task of the command line. Refuses prompts that do not fit the model: nothing is ever cut."""
    try:
        task = tasks.load(args.task, chat=bool(model.tokenizer.chat_template), data=args.data,
                          test_data=args.test_data, train=not args.eval_only)
    except ValueError as error:
        refuse(str(error))
    task.test = task.test[: args.eval_rows]
    longest = sorted((row["prompt"] for row in task.train + task.test), key=len)[-256:]
    P = encode(model, longest)[0].shape[1]
    room = model.network.config.max_position_embeddings
    if P + args.L > room:
        refuse(f"the longest prompt has {P} tokens, --L is {args.L}: {args.model} reads {room} at most")
    if args.prompts > len(task.train) and not args.eval_only:
        refuse(f"--prompts {args.prompts}: {args.task} has only {len(task.train)} training prompts")
    return task


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
    if task.parallel:  # the reward waits for other processes
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            scored = list(pool.map(task.reward, texts, rows))
    else:
        scored = [task.reward(text, row) for text, row in zip(texts, rows, strict=True)]
    parts = {k: torch.tensor([p[k] for _, p in scored]) for k in scored[0][1]}
    return torch.tensor([total for total, _ in scored], device=tokens.device), parts, texts


def rollout_metrics(roll: Rollout, reward: Tensor, parts: dict[str, Tensor], G: int, seconds: float) -> dict:
    """What every method logs of a rollout; seconds: what the rollout took."""
    groups = reward.view(-1, G)
    return {
        "reward": reward.mean().item(),
        **{f"reward_{name}": values.mean().item() for name, values in parts.items()},
        "equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        "entropy": roll.entropy[roll.valid].mean().item(),
        "length": roll.valid.sum(1).float().mean().item(),
        "tokens_per_second": roll.valid.sum().item() / seconds,
        "seconds_rollout": seconds,
    }


# ----------------------------------------------------------------------------------------------------- 5 runs


def parse_args(Args: type, method: str, llm: dict):
    """The command line as an Args. With a --model that reads words the settings `llm` are the defaults; with
    --resume RUN its settings are, and few may change."""
    args = tyro.cli(Args)
    if not args.resume:
        return check(args if reads_characters(args.model) else tyro.cli(Args, default=Args(**llm)), method)
    file = Path(args.resume) / "args.json"
    if not file.is_file() or not (Path(args.resume) / "state.pt").is_file():
        refuse(f"{args.resume} holds no checkpoint to resume (no args.json and state.pt)")
    saved = json.loads(file.read_text())
    if saved.pop("method") != method:
        refuse(f"{args.resume} is a run of another method: resume it with the script that made it")
    saved.pop("commit")
    before = Args(**saved | {"resume": args.resume, "eval_only": args.eval_only})
    args = tyro.cli(Args, default=before)
    free = {"steps", "eval_every", "eval_threshold", "eval_rows", "save_every", "budget",
            "gradient_checkpointing", "resume", "eval_only"}
    changed = [k for k, v in vars(args).items() if k not in free and v != getattr(before, k)]
    if changed:
        refuse(f"a resumed run keeps its {', '.join(changed)}; free to change: {', '.join(sorted(free))}")
    return check(args, method)


def reads_characters(name: str) -> bool:
    """Is this "tiny", or a folder trained from it? Its vocabulary tells, before anything is loaded."""
    file = Path(name) / "config.json"
    return name == "tiny" or file.is_file() and bool(re.search(r'"vocab_size": \d\d\b', file.read_text()))


def check(args, method: str):
    """Stop early on settings that cannot work; fill in the default --out. Returns args."""
    if args.task not in tasks.TASKS:
        refuse(f"unknown task {args.task!r}: choose from {', '.join(tasks.TASKS)}")
    for name in ("prompts", "minibatches", "passes", "L", "S", "block", "eval_every", "eval_rows",
                 "save_every", "budget"):
        if getattr(args, name) < 1:
            refuse(f"--{name} must be at least 1")
    for name, value in vars(args).items():
        if isinstance(value, float) and not 0 <= value < math.inf:
            refuse(f"--{name} must be a finite number, at least 0")
    if args.G < 2:
        refuse("--G must be at least 2: an advantage compares the samples of one prompt")
    if args.steps < 0 or args.temperature <= 0:
        refuse("--steps must be at least 0 and --temperature above 0: rollouts have to explore")
    if args.prompts % args.minibatches:
        refuse(f"--minibatches {args.minibatches} must divide --prompts {args.prompts}: groups stay whole")
    if args.L % args.block:
        refuse(f"--L {args.L} is not a multiple of --block {args.block}")
    if args.L % args.S or args.S % (args.L // args.block):
        refuse(f"--S {args.S} does not fit: it must divide --L {args.L} and be a multiple of its "
               f"{args.L // args.block} blocks")
    default = f"runs/eval-{args.task}" if args.eval_only else f"runs/{method}-{args.task}-{args.seed}"
    args.out = args.resume or args.out or default
    if Path(args.out).exists() and not args.resume and not args.eval_only:
        refuse(f"{args.out} exists: go on with --resume {args.out}, or choose another --out")
    return args


def pick_device() -> torch.device:
    """CUDA if there is one, else the CPU; says which arithmetic that means."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arithmetic = "fp32 weights, bf16 matrix products" if device.type == "cuda" else "fp32 (no CUDA GPU found)"
    print(f"device {device}: {arithmetic}", flush=True)
    return device


def draw_prompts(args, count: int, step: int) -> list[int]:
    """Training prompts of update `step`: each epoch is one permutation, no prompt twice in an update."""
    epoch, batch = divmod(step, count // args.prompts)
    order = torch.randperm(count, generator=generator("cpu", args.seed, "prompts", epoch))
    return order[batch * args.prompts : (batch + 1) * args.prompts].tolist()


def evaluate(model: Denoiser, task: Task, args, threshold: float | None = None) -> tuple[dict, list[tuple]]:
    """Greedy, order top_prob, every held-out row: the same for all methods. Returns metrics, and of each row
    the text and whether it is correct.

    Fixed S; or, as a second opinion, adaptive decoding with a `threshold` (see denoise)."""
    prompt, prompt_mask = encode(model, [row["prompt"] for row in task.test])
    roll = denoise(model, prompt, prompt_mask, [], L=args.L, S=args.S, block=args.block, temperature=0,
                   threshold=threshold, budget=args.budget)
    reward, parts, texts = reward_rows(model, task, roll.completion, task.test)
    answers = list(zip(texts, parts["correct"].tolist(), strict=True))
    means = {"accuracy": parts["correct"], "reward": reward, "parse_fail": parts["parse_fail"]}
    metrics = {name: values.double().mean().item() for name, values in means.items()}
    return metrics | {"nfe_per_row": roll.nfe / len(task.test)}, answers


def evaluation(model: Denoiser, task: Task, args) -> tuple[dict, list[tuple]]:
    """An evaluation as it is logged: keys eval_*, and threshold_* for adaptive decoding."""
    fixed, answers = evaluate(model, task, args)
    metrics = {f"eval_{k}": v for k, v in fixed.items()}
    if args.eval_threshold:
        adaptive, _ = evaluate(model, task, args, args.eval_threshold)
        metrics |= {f"threshold_{k}": v for k, v in adaptive.items()}
    return metrics, answers


class Run:
    """One run: folder (args.json, metrics.jsonl, state.pt, curve.png, model/), clock, counters, ctrl-C."""

    def __init__(self, args, method: str, model: Denoiser, task: Task, optimizer: torch.optim.Optimizer):
        """Make the folder, or take an existing run up where its checkpoint left it."""
        self.args, self.model, self.task, self.optimizer = args, model, task, optimizer
        self.out = Path(args.out)
        self.step = 0  # updates done
        self.counters = {"nfe_rollout": 0, "nfe_update": 0, "skipped": 0, "seconds": 0.0}
        self.skipped_in_a_row = 0
        self.interrupted = False
        if args.resume:
            state = torch.load(self.out / "state.pt", map_location="cpu", weights_only=True)
            model.network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.counters = state["step"], state["counters"]
        if args.eval_only:
            return
        if args.resume:  # what was logged after the checkpoint will be logged again
            os.truncate(self.out / "metrics.jsonl", state["metrics_bytes"])
        else:
            self.out.mkdir(parents=True)
            (self.out / "metrics.jsonl").touch()
        settings = vars(args) | {"resume": "", "method": method, "commit": git_commit()}
        (self.out / "args.tmp").write_text(json.dumps(settings, indent=1))
        os.replace(self.out / "args.tmp", self.out / "args.json")
        self.lapped = time.perf_counter()
        self.started = self.lapped - self.counters["seconds"]
        signal.signal(signal.SIGINT, self.interrupt)
        self.bar = tqdm(total=args.steps, initial=self.step, desc=method, unit="update", dynamic_ncols=True)

    def interrupt(self, *_):
        """First ctrl-C: finish this update and save. Second: stop at once, the last checkpoint stays."""
        self.interrupted = True
        tqdm.write("ctrl-C: finishing this update, then saving (once more: stop at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def boundary(self) -> bool:
        """Between updates: save and evaluate where due. True when all steps are done; exit 130 after ctrl-C.

        Saved first: a resumed run repeats the evaluation, so it inherits none that its own schedule lacks."""
        over = self.step >= self.args.steps
        if over or self.interrupted or self.step % self.args.save_every == 0:
            self.save()
        if self.interrupted:
            self.bar.close()
            print(f"stopped after {self.step} updates; go on with: python {sys.argv[0]} --resume {self.out}")
            raise SystemExit(130)
        if over or self.step % self.args.eval_every == 0:
            self.evaluate()
        return over

    def save(self):
        """Write state.pt: on disk is either the old checkpoint or the new one, never half of one."""
        state = {
            "network": self.model.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "counters": self.counters,
            "metrics_bytes": (self.out / "metrics.jsonl").stat().st_size,
        }
        with open(self.out / "state.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.out / "state.tmp", self.out / "state.pt")

    def evaluate(self):
        """Evaluate and log; the run's clock stands still meanwhile."""
        begin = time.perf_counter()
        metrics, self.answers = evaluation(self.model, self.task, self.args)
        self.log(metrics)
        tqdm.write(f"step {self.step}: {metrics['eval_accuracy']:.1%} of the held-out rows correct")
        self.started += time.perf_counter() - begin
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        before, self.lapped = self.lapped, time.perf_counter()
        return self.lapped - before

    def optimizer_step(self, loss: float, max_grad_norm: float) -> float:
        """Clip the gradient and step. Not finite: skip the step and count it; exit 1 after three in a row."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.network.parameters(), max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.counters["skipped"] += 1
            self.skipped_in_a_row += 1
            tqdm.write(f"update {self.step + 1}: loss {loss}, gradient norm {norm}: step skipped")
        self.optimizer.zero_grad()
        if self.skipped_in_a_row == 3:
            self.bar.close()
            sys.exit(f"error: three steps in a row not finite; {self.out} keeps the last good checkpoint")
        return norm

    def log_update(self, metrics: dict):
        """Count an update; log it with the counters, the clock and the memory."""
        self.step += 1
        self.counters["seconds"] = time.perf_counter() - self.started
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.model.device.type == "cuda" else 0.0
        self.log(metrics | self.counters | {"peak_memory_gib": peak})
        release_memory()
        self.bar.set_postfix_str(f"reward {metrics['reward']:.3f}, {self.counters['skipped']} skipped")
        self.bar.update()

    def log(self, metrics: dict):
        """Append one line to metrics.jsonl; a number that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in ({"step": self.step} | metrics).items()}
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> float:
        """Write model/ and curve.png, print the report; returns the final held-out accuracy."""
        self.bar.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        save_model(self.model, self.out / "model")
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        evals = [line for line in lines if "eval_accuracy" in line]
        plot(lines, self.out / "curve.png", f"{self.bar.desc} on {self.args.task}")
        print_report(self.task, self.args, {"before": evals[0], "after": evals[-1]}, self.answers)
        nfe, updates, seconds = (self.counters[k] for k in ("nfe_rollout", "nfe_update", "seconds"))
        print(f"\n{seconds / 60:.1f} minutes of RL; NFE (forward evaluations x rows): "
              f"{nfe:,} in rollouts, {updates:,} in updates")
        print(f"{self.out}/ has metrics.jsonl, curve.png, model/ (a transformers folder) and state.pt")
        print(f"next: --resume {self.out} --steps {2 * self.args.steps} goes on, --seed {self.args.seed + 1} "
              "repeats, --help lists every setting")
        return evals[-1]["eval_accuracy"]

    def eval_only(self) -> float:
        """--eval_only: print the report of the model as it is, add it with every setting and answer to
        evals.jsonl; returns the held-out accuracy."""
        metrics, answers = evaluation(self.model, self.task, self.args)
        print_report(self.task, self.args, {f"step {self.step}": metrics}, answers)
        self.out.mkdir(parents=True, exist_ok=True)
        device = self.model.device
        line = metrics | {
            "step": self.step, "rows": len(answers), "order": "top_prob", "eval_temperature": 0.0,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__, "commit": git_commit(), "args": vars(self.args), "answers": answers}
        with open(self.out / "evals.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"\n{self.out}/evals.jsonl has this evaluation with its settings and answers")
        return metrics["eval_accuracy"]


def release_memory():
    """Give freed memory back to the system. glibc keeps it: batches of ever new sizes add up to gigabytes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def git_commit() -> str:
    """The commit these files are at, or "" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def print_report(task: Task, args, columns: dict[str, dict[str, float]], answers: list[tuple]):
    """The table of held-out results, then three solved and three failed rows, drawn."""
    n, also = len(answers), f"; adaptive: threshold {args.eval_threshold}" if args.eval_threshold else ""
    print(f"\n{n} held-out rows, greedy: L {args.L}, S {args.S}, block {args.block}, order top_prob{also}")
    print(" " * 26 + "".join(f"{name:>10}" for name in columns))
    labels = {"accuracy": "solved, %", "reward": "mean reward, %", "parse_fail": "unreadable, %"}
    for kind, decoding in (("eval", ""), ("threshold", ", adaptive")):
        if all(f"{kind}_accuracy" in column for column in columns.values()):
            for key, label in labels.items():
                row = "".join(f"{100 * column[f'{kind}_{key}']:10.1f}" for column in columns.values())
                print(f"{label + decoding:<26}{row}")
            row = "".join(f"{column[f'{kind}_nfe_per_row']:10.2f}" for column in columns.values())
            print(f"{'forwards per row' + decoding:<26}{row}")
    error = max((c["eval_accuracy"] * (1 - c["eval_accuracy"]) / n) ** 0.5 for c in columns.values())
    print(f"(standard error of a solved share: {100 * error:.1f} points)")
    for label, correct in (("solved", 1.0), ("failed", 0.0)):
        found = [(text, row) for (text, c), row in zip(answers, task.test, strict=True) if c == correct]
        blocks = [task.draw(text, row) for text, row in found[:3]]
        print(f"\n{label}:" + ("" if blocks else " none"))
        if all(len(line) < 30 for block in blocks for line in block):  # boards: side by side
            blocks = [["      ".join(cells) for cells in itertools.zip_longest(*blocks, fillvalue="")]]
        print("\n\n".join("\n".join(f"   {line}" for line in block) for block in blocks))


def plot(lines: list[dict], file: Path, title: str):
    """curve.png: held-out accuracy and the rollouts' reward over the updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    curves = {"reward": ("reward of the rollouts", dict(color="tab:blue", lw=1, alpha=0.5)),
              "threshold_accuracy": ("held-out solved, adaptive", dict(color="tab:green", lw=1, ls="--")),
              "eval_accuracy": ("held-out solved", dict(color="tab:orange", lw=2, marker="o", ms=4))}
    for key, (label, look) in curves.items():
        points = [(line["step"], 100 * line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **look)
    (_, first), (step, last) = points[0], points[-1]
    axes.axhline(first, color="0.6", lw=1, ls=":")
    axes.annotate(f"{first:.1f} % before", (step, first), (0, -12), textcoords="offset points", ha="right")
    axes.annotate(f"{last:.1f} %", (step, last), (0, 7), textcoords="offset points", ha="right")
    axes.set(xlabel="update", ylabel="%", title=title, ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    plt.close(figure)
