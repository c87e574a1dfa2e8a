"""Real checkpoints from end to end: each method on each layout and each task, memory, evaluation on disk.

Weights are random and tiny, so nothing is learned; layouts, tokenizers, chat templates, rewards and the loop
are the real ones."""

import csv
import dataclasses
import importlib
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import LAYOUTS, write
from test_methods import BASELINES, METHODS, ROOT, launch, lines, same_run, variants
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import common
from plumbing import models, pretrain, run
from plumbing.flags import WORDS, Flags

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


# ------------------------------------------------------------------------------------- settings, evaluation


def settings(monkeypatch, method: str, *argv):
    module = importlib.import_module(method)
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, argv)])
    return run.parse_args(module.Args, method, module.SUDOKU, module.COUNTDOWN, module.LLM,
                          **variants(module))[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_reads_words_starts_from_the_papers_settings(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no earlier run has the default --out
    write("a2d-qwen3", tmp_path / "real")
    assert "tiny_task" not in json.loads((tmp_path / "real" / "config.json").read_text())
    llm = WORDS | importlib.import_module(method).LLM
    for task in ("gsm8k", "sudoku", "countdown"):
        paper = settings(monkeypatch, method, "--model", tmp_path / "real", "--task", task, "--seed", 5)
        assert {k: vars(paper)[k] for k in llm} == llm and (paper.seed, paper.task) == (5, task)
        assert settings(monkeypatch, method, "--model", "someone/some-hub-id", "--task", task).L == 256
    assert settings(monkeypatch, method, "--model", tmp_path / "real", "--G", 3).G == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_model_starts_from_the_settings_of_its_task(method, tmp_path, monkeypatch):
    """By name, and as a folder that its config says is one."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(method)
    assert (module.COUNTDOWN["L"], module.COUNTDOWN["block"]) == (8, 4)  # as its base was made
    own = {field.name for field in dataclasses.fields(module.Args)}
    for task, own_changes in (("sudoku", module.SUDOKU), ("countdown", module.COUNTDOWN)):
        models.save_model(pretrain.tiny_model(1, 32, task=task), tmp_path / task)
        tiny = settings(monkeypatch, method, "--task", task)
        changed = own_changes | {"task": task, "out": f"runs/{method}-{task}-1"}
        expected = vars(module.Args(**{k: v for k, v in changed.items() if k in own}))
        expected = expected | vars(Flags(**{k: v for k, v in changed.items() if k not in own}))
        assert vars(tiny) == expected
        folder = settings(monkeypatch, method, "--model", tmp_path / task, "--task", task)
        assert vars(folder) == expected | {"model": str(tmp_path / task)}
        assert settings(monkeypatch, method, f"--task={task}", "--L", 32, "--S", 8).L == 32


def test_wd1_plus_plus_starts_from_settings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("wd1")
    parse, seen = run.parse_args, []

    def parse_and_stop(*given, **variants):
        seen.append(vars(parse(*given, **variants)[1]))
        raise InterruptedError

    monkeypatch.setattr(run, "parse_args", parse_and_stop)
    sudoku, countdown, _ = module.PLUSPLUS
    cases = {"--task sudoku": sudoku, "--task countdown": countdown,
             "--model someone/some-hub-id --task gsm8k": module.LLM | {"passes": 1}, "--lr 1": {"lr": 1.0}}
    cases = {f"--plusplus {flags}": changed | {"plusplus": True} for flags, changed in cases.items()}
    for flags, changed in (cases | {"": {"passes": 8, "plusplus": False}}).items():
        monkeypatch.setattr(sys, "argv", ["wd1.py", *flags.split()])
        with pytest.raises(InterruptedError):
            runpy.run_path(str(ROOT / "wd1.py"), run_name="__main__")
        assert {k: seen[-1][k] for k in changed} == changed


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


# --------------------------------------------------------------------------------------------------- memory


def kept_for_backward(network, rows: int, T: int) -> int:
    """Bytes the body keeps for its backward pass under bf16 autocast, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: its address stays taken
        return tensor

    x = torch.randint(60, (rows, T))
    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, cache_enabled=False)):
        network.model(x)
    return sum(size for size, _ in kept.values())


QWEN = dict(vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            is_causal=False, use_cache=False)
SHAPES = [(Qwen3ForCausalLM, Qwen3Config(**QWEN, num_key_value_heads=2, head_dim=64)),
          (Qwen3ForCausalLM, Qwen3Config(**QWEN, num_key_value_heads=4, head_dim=32)),
          (Qwen2ForCausalLM, Qwen2Config(**QWEN, num_key_value_heads=2))]


@pytest.mark.parametrize("cls, config", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_activations_are_an_upper_estimate_and_no_fantasy(cls, config, checkpointing):
    network, budget = cls(config).eval(), 4 * 256
    if checkpointing:
        models.checkpoint_layers(network)
    parts = models.predict_memory(config, L=128, block=32, G=4, budget=budget, train=True, bf16=True,
                                  gradient_checkpointing=checkpointing, reference=True)
    N = sum(p.numel() for p in network.parameters())
    assert parts["weights"] * 2**30 == parts["gradients"] * 2**30 == parts["reference"] * 2**30
    assert parts["weights"] * 2**30 >= 4 * N and parts["Adam"] == 2 * parts["weights"]
    measured = kept_for_backward(network, 4, 256) / 2**30
    if checkpointing:  # and while a layer is made again, what one layer keeps
        single = config.to_dict() | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        measured += kept_for_backward(cls(type(config)(**single)).eval(), 4, 256) / 2**30
    assert measured <= parts["activations"] <= 1.7 * measured


LLADA_8B = dict(
    model_type="llada", d_model=4096, mlp_hidden_size=12288, n_layers=32, n_heads=32, n_kv_heads=32,
    rms_norm_eps=1e-5, rope_theta=500000.0, max_sequence_length=4096, include_qkv_bias=False,
    include_bias=False, weight_tying=False, pad_token_id=126081, eos_token_id=126081, vocab_size=126464)


@pytest.mark.parametrize("have, flags, said", [
    (80, [], "no setting helps: choose a smaller model or a larger GPU"),
    (135, ["--beta", 0.04], "lower --budget or --G, add --gradient_checkpointing, or set --beta 0"),
    (131, ["--beta", 0, "--budget", 2048, "--G", 4], None),  # an H200 has 139
    (131, ["--beta", 0, "--budget", 2048, "--G", 4], "needs 209.0 GiB of disk and 200.0 are free"),
])
def test_memory_and_disk_are_planned_before_anything_is_loaded(
    have, flags, said, tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (have * 2**30, 141 * 2**30))
    free = 200 if said and "disk" in said else 210
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**30))
    args = settings(monkeypatch, "egspo", "--model", tmp_path, "--task", "gsm8k", *flags)
    if said is None:
        models.plan(args.model, args, torch.device("cuda"))
        assert "weights 29.9, gradients 29.9, Adam 59.7" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stopped:
        models.plan(args.model, args, torch.device("cuda"))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and said in captured.err and captured.err.count("\n") == 1
    assert "predicted peak" in captured.out and "Adam 59.7" in captured.out
