"""What a run shows at its end: the table, answers drawn for a person, and the curve."""

import itertools
from pathlib import Path

import numpy as np

from common import Task

# Okabe and Ito's, which the colour-blind tell apart
COLOURS = {"EGSPO": "#999999", "EGSPO-SA": "#D55E00", "RLDF": "#0072B2", "wd1": "#000000", "wd1++": "#009E73",
           "GDSD": "#CC79A7", "GDSD-TLC": "#E69F00"}


def print_report(task: Task, args, columns: dict[str, dict[str, float]], answers: list[tuple]):
    """The table of held-out results, then three solved and three failed rows, drawn."""
    n, also = len(answers), f"; adaptive: threshold {args.eval_threshold}" if args.eval_threshold else ""
    print(f"\n{n} held-out rows, greedy: L {args.L}, S {args.S}, block {args.block}, order top_prob{also}")
    print(" " * 26 + "".join(f"{name:>10}" for name in columns))
    labels = {"accuracy": "solved, %", "reward": "mean reward, %", "parse_fail": "unreadable, %"}
    for kind, decoding in (("eval", ""), ("threshold", ", adaptive")):
        if all(f"{kind}_accuracy" in column for column in columns.values()):
            for key, label in labels.items():
                row = "".join(f"{100 * column[f'{kind}_{key}']:10.1f}" for column in columns.values())
                print(f"{label + decoding:<26}{row}")
            row = "".join(f"{column[f'{kind}_nfe_per_row']:10.2f}" for column in columns.values())
            print(f"{'forwards per row' + decoding:<26}{row}")
    error = max((c["eval_accuracy"] * (1 - c["eval_accuracy"]) / n) ** 0.5 for c in columns.values())
    print(f"(standard error of a solved share: {100 * error:.1f} points)")
    for label, correct in (("solved", 1.0), ("failed", 0.0)):
        found = [(text, row) for (text, c), row in zip(answers, task.test, strict=True) if c == correct]
        blocks = [task.draw(text, row) for text, row in found[:3]]
        print(f"\n{label}:" + ("" if blocks else " none"))
        if all(len(line) < 30 for block in blocks for line in block):  # boards: side by side
            blocks = [["      ".join(cells) for cells in itertools.zip_longest(*blocks, fillvalue="")]]
        print("\n\n".join("\n".join(f"   {line}" for line in block) for block in blocks))


def plot(lines: list[dict], file: Path, title: str):
    """curve.png: held-out accuracy and the rollouts' reward over the updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    curves = {"reward": ("reward of the rollouts", dict(color="tab:blue", lw=1, alpha=0.5)),
              "threshold_accuracy": ("held-out solved, adaptive", dict(color="tab:green", ls="", marker="D")),
              "eval_accuracy": ("held-out solved", dict(color="tab:orange", lw=2, marker="o", ms=4))}
    for key, (label, look) in curves.items():
        points = [(line["update"], 100 * line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **look)
    (_, first), (end, last) = points[0], points[-1]
    axes.axhline(first, color="0.6", lw=1, ls=":")
    axes.annotate(f"{first:.1f} % before", (end, first), (0, -12), textcoords="offset points", ha="right")
    axes.annotate(f"{last:.1f} %", (end, last), (0, 7), textcoords="offset points", ha="right")
    axes.set(xlabel="update", ylabel="%", title=title, ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_methods(curves: dict[str, dict[str, np.ndarray]], file: Path):
    """Held-out share over the minutes of RL, a panel for each task, mean and range of the seeds.

    curves: of each task and method (seeds, points, 4): update, seconds, forwards, share solved; may be
    empty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(10, 4), constrained_layout=True)
    for (task, methods), axes in zip(curves.items(), panels, strict=True):
        ends = []
        for method, runs in methods.items():
            if len(runs):
                minutes, share = np.median(runs[:, :, 1], 0) / 60, 100 * runs[:, :, 3]
                look = dict(color=COLOURS[method])
                axes.plot(minutes, share.mean(0), lw=2, marker="o", ms=3, **look)
                axes.fill_between(minutes, share.min(0), share.max(0), alpha=0.12, lw=0, **look)
                ends.append((share.mean(0)[-1], minutes[-1], method))
        axes.set(xlabel="minutes of RL", ylabel="held-out rows solved, %", title=task.capitalize())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        low, high = axes.get_ylim()
        right, height = axes.get_xlim()[1], -np.inf
        for y, x, method in sorted(ends):  # from below, in the order of the ends, none over another
            height = max(y, height + 0.055 * (high - low))
            axes.annotate(f"{method} {y:.0f}", (x, y), (right * 1.03, height), color=COLOURS[method],
                          va="center", annotation_clip=False,
                          arrowprops=dict(arrowstyle="-", color=COLOURS[method], lw=0.5))
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)
