"""The memory and the disk that a run will take: predicted before anything is loaded."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import LLADA_8B, settings, sharp_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import common
from benchmarks import memory
from plumbing import models, run


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


def test_the_table_of_the_readme_is_what_a_run_says(tmp_path, monkeypatch, capsys):
    memory.table()
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(memory.ROWS)
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (139 * 2**30, 141 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * 2**30))
    for gpus in (1, 2):
        monkeypatch.setattr(models.parallel, "world", lambda gpus=gpus: gpus)
        monkeypatch.setattr(models.parallel, "total", lambda value, op: value)
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        shard = ["--shard"] if gpus > 1 else []
        args = settings(monkeypatch, "egspo", "--model", tmp_path, "--task", "gsm8k", "--beta", 0, *shard)
        models.plan(args.model, args, torch.device("cuda"))
        said = capsys.readouterr().out
        row = next(row for row in rows if row[:3] == ["LLaDA-8B", str(gpus), "–"])
        assert f"predicted peak: {row[3]} GiB" in said and f"reserve: {row[4]} GiB" in said


def test_what_is_computed_again_saves_no_generators_state(monkeypatch):
    """Nothing is drawn there; on CUDA the state of each layer would be a copy that waits for the device."""
    monkeypatch.setattr(common, "LOGITS", 256)  # the head in parts
    model = sharp_model()
    models.checkpoint_layers(model.network)
    prompt, prompt_mask = common.encode(model, ["1=", "2="])
    target = torch.zeros(2, 8, dtype=torch.long)
    x = torch.cat([prompt, torch.full_like(target, model.mask_id)], 1)
    states, real = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(1) or real())
    common.score(model, x, prompt_mask, target, target == 0, 1.0).sum().backward()
    assert not states
    torch.utils.checkpoint.checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert states  # what torch does if it is not told


def test_a_checkpoint_is_mapped_and_may_be_replaced_meanwhile(tmp_path, monkeypatch):
    """Of 96 GB at 8 B parameters nothing is read at once; what Adam keeps of the old file stays as it was."""
    model = sharp_model()
    optimizer = torch.optim.AdamW(model.network.parameters())
    for p in model.network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rest = {"update": 1, "counters": dict.fromkeys(run.COUNTED, 0), "metrics_bytes": 0}
    kept = {"network": model.network.state_dict(), "optimizer": optimizer.state_dict()} | rest
    torch.save(kept, tmp_path / "state.pt")
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *inputs, **how: asked.append(how) or load(*inputs, **how))
    resumed = sharp_model()
    again = torch.optim.AdamW(resumed.network.parameters())
    assert run.load_state(tmp_path, resumed, again) == rest and asked[0]["mmap"]
    (tmp_path / "state.new").write_bytes(b"0" * 10**6)
    os.replace(tmp_path / "state.new", tmp_path / "state.pt")
    for p, q in zip(model.network.parameters(), resumed.network.parameters(), strict=True):
        q.grad = p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    again.step()
    for p, q in zip(model.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])
