"""Where GDSD's gradient goes, for both read-outs and both weights, on the tiny base of 4x4 Sudoku.

Its share on clues, which the answer only copies: 256 rollouts, one mask pair each. And the cosine between the
policy gradients (at theta_old: of mean A c) with `--weights pair` and `elbo`: 32 groups of 8, the first and
all of 16 mask pairs.

python benchmarks/gdsd_gradient.py        a minute
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.compare import BASES  # noqa: E402
from common import (attention, canvas, denoise, encode, generator, group_noise, log_prob,  # noqa: E402
                    reward_rows)
from gdsd import advantage, centred_logit, mask_pairs, pair_score  # noqa: E402
from plumbing.models import load_model  # noqa: E402
from tasks import load  # noqa: E402

READ_OUT = {"logp": log_prob, "tlc": centred_logit}
G, PAIRS = 8, 16

task = load("sudoku", chat=False)
model, rows = load_model(str(BASES / "sudoku-0")), task.train[:256]
prompt, mask = encode(model, [row["prompt"] for row in rows])
gens = [generator("cpu", 0, i) for i in range(len(rows))]
roll = denoise(model, prompt, mask, gens, L=16, S=8, block=16)
clue = torch.tensor([[c != "0" for c in row["puzzle"]] for row in rows])
for name, read_out in READ_OUT.items():
    size = torch.zeros(clue.shape)  # |d read-out / d logits|^2 of each token, where it is hidden
    for half in mask_pairs(roll.valid, group_noise(gens, len(rows), (1, 17)))[:, 0].unbind(1):
        where = half & roll.valid
        with torch.no_grad():
            z = model.head(model.body(canvas(roll, half), attention(mask, 16))[:, -16:][where])
        z.requires_grad_()
        read_out(z, torch.arange(len(z)), roll.completion[where]).sum().backward()
        size[where] = z.grad.pow(2).sum(1)
    share = size[clue].sum() / size.sum()
    print(f"{name}: {share:.1%} of the squared gradient is on clues, {clue.float().mean():.1%} of the tokens")

rows = [row for row in task.train[:32] for _ in range(G)]
prompt, mask = encode(model, [row["prompt"] for row in rows])
gens = [generator("cpu", 1, i) for i in range(32)]
roll = denoise(model, prompt, mask, gens, L=16, S=8, block=16)
adv = advantage(reward_rows(model, task, roll.completion, rows)[0], G)
pairs = mask_pairs(roll.valid, group_noise(gens, len(rows), (PAIRS, 17))).unbind(1)
for name in READ_OUT:
    total = {"pair": 0.0, "elbo": 0.0}  # the gradient summed over the mask pairs so far
    for j, hidden in enumerate(pairs):
        for weights in total:
            model.network.zero_grad()
            c, _ = pair_score(model, canvas(roll, hidden), roll, hidden, name, 1.0, weights)
            (adv * c).mean().backward()
            grads = [p.grad.flatten() for p in model.network.parameters() if p.grad is not None]
            total[weights] = total[weights] + torch.cat(grads)
        if j in (0, PAIRS - 1):
            pair, elbo = total.values()
            cosine, size = pair @ elbo / pair.norm() / elbo.norm(), elbo.norm() / pair.norm()
            print(f"{name}: mean of {j + 1} mask pairs: cosine of pair and elbo {cosine:.3f}, "
                  f"length of elbo's over pair's {size:.2f}")
