"""What only a GPU can show: TEST_CUDA=1 python -m pytest tests/test_cuda.py

Without a GPU, or without TEST_CUDA, all is skipped: conftest.py hides the GPU from all other tests."""

import importlib

import checkpoints
import pytest
import torch
from helpers import METHODS, NotedRun, toy_task

from common import canvas, denoise, encode, generator, group_noise, per_step, score
from plumbing import models, parallel

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and TEST_CUDA=1")


@pytest.fixture(scope="module", params=checkpoints.LAYOUTS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write(request.param, folder)
    return models.load_model(str(folder), DEVICE)


@pytest.fixture(scope="module")
def roll(model):
    prompt, prompt_mask = encode(model, ["What is 1 plus 2?"] * 4 + ["Hm?"] * 4)
    gens = [generator(DEVICE, 0, g) for g in range(2)]
    return denoise(model, prompt, prompt_mask, gens, L=16, S=8, block=8)


def test_what_is_decided_by_every_process_is_the_same_each_time(roll):
    """Float atomics add in any order: sums over steps are taken on the CPU."""
    sums = [per_step(roll.logp, roll.revealed_at, 8) for _ in range(20)]
    assert all(torch.equal(sums[0], found) for found in sums)
    assert torch.equal(sums[0].cpu(), per_step(roll.logp.cpu(), roll.revealed_at.cpu(), 8))


def test_what_was_sampled_is_scored_alike(model, roll):
    """Up to bf16: 0.05 nats on average at most."""
    with torch.no_grad():
        for s in range(8):
            revealed = roll.revealed_at == s
            logp = score(model, canvas(roll, roll.revealed_at >= s), roll.prompt_mask, roll.completion,
                         revealed, 1.0)
            if revealed.any():
                assert (logp - roll.logp)[revealed].abs().mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_an_update_trains(method, tmp_path):
    checkpoints.write("a2d-qwen3", tmp_path)
    module, run = importlib.import_module(method), NotedRun(1)
    model = models.load_model(str(tmp_path), DEVICE)
    before = [p.clone() for p in model.network.parameters()]
    own = {"K": 2} if hasattr(module.Args, "K") else {}
    args = module.Args(L=8, S=4, block=8, G=4, prompts=2, minibatches=1, **own)
    module.train(args, model, toy_task(), run)
    assert run.steps and all(step.gradient.isfinite().all() and step.gradient.any() for step in run.steps)
    after = list(model.network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any((p != old).any() for p, old in zip(after, before, strict=True))


def test_small_noise_is_exact():
    """float64 uniforms go far below fp32's step of 6e-8, and do not repeat there."""
    small = torch.cat([group_noise([generator(DEVICE, i)], 1, (10**7,)).flatten() for i in range(4)])
    small = small[small < 1e-5]
    assert 250 < len(small) < 550 and len(small.unique()) == len(small) and small.min() > 0


def test_settings_of_a_run():
    """No cuDNN attention, which plans anew for each shape, and no TF32: RoPE would be wrong."""
    assert parallel.start() == DEVICE and not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
