"""The tables of README.md and results/README.md, made of the lines in results/ by
`python benchmarks/compare.py --report`.

A run is a line of runs.jsonl; the points of its curve are update, seconds, forwards with every row counted,
solved share.
"""

import functools
import re
import statistics

import numpy as np

from tasks import load


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


@functools.cache
def clusters(task: str) -> np.ndarray:
    """(rows,) held-out rows that are not independent share a number: one solution grid, the same numbers."""
    rows = load(task, chat=False, train=False).test
    keys = [row.get("solution") or str(sorted(row["numbers"])) for row in rows]
    return np.unique(keys, return_inverse=True)[1]


def interval(runs: list[dict], cluster: np.ndarray) -> str:
    """Mean solved share of the runs, %, and its 95 % interval: seeds and clusters drawn with replacement."""
    if not runs:
        return "not measured"
    packed = np.stack([np.frombuffer(bytes.fromhex(row["correct"]), np.uint8) for row in runs])
    right = np.unpackbits(packed, axis=1)[:, : len(cluster)]  # (seeds, rows)
    sums = np.stack([np.bincount(cluster, row) for row in right])  # (seeds, clusters)
    sizes, rng, means = np.bincount(cluster), np.random.default_rng(0), []
    for _ in range(2000):
        seeds = rng.integers(len(runs), size=len(runs))
        drawn = rng.integers(len(sizes), size=len(sizes))
        means.append(100 * sums[seeds][:, drawn].sum() / sizes[drawn].sum() / len(runs))
    low, high = np.quantile(means, (0.025, 0.975))
    return f"**{percent(right.mean())}** [{low:.0f}, {high:.0f}]"


def adaptive(runs: list[dict], when: int = 1) -> str:
    """Solved by adaptive decoding before (when = 0) or after (1) training, and the forwards a row it took."""
    if not runs:
        return ""
    share, nfe = np.mean([row["adaptive"][when] for row in runs], 0)
    return f"{percent(share)} ({nfe:.1f})"


def base(runs: list[dict]) -> tuple[str, str]:
    """Solved by the base the runs start from, and by its adaptive decoding."""
    return percent(runs[0]["curve"][0][3]), adaptive(runs[:1], 0)


def each_seed(runs: list[dict]) -> str:
    """Solved by each run at its end."""
    return ", ".join(percent(row["curve"][-1][3]) for row in runs)


def cells(runs: list[dict], cluster: np.ndarray) -> list[str]:
    """What a method reaches and what it takes: solved, minutes, forwards, adaptive decoding."""
    if not runs:
        return ["not measured", "", "", ""]
    made = np.mean([row["nfe_rollout"] + row["nfe_update"] for row in runs]) / 1000
    full = np.mean([row["curve"][-1][2] for row in runs]) / 1000
    minutes = np.median([row["seconds"] for row in runs]) / 60
    return [interval(runs, cluster), f"{minutes:.1f}", f"{made:.0f} of {full:.0f}", adaptive(runs)]


def main_table(runs: dict[str, dict[str, list[dict]]]) -> str:
    """The README's: every method on both tasks, {task: {method: a run of each seed}}."""
    columns = []  # of the first task all four, of the second two
    for (task, methods), kept in zip(runs.items(), (4, 2), strict=True):
        everything = sum(methods.values(), [])
        solved, decoded = base(everything) if everything else ("", "")
        start = [solved, "", "", decoded]
        columns.append([start[:kept], *[cells(found, clusters(task))[:kept] for found in methods.values()]])
    names = ["the base", *next(iter(runs.values()))]
    rows = [[name, *sum(parts, [])] for name, *parts in zip(names, *columns, strict=True)]
    return table(["method", "Sudoku, %", "minutes", "k forwards made, of", "adaptive: % (forwards a row)",
                  "Countdown, %", "minutes"], rows) + "\n\n" + seeds_line(runs)


def seeds_line(runs: dict[str, dict[str, list[dict]]]) -> str:
    """How many seeds are behind the table."""
    counts = {(task, method): len(found) for task, methods in runs.items()
              for method, found in methods.items() if found}
    if not counts:
        return "No runs yet."
    usual, others = statistics.mode(counts.values()), {}
    for (task, method), count in counts.items():
        if count != usual:
            others.setdefault(f"{count} on {task.capitalize()}", []).append(method)
    told = [f"{where} of {', '.join(methods)}" for where, methods in others.items()]
    return "; ".join([f"Seeds: {usual} each", *told]) + "."


def cost_of_half(cost: np.ndarray, share: np.ndarray) -> float | None:
    """Where a curve first reaches a solved share of one half, between its points; None: it does not."""
    if share.max() < 0.5:
        return None
    i = int((share >= 0.5).argmax())
    return float(np.interp(0.5, share[max(0, i - 1) : i + 1], cost[max(0, i - 1) : i + 1]))


def budget_table(runs: dict[str, list[dict]], commands: dict[str, str], paper: dict[str, str]) -> str:
    """Each seed; solved at the largest budget that every run spent; what half of the rows cost."""
    runs = {method: found for method, found in runs.items() if found}
    if not runs:
        return "Not measured."
    least = [min(row["curve"][-1][column] for found in runs.values() for row in found) for column in (2, 1)]
    rows = [["the base", *base(next(iter(runs.values()))), "", "", "", "", paper["before"]]]
    for method, found in runs.items():
        row = [f"{method}: `{commands[method]}`", each_seed(found), adaptive(found)]
        for column, budget in zip((2, 1), least, strict=True):
            curves = [np.array(row["curve"])[:, (column, 3)].T for row in found]
            share = np.mean([np.interp(budget, *curve) for curve in curves])
            costs = [cost_of_half(*curve) for curve in curves]
            scale = 1000 if column == 2 else 1
            row += [percent(share), "–" if None in costs else f"{np.mean(costs) / scale:.0f}"]
        rows.append([*row, paper.get(method, "–")])
    return table(["method", "seeds 1, 2, ...: solved, %", "adaptive: % (forwards a row)",
                  f"after {least[0] / 1000:.0f}k forwards", "k forwards to 50 %", f"after {least[1]:.0f} s",
                  "seconds to 50 %", "paper"], rows)


def ablation_table(runs: list[tuple[str, str, list[dict]]]) -> str:
    """A row for each (method, change of its command, runs on Sudoku)."""
    rows = []
    for method, change, found in runs:
        solved, _, forwards, decoded = cells(found, clusters("sudoku"))
        name = f"`{change}`" if change else "default"
        rows.append([method, name, solved, each_seed(found), decoded, forwards])
    return table(["method", "change", "solved, %", "seeds 1, 2, 3", "adaptive: % (forwards a row)",
                  "k forwards made, of"], rows)


def long_table(runs: list[dict]) -> str:
    """How far longer runs get, when they first come near it, and what is left to learn from at their end."""
    rows = []
    for row in runs:
        update, _, _, share = np.array(row["curve"]).T
        tenths = np.linspace(0, len(share) - 1, 11).round().astype(int)
        flat = (share > share.max() - 0.02).argmax()
        rows.append([f"`{row['command']}`", ", ".join(map(percent, share[tenths])), percent(share.max()),
                     f"{update[flat]:.0f}", f"{100 * row['equal_groups']:.0f} %, {row['entropy']:.3f}",
                     adaptive([row]), f"{row['seconds'] / 60:.1f}"])
    return table(["run, Sudoku", "solved, %, before and after each tenth of it", "best",
                  "within 2 points of it from update", "at the end: equal groups, entropy, nats",
                  "adaptive: % (forwards a row)", "minutes"], rows)


def earlier_table(runs: dict[str, dict], tasks: list[str]) -> str:
    """What commands reached from earlier bases, seed by seed, on both tasks."""
    rows, starts = {}, {}
    for command, row in sorted(runs.items()):
        if found := re.fullmatch(r"(.*) --task (\w+) --seed \d+", command):
            line = rows.setdefault(found[1], {task: [] for task in tasks} | {"commit": row["commit"][:7]})
            line[found[2]].append(percent(row["curve"][-1][3]))
            starts[found[2]] = percent(row["curve"][0][3])
    head = ["command", "at", *(f"{task.capitalize()}, from {starts.get(task, '?')} %" for task in tasks)]
    return table(head, [[f"`{command}`", line["commit"], *(", ".join(line[task]) for task in tasks)]
                        for command, line in rows.items()])


def tuning_table(lines: list[dict]) -> str:
    """Of each method and setting what every run solved of the validation rows, and the updates it made; what
    few methods were run with is in a column of its own."""
    def cell(found: list[dict]) -> str:
        return ", ".join(("**{:.1f}** ({})" if line["limit"] > 60 else "{:.1f} ({})").format(
            100 * line["after"], line["update"]) for line in found)

    runs, methods = {}, list(dict.fromkeys(line["method"] for line in lines))
    for line in lines:
        runs.setdefault(line["setting"], {}).setdefault(line["method"], []).append(line)
    usual = [setting for setting, found in runs.items() if len(found) > len(methods) / 2]
    rows = []
    for method in methods:
        others = [f"`{setting}` {cell(found[method])}" for setting, found in runs.items()
                  if setting not in usual and method in found]
        rows.append([method, *(cell(runs[setting].get(method, [])) for setting in usual), ", ".join(others)])
    return table(["solved, % (updates)", *(f"`{setting}`" for setting in usual), "others"], rows)


def tree_table(lines: list[dict]) -> str:
    """Without and with sharing."""
    rows = [[line["method"], line["from"], f"{100 * line['equal_groups']:.0f} %",
             *(f"{line[f'{what}_without']} → {line[f'{what}_with']}" for what in ("forwards", "seconds")),
             f"{line['speedup']:.2f}", f"{line['peak_gib_without']} → {line['peak_gib_with']}"]
            for line in lines if "speedup" in line]
    return table(["method", "from", "equal groups", "forwards of an update", "seconds", "ratio", "peak, GiB"],
                 rows)


def nats_table(lines: list[dict]) -> str:
    """How many of a group's canvases are distinct before each step, and what had been drawn by then."""
    return table(["temperature", "before step 0, 1, ...: nats drawn / distinct canvases, %"], [
        [f"{line['temperature']}", ", ".join(f"{nats} / {100 * share:.0f}" for nats, share in
                                           zip(line["nats_before"], line["distinct"], strict=True))]
        for line in lines if "nats_before" in line])


def gradients_table(lines: list[dict]) -> str:
    """Of each update on both kinds of models."""
    rows = {}
    for line in lines:
        rows.setdefault(line["variant"], [line["variant"]]).extend([
            f"{line['cosine_mean']:.3f}", f"{line['cosine_lowest']:.3f}", f"{line['bias']:.2g}",
            f"{line['noise']:.0f}"])
    each = ["lowest", "bias", "noise"]
    return table(["update", "own logits: cosine", *each, "shared: cosine", *each], list(rows.values()))


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with what stands between <!-- name --> and <!-- end --> made anew."""
    def anew(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([\w ]+) -->\n.*?\n<!-- end -->", anew, text, flags=re.DOTALL)
