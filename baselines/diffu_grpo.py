"""diffu-GRPO, the RL of d1 (arXiv 2504.12216): GRPO on a one-step likelihood of each token.

A diffusion model has no likelihood of a token given those before it. d1 takes the one of a single canvas, on
which the WHOLE completion is hidden and each prompt token with probability 0.15 (q'):

    loss = mean over rows of (1 / |o|) sum over tokens of o of [-min(rho A, clip(rho, 1 -+ eps) A) + beta k3]
    rho  = p_theta(token | q') / p_old(token | q'),   A = R - mean R of the group

Old, reference and new policy see the same q' within a pass; each pass has its own. That canvas does not
contain the completion, so one forward per prompt serves all G of them. At ratio 1 this is wd1 with
-A / (G |o|) in place of its weights w- - w+.

Written without the authors' code (d1, commit 837888f) and later compared with it on the same inputs: the
gradients are equal where all answers of a micro-batch have one length. Our reading: the old log-probabilities
of every pass are taken before the first optimizer step on a rollout.
Differences from that code: it pools the tokens of a micro-batch, so that a longer answer weighs more (ours:
the mean over each answer, as the paper prints it); it samples at T 0.9 and scores at T 1; it draws a prompt
mask for each row, in which padding may be hidden, and with gradient accumulation uses half of them (ours: one
for a prompt, so G times fewer forwards); it trains a LoRA on 4-bit weights. Ours has minibatches and no SFT
stage before RL; without a KL it does not evaluate rows of advantage 0; its defaults are for the tiny model.

python baselines/diffu_grpo.py                   4x4 Sudoku, 26 to 74 % in 64 s
python baselines/diffu_grpo.py --hide_prompt 0   the whole prompt shown: every pass sees the same canvas
"""

import sys
from dataclasses import dataclass, replace
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
    prompts: int = 32  # prompts per rollout
    G: int = 8  # samples per prompt (a group; released: 6)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 128)
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    order: Literal["confidence", "top_prob", "random"] = "confidence"  # (released: confidence)
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; results do not depend on it

    # The method.
    hide_prompt: float = 0.15  # share of prompt tokens hidden (paper: 0.15)
    eps: float = 0.2  # clip (released: 0.5)
    beta: float = 0.0  # weight of the KL to the model before training (released: 0.04); 0: no reference

    # The optimizer, AdamW.
    passes: int = 8  # mu, passes per rollout, each with a new prompt mask (released: see LLM)
    minibatches: int = 1  # optimizer steps per pass, each on whole groups
    lr: float = 3e-5  # learning rate
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two moments
    weight_decay: float = 0.01  # (released: 0.1)
    warmup: int = 0  # optimizer steps until the learning rate is whole (released: 1e-4 of the run)
    grad_norm: float = 1.0  # gradient clipping

    def __post_init__(self):
        assert self.hide_prompt <= 1 and self.eps <= 1, "--hide_prompt and --eps must be at most 1"


def advantage(reward: Tensor, G: int) -> Tensor:
    """R minus the group's mean; exactly 0 where a whole group is equal. (B,)."""
    group = reward.view(-1, G)
    unequal = group.amax(1, keepdim=True) > group.amin(1, keepdim=True)
    return ((group - group.mean(1, keepdim=True)) * unequal).flatten()


def hide_tokens(prompt: Tensor, prompt_mask: Tensor, share: float, mask_id: int, gens: list) -> Tensor:
    """Prompts (prompts, P) with each real token hidden with probability `share`; one generator per prompt.

    Drawn from the prompt's end, so that left padding does not change the draw."""
    draw = [torch.rand(prompt.shape[1], generator=gen, device=prompt.device).flip(0) for gen in gens]
    return prompt.masked_fill((torch.stack(draw) < share) & prompt_mask, mask_id)


def one_step_logp(model: Denoiser, x: Tensor, roll: Rollout, temperature: float) -> Tensor:
    """log p(token | x) of the valid tokens of rows `roll`, 0 elsewhere: (M, L). x (M, P+L) hides them all."""
    return score(model, x, roll.prompt_mask, roll.completion, roll.valid, temperature)


def token_loss(logp: Tensor, logp_old: Tensor, adv: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """PPO-clipped loss of each token (M, L), adv (M,), and whether the clip took its gradient away."""
    ratio, adv = (logp - logp_old).exp(), adv[:, None]
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

        # 4 The canvas of each pass, and the log-probabilities on it to compare with.
        canvases, first = [], slice(None, None, args.G)  # the first row of each prompt
        for pass_no in range(args.passes):
            gens = [generator(model.device, args.seed, "prompt mask", update, pass_no, i) for i in drawn]
            masked = hide_tokens(prompt[first], prompt_mask[first], args.hide_prompt, model.mask_id, gens)
            shown = replace(roll, prompt=masked.repeat_interleave(args.G, 0))
            canvases.append(canvas(shown, torch.ones_like(roll.valid)))
        x = torch.stack(canvases, 1)  # (B, passes, P+L), equal for the G rows of a prompt: one forward
        pairs = torch.ones_like(x[..., 0]).nonzero()  # (M, 2): a row and a pass
        if not reference:  # without a KL, an advantage of 0 cannot move a weight
            pairs = worth_scoring(model, pairs, adv[pairs[:, 0]] != 0, times=2)  # old and new
        logp_old = roll.logp.new_zeros(len(rows), args.passes, args.L)
        logp_ref = torch.zeros_like(logp_old)
        with torch.no_grad():
            for micro in micro_batches(model, pairs, x, args.budget):
                r, k = micro.unbind(1)
                logp_old[r, k] = one_step_logp(model, x[r, k], roll[r], args.temperature)
                if reference:
                    logp_ref[r, k] = one_step_logp(reference, x[r, k], roll[r], args.temperature)
        logp_old, logp_ref = model.total(logp_old), model.total(logp_ref)  # over the processes

        # 5 Update.
        infos = []
        for pass_no in range(args.passes):
            gen = generator("cpu", args.seed, "pass", update, pass_no)
            of_pass = pairs[pairs[:, 1] == pass_no]
            for batch in minibatches(of_pass, args.prompts, args.G, args.minibatches, gen):
                info = dict.fromkeys(("loss", "kl", "clip_frac"), 0.0)
                scored = roll.valid[batch[:, 0]].sum().item()
                for micro in micro_batches(model, batch, x, args.budget):
                    r, k = micro.unbind(1)
                    logp, valid = one_step_logp(model, x[r, k], roll[r], args.temperature), roll.valid[r]
                    loss, was_clipped = token_loss(logp, logp_old[r, k], adv[r], args.eps)  # (M, L)
                    if reference:
                        kl = k3(logp, logp_ref[r, k])
                        loss = loss + args.beta * kl
                        info["kl"] += kl.sum().item() / scored
                    loss = (loss * valid).sum(1) / valid.sum(1)  # (M,) mean over the tokens of a completion
                    loss = loss.sum() * args.minibatches / len(rows)  # mean over rows
                    loss.backward()
                    info["loss"] += loss.item()
                    info["clip_frac"] += (was_clipped & valid).sum().item() / scored
                info = model.total(info)  # over the processes, if there are several
                info["grad_norm"] = run.step(info["loss"], args.grad_norm, args.warmup)
                infos.append(info)

        # 6 Log.
        run.log(rollout_metrics(roll, reward, parts, args.G), infos)


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words.
SUDOKU = dict(lr=1.5e-5, updates=75, eval_every=15)
COUNTDOWN = dict(L=8, S=4, block=4, passes=2, minibatches=4, updates=120, eval_every=30)
# Released (d1, commit 837888f): G, eps, beta, mu (Sudoku and Countdown: 8), weight decay; and T, but for
# rollouts alone. Ours: 4 prompts, theirs 16; all weights, theirs a LoRA of rank 128 on 4-bit weights; no
# warm-up, theirs 1e-4 of the run. L, S, block, lr and clip are those of wd1's script.
LLM = dict(prompts=4, G=6, L=256, S=128, block=32, minibatches=1, temperature=0.9, eps=0.5, beta=0.04,
           passes=12, lr=3e-6, weight_decay=0.1, grad_norm=0.2)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
