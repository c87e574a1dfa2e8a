"""RLDF: reinforcement learning from denoising feedback ("Drift", arXiv 2605.25638).

Rows are decoded adaptively: a step reveals every token the model is confident of (`threshold`), so easy rows
take few steps. The update looks again at k of a row's steps, the surprising ones more often, and learns from
everything the model believes there, not only from what it revealed:

    k steps, drawn without replacement: P(s) = softmax(w / tau), w_s = -mean log p of the tokens s revealed
    canvas: the row as the sampler had it before step s
    m = hidden and valid and (p(token | canvas) >= p_min or revealed at s)           ("clipped clean state")
    loss = sum over canvases and tokens of m (-A log p + beta k3) / sum of m
    A = (R - mean R) / max(std R, 0.01) over the group

With several passes over a rollout, -A log p becomes PPO's clipped ratio and p, in m, that of the policy
before the first. The bias towards surprising steps is intended: no importance weight 1 / P(s).

Differences from the authors' released code: the tail behind an EOS is hidden as the sampler had it (theirs is
visible from the second step on, which gives the length of the answer away); the weights use the sampler's
log-probs (for Dream theirs are uniform); rollouts and training run the same network (theirs: an approximate
prefix cache in rollouts); a row decoded in one step learns too. Their MATH training set contains 248 of the
500 MATH500 questions, and sys.exit() passes their code tests.
Differences from the paper: minibatches; small-batch defaults for the tiny model (LLM has the paper's).

python rldf.py                         4x4 Sudoku, 28 to 57 % solved in 3.1 minutes of RL on 2 CPU cores
python rldf.py --select uniform        the ablations: uniform steps; --p_min 0: no clipping of the clean
                                       state; --canvas random: random masks in place of the sampler's own
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import (Denoiser, Rollout, Run, canvas, denoise, draw_prompts, encode, generator, group_noise,
                    load_task, micro_batches, parse_args, per_step, pick_device, refuse, reward_rows,
                    rollout_metrics, score)
from models import load_model, plan_memory


@dataclass
class Args:
    # <frozen: flags>
    model: str = "tiny"  # "tiny" (built on first use), a transformers folder or a hub id
    revision: str | None = None  # of the hub id
    mask_id: int | None = None  # for a checkpoint that does not say which token is its mask
    task: str = "sudoku"  # sudoku, gsm8k, math, countdown, mbpp or humaneval
    data: str = ""  # local training rows (.json, .jsonl, .csv) in place of the hub's
    test_data: str = ""  # local held-out rows
    seed: int = 1  # decides every random draw of the run, not the tiny base
    out: str = ""  # run folder; empty: runs/<method>-<task>-<seed>
    resume: str = ""  # go on with this run folder
    eval_only: bool = False  # evaluate --resume RUN, or the model as it is, and stop
    eval_every: int = 20  # updates between evaluations on the held-out rows
    eval_threshold: float = 0.9  # evaluate adaptive decoding with this threshold as well; 0: do not
    eval_rows: int = 1024  # held-out rows evaluated, at most
    save_every: int = 10  # updates between checkpoints
    prompts: int = 32  # prompts per rollout
    G: int = 8  # samples per prompt (a group)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 128)
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    budget: int = 8448  # most tokens in one forward
    gradient_checkpointing: bool = False  # less memory for activations, a third more time per update
    # </frozen>
    steps: int = 80  # rollouts, each with its updates
    order: Literal["top_prob", "random", "confidence"] = "confidence"  # of what (paper: the sampled token)
    threshold: float = 0.9  # reveal tokens at least this probable (paper: 0.9); 0: S steps of equal size
    k: int = 4  # denoising steps per row (paper: 4)
    tau: float = 1.0  # tau, temperature of the draw of steps (paper: 1)
    select: Literal["surprise", "uniform"] = "surprise"  # how steps are drawn (paper: surprise)
    canvas: Literal["sequential", "random"] = "sequential"  # sampler's states (paper), or 30 % hidden
    p_min: float = 0.6  # score hidden tokens at least this probable (paper: 0.6); 0: all; 2: the revealed
    eps: float = 0.2  # clip of the ratio, used when passes > 1
    beta: float = 0.0  # weight of the KL to the model before training (paper: 0.01); 0: no reference model
    passes: int = 1  # passes over a rollout (paper: 1)
    minibatches: int = 2  # optimizer steps per pass, each on whole groups (paper: 1)
    lr: float = 1e-4  # AdamW (paper: 1e-6)
    grad_norm: float = 1.0  # gradient clipping (paper: 1)


# Where a model that reads words starts from: the paper's settings, cut to fit a 0.6 B model on 24 GB.
LLM = dict(
    prompts=8, G=4, L=256, S=256, block=32, budget=4096, gradient_checkpointing=True, eval_rows=128,
    eval_every=50, eval_threshold=0.0, save_every=50, minibatches=1, beta=0.01, lr=1e-6)


def step_surprise(roll: Rollout) -> tuple[Tensor, Tensor]:
    """w (B, S): mean -log p of the valid tokens each step revealed; candidates (B, S): did it reveal any?"""
    count = per_step(roll.valid.to(roll.logp), roll.step, roll.S)
    return -per_step(roll.logp * roll.valid, roll.step, roll.S) / count.clamp(min=1), count > 0


def draw_steps(w: Tensor, candidates: Tensor, k: int, tau: float, noise: Tensor) -> Tensor:
    """k steps per row, P = softmax(w / tau) over the candidates, without replacement: (B, k).

    noise (B, 1+k, S), uniform: Gumbel-top-k with the first; a row with fewer candidates takes them all and
    fills up with replacement, one of the others per place."""
    gumbel = -(-noise.log()).log()
    logits = (w / tau).masked_fill(~candidates, -torch.inf)
    first = (logits + gumbel[:, 0]).topk(k).indices
    again = (logits[:, None] + gumbel[:, 1:]).argmax(2)
    enough = torch.arange(k, device=w.device) < candidates.sum(1, keepdim=True)
    return torch.where(enough, first, again)


def canvas_logp(model: Denoiser, roll: Rollout, hidden: Tensor, temperature: float) -> Tensor:
    """log p of the hidden valid tokens of rows `roll` on canvases hidden (M, L): (M, L), one forward."""
    where = hidden & roll.valid
    return score(model, canvas(roll, hidden), roll.prompt_mask, roll.completion, where, temperature)


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
    # with the samples fixed, its gradient is that of KL(reference || policy)
    d = logp_ref - logp
    return d.exp() - d - 1


def train(args: Args) -> float:
    """One run; returns the held-out accuracy at its end."""
    S = args.L if args.threshold else args.S  # most steps a row can take
    if not 1 <= args.k <= S:
        refuse(f"--k {args.k} must be at least 1 and at most {S}, the steps a row can take")
    if args.tau <= 0 or args.threshold > 1:
        refuse("--tau must be above 0 and --threshold at most 1")
    if args.threshold and args.order == "random":
        refuse("--order random has no probability to compare with a threshold: use --threshold 0")
    # <frozen: setup>
    device = pick_device()
    plan_memory(args, device)
    model = load_model(args.model, device, args.revision, args.mask_id, args.gradient_checkpointing)
    task = load_task(args, model)
    # </frozen>
    reference = copy.deepcopy(model) if args.beta and not args.eval_only else None
    optimizer = torch.optim.AdamW(model.network.parameters(), args.lr, betas=(0.9, 0.999),
                                  weight_decay=0.01, fused=device.type == "cuda")  # fused: less memory
    # <frozen: run>
    run = Run(args, METHOD, model, task, optimizer)
    if args.eval_only:
        return run.eval_only()
    # </frozen>

    while not run.boundary():  # 1 save, evaluate
        # 2 roll out: G completions of each prompt
        ids = draw_prompts(args, len(task.train), run.step)
        rows = [task.train[i] for i in ids for _ in range(args.G)]
        prompt, prompt_mask = encode(model, [row["prompt"] for row in rows])
        gens = [generator(device, args.seed, "rollout", run.step, i) for i in ids]
        roll = denoise(model, prompt, prompt_mask, gens, L=args.L, S=args.S, block=args.block,
                       temperature=args.temperature, order=args.order, threshold=args.threshold or None,
                       budget=args.budget)
        run.counters["nfe_rollout"] += roll.nfe
        seconds_rollout = run.lap()

        # 3 reward
        reward, parts, _ = reward_rows(model, task, roll.completion, rows)  # (B,)
        seconds_reward = run.lap()

        # 4 advantage, and the canvases to learn from: (B, k, L)
        adv = advantage(reward, args.G)  # (B,)
        w, candidates = step_surprise(roll)
        gens = [generator(device, args.seed, "steps", run.step, i) for i in ids]
        w = w if args.select == "surprise" else torch.zeros_like(w)
        steps = draw_steps(w, candidates, args.k, args.tau, group_noise(gens, len(rows), (1 + args.k, S)))
        hidden = roll.step[:, None] >= steps[..., None]
        revealed = roll.step[:, None] == steps[..., None]
        if args.canvas == "random":  # the tail behind an EOS stays hidden, all that is hidden is scored
            gens = [generator(device, args.seed, "canvas", run.step, i) for i in ids]
            drawn = group_noise(gens, len(rows), (args.k, args.L)) < 0.3
            hidden = drawn & roll.valid[:, None] | (roll.step == S)[:, None]
            revealed = hidden

        # 5 update
        pairs = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(args.k)).to(device)
        tokens_each = prompt.shape[1] + args.L
        logp_old = None
        if args.passes > 1:
            logp_old = torch.zeros(hidden.shape, device=device, dtype=roll.logp.dtype)
            with torch.no_grad():
                for part in micro_batches(pairs, tokens_each, args.budget):
                    r, j = part.unbind(1)
                    logp_old[r, j] = canvas_logp(model, roll[r], hidden[r, j], args.temperature)
            run.counters["nfe_update"] += len(pairs)
        infos = []
        for epoch in range(args.passes):
            gen = generator("cpu", args.seed, "pass", run.step, epoch)
            shuffle = torch.randperm(args.prompts, generator=gen).to(device)
            for groups in shuffle.chunk(args.minibatches):
                batch = pairs[torch.isin(pairs[:, 0] // args.G, groups)]
                info = dict.fromkeys(("loss", "kl", "scored_tokens"), 0.0)
                for part in micro_batches(batch, tokens_each, args.budget):
                    r, j = part.unbind(1)
                    logp = canvas_logp(model, roll[r], hidden[r, j], args.temperature)  # (M, L)
                    old = None if logp_old is None else logp_old[r, j]
                    p = (logp.detach() if old is None else old).exp()
                    m = clean_state_mask(p, hidden[r, j], roll.valid[r], revealed[r, j], args.p_min)
                    loss = token_loss(logp, old, adv[r], args.eps)
                    if reference:
                        with torch.no_grad():
                            logp_ref = canvas_logp(reference, roll[r], hidden[r, j], args.temperature)
                        kl = k3(logp, logp_ref)
                        loss = loss + args.beta * kl
                        info["kl"] += (kl * m).sum().item()
                    loss = (loss * m).sum()  # divided by the number of scored tokens once all are counted
                    loss.backward()
                    info["loss"] += loss.item()
                    info["scored_tokens"] += m.sum().item()
                    run.counters["nfe_update"] += len(part) * (2 if reference else 1)
                scored = max(info["scored_tokens"], 1)
                for parameter in model.network.parameters():
                    parameter.grad /= scored
                info["loss"], info["kl"] = info["loss"] / scored, info["kl"] / scored
                info["grad_norm"] = run.optimizer_step(info["loss"], args.grad_norm)
                infos.append(info)

        # 6 log
        run.log_update({
            **rollout_metrics(roll, reward, parts, args.G, seconds_rollout),
            **{k: sum(i[k] for i in infos) / len(infos) for k in infos[0]},
            "seconds_reward": seconds_reward,
            "seconds_update": run.lap(),
        })
    return run.finish()


METHOD = "rldf"
if __name__ == "__main__":
    train(parse_args(Args, METHOD, LLM))
