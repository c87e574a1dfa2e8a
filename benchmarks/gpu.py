"""Speed and memory on one CUDA GPU: the 0.6 B and 8 B architectures, random weights, fp32 + bf16 autocast.

Against the naive way, written here: LLaDA's sampler (logits, float64 noise and confidence of the whole canvas
at every step) and an update that scores one canvas at a time with the logits of all of it.

python benchmarks/gpu.py            0.6 B: 8 rows, 200 + 256 tokens, S 128, block 32; medians of 3
python benchmarks/gpu.py 8b         8 B: one optimizer step with beta = 0, gradient checkpointing, fused AdamW
python benchmarks/gpu.py tiny       the same code on a small body, a CPU will do: does it run?
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
from benchmarks.memory import naive_step  # noqa: E402
from plumbing.models import checkpoint_layers  # noqa: E402

PLAIN = {"is_causal": False, "use_cache": False}
QWEN = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
LLADA = {"vocab_size": 126464, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 500000.0}
SMALL = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
P, L, S, BLOCK, G, K = 200, 256, 128, 32, 8, 8


def denoiser(network) -> common.Denoiser:
    top = network.config.vocab_size - 1
    return common.Denoiser(network.eval(), None, top, top - 1, top - 2, (top - 1,), False)


def seconds(work, repeats: int = 3) -> float:
    """Median, after one run to warm up."""
    took = []
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        took.append(time.perf_counter() - begin)
    return statistics.median(took[1:])


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(work) -> float:
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def matmul_peak() -> float:
    """FLOP per second of a large bf16 matrix product: what a share is a share of."""
    n = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 * 10 / seconds(lambda: [a @ b for _ in range(10)])


def naive_rollout(model, prompt):
    """LLaDA's sampler: everything over the whole canvas, at every step."""
    x = torch.cat([prompt, torch.full((len(prompt), L), model.mask_id, device=DEVICE)], 1)
    for s in range(S):
        end = P + (s * BLOCK // (S * BLOCK // L) + 1) * BLOCK  # of the current block
        x = naive_step(model, x, L // S, end)
    return x


def updates(model, roll, budget: int, naive: bool):
    """Forward and backward of K canvases per row, as EGSPO scores them: the tokens revealed at each step."""
    steps = torch.arange(0, S, S // K, device=DEVICE).expand(G, -1)  # (G, K)
    x = common.canvas(roll, roll.revealed_at[:, None] >= steps[..., None])  # (G, K, P+L)
    for part in common.micro_batches(model, torch.ones_like(steps).nonzero(), x, 1 if naive else budget):
        r, k = part.unbind(1)
        rows, where = roll[r], roll.revealed_at[r] == steps[r, k][:, None]
        if naive:
            logp = model.head(model.body(x[r, k], None)).log_softmax(-1)[:, P:]
            logp = logp.gather(-1, rows.completion[..., None])[..., 0] * where
        else:
            logp = common.score(model, x[r, k], rows.prompt_mask, rows.completion, where, 1.0)
        (-logp.sum() / (G * K)).backward()


def small_model(size: dict, row: dict):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = denoiser(Qwen3ForCausalLM(Qwen3Config(**size, **PLAIN)))
    body = sum(p.numel() for p in model.network.model.layers.parameters())
    optimizer = torch.optim.AdamW(model.network.parameters(), 1e-6, fused=DEVICE.type == "cuda")
    prompt = torch.randint(size["vocab_size"] - 3, (1, P), device=DEVICE).expand(G, -1)
    gens = [common.generator(DEVICE, 0)]
    rolls = {}

    def rollout():
        rolls["ours"] = common.denoise(model, prompt, prompt >= 0, gens, L=L, S=S, block=BLOCK)

    def update(budget=8192, naive=False):
        updates(model, rolls["ours"], budget, naive)
        optimizer.step()
        optimizer.zero_grad()

    took = {"rollout": seconds(rollout), "rollout, naive": seconds(lambda: naive_rollout(model, prompt))}
    took |= {"update": seconds(update), "update, naive": seconds(lambda: update(naive=True))}
    peak = matmul_peak()
    heads = size["num_attention_heads"] * size["head_dim"]
    attention = 12 * size["num_hidden_layers"] * heads * (P + L)  # FLOP per token, forward and backward
    flop = G * K * ((6 * body + attention) * (P + L) + 6 * size["vocab_size"] * size["hidden_size"] * L // S)
    row |= {
        "rollout_tokens_per_s": G * L / took["rollout"], "update_s": took["update"],
        "bf16_peak_tflops": peak / 1e12, "update_share_of_peak": flop / took["update"] / peak,
        "rollout_speedup": took["rollout, naive"] / took["rollout"],
        "update_speedup": took["update, naive"] / took["update"],
        "rollout_peak_gib": peak_gib(rollout), "update_peak_gib": peak_gib(update)}


def large_model(row: dict):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = denoiser(LlamaForCausalLM(LlamaConfig(**LLADA, **PLAIN)))
    checkpoint_layers(model.network)
    optimizer = torch.optim.AdamW(model.network.parameters(), 1e-6, fused=True)
    prompt = torch.randint(LLADA["vocab_size"] - 3, (1, P), device=DEVICE).expand(G, -1)
    roll = common.denoise(model, prompt, prompt >= 0, [common.generator(DEVICE, 0)], L=L, S=S, block=BLOCK)
    before = model.network.lm_head.weight[0, :8].clone()

    def step():
        updates(model, roll, 2048, naive=False)
        optimizer.step()
        optimizer.zero_grad()

    row |= {"update_peak_gib": peak_gib(step), "update_s": seconds(step, 1),
            "trained": not torch.equal(before, model.network.lm_head.weight[0, :8])}


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "0.6b"
    if what == "tiny":
        P, L, S, BLOCK, K = 20, 32, 8, 16, 4
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    command = f"python benchmarks/gpu.py {what}"
    row = {"model": what, "gpu": name, "torch": torch.__version__, "command": command}
    if what == "8b":
        large_model(row)
    else:
        small_model(SMALL if what == "tiny" else QWEN, row)
    print(json.dumps(row))
