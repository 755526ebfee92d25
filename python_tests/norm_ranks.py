"""One rank of a process group: synchronized batch normalisation on this rank's part of a batch.

python norm_ranks.py STORE RANK OUT, for ranks 0 and 1; `work(0, 1)` is one process with the joined batch.
"""

from __future__ import annotations

import torch
from processes import rank_of_two
from torch import nn

from fastforest.models import build_backbone, synchronize_batch_norm

UNEVEN = (0, 5, 7)
"""Rank 0 has the rows from the first to the second number, rank 1 those from there to the third."""


def work(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Outputs and input gradients of this rank's rows, weight gradients, and the state, of each case after two steps."""
    torch.set_num_threads(1)
    backbone = build_backbone("stacked", 32, depth=1, width=8, code=2, checkpoint=True)
    cases = {
        f"{name}.{dtype}": (small(), dtype, edges)
        for dtype in (torch.float32, torch.float64)
        for name, edges in {"halves": (0, 4, 8), "uneven": UNEVEN, "empty": (0, 0, 3)}.items()
    }
    cases["one_layer.torch.bfloat16"] = (nn.BatchNorm2d(3), torch.bfloat16, UNEVEN)
    cases["backbone.torch.float64"] = (backbone, torch.float64, UNEVEN)
    found = {}
    for name, (model, dtype, edges) in cases.items():
        rows = slice(edges[rank], edges[rank + 1]) if ranks > 1 else slice(edges[0], edges[-1])
        found |= {f"{name}.{key}": value for key, value in trained(model, dtype, rows, ranks).items()}
    return found


def small() -> nn.Module:
    """A layer of each kind: moving and cumulative running statistics, and neither those nor weights."""
    cumulative = nn.BatchNorm2d(6, momentum=None)
    plain = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, bias=False),
        cumulative,
        nn.ReLU(),
        plain,
    )


def trained(model: nn.Module, dtype: torch.dtype, rows: slice, ranks: int) -> dict[str, torch.Tensor]:
    """Of `model`, in `dtype` (parameters in float32 where that has 16 bits), after two steps on images with an offset."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = synchronize_batch_norm(model.to(torch.float64 if dtype == torch.float64 else torch.float32))
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = {}
    for step in range(2):
        images = 5 + torch.randn(8, 3, 32, 32, generator=generator)[rows].to(dtype)
        images.requires_grad_()
        optimizer.zero_grad()
        outputs = wrapped(images)
        if not isinstance(outputs, torch.Tensor):
            outputs = torch.cat([outputs.map.flatten(1), outputs.vector], dim=1)
        (outputs.double() - 0.3).pow(3).sum().div(1000).backward()
        assert images.grad is not None
        found[f"rows.{step}"] = torch.cat([outputs.detach().flatten(1), images.grad.flatten(1)], dim=1)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter.grad *= ranks  # DDP takes the mean, one process the sum
            found[f"grad.{step}.{name}"] = parameter.grad.clone()
        optimizer.step()
    return found | {f"state.{key}": value.clone() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    rank_of_two(work)
