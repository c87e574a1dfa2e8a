"""What a run shows at its end: the table, answers drawn for a person, and the curve."""

import itertools
from pathlib import Path

from common import Task


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
