"""route against every formulation an expert would try: eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, Bench
from torch import Tensor

import fastforest as ff
from fastforest.reference import routing as exact

UNITS = 128
Form = Callable[[Tensor], Tensor]


def levels(split: Tensor, depth: int) -> Tensor:
    """split [N, T, nodes] -> leaves, doubling level by level."""
    reach = split.new_ones(*split.shape[:2], 1)
    for level in range(depth):
        left = reach * split[..., 2**level - 1 : 2 ** (level + 1) - 1]
        reach = torch.stack([left, reach - left], -1).flatten(-2)
    return reach


def paths(depth: int) -> tuple[Tensor, Tensor]:
    """The nodes on the way to each leaf, and whether it turns right there: [L, D] each."""
    leaf = torch.arange(2**depth)[:, None]
    level = torch.arange(depth)
    return 2**level - 1 + (leaf >> (depth - level)), (leaf >> (depth - 1 - level)) & 1


def rivals(phi: Tensor, depth: int) -> dict[str, Form]:
    """units [N, F] -> [N, T, L], by name; what can be prepared from phi is prepared here."""
    trees = phi.shape[0]
    one_hot = torch.nn.functional.one_hot(phi.flatten(), UNITS).float().T.contiguous()
    node, right = (a.to(DEVICE) for a in paths(depth))
    column = phi[:, node] + UNITS * right  # [T, L, D]: in [d, 1 - d]
    counts = torch.zeros(2 * UNITS, trees * 2**depth, device=DEVICE)
    counts.scatter_add_(0, column.flatten(0, 1).T, torch.ones_like(column.flatten(0, 1).T, dtype=torch.float32))

    def gather(units: Tensor) -> Tensor:
        return levels(torch.sigmoid(units)[:, phi], depth)

    def index_select(units: Tensor) -> Tensor:
        return levels(torch.sigmoid(units).index_select(1, phi.flatten()).view(-1, *phi.shape), depth)

    def one_hot_gemm(units: Tensor) -> Tensor:
        return levels((torch.sigmoid(units) @ one_hot).view(-1, *phi.shape), depth)

    def logsum_gemm(units: Tensor) -> Tensor:
        log = torch.nn.functional.logsigmoid(units)
        return (torch.cat([log, log - units], 1) @ counts).exp().view(-1, trees, 2**depth)

    def path_product(units: Tensor) -> Tensor:
        d = torch.sigmoid(units)
        return torch.cat([d, 1 - d], 1)[:, column].prod(-1)

    forms: dict[str, Form] = {
        "levels": gather,
        "index_select": index_select,
        "one-hot gemm": one_hot_gemm,
        "logsum gemm": logsum_gemm,
    }
    if depth <= 6:  # [N, T, L, D] is ten times the leaves beyond
        forms["path product"] = path_product
    return forms


CASES = pytest.mark.parametrize(
    "samples, trees, depth, bars",
    [(4096, 5, 6, {"eager": 8, "compile": 4}), (1024, 5, 10, {"eager": 10, "compile": 6})],
    ids=["D6", "D10"],
)


@CASES
def test_forward(bench: Bench, samples: int, trees: int, depth: int, bars: dict[str, float]) -> None:
    units, phi = torch.randn(samples, UNITS, device=DEVICE), ff.draw_phi(UNITS, trees, depth).to(DEVICE)
    contenders = {}
    for name, form in rivals(phi, depth).items():
        contenders[f"eager {name}"] = lambda form=form: form(units)
        compiled = torch.compile(form)
        contenders[f"compile {name}"] = lambda form=compiled: form(units)
    leaves = samples * trees * 2**depth
    with torch.no_grad():
        bench.compare(
            f"T {trees} D {depth} N {samples} F {UNITS}",
            "route forward",
            lambda: ff.route(units, phi),
            contenders,
            bars={"eager": 1, "compile": 1},
            moved_bytes=4 * (units.numel() + leaves),
            flops=2 * leaves,
            exact=lambda: exact.route(units.double(), phi),
        )
    torch._dynamo.reset()


@CASES
def test_backward(bench: Bench, samples: int, trees: int, depth: int, bars: dict[str, float]) -> None:
    units = torch.randn(samples, UNITS, device=DEVICE, requires_grad=True)
    phi = ff.draw_phi(UNITS, trees, depth).to(DEVICE)
    upstream = torch.randn(samples, trees, 2**depth, device=DEVICE)

    def gradient(form: Form) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(form(units), units, upstream)[0]

    def reference() -> Tensor:
        u = units.detach().double().requires_grad_()
        return torch.autograd.grad(exact.route(u, phi), u, upstream.double())[0]

    contenders = {}
    for name, form in rivals(phi, depth).items():
        contenders[f"eager {name}"] = gradient(form)
        contenders[f"compile {name}"] = gradient(torch.compile(form))
    leaves = samples * trees * 2**depth
    bench.compare(
        f"T {trees} D {depth} N {samples} F {UNITS}",
        "route forward + backward",
        gradient(lambda u: ff.route(u, phi)),
        contenders,
        bars=bars,
        moved_bytes=4 * (3 * units.numel() + 2 * leaves),
        flops=9 * leaves,
        exact=reference,
        memory=DEVICE.type == "cpu",
    )
    torch._dynamo.reset()
