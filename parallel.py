"""More than one process, by torch's own collectives and FSDP2: `torchrun --nproc_per_node N egspo.py ...`

Every rank holds the whole batch and decides all that is decided about it: each draw is a function of (seed,
purpose, update, prompt index), so it comes out equal. Shared is what costs: the groups of a rollout, the
rewards, the canvases of an optimizer step. Rows are gathered; gradients, scores and counts are summed, never
averaged: a normaliser is the whole batch's. Rank 0 writes and prints. Without torchrun nothing changes.

The weights are on every rank, or in shards where they do not fit. Shards are gathered by collectives, so all
ranks must make equally many forwards and backwards: in updates by counting (common.micro_batches gives a part
without canvases to whoever has none left), in rollouts by `rollout`.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, partialmethod

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


def rank() -> int:
    """Of this process, also before the processes know of each other."""
    return int(os.environ["RANK"]) if "WORLD_SIZE" in os.environ else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_this_machine() -> int:
    """Processes that share its memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start() -> torch.device:
    """Meet the other processes, if torchrun started this one; returns its device.

    A rank may wait while another one finishes its rollout or rank 0 writes a checkpoint, so the limit is an
    hour. A death is noticed without it: torchrun ends all processes when one has ended with an error."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda and on_this_machine() > torch.cuda.device_count():
        refuse(f"{on_this_machine()} processes on a machine of {torch.cuda.device_count()} GPUs")
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
        if rank():
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def after_rank_0():
    """Before an error: rank 0 mostly has the same one, and torchrun ends this process once that is told."""
    if rank():
        time.sleep(5)


def refuse(message: str):
    """Wrong input: one line that says what is allowed, exit status 2."""
    after_rank_0()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --------------------------------------------------------------------------------------------- shared work


def share(count: int) -> range:
    """Which of `count` things are this rank's; none where there are fewer than ranks."""
    here = rank() if world() > 1 else 0
    return range(count * here // world(), count * (here + 1) // world())


def joined(mine: list) -> list:
    """The lists of all ranks, one behind the other."""
    if world() == 1:
        return mine
    lists = [None] * world()
    dist.all_gather_object(lists, mine)
    return [item for one in lists for item in one]


def summed(values, op: str = "sum"):
    """Over the ranks, of a number, a dict of numbers or a tensor: each saw its share. op: or "min"."""
    if world() == 1:
        return values
    if isinstance(values, dict):
        totals = summed(torch.tensor(list(values.values()), dtype=torch.float64), op).tolist()
        return dict(zip(values, totals, strict=True))
    if not isinstance(values, Tensor):
        return summed(torch.tensor(values, dtype=torch.float64), op).item()
    total = values.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(total, getattr(dist.ReduceOp, op.upper()))
    return total.to(values.device)


def clip(network: torch.nn.Module, max_norm: float) -> float:
    """Sum the gradients over the ranks, once per optimizer step; clip them; returns the norm before.

    FSDP2 has summed those of shards, in fp32, after each backward. Their norm is of one rank's shards until
    it is gathered, before anything is divided by it."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    if world() > 1 and not is_sharded(network):
        for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
            work.wait()
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    torch.nn.utils.clip_grads_with_norm_(network.parameters(), max_norm, norm)
    return norm.item()


# ------------------------------------------------------------------------------------------------- shards


def is_sharded(network) -> bool:
    return hasattr(network, "keep_whole")


def shard(network: torch.nn.Module, device: torch.device, keep_whole: bool):
    """Split the fp32 weights, and so gradients and Adam, over the ranks. network: on the CPU, from where a
    layer at a time is moved. keep_whole: there is memory for all layers at once during a rollout.

    A layer is gathered when it is called, on CUDA in bf16: half the bytes, and what autocast would make of
    its matrices anyway. All else (embeddings, last norm, head: tied ones must be in one group) is the root's,
    in fp32. FSDP2 gathers it for `gathered_forward` and takes it back when backward is through, so the head,
    called apart and again by a checkpoint, finds it there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh, dtype = init_device_mesh(device.type, (world(),)), torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)
    for module in (network, *network.model.layers):  # sums, not averages, which gloo does not have either
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    network.keep_whole, network.gathered_forward = keep_whole, partial(forward, network)
    register_fsdp_forward_method(network, "gathered_forward")
    forward_of_nothing(network)  # FSDP2 takes for the root what is called first
    network.reshard()  # an optimizer must not be given what is gathered


def forward(network: torch.nn.Module, x: Tensor, attn: Tensor | None, positions: Tensor | None) -> Tensor:
    return network.model(x, attention_mask=attn, position_ids=positions).last_hidden_state


def body(network: torch.nn.Module, x: Tensor, *inputs) -> Tensor:
    """The last hidden states (B, T, d) of a transformers model for x (B, T), its head left out."""
    if getattr(network, "in_step", False):
        summed(1)  # tells those who are through that one more forward comes
    call = getattr(network, "gathered_forward", partial(forward, network))
    if len(x) == 0:  # a rank without canvases goes along, and its weights get gradients of 0
        return call(x.new_zeros(1, 1), None, None)[:0].expand(*x.shape, -1)
    return call(x, *inputs)


@torch.no_grad()
def forward_of_nothing(network: torch.nn.Module):
    network.gathered_forward(torch.zeros(1, 1, dtype=torch.long, device=network.device), None, None)


@contextmanager
def rollout(model) -> Iterator[None]:
    """Within, ranks make as many forwards as their rows take. Sharded, either all layers are whole meanwhile,
    or a rank that is through goes along with each forward of the others until all are."""
    network = getattr(model, "network", None)
    if not is_sharded(network):
        yield
        return
    layers = network.model.layers if network.keep_whole else []
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    network.in_step = not network.keep_whole
    yield
    while network.in_step and summed(0):
        forward_of_nothing(network)
    network.in_step = False
    for layer in (network, *layers):
        layer.reshard()
    for layer in layers:
        layer.set_reshard_after_forward(True)


# -------------------------------------------------------------------------------- what a checkpoint holds


def whole(value):
    """A sharded tensor gathered on the CPU of rank 0 (None elsewhere); all else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    full = value.detach().full_tensor()
    return None if rank() else full.cpu()


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """The state_dict of a network that is not sharded. All ranks must ask."""
    if not is_sharded(network):
        return network.state_dict()
    held = network.state_dict(keep_vars=True)
    full = {key: whole(value) for key, value in {id(v): v for v in held.values()}.items()}
    return {name: full[id(value)] for name, value in held.items()}  # tied weights are one tensor and stay one


def moments(optimizer: torch.optim.Optimizer) -> dict:
    """The state_dict of its optimizer. All ranks must ask."""
    state = optimizer.state_dict()
    kept = {i: {name: whole(v) for name, v in held.items()} for i, held in state["state"].items()}
    return state | {"state": kept}


def like(value: Tensor, there) -> Tensor:
    """A whole tensor in the shards of `there`, if it has any; each rank takes its own."""
    if not hasattr(there, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # not above: it takes its time

    return distribute_tensor(value.to(there.device), there.device_mesh, there.placements, src_data_rank=None)
