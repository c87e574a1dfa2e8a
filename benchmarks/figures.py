"""Pictures in results/: tree.png, one group of the tiny base; gradients.png, from gradients.jsonl.

python benchmarks/figures.py
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import BASES  # noqa: E402
from common import canvas, denoise, encode, generator  # noqa: E402
from plumbing.models import load_model  # noqa: E402
from tasks import load  # noqa: E402


def tree(prompt: int = 0, G: int = 8, S: int = 8):
    """One group of the base's: a node is a distinct canvas, its number the rows that are there."""
    model, row = load_model(str(BASES / "sudoku")), load("sudoku", chat=False).train[prompt]
    tokens, mask = encode(model, [row["prompt"]] * G)
    roll = denoise(model, tokens, mask, [generator("cpu", 1, "rollout", 0, prompt)], L=16, S=S, block=16)
    states = torch.stack([canvas(roll, roll.revealed_at >= s) for s in range(S)], 1).tolist()  # (G, S, P+L)
    order = sorted(range(G), key=lambda b: states[b])  # rows that stay together lie together
    figure, axes = plt.subplots(figsize=(7.5, 2.6), constrained_layout=True)
    place = {}
    for s in range(S):
        for state in {tuple(states[b][s]) for b in order}:
            rows = [i for i, b in enumerate(order) if tuple(states[b][s]) == state]
            place[s, state] = sum(rows) / len(rows)
            parent = tuple(states[order[rows[0]]][s - 1])
            if s:
                axes.plot([s - 1, s], [place[s - 1, parent], place[s, state]], color="0.7", lw=1, zorder=1)
            axes.scatter(s, place[s, state], 150, color="tab:orange", zorder=2)
            axes.annotate(len(rows), (s, place[s, state]), ha="center", va="center", fontsize=8, zorder=3)
    made = len(place)
    assert made == model.counts["nfe_rollout"]
    axes.margins(y=0.12)
    axes.set(xlabel=f"denoising step: {made} forwards instead of {G * S}", yticks=[], xticks=range(S))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(ROOT / "results" / "tree.png", dpi=130)


def gradients():
    """Cosine with the exact gradient, mean and lowest model, and noise of each update (gradients.py)."""
    lines = [json.loads(line) for line in (ROOT / "results" / "gradients.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, width_ratios=(3, 2), figsize=(7.5, 5.2), constrained_layout=True)
    kinds = {"own": ("each state its own logits", "#0072B2", "o"),
             "shared": ("states share parameters", "#D55E00", "D")}
    for row, (kind, (label, colour, marker)) in enumerate(kinds.items()):
        found = [line for line in lines if line["kind"] == kind]
        y = [i - 0.17 + 0.34 * row for i in range(len(found))]
        keys = "cosine_mean", "cosine_lowest", "noise"
        cosine, lowest, noise = ([line[key] for line in found] for key in keys)
        left.hlines(y, lowest, cosine, color=colour, lw=1.2)
        left.scatter(cosine, y, 22, colour, marker=marker, zorder=3)
        right.scatter(noise, y, 22, colour, marker=marker, zorder=3)
        left.scatter(-0.25, row, 22, colour, marker=marker)
        left.annotate(label, (-0.2, row), color=colour, va="center", fontsize=9)
    left.set(xlabel="cosine with the exact gradient\n(dot: mean of the models, line: to the lowest)",
             xlim=(-0.33, 1.05), yticks=range(len(found)), yticklabels=[line["variant"] for line in found])
    left.invert_yaxis()
    right.set(xlabel="noise: forwards for\nas much signal as noise", xscale="log", xlim=(9, 290))
    right.set_xticks([10, 20, 50, 100, 200], [10, 20, 50, 100, 200], minor=False)
    right.minorticks_off()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(ROOT / "results" / "gradients.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    tree()
    gradients()
