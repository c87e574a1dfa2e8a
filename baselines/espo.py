"""ESPO: ELBO-based sequence-level policy optimisation (arXiv 2512.03759).

Tokens of a diffusion model have no likelihood of their own, only the sequence has: so a whole completion is
one action, its log-likelihood is stood in for by the ELBO, and there is one ratio per completion, of the
length-normalised ELBOs,

    loss = mean over rows of -min(rho A, clip(rho, 1 -+ eps) A) + beta / (2 n) (E_theta - E_ref)^2
    rho  = exp((E_theta - E_old) / n),   n tokens up to the first EOS
    A    = R minus the mean of the OTHERS' R in the group
    E    = mean over masks of (n + 1) / l times the sum over the l hidden tokens of log p(token | the others)

with l uniform on 0 .. n and the l tokens drawn uniformly. A mask with l = 0 contributes 0. n - l is uniform
as well, so a mask and its complement are both unbiased for the ELBO, sum over l of (1 / l) E[sum of log p];
together they score each token exactly once. Each pass has masks of its own, under which E_old and E_ref are
taken, too, before the first optimizer step: the noise of the masks cancels from the ratio as long as theta
has not moved.

Written without the authors' code (commit b5f2dac) and later compared with it on the same inputs: the
gradients are equal where no row has an EOS. Difference from that code: it has L in place of n and scores the
tail behind the EOS, which here is hidden and never scored, as in the sampler. Ours has minibatches and trains
all weights; without a KL it does not evaluate rows of advantage 0; its defaults are for the tiny model.

python baselines/espo.py                         4x4 Sudoku, 26 to 61 % in 45 s
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script of this folder, started from anywhere

from common import (Denoiser, Rollout, Run, Task, canvas, draw_prompts, encode, generator,  # noqa: E402
                    group_noise, micro_batches, minibatches, reward_rows, roll_out, rollout_metrics, score,
                    worth_scoring)


@dataclass
class Args:
    # (LLM: x) is the setting for real models, of which there are more at the end of this file.

    # The rollout.
    prompts: int = 32  # prompts per rollout
    G: int = 8  # samples per prompt (a group; released: 6; MATH 16, code 10)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 256)
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    order: Literal["confidence", "top_prob", "random"] = "confidence"  # (released: confidence)
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; results do not depend on it

    # The method.
    num_mc: int = 2  # masks per row and pass, each with its complement (released: 2)
    eps: float = 0.2  # clip of the ratio of a whole completion (released: 0.2; Countdown 0; demos 4e-4)
    beta: float = 0.0  # weight of the KL to the model before training (released: see LLM); 0: no reference

    # The optimizer, AdamW.
    passes: int = 2  # mu, passes per rollout, each with new masks (released: 8)
    minibatches: int = 4  # optimizer steps per pass, each on whole groups
    lr: float = 1e-4  # learning rate (released: 3e-6; code 1e-6)
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two moments
    weight_decay: float = 0.01
    warmup: int = 0  # optimizer steps until the learning rate is whole (not known)
    grad_norm: float = 1.0  # gradient clipping

    def __post_init__(self):
        assert self.num_mc >= 1 and self.eps <= 1, "--num_mc must be at least 1 and --eps at most 1"


def advantage(reward: Tensor, G: int) -> Tensor:
    """R_i minus the mean of the others of its group; exactly 0 where a whole group is equal. (B,)."""
    group = reward.view(-1, G)
    unequal = group.amax(1, keepdim=True) > group.amin(1, keepdim=True)
    others = (group.sum(1, keepdim=True) - group) / (G - 1)
    return ((group - others) * unequal).flatten()


def antithetic_masks(valid: Tensor, noise: Tensor) -> Tensor:
    """What each of K = 2 num_mc canvases scores (B, K, L): a random set of valid positions, then the rest.

    The size of the set is uniform on 0 .. n. noise: (B, num_mc, L + 1)."""
    size = (noise[..., :1] * (valid.sum(1)[:, None, None] + 1)).long()  # (B, num_mc, 1)
    place = noise[..., 1:].masked_fill(~valid[:, None], 2.0).argsort(2).argsort(2)  # valid ones first
    chosen = torch.stack([place < size, place >= size], 2).flatten(1, 2)  # (B, K, L)
    return chosen & valid[:, None]


def elbo(model: Denoiser, x: Tensor, roll: Rollout, scored: Tensor, temperature: float) -> Tensor:
    """E (M,) of rows `roll`: the mean of (n + 1) / l sum log p over K canvases x (M, K, P+L), each of which
    scores the tokens `scored` (M, K, L)."""
    M, K, _ = scored.shape
    rows = roll[torch.arange(M, device=x.device).repeat_interleave(K)]
    scored = scored.flatten(0, 1)  # (M * K, L)
    logp = score(model, x.flatten(0, 1), rows.prompt_mask, rows.completion, scored, temperature).sum(1)
    n, size = rows.valid.sum(1), scored.sum(1).clamp(min=1)  # nothing scored: the sum is 0
    return (logp * (n + 1) / size).view(M, K).mean(1)


def sequence_loss(
    elbo: Tensor, elbo_old: Tensor, n: Tensor, adv: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """PPO-clipped loss of each completion and whether the clip took its gradient away. All (M,)."""
    ratio = ((elbo - elbo_old) / n).exp()
    gain = torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv)  # pessimistic of the two
    return -gain, gain < ratio * adv


def k2(elbo: Tensor, elbo_ref: Tensor, n: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token, >= 0, from the policy's samples: no exponential of a
    sequence. All (M,)."""
    return (elbo - elbo_ref) ** 2 / (2 * n)


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

        # 4 The masks of each pass, and the ELBOs under them to compare with.
        gens = [generator(model.device, args.seed, "masks", update, i) for i in drawn]
        noise = group_noise(gens, len(rows), (args.passes * args.num_mc, args.L + 1))
        scored = antithetic_masks(roll.valid, noise)  # (B, passes * K, L), K = 2 num_mc
        x = canvas(roll, scored | ~roll.valid[:, None])
        x, scored = (t.unflatten(1, (args.passes, -1)) for t in (x, scored))  # (B, passes, K, P+L), (.., L)
        pairs = torch.ones_like(x[:, :, 0, 0]).nonzero()  # (M, 2): a row and a pass, K canvases together
        if not reference:  # without a KL, an advantage of 0 cannot move a weight
            times = 2 * scored.shape[2]  # K canvases, old and new
            pairs = worth_scoring(model, pairs, adv[pairs[:, 0]] != 0, times)
        elbo_old = roll.logp.new_zeros(len(rows), args.passes)
        elbo_ref = torch.zeros_like(elbo_old)
        with torch.no_grad():
            for micro in micro_batches(model, pairs, x, args.budget):
                r, k = micro.unbind(1)
                elbo_old[r, k] = elbo(model, x[r, k], roll[r], scored[r, k], args.temperature)
                if reference:
                    elbo_ref[r, k] = elbo(reference, x[r, k], roll[r], scored[r, k], args.temperature)
        elbo_old, elbo_ref = model.total(elbo_old), model.total(elbo_ref)  # over the processes

        # 5 Update.
        infos = []
        for pass_no in range(args.passes):
            gen = generator("cpu", args.seed, "pass", update, pass_no)
            of_pass = pairs[pairs[:, 1] == pass_no]
            for batch in minibatches(of_pass, args.prompts, args.G, args.minibatches, gen):
                info = dict.fromkeys(("loss", "kl", "clip_frac"), 0.0)
                for micro in micro_batches(model, batch, x, args.budget):
                    r, k = micro.unbind(1)
                    E = elbo(model, x[r, k], roll[r], scored[r, k], args.temperature)  # (M,)
                    n = roll.valid[r].sum(1)
                    loss, was_clipped = sequence_loss(E, elbo_old[r, k], n, adv[r], args.eps)
                    if reference:
                        kl = k2(E, elbo_ref[r, k], n)
                        loss = loss + args.beta * kl
                        info["kl"] += kl.sum().item() / len(batch)
                    loss = loss.sum() * args.minibatches / len(rows)  # mean over rows
                    loss.backward()
                    info["loss"] += loss.item()
                    info["clip_frac"] += was_clipped.sum().item() / len(batch)
                info = model.total(info)  # over the processes, if there are several
                info["grad_norm"] = run.step(info["loss"], args.grad_norm, args.warmup)
                infos.append(info)

        # 6 Log.
        run.log(rollout_metrics(roll, reward, parts, args.G), infos)


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words.
SUDOKU = dict(updates=12, eval_every=3)
COUNTDOWN = dict(L=8, S=4, block=4, prompts=16, minibatches=2, lr=2e-4, updates=36, eval_every=9)
# Released (commit b5f2dac): G (MATH 16, code 10), eps (Countdown 0), beta (Countdown 3e-3, Sudoku and code
# 1e-2), num_mc, mu, and lr, which is theirs of a LoRA (code: 1e-6, all weights, clip 0.8). Ours: 2 prompts;
# all weights; L, S, block and clip of the ESPO script in GDSD's code (commit 7c152d3), without its warm-up
# over 0.001 of the run.
LLM = dict(prompts=2, G=6, L=256, S=256, block=32, minibatches=1, eps=0.2, beta=1e-3, passes=8, lr=3e-6,
           grad_norm=0.2)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
