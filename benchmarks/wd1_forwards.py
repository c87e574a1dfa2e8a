"""What one forward per prompt saves wd1: likelihood and gradient against a forward per completion.

python benchmarks/wd1_forwards.py        both ways in one run, medians of 7
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import denoise, encode, generator  # noqa: E402
from pretrain import tiny_model  # noqa: E402
from tasks import sudoku  # noqa: E402
from wd1 import one_step_logp  # noqa: E402


def seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


prompts, G, L = 32, 8, 16
model = tiny_model(layers=4, width=128)
rows = [row["prompt"] for row in sudoku().train[:prompts] for _ in range(G)]
prompt, mask = encode(model, rows)
gens = [generator("cpu", 0, i) for i in range(prompts)]
roll = denoise(model, prompt, mask, gens, L=L, S=8, block=L)
y, valid = roll.completion.view(prompts, G, L), roll.valid.view(prompts, G, L)
each = y.view(-1, 1, L), valid.view(-1, 1, L)  # every completion a group of its own
grouped, single = [], []
for _ in range(7):
    shared = prompt[::G], mask[::G], y, valid
    grouped.append(seconds(lambda args=shared: one_step_logp(model, *args, 1.0).sum().backward()))
    apart = prompt, mask, *each
    single.append(seconds(lambda args=apart: one_step_logp(model, *args, 1.0).sum().backward()))
ratio = statistics.median(single) / statistics.median(grouped)
print(f"G {G}, {prompts} prompts, torch {torch.__version__}: a forward each takes {ratio:.1f} x as long")
