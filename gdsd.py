"""GDSD and GDSD-TLC: guided denoiser self-distillation (arXiv 2605.29398).

KL-regularised RL has the optimum pi* ~ pi_old^(1 - beta) pi_ref^beta exp(psi A), to first order in beta. At
beta = 0 its log is log pi_old + psi A minus the log of a normaliser that nobody can compute. The method fits
a score c by plain least squares and leaves the normaliser out. In "tlc" it cancels exactly, in "logp" not:

    loss = mean over rows and mask pairs of (c_theta - c_old - psi A)^2 + beta (l_theta - l_ref)^2
    c    = 1 / n * sum over the row's n valid tokens of their read-out, each on the canvas that hides it
    l    = the same mean of their log-probabilities
    A    = R_i - mean of the OTHERS' R in the group

read-out (`--match`): "logp" the log-probability, so that c = l; "tlc" the logit (divided by T) minus the
mean logit of its position, so that c needs no softmax. A mask pair is a random mask and its complement, so
that each token is scored exactly once. The pairs are drawn once per rollout and kept for c_old, l_ref and
every pass. Look at mask_pairs and pair_score first.

The mean over a pair (`--weights`): "pair" counts every token alike. Then n E[c] is 2 E_t[log p(x0 | x_t)],
where t is the share that is hidden: the quantity in the paper's loss. "elbo" is what the authors' newer code
does: each of the k tokens hidden in the mask has weight (n + 1) / k, each of the other n - k has
(n + 1) / (n - k), and the sum over both canvases is halved. Then n E[c] is the ELBO. tests/test_gdsd.py
enumerates both.

psi is per token here: the paper's 10, for a whole completion, is 10 / L. There is no clamp on c - c_old,
because the square stops at its target; the authors' code stops its passes by one. That, how their psi and
beta translate into ours, and all other differences from their code, each with its commit, are in
results/README.md. Differences from the paper: several minibatches; small-batch defaults for the tiny model.

python gdsd.py                         4x4 Sudoku, 26 to 85 % of the held-out boards solved, in a minute
python gdsd.py --task countdown        expressions, 18 to 38 %
python gdsd.py --match tlc             centred raw logits: 26 to 81 %
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common import (Denoiser, Rollout, Run, Task, canvas, draw_prompts, encode, generator, group_noise,
                    log_prob, micro_batches, minibatches, reward_rows, roll_out, rollout_metrics, score)


@dataclass
class Args:
    # (LLM: x) is the setting for real models, of which there are more at the end of this file.

    # The rollout.
    prompts: int = 32  # prompts per rollout
    G: int = 8  # samples per prompt (a group)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 256)
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    order: Literal["confidence", "top_prob", "random"] = "confidence"  # (released: confidence)
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; results do not depend on it

    # The method.
    match: Literal["logp", "tlc"] = "logp"  # what is regressed: log-probabilities, or centred raw logits
    topk: int = 0  # tlc: subtract the mean of this many largest logits (paper 0: of all; the authors now 64)
    weights: Literal["pair", "elbo"] = "pair"  # of the tokens of a mask pair (paper: pair; see above)
    num_mc: int = 1  # mask pairs per row (paper: 2)
    psi: float = 0.625  # inverse temperature of the advantage, per token (paper: 10 / L, as here for L 16)
    beta: float = 0.0  # weight of the reference (paper: 1e-3; see LLM); 0: no reference model

    # The optimizer, AdamW.
    passes: int = 1  # mu, passes per rollout (paper: 8; Dream Sudoku 1)
    minibatches: int = 8  # optimizer steps per pass, each on whole groups (paper: 1)
    lr: float = 2e-4  # learning rate; 5e-5 for hundreds of updates (paper: 3e-6; MATH 1e-5)
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two moments (paper: the same)
    weight_decay: float = 0.01  # (paper: 0.01)
    warmup: int = 0  # optimizer steps until the learning rate is whole (released: 1e-3 of the run)
    grad_norm: float = 1.0  # gradient clipping (paper: 0.2)

    def __post_init__(self):
        assert self.num_mc >= 1, "--num_mc must be at least 1"
        assert self.topk >= 0, "--topk must be at least 0"


def advantage(reward: Tensor, G: int) -> Tensor:
    """R_i minus the mean of the others of its group; exactly 0 where a whole group is equal. (B,)."""
    group = reward.view(-1, G)
    unequal = group.amax(1, keepdim=True) > group.amin(1, keepdim=True)
    others = (group.sum(1, keepdim=True) - group) / (G - 1)
    return ((group - others) * unequal).flatten()


def mask_pairs(valid: Tensor, noise: Tensor) -> Tensor:
    """Random masks and their complements among the valid positions: hidden (B, pairs, 2, L).

    The number hidden is uniform on 0 .. n_valid. What is not valid is hidden in both.
    noise: (B, pairs, L + 1)."""
    n_valid = valid.sum(1)[:, None, None]
    count = (noise[..., :1] * (n_valid + 1)).long()  # (B, pairs, 1)
    rank = noise[..., 1:].masked_fill(~valid[:, None], torch.inf).argsort(dim=2).argsort(dim=2)
    chosen = (rank < count) & valid[:, None]
    return torch.stack([chosen, valid[:, None] & ~chosen], 2) | ~valid[:, None, None]


def centred_logit(logits: Tensor, at: Tensor, token: Tensor, topk: int = 0) -> Tensor:
    """Logit of `token` (m,) at row `at` (m,) of logits (D, V) minus the mean of the row's topk largest ones.

    0: of all. The mask token's is never among them."""
    if topk:
        mean = logits.topk(min(topk, logits.shape[1] - 1)).values.mean(1)  # the mask token's, -inf, is last
    else:
        possible = logits > -torch.inf
        mean = logits.masked_fill(~possible, 0.0).sum(1) / possible.sum(1)
    return logits[at, token] - mean[at]


def read_out(logits: Tensor, at: Tensor, token: Tensor, match: str, topk: int) -> Tensor:
    """First what is regressed, last the log-probability, of `token` (m,) at row `at` (m,) of logits (D, V):
    (m, 2). Or (m, 1) where they are the same."""
    logp = log_prob(logits, at, token)
    if match == "logp":
        return logp[:, None]
    return torch.stack([centred_logit(logits, at, token, topk), logp], 1)


DRIFT = 20.0  # a mean score this far from where it began (in nats or logits) is worth a warning


def pair_score(
    model: Denoiser, x: Tensor, roll: Rollout, hidden: Tensor, match: str, temperature: float,
    weights: str = "pair", topk: int = 0,
) -> tuple[Tensor, Tensor]:
    """c (M,) and l (M,) of rows `roll`: the mean read-out and the mean log-probability of the valid tokens.

    Each is read on the one of the pair's two canvases x (M, 2, P+L) that hides it; hidden: (M, 2, L)."""
    both = torch.arange(len(x), device=x.device).repeat_interleave(2)  # a mask and its complement, adjacent
    rows = roll[both]
    where, n = hidden.flatten(0, 1) & rows.valid, roll.valid.sum(1)
    found = score(model, x.flatten(0, 1), rows.prompt_mask, rows.completion, where, temperature,
                  partial(read_out, match=match, topk=topk))  # (2 M, L, 1 or 2)
    found = found.movedim(2, 0).contiguous().sum(2)  # (1 or 2, 2 M); contiguous: both add up in one order
    if weights == "elbo":
        k = where.sum(1).clamp(min=1)  # a canvas that hides nothing scores nothing: 0 / 1
        found = found * (n[both] + 1) / (2 * k)
    found = found.unflatten(1, (-1, 2)).sum(2) / n  # (1 or 2, M)
    return found[0], found[-1]


def distillation_loss(
    c: Tensor, c_old: Tensor, adv: Tensor, psi: float, logp: Tensor, logp_ref: Tensor, beta: float
) -> Tensor:
    """(c - c_old - psi A)^2 + beta (l - l_ref)^2; all (M,)."""
    return (c - c_old - psi * adv) ** 2 + beta * (logp - logp_ref) ** 2


def train(args: Args, model: Denoiser, task: Task, run: Run):
    """Train `model` in place on the prompts of `task`, for the updates of `run`."""
    reference = model.frozen() if args.beta else None  # the model before training
    optimizer = torch.optim.AdamW(
        model.network.parameters(), args.lr, betas=args.betas, weight_decay=args.weight_decay,
        fused=model.device.type == "cuda")  # fused: needs less memory

    for update in run.updates(model, optimizer):
        # 1 Roll out: G completions of each prompt.
        drawn = draw_prompts(len(task.train), args.prompts, args.seed, update)
        rows = [task.train[i] for i in drawn for _ in range(args.G)]  # B rows
        prompt, prompt_mask = encode(model, [row["prompt"] for row in rows])  # (B, P)
        gens = [generator(model.device, args.seed, "rollout", update, i) for i in drawn]
        roll = roll_out(model, prompt, prompt_mask, gens, L=args.L, S=args.S, block=args.block,
                        temperature=args.temperature, order=args.order, budget=args.budget)

        # 2 Reward.
        reward, parts, _ = reward_rows(model, task, roll.completion, rows)  # (B,)

        # 3 Advantage.
        adv = advantage(reward, args.G)  # (B,)

        # 4 Masks, and the scores under them to move away from and to stay close to.
        gens = [generator(model.device, args.seed, "masks", update, i) for i in drawn]
        hidden = mask_pairs(roll.valid, group_noise(gens, len(rows), (args.num_mc, args.L + 1)))
        x = torch.stack([canvas(roll, half) for half in hidden.unbind(2)], 2)  # (B, num_mc, 2, P+L)
        pairs = torch.ones_like(hidden[:, :, 0, 0]).nonzero()  # (B * num_mc, 2): a row and a mask pair
        how = args.match, args.temperature, args.weights, args.topk
        c_old = torch.zeros(len(rows), args.num_mc, device=model.device)
        l_ref = torch.zeros_like(c_old)
        with torch.no_grad():
            for micro in micro_batches(model, pairs, x, args.budget):
                r, j = micro.unbind(1)
                c_old[r, j], _ = pair_score(model, x[r, j], roll[r], hidden[r, j], *how)
                if reference:
                    _, l_ref[r, j] = pair_score(reference, x[r, j], roll[r], hidden[r, j], *how)
        c_old, l_ref = model.total(c_old), model.total(l_ref)  # over the processes, if there are several

        # 5 Update.
        infos = []
        for pass_no in range(args.passes):
            c_new = torch.zeros_like(c_old)
            gen = generator("cpu", args.seed, "pass", update, pass_no)
            for batch in minibatches(pairs, args.prompts, args.G, args.minibatches, gen):
                info = {"loss": 0.0}
                for micro in micro_batches(model, batch, x, args.budget):
                    r, j = micro.unbind(1)
                    c, logp = pair_score(model, x[r, j], roll[r], hidden[r, j], *how)
                    c_new[r, j] = c.detach()
                    loss = distillation_loss(c, c_old[r, j], adv[r], args.psi, logp, l_ref[r, j], args.beta)
                    loss = loss.sum() / len(batch)  # mean over rows and mask pairs
                    loss.backward()
                    info["loss"] += loss.item()
                info = model.total(info)
                info["grad_norm"] = run.step(info["loss"], args.grad_norm, args.warmup)
                infos.append(info)

        # 6 Log: how far c has moved from c_old, and its target. c is from the last pass, of each minibatch
        # before its own optimizer step.
        move, target = model.total(c_new) - c_old, args.psi * adv
        drift = move.nanmean().item()  # the targets of a group average to zero
        run.counters["drift"] += drift if math.isfinite(drift) else 0.0
        if abs(run.counters["drift"]) > DRIFT:
            tqdm.write(f"update {update + 1}: c has drifted by {run.counters['drift']:.1f}, which no "
                       "reward asked for: lower --lr or --passes, or set --beta")
        run.log(rollout_metrics(roll, reward, parts, args.G) | {
            "c_mean": c_old.mean().item(),
            "c_std": c_old.std().item(),
            "move_mean": move.mean().item(),
            "move_std": move.std().item(),
            "target_std": target.std().item(),
        }, infos)


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words.
SUDOKU = dict(updates=32, eval_every=8)
COUNTDOWN = dict(L=8, S=4, block=4, prompts=16, minibatches=2, psi=1.0, updates=120, eval_every=30)
# Released (llada_gsm8k, commit 7c152d3): G, L, S, block, T, num_mc, mu, AdamW, clip, lr (theirs of a LoRA of
# rank 128; MATH, Sudoku and Countdown 1e-5), beta 1e-3, which is 0.064 here (MATH 1e-4, Countdown 3e-3).
# Ours: 2 prompts, theirs 20; all weights; logp, theirs TLC with topk 64 and elbo; psi 10 / L and no clamp; no
# warm-up, theirs 0.001 of the run.
LLM = dict(prompts=2, G=16, L=256, S=256, block=32, num_mc=2, minibatches=1, psi=0.04, beta=0.064, passes=8,
           lr=3e-6, grad_norm=0.2)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
