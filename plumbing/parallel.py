"""Several processes, by torch's own collectives and FSDP2: `torchrun --nproc_per_node N egspo.py ...`

Every process holds the whole batch and decides everything about it: each draw is a function of (seed,
purpose, update, prompt index), so all decide alike. What costs is shared: the groups of a rollout, the
rewards, the canvases of an optimizer step. Rows are gathered. Gradients, scores and counts are summed, never
averaged, because a normaliser is the whole batch's. Process 0 writes and prints. Without torchrun nothing
changes.

The weights are on every process, or in shards where they do not fit. Shards are gathered by collectives, so
all processes must make equally many forwards and backwards. In updates they do so by counting
(common.micro_batches gives an empty part to whoever has no work left), in rollouts by `Sharded.rolling_out`.
"""

import contextlib
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, partialmethod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import Denoiser


def rank() -> int:
    """The number of this process, known before the processes have met."""
    return int(os.environ["RANK"]) if "WORLD_SIZE" in os.environ else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_this_machine() -> int:
    """How many processes share this machine's memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start() -> torch.device:
    """Meet the other processes, if torchrun started this one; returns its device.

    A process may wait while another finishes its rollout or process 0 writes a checkpoint, so the limit is an
    hour. A death is noticed without it: torchrun ends all processes when one has ended with an error."""
    cuda = torch.cuda.is_available()
    if cuda:
        # On Hopper cuDNN's attention comes first, and it builds a plan for every new shape. Every update has
        # dozens of new ones here, and attention is a small part of a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif Path("/dev/nvidia0").exists():
        print("warning: this machine has an NVIDIA GPU, but torch cannot use it (is the driver older than "
              f"torch's CUDA {torch.version.cuda}?): training on the CPU", file=sys.stderr)
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda and on_this_machine() > torch.cuda.device_count():
        refuse(f"{on_this_machine()} processes on a machine of {torch.cuda.device_count()} GPUs")
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
        cards = set(gather([torch.cuda.get_device_name(device) if cuda else "CPU"]))
        if len(cards) > 1:  # then draws and rounding differ, and so does what each process decides
            refuse(f"all processes need the same kind of GPU; there are: {', '.join(sorted(cards))}")
        if rank():
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def after_rank_0():
    """Wait before an error: process 0 mostly has the same one, and torchrun ends this process after it."""
    if rank():
        time.sleep(5)


def refuse(message: str):
    """Wrong input: one line that says what is allowed, exit status 2."""
    after_rank_0()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Refuse, "`what`: the error", whatever is raised inside. Libraries raise errors of any kind there: bare
    ones, and the panics of Rust, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        refuse(f"{what}: {one_line(error)}")


def gather(items: list) -> list:
    """The lists of all processes, one behind the other."""
    if world() == 1:
        return items
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    return [item for of_process in lists for item in of_process]


def total(values, op: str = "sum"):
    """The sum over all processes, of a number, a dict of numbers or a tensor. op "min": the smallest."""
    if world() == 1:
        return values
    if isinstance(values, dict):
        totals = total(torch.tensor(list(values.values()), dtype=torch.float64), op).tolist()
        return dict(zip(values, totals, strict=True))
    if not isinstance(values, Tensor):
        return total(torch.tensor(values, dtype=torch.float64), op).item()
    found = values.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(found, getattr(dist.ReduceOp, op.upper()))
    return found.to(values.device)


# ----------------------------------------------------------------------------------- a model on each process


@dataclass
class Replicated(Denoiser):
    """A model whose weights are on every process."""

    @property
    def processes(self) -> int:
        return world()

    def share(self, count: int) -> range:
        """This process's share of `count`; may be empty where there are fewer pieces than processes."""
        return range(count * rank() // world(), count * (rank() + 1) // world())

    def gather(self, items: list) -> list:
        return gather(items)

    def total(self, values):
        return total(values)

    def last_hidden_state(self, x: Tensor, attn: Tensor | None, positions: Tensor | None) -> Tensor:
        """As alone. A process without canvases goes along, and its weights get gradients of 0."""
        if len(x) == 0:
            return self.forward(x.new_zeros(1, 1), None, None)[:0].expand(*x.shape, -1)
        return self.forward(x, attn, positions)

    def forward(self, x: Tensor, attn: Tensor | None, positions: Tensor | None) -> Tensor:
        return super().last_hidden_state(x, attn, positions)

    def clip_gradient(self, max_norm: float) -> float:
        """Sum the gradients over the processes, once for each optimizer step, and clip the sum."""
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
            work.wait()
        return super().clip_gradient(max_norm)


# ------------------------------------------------------------------------------------------------- in shards


@dataclass
class Sharded(Replicated):
    """A model whose fp32 weights, and so gradients and Adam, are split over the processes (FSDP2).

    A layer is gathered when it is called, on CUDA in bf16: half the bytes, and what autocast would make of
    its matrices anyway. All else (embeddings, last norm, head: tied ones must be in one group) belongs to the
    root, in fp32. FSDP2 gathers it for `gathered_forward` and takes it back when backward is through, so the
    head's weights are there when score() calls the head by itself, and when backward runs it again."""

    keep_whole: bool = False  # there is memory for all layers at once during a rollout
    twin: torch.nn.Module | None = None  # of the network, in the same shards, where a frozen copy is needed
    in_step: bool = False  # inside a rollout in which every forward is announced to the others

    def frozen(self) -> Denoiser:
        """A copy of the network as it is now. FSDP2 copies no module, so its weights go into the twin."""
        self.twin.load_state_dict(self.network.state_dict())
        return dataclasses.replace(self, network=self.twin, twin=None)

    def forward(self, x: Tensor, attn: Tensor | None, positions: Tensor | None) -> Tensor:
        if self.in_step:
            total(1)  # tells those who are through that one more forward comes
        return self.network.gathered_forward(x, attn, positions)

    @torch.no_grad()
    def forward_of_nothing(self):
        """Go along with a forward of the others."""
        with self.autocast():
            x = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.network.gathered_forward(x, None, None)

    @contextlib.contextmanager
    def rolling_out(self) -> Iterator[None]:
        """Either all layers are whole meanwhile, or a process that is through goes along with each forward of
        the others until all are through."""
        layers = self.network.model.layers if self.keep_whole else []
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        self.in_step = not self.keep_whole
        yield
        while self.in_step and total(0):
            self.forward_of_nothing()
        self.in_step = False
        for layer in (self.network, *layers):
            layer.reshard()
        for layer in layers:
            layer.set_reshard_after_forward(True)

    def clip_gradient(self, max_norm: float) -> float:
        """FSDP2 has summed the gradients of shards, in fp32, after each backward. This process knows the norm
        of its own shards alone; full_tensor() combines them."""
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).full_tensor()
        torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), max_norm, norm)
        return norm.item()


def spread(
    model: Denoiser, device: torch.device, sharded: bool, keep_whole: bool, with_twin: bool
) -> Denoiser:
    """The model on all processes; `model` itself where there is one. A model that is to be sharded is on the
    CPU still, from where a layer at a time is moved."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(Denoiser)}
    if not sharded:
        return Replicated(**fields) if world() > 1 else model
    model = Sharded(**fields, keep_whole=keep_whole)
    model.twin = copy.deepcopy(model.network) if with_twin else None
    for network in filter(None, (model.network, model.twin)):
        shard(dataclasses.replace(model, network=network), device)
    return model


def shard(model: Sharded, device: torch.device):
    """Split the weights of its network over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    network = model.network
    mesh, dtype = init_device_mesh(device.type, (world(),)), torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)
    for module in (network, *network.model.layers):  # sums, not averages, which gloo does not have either
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    network.gathered_forward = partial(hidden_state_of, network)
    register_fsdp_forward_method(network, "gathered_forward")
    model.forward_of_nothing()  # FSDP2 takes for the root what is called first
    network.reshard()  # an optimizer must not be given what is gathered


def hidden_state_of(network: torch.nn.Module, x: Tensor, attn: Tensor | None, positions: Tensor | None):
    return network.model(x, attention_mask=attn, position_ids=positions).last_hidden_state


# --------------------------------------------------------------------------------- what a checkpoint holds


def whole(value):
    """A sharded tensor gathered on the CPU of process 0 (None elsewhere); everything else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    full = value.detach().full_tensor()
    return None if rank() else full.cpu()


def weights(model: Denoiser) -> dict[str, Tensor]:
    """The state_dict as it would be without shards. All processes must ask."""
    if not isinstance(model, Sharded):
        return model.network.state_dict()
    held = model.network.state_dict(keep_vars=True)
    full = {key: whole(value) for key, value in {id(v): v for v in held.values()}.items()}
    return {name: full[id(value)] for name, value in held.items()}  # tied weights are one tensor and stay one


def moments(optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state_dict as it would be without shards. All processes must ask."""
    state = optimizer.state_dict()
    kept = {i: {name: whole(v) for name, v in held.items()} for i, held in state["state"].items()}
    return state | {"state": kept}


def like(value: Tensor, there) -> Tensor:
    """A whole tensor in the shards of `there`, if it has any; each process takes its own."""
    if not hasattr(there, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # not above, because it takes its time

    return distribute_tensor(value.to(there.device), there.device_mesh, there.placements, src_data_rank=None)
