"""RLDF: reinforcement learning from denoising feedback ("Drift", arXiv 2605.25638).

Rows are decoded adaptively: a step reveals every token the model is confident of (`threshold`), so easy rows
take few steps. The update looks again at K of a row's steps, the surprising ones more often, and learns from
all hidden tokens there, not only from those the step revealed:

    K of the steps that the row took: P(s) = softmax(w / tau), w_s = -mean log p of the tokens s revealed
    canvas: the row as the sampler had it before step s
    m = hidden and valid and (p(token | canvas) >= p_min or revealed at s)           ("clipped clean state")
    loss = sum over canvases and tokens of m (-A log p + beta k3) / sum of m
    A = (R - mean R) / max(std R, 0.01) over the group

The K are drawn without replacement. A row that took fewer than K steps has each of them once, and the others
of its K are repeats. The bias towards surprising steps is intended: there is no importance weight 1 / P(s).
With several passes over a rollout, PPO's clipped ratio takes the place of -A log p. The p in m is then that
of the policy before the first pass. Look at draw_steps and clean_state_mask first.

Differences from the paper: p_min is 0, so that every hidden token is scored (it learned more on the
validation rows); several minibatches; small-batch defaults for the tiny model. LLM has the paper's settings.
Without a KL, a minibatch of advantages 0 makes no optimizer step: its gradient is 0, and AdamW would still
move the weights by momentum and weight decay.
Differences from the authors' code, each with its commit, are in results/README.md.

python rldf.py                         4x4 Sudoku, 26 to 96 % of the held-out boards, in under a minute
python rldf.py --task countdown        expressions, 18 to 36 %
python rldf.py --p_min 0.6             the paper's clipping of the clean state
python rldf.py --select uniform        an ablation: steps drawn uniformly
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
    prompts: int = 32  # prompts per rollout
    G: int = 16  # samples per prompt (a group)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 256); with a threshold, those of evaluation alone
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    order: Literal["confidence", "top_prob", "random"] = "confidence"  # (paper: confidence)
    threshold: float = 0.9  # reveal tokens at least this probable (paper: 0.9); 0: S steps of equal size
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; results do not depend on it

    # The method.
    K: int = 4  # denoising steps per row (paper: k = 4)
    tau: float = 1.0  # temperature of the draw of steps (paper: 1)
    select: Literal["surprise", "uniform"] = "surprise"  # how steps are drawn (paper: surprise)
    masks: Literal["sequential", "random"] = "sequential"  # the sampler's states (paper), or 30 % hidden
    p_min: float = 0.0  # score hidden tokens at least this probable (paper: 0.6); 0: all; 2: the revealed
    eps: float = 0.2  # clip of the ratio, used when passes > 1
    beta: float = 0.0  # weight of the KL to the model before training (paper: 0.01); 0: no reference model

    # The optimizer, AdamW.
    passes: int = 1  # passes over a rollout (paper: 1)
    minibatches: int = 2  # optimizer steps per pass, each on whole groups (paper: 1)
    lr: float = 2e-4  # learning rate (paper: 1e-6)
    betas: tuple[float, float] = (0.9, 0.999)  # decay of Adam's two moments (released code: PyTorch's own)
    weight_decay: float = 0.01  # (released: 0 for LLaDA, 0.01 for Dream)
    warmup: int = 0  # optimizer steps until the learning rate is whole (released: 0)
    grad_norm: float = 1.0  # gradient clipping (paper: 1)

    def __post_init__(self):
        assert 1 <= self.K <= self.most_steps, (
            f"--K {self.K} must be at least 1 and at most {self.most_steps}, the steps a row can take")
        assert self.tau > 0 and self.threshold <= 1 and self.eps <= 1, (
            "--tau must be above 0, --threshold and --eps at most 1")
        assert not (self.threshold and self.order == "random"), (
            "--order random has no probability to compare with a threshold: use --threshold 0")

    @property
    def most_steps(self) -> int:
        """The most denoising steps that a row can take."""
        return self.L if self.threshold else self.S


def step_surprise(roll: Rollout) -> tuple[Tensor, Tensor]:
    """w (B, S): mean -log p of the valid tokens each step revealed; candidates (B, S): did it reveal any?"""
    count = per_step(roll.valid.to(roll.logp), roll.revealed_at, roll.S)
    return -per_step(roll.logp * roll.valid, roll.revealed_at, roll.S) / count.clamp(min=1), count > 0


def draw_steps(w: Tensor, candidates: Tensor, K: int, tau: float, noise: Tensor) -> Tensor:
    """K steps per row, P = softmax(w / tau) over the candidates, without replacement: (B, K).

    noise (B, 1+K, S), uniform. noise[:, 0] draws by Gumbel-top-k. A row with fewer than K candidates takes
    them all, and noise[:, 1 + j] draws a repeat for place j."""
    gumbel = -(-noise.log()).log()
    logits = (w / tau).masked_fill(~candidates, -torch.inf)
    first = (logits + gumbel[:, 0]).topk(K).indices
    again = (logits[:, None] + gumbel[:, 1:]).argmax(2)
    enough = torch.arange(K, device=w.device) < candidates.sum(1, keepdim=True)
    return torch.where(enough, first, again)


def canvas_logp(model: Denoiser, x: Tensor, roll: Rollout, hidden: Tensor, temperature: float) -> Tensor:
    """log p (M, L) of the valid tokens of rows `roll` that are hidden (M, L) on canvases x (M, P+L)."""
    return score(model, x, roll.prompt_mask, roll.completion, hidden & roll.valid, temperature)


def clean_state_mask(p: Tensor, hidden: Tensor, valid: Tensor, revealed: Tensor, p_min: float) -> Tensor:
    """m (M, L): the hidden valid tokens that are scored, confident ones and those revealed at s."""
    return hidden & valid & ((p >= p_min) | revealed)


def advantage(reward: Tensor, G: int) -> Tensor:
    """(R - mean) / max(std, 0.01) in each group, ddof 1; exactly 0 where a whole group is equal. (B,)."""
    group = reward.view(-1, G)
    unequal = group.amax(1, keepdim=True) > group.amin(1, keepdim=True)
    adv = (group - group.mean(1, keepdim=True)) / group.std(1, keepdim=True).clamp(min=1e-2)
    return (adv * unequal).flatten()


def token_loss(logp: Tensor, logp_old: Tensor | None, adv: Tensor, eps: float) -> Tensor:
    """-A log p per token (M, L), or PPO-clip once there is an old policy to compare with. adv: (M,)."""
    adv = adv[:, None]
    if logp_old is None:
        return -adv * logp
    ratio = (logp - logp_old).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv)


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
                        temperature=args.temperature, order=args.order, threshold=args.threshold or None,
                        budget=args.budget)

        # 2 Reward.
        reward, parts, _ = reward_rows(model, task, roll.completion, rows)  # (B,)

        # 3 Advantage.
        adv = advantage(reward, args.G)  # (B,)

        # 4 Canvases to learn from: the sampler's states before K steps, or random masks.
        w, candidates = step_surprise(roll)  # (B, S)
        w = w if args.select == "surprise" else torch.zeros_like(w)
        gens = [generator(model.device, args.seed, "steps", update, i) for i in drawn]
        noise = group_noise(gens, len(rows), (1 + args.K, roll.S))
        steps = draw_steps(w, candidates, args.K, args.tau, noise)  # (B, K)
        hidden = roll.revealed_at[:, None] >= steps[..., None]  # (B, K, L)
        revealed = roll.revealed_at[:, None] == steps[..., None]
        if args.masks == "random":  # positions that no step revealed stay hidden
            gens = [generator(model.device, args.seed, "canvas", update, i) for i in drawn]
            chosen = group_noise(gens, len(rows), (args.K, args.L)) < 0.3
            hidden = (chosen & roll.valid[:, None]) | (roll.revealed_at == roll.S)[:, None]
            revealed = hidden
        x = canvas(roll, hidden)  # (B, K, P+L)
        pairs = torch.ones_like(steps).nonzero()  # (B * K, 2): a row and one of its canvases
        logp_old = None
        if args.passes > 1:
            logp_old = torch.zeros(hidden.shape, device=model.device, dtype=roll.logp.dtype)  # (B, K, L)
            with torch.no_grad():
                for micro in micro_batches(model, pairs, x, args.budget):
                    r, k = micro.unbind(1)
                    logp_old[r, k] = canvas_logp(model, x[r, k], roll[r], hidden[r, k], args.temperature)
            logp_old = model.total(logp_old)  # over the processes, if there are several

        # 5 Update. Without a KL, an advantage of 0 cannot move a weight; its tokens count in the normaliser.
        asks_p = logp_old is None and args.p_min > 0  # does it take a forward to know which tokens count?
        infos = []
        for pass_no in range(args.passes):
            gen = generator("cpu", args.seed, "pass", update, pass_no)
            for batch in minibatches(pairs, args.prompts, args.G, args.minibatches, gen):
                moves = (adv[batch[:, 0]] != 0) | (reference is not None)  # (M,)
                if not (asks_p and moves.any()):  # what moves no weight needs no forward: only counted
                    worth_scoring(model, batch, moves, times=1)
                if not moves.any():
                    continue
                info = dict.fromkeys(("loss", "kl", "scored_tokens"), 0.0)
                with torch.no_grad():
                    for micro in micro_batches(model, batch[~moves], x, args.budget):
                        r, k = micro.unbind(1)
                        if asks_p:
                            logp = canvas_logp(model, x[r, k], roll[r], hidden[r, k], args.temperature)
                        else:  # with p_min 0 any probability will do
                            logp = roll.logp[r] if logp_old is None else logp_old[r, k]
                        m = clean_state_mask(logp.exp(), hidden[r, k], roll.valid[r], revealed[r, k],
                                             args.p_min)
                        info["scored_tokens"] += m.sum().item()
                for micro in micro_batches(model, batch[moves], x, args.budget):
                    r, k = micro.unbind(1)
                    logp = canvas_logp(model, x[r, k], roll[r], hidden[r, k], args.temperature)  # (M, L)
                    old = None if logp_old is None else logp_old[r, k]
                    p = (logp.detach() if old is None else old).exp()
                    m = clean_state_mask(p, hidden[r, k], roll.valid[r], revealed[r, k], args.p_min)
                    loss = token_loss(logp, old, adv[r], args.eps)
                    if reference:
                        with torch.no_grad():
                            logp_ref = canvas_logp(reference, x[r, k], roll[r], hidden[r, k],
                                                   args.temperature)
                        kl = k3(logp, logp_ref)
                        loss = loss + args.beta * kl
                        info["kl"] += (kl * m).sum().item()
                    loss = (loss * m).sum()  # divided by the number of scored tokens once all are counted
                    loss.backward()
                    info["loss"] += loss.item()
                    info["scored_tokens"] += m.sum().item()
                info = model.total(info)  # over the processes, if there are several
                scored = max(info["scored_tokens"], 1)
                for parameter in model.network.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= scored
                info["loss"], info["kl"] = info["loss"] / scored, info["kl"] / scored
                info["grad_norm"] = run.step(info["loss"], args.grad_norm, args.warmup)
                infos.append(info)

        # 6 Log.
        run.log(rollout_metrics(roll, reward, parts, args.G), infos)


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words (LLM).
# LLM is the released script for LLaDA and MATH throughout, full fine-tuning without warm-up included, except
# that a rollout has 8 prompts on however many GPUs (8 on each).
SUDOKU = dict(lr=1e-4, updates=100, eval_every=25)
COUNTDOWN = dict(L=8, S=4, block=4, prompts=16, minibatches=4, lr=1e-4, updates=150)
LLM = dict(prompts=8, G=4, L=256, S=256, block=32, minibatches=1, p_min=0.6, beta=0.01, lr=1e-6,
           weight_decay=0.0)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
