"""Which tokens GDSD's gradient goes to: its share on clues, which the answer only copies, for both read-outs.

python benchmarks/gdsd_gradient.py        256 rollouts of the tiny base, one mask pair each
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.compare import BASES  # noqa: E402
from common import attention, canvas, denoise, encode, generator, group_noise  # noqa: E402
from gdsd import READ_OUT, mask_pairs  # noqa: E402
from plumbing.models import load_model  # noqa: E402
from tasks import load  # noqa: E402

model, rows = load_model(str(BASES / "sudoku")), load("sudoku", chat=False).train[:256]
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
