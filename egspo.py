"""EGSPO and EGSPO-SA: entropy-guided stepwise policy optimisation (arXiv 2603.12554).

Denoising is a decision process: the state is the partly masked canvas, the action the tokens revealed at a
step, and the reward comes at the end. The policy gradient then is a sum over denoising steps. Of the S steps
of each of the B rows, only the K at which the model was least certain are evaluated. A step reveals n tokens:

    loss = 1 / (B K n) * sum over rows b, kept steps s of [-min(rho A, clip(rho, 1 - lo, 1 + hi) A) + beta k3]
    rho  = exp(l - l_old),   l(b, s) = sum over the tokens revealed at s of log p(token | canvas before s)
    A    = (R - mean R) - lambda / (1 + lambda) (r_s - mean r_s)

R is the reward of the row, r_s that of the greedy one-step completion of its canvas before s ("stepwise
advantage", SA; with lambda = 0 it is EGSPO). The mean of R is over the group, that of r_s over the group's
rows that kept the same denoising step. With `--baseline rank`, the paper's, both means are over the group's
rows at the same rank, which is a step's place among the row's kept ones, highest entropy first. The return is
then (R + lambda (R - r_s)) / (1 + lambda). Look at select_steps and stepwise_advantage first.

The theorem behind the sum over steps is sum_s E[R grad l_s] = grad E[R]. It needs three things, all of which
tests/test_egspo.py enumerates:

- The rule that picks the positions must not look at the tokens sampled in that step: `order` top_prob or
  random. `confidence`, the rule of LLaDA, of the paper and of our defaults, looks at them, and the theorem
  fails (published since: Mask-Aware Policy Gradients, arXiv 2607.15200).
- The kept steps must stand for all: K = S; or `select` importance, which draws them in proportion to their
  entropy and weights each by the inverse of its probability (as AGRPO, ICML 2026, does); or uniform, if no
  EOS ends a row early. The K most uncertain are picked by looking at the finished row: a bias by design.
- The baseline must not depend on later steps of the row: lambda = 0, or `step`. (The row's own R is part of
  mean R; that only scales the gradient by (G - 1) / G.) A rank is known only once the row is finished.

By default only the last holds: like the paper we take the most uncertain steps, in LLaDA's order, which
learned as well or faster on validation rows. With `--order top_prob --select all` all three hold, up to the
first optimizer step on a rollout.

Differences from the paper: lambda is constant (the paper's lambda_t, as in the newest released code, is
`--lam_schedule linear`: lambda s / S); the baseline of r_s (paper: rank); full fine-tuning, no LoRA; several
minibatches; small-batch defaults for the tiny model. Without a KL, pairs of advantage 0 are not evaluated,
and a minibatch that has no others makes no optimizer step: its gradient is 0, and AdamW would still move the
weights by momentum and weight decay.
Differences from the authors' code, each with its commit, are in results/README.md.

python egspo.py                        4x4 Sudoku, 26 to 96 % of the held-out boards, in under a minute
python egspo.py --task countdown       expressions, 18 to 52 %, in a minute
python egspo.py --lam 0                EGSPO without the stepwise advantage
python egspo.py --order top_prob       the order for which the theorem holds
python egspo.py --model dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1 --task gsm8k     a real one, on a 24 GB GPU
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import (Denoiser, Rollout, Run, Task, canvas, draw_prompts, encode, generator, group_noise,
                    micro_batches, minibatches, per_step, reward_rows, roll_out, rollout_metrics, score,
                    worth_scoring)


@dataclass
class Args:
    # (LLM: x) is the setting for real models, of which there are more at the end of this file.

    # The rollout.
    prompts: int = 16  # prompts per rollout
    G: int = 16  # samples per prompt (a group)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 128)
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    order: Literal["confidence", "top_prob", "random"] = "confidence"  # (paper: confidence)
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; results do not depend on it

    # The method.
    K: int = 4  # denoising steps kept per row (paper: 8 of 128)
    select: Literal["entropy", "importance", "uniform", "all"] = "entropy"  # which steps (paper: entropy)
    baseline: Literal["rank", "step"] = "step"  # r_s is compared at the same step, or the same rank (paper)
    lam: float = 0.5  # lambda, weight of the stepwise advantage (paper: 0.5); 0: plain EGSPO
    lam_schedule: Literal["constant", "linear"] = "constant"  # over a row's steps; linear: lambda s / S
    eps_lo: float = 0.2  # lower clip (paper: 0.2; train_vision_egspo.sh: 0.5)
    eps_hi: float = 0.5  # upper clip (paper: 0.5)
    beta: float = 0.0  # weight of the KL to the model before training (paper: 0.04); 0: no reference model

    # The optimizer, AdamW.
    passes: int = 1  # passes over the kept steps of a rollout
    minibatches: int = 4  # optimizer steps per pass, each on whole groups (released scripts: 4 or 1)
    lr: float = 1e-4  # learning rate (paper: 3e-5 with LoRA; full fine-tuning of an LLM: start at 1e-6)
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two moments (released: these)
    weight_decay: float = 0.01  # (released: 0.1, on LoRA's weights)
    warmup: int = 0  # optimizer steps until the learning rate is whole (released: 1e-4 of the run)
    grad_norm: float = 1.0  # gradient clipping (paper: 0.2)

    def __post_init__(self):
        assert 1 <= self.K <= self.S, f"--K {self.K} must be from 1 to S = {self.S}"
        assert self.eps_lo <= 1, "--eps_lo must be at most 1: a ratio is never below 0"


def step_entropy(roll: Rollout) -> tuple[Tensor, Tensor]:
    """H (B, S): mean entropy of the tokens each step revealed; taken (B, S): did the row take the step?"""
    count = per_step(torch.ones_like(roll.entropy), roll.revealed_at, roll.S)
    return per_step(roll.entropy, roll.revealed_at, roll.S) / count.clamp(min=1), count > 0


def select_steps(roll: Rollout, K: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The K steps of highest mean entropy of each row, highest first: steps (B, K), taken (B, K).

    taken is False where a row, ended by an EOS, took fewer than K steps. noise (B, S): take K steps at random
    instead, still ranked by entropy."""
    entropy, taken = step_entropy(roll)
    wanted = entropy if noise is None else noise
    # Of steps of equal entropy, topk may pick different ones in different processes. A stable sort does not.
    chosen = wanted.masked_fill(~taken, -1.0).argsort(dim=1, descending=True, stable=True)[:, :K]
    by_entropy = entropy.gather(1, chosen).masked_fill(~taken.gather(1, chosen), -1.0)
    steps = chosen.gather(1, by_entropy.argsort(dim=1, descending=True, stable=True))
    return steps, taken.gather(1, steps)


def draw_steps(roll: Rollout, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw K steps of each row with replacement, P(s) = H_s / sum of H. noise (B, K) is uniform.

    Returns steps (B, K), highest entropy first; taken (B, K), False in a row without any entropy, which has
    no gradient either; and weight (B, K) = 1 / (S P(s)), with which the mean over the draws is on average the
    mean over all S steps. On the CPU: CUDA adds in any order, so processes would draw other steps."""
    H = step_entropy(roll)[0].cpu().double()  # (B, S)
    cumulated = H.cumsum(1)
    total = cumulated[:, -1:]
    # The first step whose cumulated entropy exceeds the number drawn.
    steps = torch.searchsorted(cumulated, noise.cpu() * total, right=True)
    steps = steps.clamp(max=roll.S - 1)  # rounding, or a row without any entropy
    entropy, order = H.gather(1, steps).sort(dim=1, descending=True, stable=True)
    taken = entropy > 0
    weight = taken * total / (roll.S * entropy.masked_fill(~taken, 1.0))
    device = roll.logp.device
    return steps.gather(1, order).to(device), taken.to(device), weight.to(roll.logp)


def stepwise_return(reward: Tensor, guess_reward: Tensor, lam: float | Tensor) -> Tensor:
    """(B,) rewards, (B, K) rewards of the guesses to returns (B, K): credit for improving on the guess."""
    reward = reward[:, None]
    return (reward + lam * (reward - guess_reward)) / (1 + lam)


def advantage(ret: Tensor, taken: Tensor, G: int) -> Tensor:
    """Advantages (B, K): each return (B, K) minus its group's mean in the same column.

    0 where a row did not take the step, or where a whole group is equal."""
    ret, taken = ret.view(-1, G, ret.shape[1]), taken.view(-1, G, ret.shape[1])  # (prompts, G, K)
    mean = (ret * taken).sum(1, keepdim=True) / taken.sum(1, keepdim=True).clamp(min=1)
    highest = ret.masked_fill(~taken, -torch.inf).amax(1, keepdim=True)
    lowest = ret.masked_fill(~taken, torch.inf).amin(1, keepdim=True)
    # Exactly 0 if all returns are equal: subtraction would leave +-1e-8, which Adam scales up to full steps.
    return ((ret - mean) * (taken & (highest > lowest))).flatten(0, 1)


def stepwise_advantage(
    reward: Tensor, guess_reward: Tensor, steps: Tensor, taken: Tensor, G: int, S: int,
    lam: float | Tensor, baseline: str,
) -> Tensor:
    """A (B, K) of rewards (B,), the guesses' (B, K) and lambda, one number or (B, K).

    baseline "rank": subtract the group's mean at the same rank. "step": centre R over the group, and r_s over
    its rows that kept the same step."""
    if baseline == "rank":
        return advantage(stepwise_return(reward, guess_reward, lam), taken, G)
    # r_s in the column of its step, so that a mean over a column is over one step.
    at_step = reward.new_zeros(len(steps), S).scatter(1, steps, guess_reward * taken)
    kept = taken.new_zeros(len(steps), S).scatter(1, steps, taken)
    guess_adv = advantage(at_step, kept, G).gather(1, steps)
    any_step = taken[:, :1]  # (B, 1) False only in a row without entropy of which `importance` drew nothing
    return (advantage(reward[:, None], any_step, G) - lam / (1 + lam) * guess_adv) * taken


def step_logp(model: Denoiser, x: Tensor, roll: Rollout, s: Tensor, temperature: float) -> Tensor:
    """l(b, s) (M,): log p of what step s (M,) of rows `roll` revealed, on the canvas x (M, P+L) before it."""
    revealed = roll.revealed_at == s[:, None]  # (M, L)
    return score(model, x, roll.prompt_mask, roll.completion, revealed, temperature).sum(1)


def policy_loss(
    logp: Tensor, logp_old: Tensor, adv: Tensor, eps_lo: float, eps_hi: float
) -> tuple[Tensor, Tensor]:
    """PPO-clipped loss of each (row, step) pair and whether the clip took its gradient away. All (M,)."""
    ratio = (logp - logp_old).exp()  # 1, up to rounding, until the first optimizer step on a rollout
    clipped = ratio.clamp(1 - eps_lo, 1 + eps_hi)
    gain = torch.min(ratio * adv, clipped * adv)  # pessimistic of the two
    return -gain, gain < ratio * adv


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from the policy's samples, >= 0."""
    # Its gradient, with the samples fixed, is on average that of KL(reference || policy).
    d = logp_ref - logp
    return d.exp() - d - 1


def train(args: Args, model: Denoiser, task: Task, run: Run):
    """Train `model` in place on the prompts of `task`, for the updates of `run`."""
    reference = model.frozen() if args.beta else None  # the model before training
    optimizer = torch.optim.AdamW(
        model.network.parameters(), args.lr, betas=args.betas, weight_decay=args.weight_decay,
        fused=model.device.type == "cuda")  # fused: needs less memory
    K, n = args.S if args.select == "all" else args.K, args.L // args.S

    for update in run.updates(model, optimizer):
        # 1 Roll out: G completions of each prompt.
        drawn = draw_prompts(len(task.train), args.prompts, args.seed, update)
        rows = [task.train[i] for i in drawn for _ in range(args.G)]  # B rows
        prompt, prompt_mask = encode(model, [row["prompt"] for row in rows])  # (B, P)
        gens = [generator(model.device, args.seed, "rollout", update, i) for i in drawn]
        roll = roll_out(model, prompt, prompt_mask, gens, L=args.L, S=args.S, block=args.block,
                        temperature=args.temperature, order=args.order,
                        guess="greedy" if args.lam > 0 else None, budget=args.budget)
        gens = [generator(model.device, args.seed, "select", update, i) for i in drawn]
        if args.select == "importance":
            steps, taken, weight = draw_steps(roll, group_noise(gens, len(rows), (K,)))  # (B, K)
        else:
            noise = group_noise(gens, len(rows), (args.S,)) if args.select == "uniform" else None
            steps, taken = select_steps(roll, K, noise)  # (B, K)
            weight = taken.to(roll.logp)  # all count alike

        # 2 Reward: of the completions, and of the one-step guesses at the kept steps.
        reward, parts, _ = reward_rows(model, task, roll.completion, rows)  # (B,)
        guess_reward = reward.new_zeros(len(rows), K)
        if args.lam > 0:
            guess = roll.guess.gather(1, steps[..., None].expand(-1, -1, args.L)).flatten(0, 1)  # (B * K, L)
            guess_rows = [row for row in rows for _ in range(K)]
            guess_reward = reward_rows(model, task, guess, guess_rows)[0].view(-1, K)

        # 3 Advantage, and the log-probabilities that the tokens were sampled with.
        lam = args.lam * steps / args.S if args.lam_schedule == "linear" else args.lam
        adv = stepwise_advantage(reward, guess_reward, steps, taken, args.G, args.S, lam, args.baseline)
        logp_old = per_step(roll.logp, roll.revealed_at, args.S).gather(1, steps)  # (B, K)

        # 4 Update, on the canvases before the kept steps.
        x = canvas(roll, roll.revealed_at[:, None] >= steps[..., None])  # (B, K, P+L)
        pairs = taken.nonzero()  # (M, 2): a row and one of its K steps
        if not reference:  # without a KL, an advantage of 0 cannot move a weight: such pairs are left out
            pairs = worth_scoring(model, pairs, adv[pairs[:, 0], pairs[:, 1]] != 0, args.passes)
        tokens = len(rows) // args.minibatches * K * n  # of a minibatch, those of steps not taken included
        infos = []
        for pass_no in range(args.passes):
            gen = generator("cpu", args.seed, "pass", update, pass_no)
            for batch in minibatches(pairs, args.prompts, args.G, args.minibatches, gen):
                info = dict.fromkeys(("loss", "kl", "clip_frac"), 0.0)
                for micro in micro_batches(model, batch, x, args.budget):
                    r, k = micro.unbind(1)
                    logp = step_logp(model, x[r, k], roll[r], steps[r, k], args.temperature)  # (M,)
                    loss, was_clipped = policy_loss(logp, logp_old[r, k], adv[r, k], args.eps_lo, args.eps_hi)
                    if reference:
                        with torch.no_grad():
                            logp_ref = step_logp(reference, x[r, k], roll[r], steps[r, k], args.temperature)
                        kl = k3(logp, logp_ref)
                        loss = loss + args.beta * kl
                        info["kl"] += kl.sum().item() / len(batch)
                    loss = loss * weight[r, k]
                    loss = loss.sum() / tokens
                    loss.backward()
                    info["loss"] += loss.item()
                    info["clip_frac"] += was_clipped.sum().item() / len(batch)
                info = model.total(info)  # over the processes, if there are several
                info["grad_norm"] = run.step(info["loss"], args.grad_norm, args.warmup)
                infos.append(info)

        # 5 Log.
        run.log(rollout_metrics(roll, reward, parts, args.G), infos)


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words (LLM).
# As in the released train.sh, LLM has G, L, S, block, T, K, lambda, beta, both eps, grad_norm and betas. Ours
# are 4 prompts (theirs: 6), one optimizer step per rollout (theirs: 4), full fine-tuning at lr 1e-6 and
# weight decay 0.01 (theirs: LoRA of rank 128 on 4-bit weights, at 3e-5 and 0.1) and no warm-up (theirs: over
# 1e-4 of the steps, then constant).
# Their train_vision_egspo.sh, GSM8K too, has lambda 0.1 and a return not divided by 1 + lambda, eps_lo 0.5,
# l(b, s) as the mean over its tokens, r_s of the correctness reward alone, and one step per rollout.
SUDOKU = dict(lr=5e-5, updates=160, eval_every=40)
COUNTDOWN = dict(L=8, S=4, block=4, G=8, minibatches=2, lr=2e-4, updates=200)
LLM = dict(prompts=4, G=8, L=256, S=128, block=32, minibatches=1, temperature=0.9, K=8, beta=0.04, lr=1e-6,
           grad_norm=0.2)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
