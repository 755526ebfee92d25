"""One rank of a process group: synchronized batch normalisation on this rank's part of a batch.

python norm_ranks.py STORE RANK OUT, for ranks 0 and 1; `work(0, 1)` is one process with the joined batch.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed, nn

from fastforest.models import build_backbone, synchronize_batch_norm

PARTS = {"halves": (0, 4, 8), "uneven": (0, 5, 7), "empty": (0, 0, 3)}
"""The rows of rank 0 end, and those of rank 1 begin, at the middle number."""


def work(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Outputs and input gradients of this rank's rows, weight gradients, and the state, of each case after two steps."""
    torch.set_num_threads(1)
    found = {}
    for dtype in (torch.float32, torch.float64):
        for case, edges in PARTS.items():
            rows = slice(edges[rank], edges[rank + 1]) if ranks > 1 else slice(edges[0], edges[-1])
            found |= {f"small.{case}.{dtype}.{key}": value for key, value in trained(small(), dtype, rows).items()}
    backbone = build_backbone("stacked", 32, depth=1, width=8, code=2, checkpoint=True)
    for key, value in trained(
        backbone, torch.float64, slice(5) if ranks == 1 else (slice(2), slice(2, 5))[rank]
    ).items():
        found[f"stacked.{key}"] = value
    return found


def small() -> nn.Module:
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


def trained(model: nn.Module, dtype: torch.dtype, rows: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = synchronize_batch_norm(model.to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = {}
    for step in range(2):
        images = 5 + torch.randn(8, 3, 32, 32, generator=generator)[rows].to(dtype)
        images.requires_grad_()
        optimizer.zero_grad()
        outputs = model(images)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.map
        (outputs - 0.3).pow(3).sum().div(1000).backward()
        assert images.grad is not None
        found |= {f"rows.{step}": torch.cat([outputs.detach().flatten(1), images.grad.flatten(1)], dim=1)}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                if distributed.is_initialized():
                    distributed.all_reduce(parameter.grad)
                found[f"grad.{step}.{name}"] = parameter.grad.clone()
        optimizer.step()
    return found | {f"state.{key}": value.clone() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    store, rank, out = sys.argv[1:]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    torch.save(work(int(rank), 2), out)
    distributed.destroy_process_group()
