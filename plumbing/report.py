"""What a run shows at its end: the table, answers drawn for a person, the curve, and how it denoised."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from common import Denoiser, Task, answer_texts

# of an evaluation, for the trace: fields of its Rollout (B, L); of its rewards (B,)
SHOWN = ("completion", "revealed_at", "logp", "entropy", "reward", "correct", "parse_fail")
KINDS = {(0, 1): "became solved", (1, 0): "became wrong", (0, 0): "stayed failed", (1, 1): "stayed solved",
         (1,): "solved", (0,): "failed"}

# Okabe and Ito's, which the colour-blind tell apart
COLOURS = {"EGSPO": "#999999", "EGSPO-SA": "#D55E00", "RLDF": "#0072B2", "wd1": "#000000", "wd1++": "#009E73",
           "GDSD": "#CC79A7", "GDSD-TLC": "#E69F00", "diffu-GRPO": "#56B4E9", "ESPO": "#882255",
           "JustGRPO": "#999933"}


def print_report(task: Task, args, columns: dict[str, dict[str, float]], answers: list[tuple]):
    """The table of held-out results, then three solved and three failed rows, drawn."""
    n, also = len(answers), f"; adaptive: threshold {args.eval_threshold}" if args.eval_threshold else ""
    print(f"\n{n} held-out rows, greedy: L {args.L}, S {args.S}, block {args.block}, order top_prob{also}")
    print(" " * 26 + "".join(f"{name:>10}" for name in columns))
    labels = {"accuracy": "solved, %", "reward": "mean reward, %", "parse_fail": "unreadable, %"}
    for kind, decoding in (("eval", ""), ("threshold", ", adaptive")):
        shown = [column for column in columns.values() if f"{kind}_accuracy" in column]
        gap = " " * 10 * (len(columns) - len(shown))  # the earlier column may lack what the later one has
        if shown:
            for key, label in labels.items():
                row = "".join(f"{100 * column[f'{kind}_{key}']:10.1f}" for column in shown)
                print(f"{label + decoding:<26}{gap}{row}")
            row = "".join(f"{column[f'{kind}_nfe_per_row']:10.2f}" for column in shown)
            print(f"{'forwards per row' + decoding:<26}{gap}{row}")
    error = max((c["eval_accuracy"] * (1 - c["eval_accuracy"]) / n) ** 0.5 for c in columns.values())
    print(f"(standard error of a solved share: {100 * error:.1f} points)")
    for label, solved in (("solved", True), ("failed", False)):
        found = [(text, row) for (text, c), row in zip(answers, task.test, strict=True) if (c == 1) == solved]
        blocks = [task.draw(text, row) for text, row in found[:3]]
        print(f"\n{label}:" + ("" if blocks else " none"))
        if all(len(line) < 30 for block in blocks for line in block):  # boards: side by side
            blocks = [["      ".join(cells) for cells in itertools.zip_longest(*blocks, fillvalue="")]]
        print("\n\n".join("\n".join(f"   {line}" for line in block) for block in blocks))


def comparable(lines: list[dict]) -> list[dict]:
    """The lines of metrics.jsonl without the evaluations that do not compare with the last one: of another
    number of rows and, of adaptive decoding, with another threshold."""
    last = [line for line in lines if "eval_accuracy" in line][-1]
    kept = [line for line in lines if line.get("eval_rows", last["eval_rows"]) == last["eval_rows"]]
    threshold = last.get("eval_threshold")
    return [{k: v for k, v in line.items()
             if not k.startswith("threshold_") or line.get("eval_threshold") == threshold} for line in kept]


def pyplot():
    """matplotlib, for files alone; imported when something is drawn, because that takes its time."""
    os.environ["MPLBACKEND"] = "agg"  # matplotlib cannot be imported while one stands there that it lacks
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(lines: list[dict], file: Path, title: str):
    """curve.png: held-out accuracy and the rollouts' reward over the updates; below, what is left to learn
    from: without entropy the rows of a group are equal, and equal rewards have no advantage."""
    plt = pyplot()

    def points(key: str, scale: float = 1) -> list[tuple]:
        return [(line["update"], scale * line[key]) for line in lines if line.get(key) is not None]

    figure, (axes, left) = plt.subplots(2, figsize=(7, 5.4), height_ratios=(3, 1), sharex=True,
                                        constrained_layout=True)
    fixed, adaptive = (" → ".join(f"{forwards:.1f}" for _, forwards in points(f"{kind}_nfe_per_row"))
                       for kind in ("eval", "threshold"))
    for key, label, look in (
        ("reward", "reward of the rollouts", dict(color="tab:blue", lw=1, alpha=0.5)),
        ("threshold_accuracy", "held-out solved, adaptive: a step takes all it is sure of\n"
         f"({adaptive} forwards per row)", dict(color="tab:green", ls="", marker="D")),
        ("eval_accuracy", f"held-out solved ({fixed.partition(' ')[0]} forwards per row)",
         dict(color="tab:orange", lw=2, marker="o", ms=4)),
    ):
        if points(key):
            axes.plot(*zip(*points(key, 100), strict=True), label=label, **look)
    solved = points("eval_accuracy", 100)
    (start, first), (end, last) = solved[0], solved[-1]
    if start == 0:
        axes.axhline(first, color="0.6", lw=1, ls=":")
        axes.annotate(f"{first:.1f} % before", (end, first), (0, -12), textcoords="offset points", ha="right")
    axes.annotate(f"{last:.1f} %", (end, last), (0, 7), textcoords="offset points", ha="right")
    axes.set(ylabel="%", ylim=(0, 100))
    axes.set_title(title, parse_math=False)  # the name of a file may hold a $
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower right", fontsize="small")
    right = left.twinx()
    for side, key, scale, label, colour in ((left, "entropy", 1, "entropy, nats", "tab:purple"),
                                            (right, "equal_groups", 100, "equal groups, %", "0.45")):
        if points(key):
            side.plot(*zip(*points(key, scale), strict=True), color=colour, lw=1.5)
        side.set_ylabel(label, color=colour)
        side.set_ylim(0, 100 if side is right else None)
    left.set_xlabel("update")
    for panel in figure.axes:
        panel.spines[["top"] if panel is not axes else ["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_methods(curves: dict[str, dict[str, np.ndarray]], file: Path):
    """Held-out share over the minutes of RL, a panel for each task, mean and range of the seeds.

    curves: of each task and method (seeds, points, 4): update, seconds, forwards, share solved; may be
    empty, and a task without any has no panel."""
    plt = pyplot()
    curves = {task: methods for task, methods in curves.items() if any(map(len, methods.values()))}
    figure, panels = plt.subplots(1, max(1, len(curves)), figsize=(1 + 4.5 * len(curves), 4), squeeze=False,
                                  constrained_layout=True)
    for (task, methods), axes in zip(curves.items(), panels[0], strict=False):
        ends = []
        for method, runs in methods.items():
            if len(runs):
                minutes, share = np.median(runs[:, :, 1], 0) / 60, 100 * runs[:, :, 3]
                axes.plot(minutes, share.mean(0), color=COLOURS[method], lw=2, marker="o", ms=3)
                axes.fill_between(minutes, share.min(0), share.max(0), color=COLOURS[method], alpha=0.12,
                                  lw=0)
                ends.append((share.mean(0)[-1], minutes[-1], method))
        axes.set(xlabel="minutes of RL", ylabel="held-out rows solved, %", title=task.capitalize())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        low, high = axes.get_ylim()
        right, gap, ends = axes.get_xlim()[1], 0.055 * (high - low), sorted(ends)
        heights = [y for y, _, _ in ends]
        for _ in range(100):  # labels in the order of the ends, pushed apart where one would be over another
            for i in range(len(ends) - 1):
                push = max(0.0, gap - (heights[i + 1] - heights[i])) / 2
                heights[i] -= push
                heights[i + 1] += push
        for (y, x, method), height in zip(ends, heights, strict=True):
            axes.annotate(f"{method} {y:.0f}", (x, y), (right * 1.03, height), color=COLOURS[method],
                          va="center", annotation_clip=False,
                          arrowprops=dict(arrowstyle="-", color=COLOURS[method], lw=0.5))
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text, a space before it included where the tokenizer joins with spaces. A
    character made of several tokens is added by the last of them."""
    alone = tokenizer.batch_decode([[i] for i in ids])
    after = tokenizer.batch_decode([ids[max(0, i - 1) : i + 1] for i in range(len(ids))])
    texts = [text[len(before) :] for before, text in zip(["", *alone[:-1]], after, strict=True)]
    for broken, run in itertools.groupby(range(len(ids)), lambda i: "\ufffd" in alone[i]):
        if broken:
            places = list(run)
            whole = tokenizer.decode([ids[i] for i in places])
            texts[places[0] : places[-1] + 1] = [""] * (len(places) - 1) + [whole]
    return texts


def trace_column(model: Denoiser, task: Task, row: dict, shown: dict[str, Tensor], i: int, S: int) -> dict:
    """Row i of an evaluation as the page shows it."""
    completion, steps = shown["completion"][i], shown["revealed_at"][i].tolist()
    text, = answer_texts(model, completion[None])
    drawn = task.draw(text, row)

    def numbers(values: Tensor) -> list[float | None]:  # none where no step revealed a token; JSON has no NaN
        rounded = [round(value, 3) for value in values.tolist()]
        return [v if s < S and math.isfinite(v) else None for v, s in zip(rounded, steps, strict=True)]

    return {
        "tokens": token_texts(model.tokenizer, completion.tolist()), "step": steps,
        "p": numbers(shown["logp"][i].exp()), "entropy": numbers(shown["entropy"][i]),
        "reward": shown["reward"][i].item(), "correct": bool(shown["correct"][i]),
        "unreadable": bool(shown["parse_fail"][i]), "text": text,
        "note": drawn[0].removeprefix(f"{row['prompt']} {text}").strip() if len(drawn) == 1 else ""}


def trace(file: Path, model: Denoiser, task: Task, args, columns: dict[str, dict[str, Tensor]]):
    """A page of how a dozen held-out rows were denoised, the first ones of each kind: the trace.html beside
    this file with a JSON in it. columns: of two evaluations, before training and after, or of one alone, what
    SHOWN names."""
    def packed(value) -> str:  # no "<": no text can end the script element that holds it
        return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")

    kinds = {kind: [] for outcome, kind in KINDS.items() if len(outcome) == len(columns)}
    correct = [(shown["correct"] == 1).tolist() for shown in columns.values()]  # a half is not solved
    for i, outcome in enumerate(zip(*correct, strict=False)):  # a resumed run may evaluate more or fewer
        kinds[KINDS[outcome]].append(i)
    ranked = sorted((kind == "stayed solved", rank, number, kind, i)
                    for number, (kind, found) in enumerate(kinds.items()) for rank, i in enumerate(found))
    words, board = bool(model.tokenizer.chat_template), "puzzle" in task.test[0]
    rows, size = [], 0
    for *_, kind, i in ranked[:12]:
        row = task.test[i]
        told = {
            "row": i, "kind": kind, "layout": "text" if words else "board" if board else "expression",
            "question": row["puzzle"] if board and not words else row.get("question", row["prompt"]),
            "answer": str(row.get("solution", row.get("answer", ""))),
            "columns": [trace_column(model, task, row, shown, i, args.S) for shown in columns.values()]}
        size += len(packed(told))
        if rows and size > 270_000:
            break
        rows.append(told)
    data = {
        "title": f"{file.resolve().parent.name}: how it denoised", "args": vars(args), "S": args.S,
        "about": f"{args.model} on {args.task}: {len(ranked)} held-out rows, greedy, L {args.L}, S {args.S}, "
                 f"block {args.block}, order top_prob. Below are the first of each kind.",
        "columns": list(columns), "counts": {kind: len(found) for kind, found in kinds.items()},
        "end": model.tokenizer.batch_decode([[i] for i in model.end_ids]), "rows": rows}
    template = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    file.write_text(template.replace("{{data}}", packed(data), 1), encoding="utf-8")
