"""The Python of README.md runs as it is printed."""

import re
import shutil
import subprocess
import sys

import torch
from helpers import ROOT, sharp_model, toy_task
from test_copies import PROJECT

import common
import egspo

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_one_update_is_egspos():
    """Its gradient is that of train() in egspo.py, with one minibatch and the same draws."""
    model, task, G = sharp_model(), toy_task(), 4
    args = egspo.Args(prompts=3, G=G, minibatches=1, grad_norm=1e9, lr=0.0, weight_decay=0.0)
    found = []

    class OneUpdate(common.Run):
        def step(self, loss, max_grad_norm, warmup=0):
            found.append([p.grad.clone() for p in model.network.parameters() if p.grad is not None])
            return super().step(loss, max_grad_norm, warmup)

    egspo.train(args, model, task, OneUpdate(updates=1))
    ids = common.draw_prompts(len(task.train), args.prompts, args.seed, 0)
    names = vars(common) | vars(egspo) | {
        "model": model, "task": task, "G": G, "rows": [task.train[i] for i in ids for _ in range(G)],
        "gens": [common.generator("cpu", args.seed, "rollout", 0, i) for i in ids]}
    code, = [block for block in BLOCKS if "loss.backward()" in block]
    exec(code, names)
    mine = [p.grad for p in model.network.parameters() if p.grad is not None]
    assert max(grad.abs().max() for grad in mine) > 1e-3
    for one, other in zip(mine, found[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_two_files_copied_train(tmp_path):
    code, = [block for block in BLOCKS if "Run(updates" in block]
    for name in ("common.py", "egspo.py"):
        shutil.copy(ROOT / name, tmp_path)
    network = "network, tokenizer, mask_id, eos_id, pad_id = Network().eval(), Digits(), 12, 10, 11"
    code = code.replace("2+3=", "235").replace("4+4=", "448").replace("updates=100", "updates=2")
    (tmp_path / "project.py").write_text(f"{PROJECT}\n{network}\n{code}")
    done = subprocess.run([sys.executable, "project.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2 and "update 2: reward " in done.stdout


def test_a_trained_model_fills_a_board(capsys):
    code, = [block for block in BLOCKS if "load_model" in block]
    exec(code.replace("runs/egspo-sudoku-1/model", str(ROOT / "plumbing" / "bases" / "sudoku-0")), {})
    said = re.fullmatch(r"[0-4]{16}= [1-4]{16} tensor\((.*)\)\n", capsys.readouterr().out)
    assert 0 <= float(said[1]) <= 1
