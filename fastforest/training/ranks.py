"""Training on many ranks: the process group that torchrun describes, and what the ranks tell each other.

Without a process group of two ranks or more, every function gives what one process needs and talks to nobody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from ..nn._ranks import many_ranks, rows_of_ranks, sum_over_ranks

__all__ = ["broadcast", "count", "first_says", "joined", "mine", "rank", "rows_of_ranks", "sum_gradients", "sums"]

BUCKET = 1 << 23
"""Numbers of a gradient's bucket: enough for the network's bandwidth, little beside the activations."""


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """The process group of torchrun (gloo on the CPU, NCCL on CUDA), left at the end; gives this rank's device.

    Where the environment names one process or none, or the caller has a group already, the device is the one given.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """0 is the rank that writes and speaks."""
    return distributed.get_rank() if many_ranks() else 0


def count() -> int:
    return distributed.get_world_size() if many_ranks() else 1


def mine(length: int) -> slice:
    """This rank's part of `length` rows: the parts are in the order of the ranks and differ by at most one row."""
    here, ranks = rank(), count()
    return slice(here * length // ranks, (here + 1) * length // ranks)


def first_says(value: float, device: torch.device) -> float:
    """The value of rank 0: what ranks must agree on and each would measure for itself, such as the time."""
    if not many_ranks():
        return value
    told = torch.tensor([value], dtype=torch.float64, device=device)
    distributed.broadcast(told, src=0)
    return told.item()


def sums(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks, float64."""
    if not many_ranks():
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=device)
    sum_over_ranks([told])
    return told.tolist()


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Parameters and buffers become those of rank 0."""
    if many_ranks():
        for tensor in module.state_dict().values():
            plain = tensor.contiguous()  # a convolution's weight may lie channels last
            distributed.broadcast(plain, src=0)
            tensor.copy_(plain)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Each gradient becomes its sum over the ranks.

    Not `DistributedDataParallel`: that averages, where the ranks' losses are means over unequal numbers of landmarks,
    and it follows one forward call, where a model's loss is a method and a run has two of them.
    """
    if not many_ranks():
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        distributed.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, up to `BUCKET` numbers together, or a single larger one."""
    bucket: list[Tensor] = []
    for grad in grads:
        full = sum(other.numel() for other in bucket) + grad.numel() > BUCKET
        if bucket and (full or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
