"""From a causal model to a masked diffusion model: what is loaded is what was learned, it sees both ways, a
killed conversion goes on as if nothing had happened, and what cannot be converted is refused in one line."""

import fcntl
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DROP, MERGES, write
from helpers import ROOT, global_random_states, launch

from common import encode
from plumbing import a2d
from plumbing.folder import fingerprint
from plumbing.models import load_model, save_model

CAUSAL = {"llama": "a2d-llama", "qwen2": "a2d-qwen2", "qwen3": "a2d-qwen3"}  # tied: qwen3
ADDED = {"llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                   "<|eot_id|>"],
         "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
         "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]}
SHORT = "--L 16 --S 4 --block 16 --batch 4 --eval_rows 2 --lr 1e-2 --warmup 2".split()


def causal(folder: Path, kind: str = "llama", spare: int = 0, **changes) -> Path:
    """A tiny causal checkpoint without a mask token, whose embedding has `spare` rows that are no token."""
    added = ADDED[kind]
    write(CAUSAL[kind], folder, model_type=kind, added=added, special={"mask_token": DROP}, auto_map=DROP,
          mask_token_id=DROP, vocab_size=256 + len(MERGES) + len(added) + spare, **changes)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Demonstrations, and rows of the task to train and to validate on; short, since a token is a byte."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"{a} + {b}?", "answer": f"\\boxed{{{a + b}}}"} for a in range(5) for b in range(5)]
    held = [{"question": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(20)]
    files = {"demos": folder / "demos.jsonl", "held": folder / "held.jsonl", "train": folder / "train.jsonl"}
    for name, lines in (("demos", rows), ("held", held[:4]), ("train", held[4:])):
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def convert(monkeypatch, *argv) -> None:
    """`python plumbing/a2d.py argv`, in this process."""
    monkeypatch.setattr(sys, "argv", ["plumbing/a2d.py", *map(str, argv)])
    a2d.main()


def few_steps(model, out, data, *more) -> list:
    """Arguments of a conversion that stops at its first evaluation."""
    return ["--model", model, "--out", out, "--data", data["demos"], "--test_data", data["held"], *SHORT,
            "--until", 0, "--eval_every", 3, *more]


@torch.no_grad()
def logits(model, x: torch.Tensor) -> torch.Tensor:
    return model.head(model.body(x, None))


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("spare, shift", [(0, True), (7, False)])
def test_what_is_loaded_is_what_was_learned(kind, spare, shift, data, tmp_path, monkeypatch):
    name, random = causal(tmp_path / "causal", kind, spare), global_random_states()
    was, saved = fingerprint(str(name)), []
    monkeypatch.setattr(a2d, "save_model",
                        lambda model, folder: saved.append(model) or save_model(model, folder))
    convert(monkeypatch, *few_steps(name, tmp_path / "out", data, "--shift" if shift else "--no-shift"))
    assert fingerprint(str(name)) == was and global_random_states()[:2] == random[:2]
    (made,), loaded = saved, load_model(str(tmp_path / "out" / "model"))
    prompt, _ = encode(loaded, ["3 + 4?"])
    x = torch.cat([prompt, torch.full((1, 6), loaded.mask_id)], 1)
    assert torch.equal(logits(loaded, x), logits(made, x))
    assert loaded.shift is shift and loaded.tokenizer.convert_ids_to_tokens(loaded.mask_id) == "<|mask|>"
    assert loaded.V == 256 + len(MERGES) + len(ADDED[kind]) + max(1, spare)
    assert loaded.mask_id == 256 + len(MERGES) + len(ADDED[kind])  # a spare row, or the one that was added
    head, embedding = loaded.network.lm_head.weight, loaded.network.model.embed_tokens.weight
    assert (head.data_ptr() == embedding.data_ptr()) == (kind == "qwen3")
    before = logits(loaded, x)
    x[0, -1] = prompt[0, 0]  # the last token moves the prediction before it, and the first one's
    assert (logits(loaded, x)[0, 1] != before[0, 1]).any()
    h = loaded.network.model(x).last_hidden_state
    assert torch.equal(loaded.body(x, None)[:, 1:], h[:, :-1] if shift else h[:, 1:])


def test_a_new_mask_token_is_the_mean_of_all_others(tmp_path):
    for kind, spare in (("llama", 0), ("llama", 3), ("qwen3", 0), ("qwen2", 0)):
        name = causal(tmp_path / f"{kind}{spare}", kind, spare)
        was, _ = a2d.load_causal(str(name), None)
        model = a2d.convert(a2d.Settings(model=str(name)))
        for matrix, old in ((model.network.model.embed_tokens, was.model.embed_tokens),
                            (model.network.lm_head, was.lm_head)):
            mask = model.mask_id
            assert torch.equal(matrix.weight[:mask], old.weight[:mask])
            assert torch.allclose(matrix.weight[mask], old.weight[:mask].mean(0))


def test_a_mask_token_that_is_there_is_kept(tmp_path):
    write("a2d-llama", tmp_path / "model", model_type="llama")
    was, tokenizer = a2d.load_causal(str(tmp_path / "model"), None)
    model = a2d.convert(a2d.Settings(model=str(tmp_path / "model")))
    assert model.mask_id == tokenizer.convert_tokens_to_ids("<|mask|>") and model.V == was.config.vocab_size
    assert torch.equal(model.network.model.embed_tokens.weight, was.model.embed_tokens.weight)


def test_a_killed_conversion_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    name, real = causal(tmp_path / "causal"), a2d.loss_of
    more = ["--eval_every", 4, "--save_every", 2, "--until", 1, "--minutes", 60]

    def run(out: str, stop_at: int):
        """Ctrl-C in the middle of step `stop_at`, when nothing of it is on disk yet."""
        steps = []

        def loss_of(*args):
            steps.append(torch.is_grad_enabled())
            if sum(steps) == stop_at:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(a2d, "loss_of", loss_of)
        with pytest.raises(SystemExit) as stopped:
            convert(monkeypatch, *few_steps(name, tmp_path / out, data, *more))
        assert stopped.value.code == 130

    run("whole", 9)
    run("parts", 4)  # after the checkpoint of step 2
    run("parts", 7)  # two steps from there on are step 4
    whole, parts = (torch.load(tmp_path / out / "state.pt", weights_only=True) for out in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 8 and whole["losses"] == parts["losses"] == []
    for name, value in whole["network"].items():
        assert torch.equal(value, parts["network"][name]), name
    for i, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][i][k]) for k, value in moments.items())
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("whole", "parts")]
    lines = [[json.loads(line) | {"seconds": 0} for line in log] for log in logs]
    assert lines[0] == lines[1] and [line["examples"] for line in lines[0]] == [16, 32]


def test_it_learns_and_a_method_goes_on_from_it(data, tmp_path, monkeypatch, with_a_gradient):
    name, more = causal(tmp_path / "causal"), ["--until", 1, "--eval_every", 40, "--lr", 3e-3]
    monkeypatch.setattr(a2d.Conversion, "enough", lambda self: self.progress["step"] >= 80)
    convert(monkeypatch, *few_steps(name, tmp_path / "out", data, *more))
    first, second = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert second["loss"] < first["loss"] / 2
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
    launch("egspo", "--model", tmp_path / "out" / "model", "--task", "word_problems", "--data", data["train"],
           *"--prompts 2 --G 2 --L 16 --S 4 --block 16 --K 2 --beta 0 --eval_rows 2 --updates 2".split(),
           "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("grad_norm", 0) for row in rows) > 0 and rows[-1]["update"] == 2


def test_the_demonstrations_of_a_task_are_its_right_answers(tmp_path):
    prompts, answers, task = a2d.demonstrations(a2d.Settings(model="m"), chat=True)
    assert len(prompts) == len(answers) == 8192 and len(task.test) == 64
    assert not {row["prompt"] for row in task.test} & set(prompts)
    assert all(task.reward(answer, row)[1]["correct"] for row, answer in
               zip([{"answer": a.strip("\\boxed{}")} for a in answers[:20]], answers[:20], strict=True))


def test_an_epoch_has_every_demonstration_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(20, 60, 1003)
    epoch = a2d.batches_of(lengths, 8, seed=1, epoch=0)
    assert epoch.shape == (125, 8) and len(set(epoch.flatten())) == 1000
    assert (lengths[epoch].max(1) - lengths[epoch].min(1)).mean() < 8  # unsorted: some 30
    assert (epoch == a2d.batches_of(lengths, 8, seed=1, epoch=0)).all()
    for other in (dict(seed=2, epoch=0), dict(seed=1, epoch=1)):
        assert (epoch != a2d.batches_of(lengths, 8, **other)).any()
    assert np.corrcoef(np.arange(125), lengths[epoch].mean(1))[0, 1] < 0.5  # no order from short to long


def test_a_chat_template_of_ones_own(data, tmp_path, monkeypatch):
    name, file = causal(tmp_path / "causal"), tmp_path / "short.jinja"
    file.write_text("{{ messages[0].content }}\n->")
    convert(monkeypatch, *few_steps(name, tmp_path / "out", data, "--chat_template", file))
    model = load_model(str(tmp_path / "out" / "model"))
    assert model.tokenizer.decode(encode(model, ["1 + 1?"])[0][0]) == "1 + 1?\n->"


def refused(monkeypatch, capfd, *argv) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        convert(monkeypatch, *argv)
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_what_is_refused(data, tmp_path, monkeypatch, capfd):
    name, out = causal(tmp_path / "causal"), tmp_path / "out"
    right = few_steps(name, out, data)

    def told(*changes) -> str:
        return refused(monkeypatch, capfd, *right, *changes)

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write("dream", tmp_path / "dream")
    write("modernbert", tmp_path / "modernbert")
    causal(tmp_path / "poor")
    (tmp_path / "poor" / "model.safetensors").unlink()
    for folder, layers in (("deep", 1001), ("hollow", 900)):  # more than any model has; than the files have
        config = causal(tmp_path / folder) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {
            "num_hidden_layers": layers, "hidden_size": 8192, "intermediate_size": 8192}))
    causal(tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    long = tmp_path / "long.jsonl"
    long.write_text('{"question": "1?", "answer": "one, two, three, four, five"}\n' * 4)
    assert "unknown model" in told("--model", tmp_path / "nothing")
    assert "no file" in told("--model", tmp_path / "nothing.gguf")
    assert "adapter" in told("--model", tmp_path / "adapter")
    assert "is a masked diffusion model as it is" in told("--model", tmp_path / "dream")
    assert "modernbert" in told("--model", tmp_path / "modernbert")
    assert "cannot be loaded" in told("--model", tmp_path / "poor")
    assert "1001 layers" in told("--model", tmp_path / "deep")
    assert "numbers in its files" in told("--model", tmp_path / "hollow")
    assert "needs a model with a chat template" in told("--model", tmp_path / "mute")
    assert "25 tokens, --L is 16" in told("--data", long)
    assert "there are 4 demonstrations" in told("--data", long, "--batch", 8)
    assert "cannot read" in told("--data", tmp_path / "nothing.jsonl")
    assert "unknown task" in told("--task", "sums")
    assert "not a multiple of --block" in told("--block", 5)
    assert "--S 5 does not fit" in told("--S", 5)
    assert "--batch must be" in told("--batch", 0)
    assert "--until" in told("--until", 30)
    assert "--lr" in told("--lr", 0)
    assert "cannot be read" in told("--chat_template", tmp_path / "nothing.jinja")
    assert not out.exists()
    assert "holds no conversion" in told("--out", tmp_path / "causal")
    convert(monkeypatch, *right)
    assert "other lr" in told("--lr", 1e-3)
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "another process is at work" in told()
    os.close(held)
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:-1000])
    assert "state.pt cannot be used" in told()
    monkeypatch.setattr(a2d.importlib.util, "find_spec", lambda package: None)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert "pip install gguf accelerate" in told("--model", tmp_path / "model.gguf")


def test_a_gguf_file(data, tmp_path, monkeypatch):
    """One that the test writes, where the packages that read it are there; neither is a requirement."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    name = causal(tmp_path / "causal", tie_word_embeddings=False)
    network, tokenizer = a2d.load_causal(str(name), None)
    config, writer = network.config, gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    ids = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([3 if token in ADDED["llama"] else 1 for token, _ in ids])  # 3: a control token
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "model.layers": "blk"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, value in network.state_dict().items():
        stored, theirs = value, re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], key)
        if (kind := key.split(".")[-2]) in heads:  # llama.cpp turns neighbours, transformers halves
            stored = value.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(theirs, stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read, _ = a2d.load_causal(str(tmp_path / "model.gguf"), None)
    x = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(read(x).logits, network(x).logits, atol=1e-4)
    convert(monkeypatch, *few_steps(tmp_path / "model.gguf", tmp_path / "out", data))
    assert load_model(str(tmp_path / "out" / "model")).shift


def test_help():
    assert (ROOT / "plumbing" / "a2d.py").read_text().startswith('r"""')
    with pytest.raises(SystemExit) as stopped:
        a2d.tyro.cli(a2d.Settings, args=["--help"])
    assert stopped.value.code == 0


def test_a_panic_of_the_tokenizer_ends_in_one_line(tmp_path, capfd):
    """As in load_model: it is no Exception. Rust itself says where it was, before."""
    file = causal(tmp_path / "causal") / "tokenizer.json"
    junk = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | junk))
    with pytest.raises(SystemExit) as stop:
        a2d.load_causal(str(file.parent), None)
    said = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert re.match(f"error: {file.parent} cannot be loaded: PanicException", said.splitlines()[-1])
