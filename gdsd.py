"""GDSD and GDSD-TLC: guided denoiser self-distillation (arXiv 2605.29398).

KL-regularised RL has the optimum pi* ~ pi_old^(1 - beta) pi_ref^beta exp(psi A), to first order in beta. Its
log differs from log pi_old by psi A and a normaliser nobody can compute; so distil, by plain regression, a
score c in which the normaliser does not matter:

    loss = mean over rows and mask pairs of (c_theta - c_old - psi A)^2 + beta (c_theta - c_ref)^2
    c    = mean over the tokens of the completion of the read-out of the token, each scored where it is hidden
    A    = R_i - mean of the OTHERS' R in the group

read-out (`match`): "tlc" the raw logit minus the mean logit of its position (no softmax anywhere), "logp" the
log-probability. A mask pair is a random mask and its complement, so that each token is scored exactly once;
the pairs are drawn once per rollout and kept for c_old, c_ref and every pass.

Differences from the authors' released code: it centres the logits and then calls cross_entropy, whose softmax
undoes the centring exactly; its policy term is clamped to +-4e-4, so from the second of 8 passes on its
gradient is zero (no clamp here: the square stops at its target by itself); masks repeat after 51-76 rollouts;
its policy term sums over masks while the KL averages; it draws fresh masks for each pass (ours keeps one
set); padding is seen and tokens behind the EOS count. Its psi and beta do not carry over: for the variant
without TLC, its loss at (psi, beta) is num_mc / 4 times ours at (2 psi, beta L / (2 num_mc)), so its recipe,
psi 10 and beta 1e-3 with L 256 and num_mc 2, is psi 20 and beta 0.064 here, as in LLM (TLC has no halving:
psi 10).
Differences from the paper: minibatches; small-batch defaults for the tiny model, the paper's beside them
(paper: L = S = 256, block 32, T 1, G 16).

python gdsd.py                         4x4 Sudoku, 32 to 39 % of the held-out boards solved in two minutes
python gdsd.py --match tlc             centred raw logits: 32 to 39 %
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common import (Denoiser, Rollout, Run, Task, canvas, draw_prompts, encode, generator, group_noise,
                    log_prob, micro_batches, minibatches, reward_rows, roll_out, rollout_metrics, score)


@dataclass
class Args:
    # The rollout.
    prompts: int = 16  # prompts per rollout
    G: int = 16  # samples per prompt (a group)
    L: int = 16  # completion length, tokens (LLM: 256)
    S: int = 8  # denoising steps per completion (LLM: 128)
    block: int = 16  # tokens per block, decoded left to right (LLM: 32)
    temperature: float = 1.0  # of rollouts and scoring alike; evaluation is greedy
    seed: int = 1  # decides every random draw
    budget: int = 8448  # most tokens in one forward; no result depends on it

    # The method.
    match: Literal["logp", "tlc"] = "logp"  # what is regressed: log-probabilities, or centred raw logits
    num_mc: int = 2  # mask pairs per row (paper: 2)
    psi: float = 0.2  # psi, inverse temperature of the advantage (paper: 10; see above)
    beta: float = 0.0  # weight of the reference (paper: 1e-3; see above); 0: no reference model

    # The optimizer, AdamW.
    passes: int = 2  # mu, passes per rollout (paper: 8)
    minibatches: int = 4  # optimizer steps per pass, each on whole groups (paper: 1)
    lr: float = 1e-4  # learning rate (paper: 3e-6; MATH 1e-5)
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two moments
    weight_decay: float = 0.01
    grad_norm: float = 1.0  # gradient clipping (paper: 0.2)

    def __post_init__(self):
        assert self.num_mc >= 1, "--num_mc must be at least 1"


def advantage(reward: Tensor, G: int) -> Tensor:
    """R_i minus the mean of the others of its group; exactly 0 where a whole group is equal. (B,)."""
    group = reward.view(-1, G)
    unequal = group.amax(1, keepdim=True) > group.amin(1, keepdim=True)
    others = (group.sum(1, keepdim=True) - group) / (G - 1)
    return ((group - others) * unequal).flatten()


def mask_pairs(valid: Tensor, noise: Tensor) -> Tensor:
    """Random masks and their complements among the valid positions: hidden (B, pairs, 2, L).

    The number hidden is uniform on 0 .. n_valid. The tail behind the EOS is hidden in both.
    noise: (B, pairs, L + 1)."""
    n_valid = valid.sum(1)[:, None, None]
    count = (noise[..., :1] * (n_valid + 1)).long()  # (B, pairs, 1)
    rank = noise[..., 1:].masked_fill(~valid[:, None], torch.inf).argsort(dim=2).argsort(dim=2)
    chosen = (rank < count) & valid[:, None]
    return torch.stack([chosen, valid[:, None] & ~chosen], 2) | ~valid[:, None, None]


def centred_logit(logits: Tensor, at: Tensor, token: Tensor) -> Tensor:
    """Logit of `token` (m,) at row `at` (m,) of logits (D, V) minus the row's mean (no mask token in it)."""
    possible = logits > -torch.inf
    mean = logits.masked_fill(~possible, 0.0).sum(1) / possible.sum(1)
    return logits[at, token] - mean[at]


READ_OUT = {"logp": log_prob, "tlc": centred_logit}
DRIFT = 20.0  # a mean score this far from where it began (in nats or logits) is worth a warning


def pair_score(
    model: Denoiser, x: Tensor, roll: Rollout, hidden: Tensor, match: str, temperature: float
) -> Tensor:
    """c (M,) of rows `roll`: the mean read-out of the valid tokens, each on the two canvases x (M, 2, P+L) of
    a mask pair, hidden (M, 2, L)."""
    both = torch.arange(len(x), device=x.device).repeat_interleave(2)  # a mask and its complement, adjacent
    rows = roll[both]
    where = hidden.flatten(0, 1) & rows.valid
    found = score(model, x.flatten(0, 1), rows.prompt_mask, rows.completion, where, temperature,
                  READ_OUT[match])  # (2 M, L)
    return found.sum(1).view(-1, 2).sum(1) / roll.valid.sum(1)


def distillation_loss(
    c: Tensor, c_old: Tensor, c_ref: Tensor, adv: Tensor, psi: float, beta: float
) -> Tensor:
    """(c - c_old - psi A)^2 + beta (c - c_ref)^2; all (M,)."""
    return (c - c_old - psi * adv) ** 2 + beta * (c - c_ref) ** 2


def train(args: Args, model: Denoiser, task: Task, run: Run):
    """Train `model` in place on the prompts of `task`, for the updates of `run`."""
    reference = model.frozen() if args.beta else None  # the model before training
    optimizer = torch.optim.AdamW(
        model.network.parameters(), args.lr, betas=args.betas, weight_decay=args.weight_decay,
        fused=model.device.type == "cuda")  # fused: needs less memory

    for update in run.updates(model, optimizer):
        # 1 Roll out: G completions of each prompt.
        ids = draw_prompts(len(task.train), args.prompts, args.seed, update)
        rows = [task.train[i] for i in ids for _ in range(args.G)]  # B rows
        prompt, prompt_mask = encode(model, [row["prompt"] for row in rows])  # (B, P)
        gens = [generator(model.device, args.seed, "rollout", update, i) for i in ids]
        roll = roll_out(model, prompt, prompt_mask, gens, L=args.L, S=args.S, block=args.block,
                        temperature=args.temperature, budget=args.budget)

        # 2 Reward.
        reward, parts, _ = reward_rows(model, task, roll.completion, rows)  # (B,)

        # 3 Advantage.
        adv = advantage(reward, args.G)  # (B,)

        # 4 Masks, and the scores under them to move away from and to stay close to.
        gens = [generator(model.device, args.seed, "masks", update, i) for i in ids]
        hidden = mask_pairs(roll.valid, group_noise(gens, len(rows), (args.num_mc, args.L + 1)))
        x = torch.stack([canvas(roll, half) for half in hidden.unbind(2)], 2)  # (B, num_mc, 2, P+L)
        pairs = torch.ones_like(hidden[:, :, 0, 0]).nonzero()  # (B * num_mc, 2); at A = 0 c is held in place
        c_old = torch.zeros(len(rows), args.num_mc, device=model.device)
        c_ref = torch.zeros_like(c_old)
        with torch.no_grad():
            for part in micro_batches(model, pairs, x, args.budget):
                r, j = part.unbind(1)
                c_old[r, j] = pair_score(model, x[r, j], roll[r], hidden[r, j], args.match, args.temperature)
                if reference:
                    c_ref[r, j] = pair_score(reference, x[r, j], roll[r], hidden[r, j], args.match,
                                             args.temperature)
        c_old, c_ref = model.total(c_old), model.total(c_ref)  # over the processes, if there are several

        # 5 Update.
        infos = []
        for epoch in range(args.passes):
            c_new = torch.zeros_like(c_old)
            gen = generator("cpu", args.seed, "pass", update, epoch)
            for batch in minibatches(pairs, args.prompts, args.G, args.minibatches, gen):
                info = {"loss": 0.0}
                for part in micro_batches(model, batch, x, args.budget):
                    r, j = part.unbind(1)
                    c = pair_score(model, x[r, j], roll[r], hidden[r, j], args.match, args.temperature)
                    c_new[r, j] = c.detach()
                    loss = distillation_loss(c, c_old[r, j], c_ref[r, j], adv[r], args.psi, args.beta)
                    loss = loss.sum() / len(batch)  # mean over rows and mask pairs
                    loss.backward()
                    info["loss"] += loss.item()
                info = model.total(info)
                info["grad_norm"] = run.step(info["loss"], args.grad_norm)
                infos.append(info)

        # 6 Log: how far c is from c_old, as the last pass found it before its own steps, and its target.
        move, target = model.total(c_new) - c_old, args.psi * adv
        drift = move.nanmean().item()  # the targets average to zero
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


# Where a run starts from: the tiny models of 4x4 Sudoku and Countdown, and any model that reads words, for
# which these are the paper's settings, cut to fit a 0.6 B model on 24 GB.
SUDOKU = dict(updates=20)
COUNTDOWN = dict(L=8, S=4, block=4, G=8, minibatches=2, lr=2e-4, updates=82)
LLM = dict(prompts=2, G=16, L=256, S=256, block=32, minibatches=1, psi=20.0, beta=0.064, passes=8, lr=3e-6,
           grad_norm=0.2)

if __name__ == "__main__":
    from plumbing.run import main

    main(train, Args, SUDOKU, COUNTDOWN, LLM)
