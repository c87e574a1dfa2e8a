"""The fixtures that tests share. What else they share is in helpers.py."""

import dataclasses
import os

# Both before torch is imported. On networks this small two threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests compare with numbers that only a CPU repeats, so a GPU is hidden, also from the processes that
# they start. TEST_CUDA=1 shows it, for tests/test_cuda.py alone.
if not os.environ.get("TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

import helpers  # noqa: E402, F401  from here on our own files can be imported
import tasks  # noqa: E402
from plumbing import models, pretrain  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """An untrained tiny model as a transformers folder: what a method does does not depend on its
    training."""
    path = tmp_path_factory.mktemp("model") / "untrained"
    models.save_model(pretrain.tiny_model(layers=1, width=32), path)
    return str(path)


@pytest.fixture
def float64():
    """Tensors are made in float64, rewards among them, and .float() keeps them so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def with_a_gradient(monkeypatch):
    """Random weights earn nothing: a number that depends on the text is added to each real reward."""
    real = tasks.load

    def load(name, **options):
        task = real(name, **options)

        def reward(text: str, row: dict):
            total, parts = task.reward(text, row)
            return total + sum(map(ord, text)) % 7 / 6, parts

        return dataclasses.replace(task, reward=reward)

    monkeypatch.setattr(tasks, "load", load)
