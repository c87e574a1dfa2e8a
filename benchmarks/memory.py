"""Peak memory of one rollout and of one update at a real vocabulary, against the naive way.

Tiny body, V = 151 936 (Qwen), rows of 200 + 256 tokens, on a CPU in fp32: 8 rows in the update, 2 in the
rollout (the naive one would take 18 GiB with 8). Naive: logits, float64 noise and probabilities of the whole
canvas at every step; log_softmax of the whole canvas in the update. Ours scores the whole completion, the
most any method does. Each measurement is a process of its own: its peak above what it had loaded.

python benchmarks/memory.py            one to two minutes
python benchmarks/memory.py table      instead: what plumbing/models.py predicts for real models on GPUs
"""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, ModernBertConfig, Qwen2Config, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import egspo  # noqa: E402

P, L, BLOCK = 200, 256, 32
WAYS = ("rollout, naive", "rollout", "update, naive", "update")

# The sizes in the config.json of each; and the tables: model, GPUs, with its KL to the model before training?
MODERNBERT = ModernBertConfig(
    vocab_size=50368, hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16)
QWEN = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
DREAM = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4)
LLADA = LlamaConfig(
    vocab_size=126464, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32)
ROWS = (
    ("ModernBERT-large-chat", MODERNBERT, 1, True), ("Qwen3-0.6B", QWEN, 1, True),
    ("Dream-7B", DREAM, 1, False), ("LLaDA-8B", LLADA, 1, False), ("LLaDA-8B", LLADA, 2, False),
    ("LLaDA-8B", LLADA, 4, False), ("LLaDA-8B", LLADA, 8, False), ("LLaDA-8B", LLADA, 16, False),
    ("LLaDA-8B", LLADA, 4, True), ("LLaDA-8B", LLADA, 8, True), ("Dream-7B", DREAM, 2, False))


def tiny_body() -> common.Denoiser:
    """Two layers of width 64 under the vocabulary of Qwen3; random weights."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, is_causal=False, use_cache=False)
    return common.Denoiser(Qwen3ForCausalLM(config).eval(), None, 151669, 151645, 151643, (151645,), False)


@torch.no_grad()
def naive_step(model: common.Denoiser, x: torch.Tensor, n: int, end: int) -> torch.Tensor:
    """One step of LLaDA's sampler: noise and confidence of the whole canvas in float64, n tokens revealed.

    `end`: the column behind the current block."""
    logits = model.head(model.body(x, None))  # (B, P+L, V)
    noise = torch.rand(logits.shape, dtype=torch.float64, device=x.device)
    token = (logits.double().exp() / -noise.log()).argmax(-1)
    confidence = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
    confidence[:, end:] = -torch.inf
    at = confidence.masked_fill(x != model.mask_id, -torch.inf).topk(n).indices
    return x.scatter(1, at, token.gather(1, at))


def measure(way: str) -> float:
    """GiB above what was loaded."""
    model, rows = tiny_body(), 8 if way.startswith("update") else 2
    prompt = torch.randint(151643, (rows, P))
    x = torch.cat([prompt, torch.full((rows, L), model.mask_id)], 1)
    target = torch.randint(151643, (rows, L))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "rollout, naive":
        naive_step(model, x, L // 8, P + BLOCK)
    elif way == "rollout":  # eight steps, one per block
        common.denoise(model, prompt, prompt >= 0, [common.generator("cpu", 0)], L=L, S=8, block=BLOCK)
    elif way == "update, naive":
        logp = model.head(model.body(x, None)).log_softmax(-1)[:, P:].gather(-1, target[..., None])
        logp.sum().backward()
    else:
        where = torch.ones_like(target, dtype=torch.bool)
        common.score(model, x, prompt >= 0, target, where, 1.0).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def table():
    """Print a row for each of ROWS: GiB on each GPU, in shards where there are several.

    The settings are those EGSPO has for a model that reads words."""
    from plumbing import models  # not above: the peak of a measurement is that of all it has loaded
    from plumbing.flags import WORDS

    of = WORDS | egspo.LLM
    print("| model | GPUs | KL | GiB on each | of it reserved | in rollouts, whole layers | disk, GiB |")
    print("|---|---|---|---|---|---|---|")
    for name, config, gpus, kl in ROWS:
        predict = partial(
            models.predict_memory, config, L=of["L"], S=of["S"], block=of["block"], G=of["G"],
            rows=max(of["prompts"] * of["G"], of["eval_rows"]), budget=of["budget"], reference=kl, train=True,
            gradient_checkpointing=of["gradient_checkpointing"], bf16=True)
        disk = 7 * predict()["weights"]
        parts = predict(ranks=gpus if gpus > 1 else 0)
        layers = parts.pop("layers", 0)
        reserved = models.reserve(parts) + (gpus > 1)  # and NCCL's, which this one process has none of
        need = sum(parts.values()) + reserved
        whole = f"{need - parts['gradients'] - parts['activations'] + layers:.1f}" if layers else "–"
        said = "yes" if kl else "–"
        print(f"| {name} | {gpus} | {said} | {need:.1f} | {reserved:.1f} | {whole} | {disk:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    elif len(sys.argv) > 1:
        print(measure(sys.argv[1]))
    else:
        peak = {}
        for way in WAYS:
            run = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
            peak[way] = float(run.stdout)
        for what in ("rollout", "update"):
            naive, ours = peak[f"{what}, naive"], peak[what]
            print(f"{what}: {ours:.2f} GiB, naive {naive:.2f} GiB: 1/{naive / ours:.1f}")
