"""JustGRPO ("The Flexibility Trap", arXiv 2601.15165): GRPO on a diffusion model that writes left to right.

Rollouts reveal one token at a time from left to right, whatever the model is sure of. Then a completion has a
likelihood, exactly, a product of probabilities each with everything behind the token hidden, and plain GRPO
applies:

    loss = mean over rows of (1 / L) sum over tokens t of [-min(rho A, clip(rho, 1 -+ eps) A) + beta k3]
    rho  = p_theta(o_t | q, o_<t, rest hidden) / p_old(...),   A = (R - mean R) / (std R + 1e-4) of the group

The mean is over the rows of advantage other than 0, as in the authors' code; with a KL it is over all. Where
one step is made on a rollout, as by the authors, rho is 1 and the clip never acts. The four minibatches that
suit the tiny model make real ratios.

`--normalise none` leaves out the std and takes the mean over all rows. Its expectation at theta_old is then
(G - 1) / (G L) times the exact policy gradient of that order (tests/test_baselines.py, by enumeration). It is
`egspo.py --lam 0 --select all` with steps that reveal the next token. So it costs what EGSPO would with
K = L: L canvases a row, minus those that rows share. Rows with a common beginning share many.

EVALUATION is that of all methods: S steps, most certain first. --S and --block affect the evaluation only.
What is learned in one order is used in another, which is the paper's claim ("fully retaining the parallel
decoding ability"). It is about mathematics and code: for Sudoku its abstract says that free order helps.

Written without the authors' code (commit eebe50e) and later compared with it on the same inputs: for one
advantage on both sides the gradients are equal. The old log-probabilities are those the sampler recorded.
Differences from that code: it samples and scores all L tokens, as if there were no EOS (ours: blocks of one
token, and a row ends with its first EOS); it counts the rows of advantage other than 0 on each device and
averages that (ours: in each minibatch); it has no KL. Ours has minibatches; without a KL it does not evaluate
rows of advantage 0; its defaults are for the tiny model.

python baselines/just_grpo.py                    4x4 Sudoku, 26 to 75 % in 63 s
python baselines/just_grpo.py --normalise none   the exact policy gradient of its order
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script of this folder, started from anywhere

from common import (Denoiser, Rollout, Run, Task, canvas, draw_prompts, encode, generator,  # noqa: E402
                    micro_batches, minibatches, reward_rows, roll_out, rollout_metrics, score,
                    worth_scoring)


@dataclass
class Args:
    # (LLM: x) is the setting for real models, of which there are more at the end of this file.

    # The rollout.
    prompts: int = 16  # prompts per rollout
    G: int = 16  # samples per prompt (a group; released: 16)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps of an evaluation; a rollout takes L, a token each (LLM: 128)
    block: int = 16  # tokens per block in an evaluation; 1 in a rollout (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; results do not depend on it

    # The method.
    normalise: Literal["released", "none"] = "released"  # none: no std, and the mean over all rows
    eps: float = 0.2  # clip (released: never acts, since the ratio is 1)
    beta: float = 0.0  # weight of the KL to the model before training (released: none); 0: no reference

    # The optimizer, AdamW.
    passes: int = 1  # passes over the tokens of a rollout
    minibatches: int = 4  # optimizer steps per pass, each on whole groups (released: 1)
    lr: float = 1e-4  # learning rate (released: 5e-6)
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two moments (released: 0.9, 0.999)
    weight_decay: float = 0.01  # (released: 0)
    warmup: int = 0  # optimizer steps until the learning rate is whole (released: 0)
    grad_norm: float = 1.0  # gradient clipping (released: 0.125 in this file's scale)

    def __post_init__(self):
        assert self.eps <= 1, "--eps must be at most 1: a ratio is never below 0"


def advantage(reward: Tensor, G: int, normalise: str) -> Tensor:
    """(R - the group's mean) / (its std + 1e-4), or without the division; exactly 0 where a whole group is
    equal. (B,)."""
    group = reward.view(-1, G)
    equal = group.amax(1, keepdim=True) == group.amin(1, keepdim=True)
    scale = group.std(1, keepdim=True) + 1e-4 if normalise == "released" else 1.0
    return ((group - group.mean(1, keepdim=True)) / scale).masked_fill(equal, 0.0).flatten()


def token_logp(model: Denoiser, x: Tensor, roll: Rollout, t: Tensor, temperature: float) -> Tensor:
    """log p (M,) of token t (M,) of rows `roll`, on canvas x (M, P+L), which hides it and all behind it."""
    place = torch.arange(roll.completion.shape[1], device=t.device)
    return score(model, x, roll.prompt_mask, roll.completion, place == t[:, None], temperature).sum(1)


def token_loss(logp: Tensor, logp_old: Tensor, adv: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """PPO-clipped loss of each token and whether the clip took its gradient away. All (M,)."""
    ratio = (logp - logp_old).exp()  # 1, up to rounding, until the first optimizer step on a rollout
    gain = torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv)  # pessimistic of the two
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

    for update in run.updates(model, optimizer):
        # 1 Roll out: G completions of each prompt, left to right.
        drawn = draw_prompts(len(task.train), args.prompts, args.seed, update)
        rows = [task.train[i] for i in drawn for _ in range(args.G)]  # B rows
        prompt, prompt_mask = encode(model, [row["prompt"] for row in rows])  # (B, P)
        gens = [generator(model.device, args.seed, "rollout", update, i) for i in drawn]
        roll = roll_out(model, prompt, prompt_mask, gens, L=args.L, S=args.L, block=1,
                        temperature=args.temperature, budget=args.budget)

        # 2 Reward.
        reward, parts, _ = reward_rows(model, task, roll.completion, rows)  # (B,)

        # 3 Advantage.
        adv = advantage(reward, args.G, args.normalise)  # (B,)

        # 4 Update, on the canvas of each token, which hides it and all behind it.
        behind = torch.ones(args.L, args.L, dtype=torch.bool, device=model.device).triu()  # t and after
        x = canvas(roll, behind.expand(len(rows), -1, -1))  # (B, L, P+L)
        pairs = roll.valid.nonzero()  # (M, 2): a row and one of its tokens
        if not reference:  # without a KL, an advantage of 0 cannot move a weight
            pairs = worth_scoring(model, pairs, adv[pairs[:, 0]] != 0, args.passes)
        infos = []
        for pass_no in range(args.passes):
            gen = generator("cpu", args.seed, "pass", update, pass_no)
            for batch in minibatches(pairs, args.prompts, args.G, args.minibatches, gen):
                info = dict.fromkeys(("loss", "kl", "clip_frac"), 0.0)
                # The rows of the mean: all of the minibatch, or those it scores.
                every = len(rows) / args.minibatches
                count = every if args.normalise == "none" else batch[:, 0].unique().numel()
                for micro in micro_batches(model, batch, x, args.budget):
                    r, t = micro.unbind(1)
                    logp = token_logp(model, x[r, t], roll[r], t, args.temperature)  # (M,)
                    loss, was_clipped = token_loss(logp, roll.logp[r, t], adv[r], args.eps)
                    if reference:
                        with torch.no_grad():
                            logp_ref = token_logp(reference, x[r, t], roll[r], t, args.temperature)
                        kl = k3(logp, logp_ref)
                        loss = loss + args.beta * kl
                        info["kl"] += kl.sum().item() / len(batch)
                    loss = loss.sum() / (args.L * count)
                    loss.backward()
                    info["loss"] += loss.item()
                    info["clip_frac"] += was_clipped.sum().item() / len(batch)
                info = model.total(info)  # over the processes, if there are several
                info["grad_norm"] = run.step(info["loss"], args.grad_norm, args.warmup)
                infos.append(info)

        # 5 Log.
        run.log(rollout_metrics(roll, reward, parts, args.G), infos)


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words; a row
# takes L forwards.
SUDOKU = dict(lr=2e-4, updates=28, eval_every=7)
COUNTDOWN = dict(L=8, S=4, block=4, prompts=32, G=8, updates=52, eval_every=13)
# Released (commit eebe50e): G, T, lr, AdamW, one step on a rollout, no warm-up, all weights, and clip, theirs
# 1 for the sum of 8 micro-batches. Ours: 2 prompts, theirs 64; L, S and block, which are EGSPO's.
LLM = dict(prompts=2, G=16, L=256, S=128, block=32, minibatches=1, temperature=1.0, lr=5e-6,
           betas=(0.9, 0.999), weight_decay=0.0, grad_norm=0.125)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
