"""A method needs common.py and nothing else of ours: the two files are copied, and a project trains with them
that has a model, a tokenizer and a task of its own. Through the plumbing comes out the same."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import METHODS, ROOT, launch, offer, script

from plumbing import models

PROJECT = '''
from types import SimpleNamespace
import torch
from common import Denoiser, Run, Task

class Network(torch.nn.Module):  # each position sees all others
    device, config = torch.device("cpu"), SimpleNamespace(vocab_size=13, max_position_embeddings=64)
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(13, 32), torch.nn.Linear(32, 13)
    def model(self, x, attention_mask, position_ids):
        e = self.embed(x) * (1 if attention_mask is None else attention_mask[..., None])
        return SimpleNamespace(last_hidden_state=(e + e.cumsum(1) + e.sum(1, keepdim=True)).tanh())

class Digits:  # the tokens 0 to 9; 10 ends an answer, 11 pads, 12 is the mask
    chat_template = None
    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [list(map(int, text)) for text in texts]}
    def batch_decode(self, rows):
        return ["".join(str(token) for token in row if token < 10) for row in rows]

def reward(text, row):
    return text.count(row["prompt"][0]) + len(text) / 10, {"correct": 0.0, "parse_fail": 0.0}

def model():
    torch.manual_seed(0)
    return Denoiser(Network().eval(), Digits(), mask_id=12, eos_id=10, pad_id=11, end_ids=(10,))

def task():
    rows = [{"prompt": "123456789"[i:i + 1 + i % 3]} for i in range(9)]  # of three lengths
    return Task(rows, rows[:2], reward, draw=lambda text, row: [text])
'''
TRAIN = '''
from {method} import Args, train
denoiser = model()
train(Args(**{settings}), denoiser, task(), Run(updates=3))
torch.save(denoiser.network.state_dict(), "trained.pt")
'''
ALONE = '''
import common, importlib.util, sys
assert common.__file__ == __import__("os").path.abspath("common.py")
assert not any(map(importlib.util.find_spec, ("plumbing", "tasks", "benchmarks", "baselines")))
assert not {"tyro", "transformers", "datasets", "matplotlib"} & sys.modules.keys()
'''
SHAPE = dict(prompts=4, G=4, L=8, S=4, block=4, minibatches=2, lr=1e-2, seed=3)
OWN = {
    "egspo": dict(K=2, beta=0.1, passes=2), "rldf": dict(K=2, threshold=0.3, beta=0.1), "wd1": dict(passes=2),
    "gdsd": dict(beta=0.1, psi=2.0), "baselines.diffu_grpo": dict(beta=0.1, passes=2),
    "baselines.espo": dict(beta=0.1), "baselines.just_grpo": dict(beta=0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_two_files_are_enough_and_do_what_the_plumbing_does(method, tmp_path, monkeypatch):
    settings, name = SHAPE | OWN[method], method.rpartition(".")[2]
    here = tmp_path / "project"
    here.mkdir()
    for file in (ROOT / "common.py", script(method)):
        shutil.copy(file, here)
    (here / "project.py").write_text(PROJECT + TRAIN.format(method=name, settings=settings) + ALONE)
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "project.py"]
    done = subprocess.run(command, cwd=here, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [dict(re.findall(r"(\w+) ([^ :]+)", line)) for line in done.stdout.splitlines()]
    assert [int(line["update"]) for line in printed] == [1, 2, 3]

    ours = {}
    exec(PROJECT, ours)
    offer(monkeypatch, "toy", ours["task"])
    monkeypatch.setattr(models, "load_model", lambda *_: ours["model"]())
    monkeypatch.setattr(models, "plan", lambda *_: (False, False))
    monkeypatch.setattr(models, "save_model", lambda *_: None)  # of transformers models alone
    for function in ("plot", "trace"):
        monkeypatch.setattr(f"plumbing.run.{function}", lambda *_: None)
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    launch(method, "--model", "any", "--task", "toy", *flags, "--updates", 3, "--eval_threshold", 0,
           "--out", tmp_path / "run")
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    logged = [row for row in rows if "loss" in row]
    for line, row in zip(printed, logged, strict=True):
        for key in ("reward", "loss", "grad_norm"):
            assert line[key] == f"{row[key]:.4g}", (key, line, row)
    assert all(row["grad_norm"] > 0 for row in logged)
    trained = torch.load(here / "trained.pt", weights_only=True)
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["network"]
    start = ours["model"]().network.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in trained.items()) and len(kept) == len(trained)
    assert all((value - start[key]).abs().max() > 1e-3 for key, value in trained.items())
