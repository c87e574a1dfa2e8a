"""The tables of README.md and results/README.md, made of the lines in results/ by
`python benchmarks/compare.py --report`.

A run is a line of runs.jsonl; the points of its curve are update, seconds, forwards with every row counted,
solved share.
"""

import functools
import itertools
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


def interval(runs: list[list[dict]], cluster: np.ndarray) -> str:
    """Mean solved share of the runs, %, a list for each base, and its 95 % interval. Bases, the seeds of a
    base, and clusters are drawn with replacement."""
    if not runs:
        return "not measured"
    sums, sizes = [], np.bincount(cluster)
    for of_base in runs:
        packed = np.stack([np.frombuffer(bytes.fromhex(row["correct"]), np.uint8) for row in of_base])
        right = np.unpackbits(packed, axis=1)[:, : len(cluster)]  # (seeds, rows)
        sums.append(np.stack([np.bincount(cluster, row) for row in right]))  # (seeds, clusters)
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        drawn, shares = rng.integers(len(sizes), size=len(sizes)), []
        for base in rng.integers(len(sums), size=len(sums)):
            seeds = rng.integers(len(sums[base]), size=len(sums[base]))
            shares.append(sums[base][seeds][:, drawn].sum() / sizes[drawn].sum() / len(seeds))
        means.append(100 * np.mean(shares))
    low, high = np.quantile(means, (0.025, 0.975))
    mean = np.mean([of_base.sum() / sizes.sum() / len(of_base) for of_base in sums])
    return f"**{percent(mean)}** [{low:.0f}, {high:.0f}]"


def flat(runs: list[list[dict]]) -> list[dict]:
    """The runs of all bases in one list."""
    return sum(runs, [])


def adaptive(runs: list[dict], when: int = 1) -> str:
    """Solved by adaptive decoding before (when = 0) or after (1) training, and the forwards a row it took."""
    if not runs:
        return ""
    share, nfe = np.mean([row["adaptive"][when] for row in runs], 0)
    return f"{percent(share)} ({nfe:.1f})"


def shows(runs: list[dict]) -> str:
    """Solved by the bases that the runs start from, as a mean."""
    return percent(np.mean(list({row["base"]: row["curve"][0][3] for row in runs}.values()))) if runs else ""


def each_seed(runs: list[list[dict]]) -> str:
    """Solved by each run at its end; a semicolon between two bases."""
    return "; ".join(", ".join(percent(row["curve"][-1][3]) for row in of_base) for of_base in runs)


def forwards(runs: list[dict]) -> str:
    """Thousands of forwards made, and how many the papers count."""
    if not runs:
        return ""
    made = np.mean([row["nfe_rollout"] + row["nfe_update"] for row in runs]) / 1000
    full = np.mean([row["curve"][-1][2] for row in runs]) / 1000
    return f"{made:.0f} / {full:.0f}"


def minutes(runs: list[dict]) -> str:
    return f"{np.median([row['seconds'] for row in runs]) / 60:.1f}" if runs else ""


def main_table(
    runs: dict[str, dict[str, list[list[dict]]]], known: dict[str, list[float]], when: dict[str, str]
) -> str:
    """The README's: every method on both tasks, {task: {method: runs of each base}}; what the bases know; and
    which method to take when."""
    everything = {task: flat(sum(methods.values(), [])) for task, methods in runs.items()}
    rows = [["what the base shows", *(shows(everything[task]) for task in runs), "", ""],
            ["what the base knows", *(percent(np.mean(known[task])) for task in runs), "", ""]]
    for method in next(iter(runs.values())):
        both = [runs[task][method] for task in runs]
        solved = [interval(found, clusters(task)) for task, found in zip(runs, both, strict=True)]
        took = " / ".join(minutes(flat(found)) or "–" for found in both)
        rows.append([method, *solved, took, when[method]])
    head = ["method", "Sudoku, % solved", "Countdown, % solved", "minutes", "take it"]
    return table(head, rows) + "\n\n" + seeds_line(runs)


def seeds_line(runs: dict[str, dict[str, list[list[dict]]]]) -> str:
    """How many bases and seeds are behind the table."""
    counts = {(task, method): tuple(map(len, found)) for task, methods in runs.items()
              for method, found in methods.items() if found}
    if not counts:
        return "No runs yet."

    def told(count: tuple[int, ...]) -> str:
        return f"{len(count)} base{'s' * (len(count) > 1)}, {sum(count)} run{'s' * (sum(count) > 1)}"

    usual, others = statistics.mode(counts.values()), {}
    for (task, method), count in counts.items():
        if count != usual:
            others.setdefault(f"{told(count)} on {task.capitalize()}", []).append(method)
    different = [f"{where} of {', '.join(methods)}" for where, methods in others.items()]
    return "; ".join([f"Each cell: {told(usual)}", *different]) + "."


def cost_of_half(cost: np.ndarray, share: np.ndarray) -> float | None:
    """Where a curve first reaches a solved share of one half, between its points; None: it does not."""
    if share.max() < 0.5:
        return None
    i = int((share >= 0.5).argmax())
    return float(np.interp(0.5, share[max(0, i - 1) : i + 1], cost[max(0, i - 1) : i + 1]))


def budget_table(
    runs: dict[str, list[list[dict]]], commands: dict[str, str], paper: dict[str, str], known: list[float]
) -> str:
    """Each run; solved at the largest budget that every run spent; what half of the rows cost."""
    runs = {method: found for method, found in runs.items() if found}
    if not runs:
        return "Not measured."
    everything = flat(sum(runs.values(), []))
    least = [min(row["curve"][-1][column] for row in everything) for column in (2, 1)]
    rows = [["what the base shows", shows(everything), adaptive(everything, 0), *[""] * 5, paper["before"]],
            ["what the base knows", ", ".join(map(percent, known)), *[""] * 7]]
    for method, found in runs.items():
        row = [f"{method}: `{commands[method]}`", each_seed(found), adaptive(flat(found)),
               forwards(flat(found))]
        for column, budget in zip((2, 1), least, strict=True):
            curves = [np.array(line["curve"])[:, (column, 3)].T for line in flat(found)]
            share = np.mean([np.interp(budget, *curve) for curve in curves])
            costs = [cost_of_half(*curve) for curve in curves]
            scale = 1000 if column == 2 else 1
            row += [percent(share), "–" if None in costs else f"{np.mean(costs) / scale:.0f}"]
        rows.append([*row, paper.get(method, "–")])
    return table(["method", "each run: solved, %; a semicolon between bases", "adaptive: % (forwards a row)",
                  "k forwards run / counted by the papers", f"after {least[0] / 1000:.0f}k forwards",
                  "k forwards to 50 %", f"after {least[1]:.0f} s", "seconds to 50 %", "paper"], rows)


def ablation_table(runs: list[tuple[str, str, list[list[dict]]]], known: list[float]) -> str:
    """A row for each (method, change of its command, runs on Sudoku). known: the share that each base
    knows."""
    if not runs:
        return "Not measured."
    everything = flat(sum((found for _, _, found in runs), []))
    rows = [["what the bases show", "", shows(everything), "", adaptive(everything, 0), ""],
            ["what the bases know", "", percent(np.mean(known)), "; ".join(map(percent, known)), "", ""]]
    rows += [[method, f"`{change}`" if change else "default", interval(found, clusters("sudoku")),
              each_seed(found), adaptive(flat(found)), forwards(flat(found))]
             for method, change, found in runs]
    return table(["method", "change", "solved, %", "each run; a semicolon between bases",
                  "adaptive: % (forwards a row)", "k forwards run / counted by the papers"], rows)


def long_table(runs: list[dict], known: float) -> str:
    """How far longer runs get, when they first come near it, and what is left to learn from at their end.
    known: the share that the base knows."""
    if not runs:
        return "Not measured."
    rows = [["what the base knows", "", percent(known), "", "", "", ""]]
    for row in runs:
        update, _, _, share = np.array(row["curve"]).T
        tenths = np.linspace(0, len(share) - 1, 11).round().astype(int)
        near = (share > share.max() - 0.02).argmax()
        rows.append([f"`{row['command']}`", ", ".join(map(percent, share[tenths])), percent(share.max()),
                     f"{update[near]:.0f}", f"{100 * row['equal_groups']:.0f} %, {row['entropy']:.3f}",
                     adaptive([row]), f"{row['seconds'] / 60:.1f}"])
    return table(["run, Sudoku", "solved, %, before and after each tenth of it", "best",
                  "first within 2 points of it at update", "at the end: equal groups, entropy, nats",
                  "adaptive: % (forwards a row)", "minutes"], rows)


def bases_table(configs: dict[str, dict]) -> str:
    """What each kept base knows and shows of the held-out rows, as pretrain.py has measured it."""
    rows = [[f"`{name}`", *(percent(config[what][part]) for what in ("knows", "shows")
                            for part in ("test", "test_one_token"))] for name, config in configs.items()]
    return table(["base", "knows", "knows, one token a step", "shows", "shows, one token a step"], rows)


def tuning_table(lines: list[dict], known: float) -> str:
    """What each setting solved of the validation rows in a minute, and the updates it made. known: the
    share that the base knows."""
    found = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        found.setdefault(line["command"], []).append(f"{percent(line['after'])} ({line['update']})")
    rows = [["what the base shows", percent(lines[0]["before"])], ["what the base knows", percent(known)]]
    rows += [[f"`{command}`", ", ".join(runs)] for command, runs in sorted(found.items())]
    return table(["command", "solved, % (updates)"], rows)


def smollm2_table(lines: list[dict]) -> str:
    """The runs of benchmarks/smollm2.py, the best method first: more rows are evaluated at its two ends than
    on its way."""
    best = {line["method"]: line["after"] for line in sorted(lines, key=lambda line: line["after"])}
    rows = [[line["method"], str(line["seed"]), f"{line['minutes']:.0f}", str(line["curve"][-1][0]),
             f"{percent(line['before'])} → **{percent(line['after'])}**",
             ", ".join(percent(share) for _, _, _, share in line["curve"]), forwards([line]),
             f"{100 * line['equal_groups']:.0f} %, {line['entropy']:.2f}"]
            for line in sorted(lines, key=lambda line: (-best[line["method"]], line["method"], line["seed"],
                                                      line["minutes"]))]
    return table(["method", "seed", "minutes", "updates", f"solved, % of {lines[0]['rows']} held-out rows",
                  "on the way, of fewer rows, %",
                  "k forwards run / counted by the papers", "at the end: equal groups, entropy, nats"], rows)


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
    """The text with what stands between <!-- name --> and <!-- end --> made anew. ValueError unless an end
    follows each name: what stands between two names would be lost."""
    marks = re.findall(r"^<!-- (.*) -->$", text, re.MULTILINE)
    for name, end in itertools.zip_longest(marks[::2], marks[1::2]):
        if name == "end" or end != "end":
            raise ValueError(f"<!-- {name} --> is followed by <!-- {end} -->, not by <!-- end -->")

    def anew(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->"

    return re.sub(r"^<!-- (.*) -->\n(?:.*\n)*?<!-- end -->$", anew, text, flags=re.MULTILINE)
