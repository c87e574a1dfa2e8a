"""benchmarks/compare.py: runs are made once and go on, and no number in a README is typed by hand."""

import fcntl
import json
import os
import re

import numpy as np
import pytest
from helpers import ROOT

from benchmarks import compare, tables

STUB = """
import json, sys, time
from pathlib import Path
resumed = "--resume" in sys.argv
out = Path(sys.argv[sys.argv.index("--resume" if resumed else "--out") + 1])
out.mkdir(exist_ok=True)
with open(out / "starts", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
(out / "state.pt").touch()
time.sleep(0.5)
if (out.parent / "fail").exists() and "--seed 2" in (out / "starts").read_text():
    sys.exit(130)
update = dict(update=5, seconds=200.0, nfe_rollout=3, nfe_rollout_full=30, nfe_update=1, nfe_update_full=10,
              equal_groups=0.5, entropy=0.1)
lines = [dict(update=u, eval_accuracy=a, threshold_accuracy=a, threshold_nfe_per_row=4.0)
         for u, a in ((0, 0.25), (5, 0.5))]
(out / "metrics.jsonl").write_text("\\n".join(map(json.dumps, [lines[0], update, lines[1]])))
(out / "evals.jsonl").write_text(json.dumps(dict(answers=[["x", 1.0], ["y", 0.0]] * 8, rows=16, torch="",
                                                      args=dict(task="sudoku"))))
"""


SECOND = "egspo.py --lam 0 --task sudoku --model plumbing/bases/sudoku-0 --seed 2"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project of one method, which writes what a run writes."""
    (tmp_path / "egspo.py").write_text(STUB)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(compare, "MAIN", {"EGSPO": "egspo.py --lam 0"})
    return tmp_path


def starts(folder) -> list[list[str]]:
    return [file.read_text().splitlines() for file in sorted(folder.glob("runs/compare/*/starts"))]


def test_a_run_is_made_once_and_a_stopped_one_goes_on(folder, capsys):
    args = compare.Args(study="main", task="sudoku", bases=1, seeds=3, jobs=2)
    (folder / "runs" / "compare").mkdir(parents=True)
    (folder / "runs" / "compare" / "fail").touch()
    with pytest.raises(SystemExit) as stopped:
        compare.make(args)
    assert stopped.value.code == 1 and len(compare.finished()) == 2  # the others were made
    assert f"{SECOND}: exit status 130" in capsys.readouterr().out
    (folder / "runs" / "compare" / "fail").unlink()
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            compare.make(args)
        assert stopped.value.code == 0
    rows = compare.finished()
    assert list(rows) and set(rows) == set(compare.commands(args)) and len(rows) == 3
    first, second, third = starts(folder)
    assert len(first) == len(third) == 1 and len(second) == 2 and second[1].startswith("--resume ")
    assert all("--model plumbing/bases/sudoku-0 " in start[0] for start in (first, third))
    base = compare.digest(compare.BASES / "sudoku-0")
    assert all(row["base"] == base for row in rows.values())
    row = rows[SECOND.replace("--seed 2", "--seed 1")]
    assert row["curve"] == [[0, 0, 0, 0.25], [5, row["seconds"], 40, 0.5]]
    assert 0 < row["seconds"] < 150  # of 200 by the clock, most of them asleep
    assert row["adaptive"] == [[0.25, 4], [0.5, 4]]
    assert np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)).tolist() == [1, 0] * 8
    compare.RUNS.write_text(compare.RUNS.read_text().replace(base, "another"))
    assert compare.finished() == {}  # runs from weights that are not kept any more


def test_a_run_of_another_process_is_left_alone(folder):
    out = compare.run_folder(SECOND)
    out.mkdir(parents=True)
    (out / "metrics.jsonl").touch()  # no checkpoint yet
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="another process is at work"):
        compare.execute(SECOND)
    assert (out / "metrics.jsonl").exists()
    os.close(held)
    compare.execute(SECOND)
    assert not (out / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("line", ["{", "[]", '{"base": "x"}'])
def test_a_bad_line_is_refused_in_one_line(line, folder, capsys):
    compare.RUNS.write_text(line + "\n")
    with pytest.raises(SystemExit) as stopped:
        compare.finished()
    assert stopped.value.code == 2 and "line 1 is not of a run" in capsys.readouterr().err


def test_a_study_makes_one_of_everything_before_the_next_of_anything():
    found = compare.commands(compare.Args(study="main", task="sudoku"))
    starts = [re.search(r"sudoku-(\d) --seed (\d)", command).groups() for command in found]
    turns = [("0", "1"), ("1", "1"), ("2", "1"), ("0", "2"), ("1", "2"), ("2", "2")]  # base, seed
    assert starts == [turn for turn in turns for _ in compare.MAIN]


def test_every_command_is_of_a_script_with_these_flags():
    commands = compare.commands(compare.Args())
    assert len(set(commands)) == len(commands)
    for command in commands:
        script, *flags = command.split()
        args = (ROOT / script).read_text() + (ROOT / "plumbing" / "flags.py").read_text()
        for flag in (flag for flag in flags if flag.startswith("--")):
            assert re.search(rf"^    {flag[2:]}: ", args, re.MULTILINE), command


def test_interval_against_a_slow_one():
    """Two bases of three runs, of 40 rows in 8 clusters; the bootstrap by loops, over other draws."""
    rng, cluster = np.random.default_rng(5), np.repeat(np.arange(8), [1, 9, 5, 5, 5, 5, 5, 5])
    right = (rng.random((2, 3, 8))[:, :, cluster] > [[[0.3]], [[0.7]]]).astype(int)  # a cluster goes together
    runs = [[{"correct": np.packbits(row).tobytes().hex()} for row in of_base] for of_base in right]
    value, low, high = map(float, re.findall(r"[\d.]+", tables.interval(runs, cluster)))
    means, one_bag = [], []
    for _ in range(4000):
        chosen = [row for cluster_ in rng.integers(8, size=8) for row in np.flatnonzero(cluster == cluster_)]
        means.append(np.mean([np.mean([right[base][seed][chosen].mean() for seed in rng.integers(3, size=3)])
                              for base in rng.integers(2, size=2)]))
        one_bag.append(np.mean([right.reshape(6, 40)[run][chosen].mean() for run in rng.integers(6, size=6)]))
    assert abs(value - 100 * right.mean()) < 0.06
    assert np.abs(np.quantile(means, (0.025, 0.975)) * 100 - [low, high]).max() < 2.5
    assert np.abs(np.quantile(one_bag, (0.025, 0.975)) * 100 - [low, high]).max() > 4  # bases not resampled
    alone = [np.mean(right[rng.integers(2), rng.integers(3), rng.integers(40, size=40)]) for _ in range(4000)]
    assert np.abs(np.quantile(alone, (0.025, 0.975)) * 100 - [low, high]).max() > 5  # rows as if independent


def test_the_cost_of_half_is_that_of_the_first_crossing():
    cost = np.array([0.0, 10, 20, 30, 40])
    assert tables.cost_of_half(cost, np.array([0.3, 0.4, 0.6, 0.45, 0.7])) == 15  # not the second one
    assert tables.cost_of_half(cost, np.array([0.5, 0.4, 0.6, 0.45, 0.7])) == 0
    assert tables.cost_of_half(cost, np.array([0.3, 0.4, 0.49, 0.45, 0.2])) is None


def test_a_long_run_has_flattened_where_it_first_comes_near_its_best():
    solved = [0.3, 0.6, 0.7, 0.66, 0.715, 0.69]  # not at its best, nor only where it stays near it
    curve = [[50 * i, 9.0 * i, 7 * i, share] for i, share in enumerate(solved)]
    run = {"command": "egspo.py", "curve": curve,
           "equal_groups": 0.5, "entropy": 0.02, "adaptive": [[0.4, 7.0], [0.3, 2.0]], "seconds": 90.0}
    line = tables.long_table([run], 0.99).splitlines()[3]
    assert line.endswith("| 71.5 | 100 | 50 %, 0.020 | 30.0 (2.0) | 1.5 |")


@pytest.mark.parametrize("text, made", [
    ("<!-- a -->\nold\nold\n<!-- end -->\nkept\n<!-- b -->\n<!-- end -->\n",
     "<!-- a -->\nA\n<!-- end -->\nkept\n<!-- b -->\nB\n<!-- end -->\n"),  # not up to the next end
    ("<!-- a -->\n<!-- end -->\nkept\n<!-- b -->\nold\n<!-- end -->",
     "<!-- a -->\nA\n<!-- end -->\nkept\n<!-- b -->\nB\n<!-- end -->"),
    ("<!-- a -->\nkept\n<!-- b -->\nold\n<!-- end -->\n", None), ("<!-- a -->\nkept\n", None),
    ("<!-- end -->\nkept\n<!-- a -->\n", None)])
def test_a_table_takes_its_own_place_alone(text, made):
    if made is None:
        with pytest.raises(ValueError, match="not by <!-- end -->"):
            tables.fill(text, {"a": "A", "b": "B"})
    else:
        assert tables.fill(text, {"a": "A", "b": "B"}) == made


def test_the_readmes_hold_what_the_runs_say():
    made = compare.every_table()
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = file.read_text()
        assert tables.fill(text, made) == text, f"python benchmarks/compare.py --report rewrites {file}"
    names = [name for file in ("README.md", "results/README.md")
             for name in re.findall(r"^<!-- ([\w -]+) -->\n", (ROOT / file).read_text(), re.MULTILINE)]
    assert set(names) - {"end"} == set(made)
    broken = (ROOT / "README.md").read_text().replace("what the base shows", "what the bass shows", 1)
    assert tables.fill(broken, made) != broken
    assert json.dumps(made)  # text alone
