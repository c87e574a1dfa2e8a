"""What every method must do, whatever its objective: learn, resume bit for bit, stop on wrong input, log,
save."""

import dataclasses
import importlib
import json
import math
import re
import shlex
import signal
import sys
import time

import pytest
import torch
from helpers import (METHODS, ROOT, SMALL, complete_lines, launch, lines, offer, same_run, script, start,
                     wait_for_update, weights)

import common
import tasks
from plumbing import flags, models, pretrain

@pytest.mark.parametrize("method", METHODS)
def test_four_updates_equal_two_resumed_for_two(method, folder, tmp_path, with_a_gradient):
    four, two = tmp_path / "four", tmp_path / "two"
    launch(method, "--model", folder, *SMALL, "--updates", 4, "--out", four)
    launch(method, "--model", folder, *SMALL, "--updates", 2, "--out", two)
    launch(method, "--resume", two, "--updates", 4)
    same_run(four, two)
    assert max(row.get("grad_norm", 0) for row in lines(four)) > 0
    other = tmp_path / "other-seed"
    launch(method, "--model", folder, *SMALL, "--updates", 4, "--seed", 4, "--out", other)
    assert lines(other) != lines(four)


def test_kill_9_then_resume_equals_never_killed(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["--model", folder, *SMALL, *"--updates 12 --save_every 3 --beta 1".split()]  # the KL moves it
    launch("egspo", *argv, "--out", whole)
    process = start("egspo", *argv, "--out", killed)
    wait_for_update(killed, 4, process)
    process.kill()
    process.communicate()
    done = complete_lines(killed / "metrics.jsonl")[-1]["update"]
    assert done < 12, "killed too late to show anything"
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"update": 99, "rew')  # what a kill in the middle of a write leaves behind
    (killed / "state.tmp").write_bytes(b"half a checkpoint")
    launch("egspo", "--resume", killed)
    same_run(whole, killed)
    assert max(row.get("grad_norm", 0) for row in lines(whole)) > 0


def test_ctrl_c_finishes_the_update_saves_and_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "run"
    process = start("egspo", "--model", folder, *SMALL, "--updates", 1000, "--save_every", 1000, "--out", out)
    wait_for_update(out, 2, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"--resume {out}" in stdout
    step = torch.load(out / "state.pt", weights_only=True)["update"]
    assert 2 <= step < 1000
    assert complete_lines(out / "metrics.jsonl")[-1]["update"] == step
    launch("egspo", "--resume", out, "--updates", step + 1)
    assert lines(out)[-1]["update"] == step + 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_the_readme_promises(method, folder, tmp_path, capsys, with_a_gradient):
    out = tmp_path / "run"
    accuracy = launch(method, "--model", folder, *SMALL, "--updates", 3, "--out", out)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("before", "after", "solved", "failed", "NFE", str(out)))
    first, last = lines(out)[0], lines(out)[-1]
    assert first["update"] == 0 and last["update"] == 3 and last["eval_accuracy"] == accuracy
    updates = [row for row in complete_lines(out / "metrics.jsonl") if "reward" in row]
    assert [row["update"] for row in updates] == [1, 2, 3]
    assert all(math.isfinite(value) for row in updates for value in row.values())
    most = 16 if method in ("rldf", "baselines.just_grpo") else 4  # at most a step per token
    assert 8 * 2 <= updates[0]["nfe_rollout"] <= 8 * 2 * most
    readme = (ROOT / "plumbing" / "README.md").read_text()
    assert [key for key in updates[0] | first if f"`{key}`" not in readme] == []
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "args.json").read_text())
    assert saved["method"] == method.rpartition(".")[2] and saved["seed"] == 3
    model, state = models.load_model(str(out / "model")), weights(out)
    assert all(torch.equal(v, state[k]) for k, v in model.network.state_dict().items())
    assert launch(method, "--resume", out, "--eval_only") == accuracy
    again = launch(method, "--model", out / "model", *SMALL, "--eval_only", "--out", tmp_path / "again")
    assert again == accuracy


BAD = {
    "--task chess": "sudoku",
    "--model nowhere": "tiny",
    "--nonsense 1": "nonsense",
    "--updates many": "steps",
    "--G 1": "at least 2",
    "--prompts 0": "at least 1",
    "--prompts 9000": "8192",
    "--block 5": "multiple",
    "--S 5": "divide",
    "--L 64 --block 8 --S 4": "8 blocks",
    "--L 64 --S 8": "64",
    "--temperature 0": "explore",
    "--updates -1": "at least 0",
    "--lr nan": "lr",
    "--temperature 1e-30": "explore",
    "--temperature 1e30": "explore",
    "--grad_norm 0": "above 0",
    "--eval_threshold 2": "at most 1",
    "--resume /nowhere": "no run",
}
BAD_OF = {
    "rldf": {"--K 17": "at most", "--tau 0": "above 0", "--threshold 1.5": "at most 1", "--masks": "masks",
             "--order random": "threshold", "--eps 2": "at most 1"},
    "gdsd": {"--num_mc 0": "at least 1", "--match kl": "match", "--topk -1": "at least 0",
             "--beta -1": "at least 0"},
    "wd1": {"--plusplus --K 9": "from 1 to", "--psi -1": "at least 0"},
    "baselines.diffu_grpo": {"--hide_prompt 2": "at most 1", "--eps 2": "at most 1"},
    "baselines.espo": {"--num_mc 0": "at least 1", "--eps 2": "at most 1"},
    "baselines.just_grpo": {"--eps 2": "at most 1", "--beta -1": "at least 0"},
    "egspo": {
        "--K 0": "from 1 to",
        "--K 9": "from 1 to",
        "--eps_lo 2": "at most 1",
        "--baseline mean": "rank",
        "--select best": "entropy",
        "--order left": "top_prob",
        "--minibatches 3": "divide",
        "--threshold 0.9": "threshold",
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_wrong_input_stops_with_one_line_and_status_2(method, folder, tmp_path, capfd):
    for given, allowed in (BAD | BAD_OF[method]).items():
        with pytest.raises(SystemExit) as stopped:
            launch(method, "--model", folder, "--out", tmp_path / "run", *given.split())
        message = capfd.readouterr().err
        assert stopped.value.code == 2, given
        assert allowed in message, (given, message)
        assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_wrong_runs_are_refused(folder, tmp_path, capfd):
    out = tmp_path / "run"
    launch("egspo", "--model", folder, *SMALL, "--updates", 1, "--out", out)
    before = (out / "state.pt").read_bytes(), (out / "metrics.jsonl").read_bytes()
    settings = json.loads((out / "args.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.json").write_text(json.dumps(settings | {"method": "something else"}))
    (other / "state.pt").write_bytes(before[0])
    cases = [(("--out", out), "--resume"), (("--resume", out, "--lr", 1), "lr"),
             (("--resume", other), "another method"), (("--resume", out, "--task", "chess"), "task")]
    for argv, said in cases:
        with pytest.raises(SystemExit) as stopped:
            launch("egspo", "--model", folder, *argv)
        assert stopped.value.code == 2
        assert said in capfd.readouterr().err
    assert before == ((out / "state.pt").read_bytes(), (out / "metrics.jsonl").read_bytes())


def test_non_finite_gradients_are_skipped_and_three_stop_the_run(folder, tmp_path, monkeypatch, capfd):
    """Infinite rewards make the loss NaN from the third update on; what is kept led
    to a finite one."""
    honest, calls = common.reward_rows, []

    def broken(*inputs):
        reward, parts, texts = honest(*inputs)
        calls.append(1)
        return (reward * math.nan if len(calls) > 2 else reward), parts, texts

    egspo = importlib.import_module("egspo")
    monkeypatch.setattr(egspo, "reward_rows", broken)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        argv = "--updates 9 --lam 0 --minibatches 1".split()
        launch("egspo", "--model", folder, *SMALL, *argv, "--out", out)
    assert "not finite" in stopped.value.code  # sys.exit with a string: exit status 1
    updates = [row for row in lines(out) if "reward" in row]
    assert [row["skipped"] for row in updates] == [0, 0, 1, 2]
    assert updates[-1]["loss"] is None
    assert torch.load(out / "state.pt", weights_only=True)["update"] == 1
    assert all(v.isfinite().all() for v in weights(out).values())


def test_all_methods_start_and_end_with_the_same_text():
    """The optimizer, the prompts of an update, and what a script calls."""
    same = {}
    for method in METHODS:
        text = script(method).read_text()
        assert text.count("    optimizer = torch") == text.count("        # 1 Roll out: ") == 1, method
        head = text.partition("    optimizer = torch")[2].partition("# fused")[0]
        rollout = text.partition("        drawn = draw_prompts(")[2].partition("        roll = roll_out(")[0]
        tail = text.partition('if __name__ == "__main__":\n')[2].replace(", plusplus=PLUSPLUS", "")
        assert head and rollout and tail.endswith("main(train, Args, SUDOKU, COUNTDOWN, LLM)\n"), method
        same.setdefault((head, rollout, tail), []).append(method)
    assert len(same) == 1, list(same.values())


def test_every_setting_is_read():
    """A flag nobody reads is a lie in --help."""
    plumbing = "".join((ROOT / "plumbing" / f"{name}.py").read_text() for name in ("flags", "run", "models"))
    listed = re.search(r"for name in \((.*?)\):", plumbing, re.S).group(1)  # checked by name

    def unread(kind: type, name: str, read: str) -> list[str]:
        names = [f.name for f in dataclasses.fields(kind)]
        return [n for n in names if f"{name}.{n}" not in read and f'"{n}"' not in listed]

    assert unread(flags.Flags, "settings", plumbing) == []
    for method in METHODS:
        read = script(method).read_text() + plumbing.replace("settings.", "args.")
        assert unread(importlib.import_module(method).Args, "args", read) == [], method


def test_written_commands_parse(monkeypatch):
    """Every `python method.py ...` of the README and of the docstrings is a command line of today."""
    texts = [(ROOT / "README.md").read_text(), *(importlib.import_module(m).__doc__ for m in METHODS)]
    command = r"python ([\w/]+)\.py((?: --[\w-]+(?: (?![-#])[\w./~-]+)?)*)"
    commands = [found for text in texts for found in re.findall(command, text)]
    assert len(commands) > 10
    for path, given in commands:
        name = path.replace("/", ".")
        if name in METHODS and "--help" not in given:
            monkeypatch.setattr(sys, "argv", [path, *shlex.split(given)])
            flags.parse(importlib.import_module(name).Args, {})


# ------------------------------------------------------------------------------------------------- it learns

LEARN = {
    "rldf": "--updates 45 --lr 2e-3",
    "gdsd": "--updates 45 --passes 2 --num_mc 2 --minibatches 4 --psi 0.2 --lr 2e-3",
    "wd1": "--updates 45 --lr 5e-4",
    "egspo": "--updates 45 --K 2 --minibatches 1 --lr 5e-3",
    "baselines.diffu_grpo": "--updates 45 --lr 2e-3",
    "baselines.espo": "--updates 45 --lr 2e-3",
    "baselines.just_grpo": "--updates 45 --minibatches 1 --lr 5e-3",
}


def echo_task() -> tasks.Task:
    """Answer with the prompt's digit, four times. Chance is 1/13 per token."""
    rows = [{"prompt": f"{digit}="} for digit in "1234"]

    def reward(text: str, row: dict):
        right = sum(a == row["prompt"][0] for a in text) / 4
        return right, {"correct": float(right == 1), "parse_fail": 0.0}

    return tasks.Task(rows, rows, reward, lambda text, row: [row["prompt"] + text])


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method, tmp_path, monkeypatch):
    base = tmp_path / "base"
    models.save_model(pretrain.tiny_model(layers=1, width=64), base)
    offer(monkeypatch, "echo", echo_task)
    begin = time.perf_counter()
    shape = "--prompts 4 --G 32 --L 4 --S 2 --block 4 --eval_every 1000 --save_every 1000".split()
    out = tmp_path / "run"
    launch(method, "--model", base, "--task", "echo", *shape, "--out", out, *LEARN[method].split())
    rows = lines(out)
    print(method, time.perf_counter() - begin, [round(row["reward"], 2) for row in rows if "reward" in row])
    assert rows[0]["eval_reward"] < 0.3
    assert rows[-1]["eval_reward"] > 0.9
