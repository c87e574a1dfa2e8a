"""Real checkpoints from end to end: each method on each layout and each task, and an evaluation kept on disk.

Weights are random and tiny, so nothing is learned; layouts, tokenizers, chat templates, rewards and the loop
are the real ones."""

import csv
import json

import pytest
import torch
from helpers import BASELINES, METHODS, launch, lines, same_run
from checkpoints import LAYOUTS, write

import common
from plumbing import models

QUESTIONS = [f"What is {a} plus {a + 1}?" for a in range(20)]
BOARDS = ["0140432014020000,2143432114323214", "3102200002100320,3142243142131324"]
CHECK = "\n\ndef check(candidate):\n    assert f({0}) == {0}\n    assert f(0) == 0\n\ncheck(f)"
ROWS = {  # as the local files have them
    "gsm8k": [{"question": q, "ground_truth_answer": str(2 * a + 1)} for a, q in enumerate(QUESTIONS)],
    "math": [{"question": q, "ground_truth_answer": f"\\frac{{{a}}}{{7}}"} for a, q in enumerate(QUESTIONS)],
    "sudoku": [dict(zip(("Puzzle", "Solution"), row.split(","), strict=True)) for row in BOARDS],
    "countdown": [{"input": f"{a},{a + 1},3", "output": "10"} for a in range(20)],
    "mbpp": [{"question": q, "test_list": [CHECK.format(a)]} for a, q in enumerate(QUESTIONS)],
}
SHAPE = ("--prompts 1 --G 2 --L 16 --S 4 --block 8 --budget 600 --eval_rows 2 --eval_every 2 --save_every 1 "
         "--seed 3").split()
OWN = {"egspo": ["--K", 2], "rldf": ["--K", 2], "wd1": ["--passes", 2], "gdsd": ["--passes", 2],
       **dict.fromkeys(BASELINES, ["--passes", 1])}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for task, rows in ROWS.items():
        files[task] = str(folder / f"{task}.{'csv' if task == 'sudoku' else 'json'}")
        with open(files[task], "w", newline="") as file:
            if task == "sudoku":
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                json.dump(rows, file)
    return files


# Every method with every layout, a baseline with two; the tasks take turns: each meets every method.
RUNS = [(method, layout, list(ROWS)[(m + i) % 5]) for m, method in enumerate(METHODS)
        for i, layout in enumerate(LAYOUTS) if method not in BASELINES or i % 3 == m % 3]


@pytest.mark.parametrize("method, layout, task", RUNS)
def test_two_updates_and_resume(method, layout, task, data, tmp_path, monkeypatch, with_a_gradient):
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)  # it would take half of the time
    write(layout, tmp_path / "model")
    argv = ["--model", tmp_path / "model", "--task", task, "--data", data[task], *SHAPE, *OWN[method]]
    launch(method, *argv, "--updates", 2, "--out", tmp_path / "whole")
    launch(method, *argv, "--updates", 1, "--out", tmp_path / "two")
    launch(method, "--resume", tmp_path / "two", "--updates", 2)
    same_run(tmp_path / "whole", tmp_path / "two")
    rows = [row for row in lines(tmp_path / "whole") if "reward" in row]
    assert [row["update"] for row in rows] == [1, 2]
    assert all(row["skipped"] == 0 for row in rows) and max(row["grad_norm"] for row in rows) > 0
    before = models.load_model(str(tmp_path / "model"))
    after = models.load_model(str(tmp_path / "whole" / "model"))
    assert (after.mask_id, after.end_ids, after.shift) == (before.mask_id, before.end_ids, before.shift)
    assert common.chat_prompt(after, "1 + 1?") == common.chat_prompt(before, "1 + 1?")


@pytest.mark.parametrize("method", METHODS)
def test_as_on_cuda(method, data, tmp_path, monkeypatch, with_a_gradient):
    """bf16 autocast over fp32 weights, and checkpointed layers; here by the CPU's own autocast."""
    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    monkeypatch.setattr(models.Denoiser, "autocast", autocast)
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
    write("dream", tmp_path / "model")
    argv = ["--model", tmp_path / "model", "--task", "gsm8k", "--data", data["gsm8k"], *SHAPE, *OWN[method]]
    beta = [] if method == "wd1" else ["--beta", 0.1]
    launch(method, *argv, *beta, "--updates", 2, "--gradient_checkpointing", "--out", tmp_path / "run")
    rows = [row for row in lines(tmp_path / "run") if "reward" in row]
    assert all(row["skipped"] == 0 for row in rows) and max(row["grad_norm"] for row in rows) > 0
    assert rows[0].get("kl", 0.0) == 0.0  # policy and reference round alike
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert {value.dtype for value in state["network"].values()} == {torch.float32}
    model = models.load_model(str(tmp_path / "model"))
    hidden = model.body(torch.full((1, 4), model.mask_id), None)
    with model.autocast():
        assert model.network.lm_head(hidden).dtype == torch.bfloat16  # it was on
    assert model.head(hidden).dtype == torch.float32


def test_eval_only_gives_the_number_of_the_run_and_keeps_it_with_its_settings(data, tmp_path, capsys):
    write("dream", tmp_path / "model")
    argv = ["--model", tmp_path / "model", "--task", "gsm8k", "--data", data["gsm8k"], *SHAPE]
    out = tmp_path / "run"
    launch("wd1", *argv, "--eval_threshold", 0.4, "--updates", 1, "--out", out)
    last = [row for row in lines(out) if "eval_reward" in row][-1]
    capsys.readouterr()
    launch("wd1", "--resume", out, "--eval_only")
    assert "greedy: L 16, S 4, block 8, order top_prob; adaptive: threshold 0.4" in capsys.readouterr().out
    launch("wd1", "--resume", out, "--eval_only")
    end, first, second = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    assert first == second  # none replaces another
    assert {k: v for k, v in end.items() if k != "args"} == {k: v for k, v in first.items() if k != "args"}
    assert {k: first[k] for k in last} == last and "threshold_accuracy" in last
    said = first | first["args"]
    for key in ("model", "revision", "task", "data", "test_data", "L", "S", "block", "order"):
        assert key in said, key
    for key in ("eval_threshold", "eval_temperature", "budget", "rows", "device", "torch", "commit"):
        assert key in said, key
    assert len(first["answers"]) == said["rows"] == 2 and isinstance(first["answers"][0][0], str)
