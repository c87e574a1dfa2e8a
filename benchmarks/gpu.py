"""Speed and memory on one CUDA GPU: the 0.6 B and 8 B architectures, random weights, fp32 + bf16 autocast.

Against the naive way, written here: LLaDA's sampler (logits, float64 noise and confidence of the whole canvas
at every step) and an update that scores one canvas at a time with the logits of all of it. As in the released
code its head runs in bf16, and in its rollouts all weights are bf16.

python benchmarks/gpu.py            0.6 B: 8 rows, 200 + 256 tokens, S 128, block 32; medians of 3
python benchmarks/gpu.py 8b         8 B: one optimizer step with beta = 0, gradient checkpointing, fused AdamW
python benchmarks/gpu.py tiny       the same code on a small body, a CPU will do: does it run?
"""

import copy
import dataclasses
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


def shrink():
    """Sizes for a CPU."""
    globals().update(P=20, L=32, S=8, BLOCK=16, K=4)


@dataclasses.dataclass
class Naive(common.Denoiser):
    """A denoiser whose head runs in bf16, too."""

    def head(self, h):
        with self.autocast():
            return super().head(h)


def build(size: dict, device: torch.device = DEVICE) -> common.Denoiser:
    """A model of this size with random weights; the same on every call."""
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if "head_dim" in size else (LlamaForCausalLM, LlamaConfig)
    torch.manual_seed(0)
    with device:
        network = kind(config(**size, **PLAIN)).eval()
    top = network.config.vocab_size - 1
    return common.Denoiser(network, None, top, top - 1, top - 2, (top - 1,), False)


def optimizer_of(model: common.Denoiser) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.network.parameters(), 1e-6, fused=DEVICE.type == "cuda")


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
    """The most memory that tensors take while work() runs, with all that was there before."""
    if DEVICE.type != "cuda":
        work()
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


def rollout(model: common.Denoiser, groups: int = 1, steps: int | None = None, **options) -> common.Rollout:
    """G rows for each of so many prompts, in one forward a step. steps: end after so many, in the last block
    of a row as long as the others."""
    length, S_ = (L, S) if steps is None else (BLOCK, steps)
    gen = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.V - 3, (groups, P + L - length), generator=gen).to(DEVICE)
    prompt = prompt.repeat_interleave(G, 0)
    gens = [common.generator(DEVICE, 0, g) for g in range(groups)]
    return common.denoise(model, prompt, prompt >= 0, gens, L=length, S=S_, block=BLOCK, **options)


def naive_rollout(model: common.Denoiser):
    """LLaDA's sampler: everything over the whole canvas, at every step."""
    network = copy.deepcopy(model.network).bfloat16()
    naive = Naive(**vars(model) | {"network": network, "bf16": True})
    prompt = torch.randint(model.V - 3, (1, P), device=DEVICE).expand(G, -1)
    x = torch.cat([prompt, torch.full((G, L), model.mask_id, device=DEVICE)], 1)
    for s in range(S):
        end = P + (s * BLOCK // (S * BLOCK // L) + 1) * BLOCK  # of the current block
        x = naive_step(naive, x, L // S, end)


def updates(model: common.Denoiser, roll: common.Rollout, budget: int):
    """Forward and backward of K canvases per row, as EGSPO scores them: the tokens revealed at each step."""
    for x, rows, where in canvases(model, roll, budget):
        logp = common.score(model, x, rows.prompt_mask, rows.completion, where, 1.0)
        (-logp.sum() / (G * K)).backward()


def naive_updates(model: common.Denoiser, roll: common.Rollout):
    """The same, one canvas at a time and with the logits of all of it."""
    naive = Naive(**vars(model))
    for x, rows, where in canvases(model, roll, budget=1):
        logp = naive.head(naive.body(x, None)).log_softmax(-1, dtype=torch.float32)[:, -L:]
        logp = logp.gather(-1, rows.completion[..., None])[..., 0] * where
        (-logp.sum() / (G * K)).backward()


def canvases(model: common.Denoiser, roll: common.Rollout, budget: int):
    """Yield micro-batches of K canvases per row: what is shown, the rows, where tokens are scored."""
    steps = torch.arange(0, roll.S, roll.S // K, device=DEVICE).expand(len(roll.completion), -1)  # (B, K)
    x = common.canvas(roll, roll.revealed_at[:, None] >= steps[..., None])  # (B, K, P+L)
    for part in common.micro_batches(model, torch.ones_like(steps).nonzero(), x, budget):
        r, k = part.unbind(1)
        yield x[r, k], roll[r], roll.revealed_at[r] == steps[r, k][:, None]


def optimizer_step(model: common.Denoiser, optimizer: torch.optim.Optimizer, score):
    """Gradients by score(), and a step of the optimizer."""
    score()
    optimizer.step()
    optimizer.zero_grad()


def share_of_peak(size: dict, update_s: float, peak: float) -> float:
    """Share of the bf16 peak that an update of G * K canvases reaches, of its useful arithmetic."""
    layers = build(size, torch.device("meta")).network.model.layers
    body = sum(p.numel() for p in layers.parameters())
    width = size["num_attention_heads"] * size["head_dim"] if "head_dim" in size else size["hidden_size"]
    attention = 12 * size["num_hidden_layers"] * width * (P + L)  # FLOP per token, forward and backward
    head = 6 * size["vocab_size"] * size["hidden_size"] * L // S
    return G * K * ((6 * body + attention) * (P + L) + head) / update_s / peak


def small_model(size: dict, row: dict):
    model = build(size)
    optimizer, roll = optimizer_of(model), rollout(model)

    def update():
        optimizer_step(model, optimizer, lambda: updates(model, roll, 8192))

    def naive_update():
        optimizer_step(model, optimizer, lambda: naive_updates(model, roll))

    took = {"rollout": seconds(lambda: rollout(model, guess="greedy")),
            "rollout, no guess": seconds(lambda: rollout(model)),
            "rollout, naive": seconds(lambda: naive_rollout(model)),
            "update": seconds(update), "update, naive": seconds(naive_update)}
    peak = matmul_peak()
    row |= {
        "rollout_tokens_per_s": G * L / took["rollout"],
        "rollout_tokens_per_s_without_guess": G * L / took["rollout, no guess"],
        "update_s": took["update"], "bf16_peak_tflops": peak / 1e12,
        "update_share_of_peak": share_of_peak(size, took["update"], peak),
        "rollout_speedup": took["rollout, naive"] / took["rollout"],
        "update_speedup": took["update, naive"] / took["update"],
        "rollout_peak_gib": peak_gib(lambda: rollout(model, guess="greedy")),
        "update_peak_gib": peak_gib(update)}


def large_model(row: dict):
    model = build(LLADA)
    checkpoint_layers(model.network)
    optimizer, roll = optimizer_of(model), rollout(model)
    before = model.network.lm_head.weight[0, :8].clone()

    def step():
        optimizer_step(model, optimizer, lambda: updates(model, roll, 2048))

    row |= {"update_peak_gib": peak_gib(step), "update_s": seconds(step, 1),
            "trained": not torch.equal(before, model.network.lm_head.weight[0, :8])}


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "0.6b"
    if what == "tiny":
        shrink()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    command = f"python benchmarks/gpu.py {what}"
    row = {"model": what, "gpu": name, "torch": torch.__version__, "command": command}
    if what == "8b":
        large_model(row)
    else:
        small_model(SMALL if what == "tiny" else QWEN, row)
    print(json.dumps(row))
