"""Every layer converted to bfloat16 or float16, and under autocast: forward, loss, leaf updates, and what stays precise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastforest.nn import GaussianForest, HeatmapForest, LabelDistributionForest, LeafPool, SoftForest

N, F, SIZE = 60, 8, (9, 11)
LAYERS = ["gaussian", "gaussian_forest", "labels_kl", "labels_l2", "heatmaps", "pool_softmax", "pool_forest", "pool_l2"]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from threads, and on a busy machine lose a hundredfold by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def problem(name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A layer whose leaves are those of its labels, features, labels."""
    x, shape = torch.randn(N, F), {"trees": 2, "depth": 3, "units": 16, "steepness": 1.3}
    points = torch.tensor([[3.0, 4.0], [6.0, 5.0]]) + torch.stack([x[:, :2], x[:, 1:3]], 1).clamp(-2.5, 2.5)
    kind, _, way = name.partition("_")
    if kind == "pool":
        changes = {"selection": "forest", "depth": 3} if way == "forest" else {}
        objective = "l2" if way == "l2" else "kl"
        shift = torch.tensor([[0.3, -0.1], [-2.3, 1.7]])  # of no exact value in 16 bits
        return LeafPool(F, 2, 16, SIZE, 1.2, mean_shape=shift + 5, rank=8, objective=objective, **changes), x, points
    if kind == "gaussian":
        head: Any = GaussianForest(F, 2, objective=way or "per_tree", **shape)
        labels = 40 + torch.stack([x[:, 0] + x[:, 1], 3 * x[:, 2].tanh()], 1)
    elif kind == "labels":
        head, labels = LabelDistributionForest(F, 4, loss=way, **shape), (x[:, :4]).softmax(-1)
    else:
        head, labels = HeatmapForest(F, 2, SIZE, groups=[0, 1], **shape), points
    head.initialize(labels)
    head.calibrate(x)
    return head, x, labels


def buffers(head: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in head.named_buffers() if t.is_floating_point()}


@HALVES
def test_routing(dtype: torch.dtype) -> None:
    forest, x = SoftForest(F, 2, 4, steepness=1.3), torch.randn(N, F)
    low = copy.deepcopy(forest).to(dtype)
    assert low.weight.dtype == dtype and low.steepness == forest.steepness
    for given in (x, x.to(dtype)):
        prob = low(given)
        assert prob.dtype == torch.float32
        torch.testing.assert_close(prob, forest(x), atol=0.03, rtol=0)
        torch.testing.assert_close(prob.sum(-1), torch.ones(N, 2))
    low.log_prob(x).square().mean().backward()
    assert low.weight.grad.dtype == dtype and low.weight.grad.isfinite().all() and low.weight.grad.abs().max() > 0
    low.calibrate(x.to(dtype))
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(forest(x), forest(x).detach(), atol=0.03, rtol=0)
        assert forest(x.to(dtype)).dtype == low(x.to(dtype)).dtype == torch.float32


@HALVES
@pytest.mark.parametrize("name", LAYERS)
def test_converted_layers_work(name: str, dtype: torch.dtype) -> None:
    head, x, labels = problem(name)
    low = copy.deepcopy(head).to(dtype)
    assert {p.dtype for p in low.parameters()} == {dtype}
    torch.testing.assert_close(buffers(low), buffers(head), rtol=0, atol=0)
    torch.testing.assert_close(low.loss(x, labels), head.loss(x, labels), rtol=0.02, atol=0.05)
    for given in (x, x.to(dtype)):
        assert low(given).dtype == torch.float32
        # Units are rounded to 2^-9 of themselves: points and labels move by about a hundredth of their spread.
        torch.testing.assert_close(low(given), head(x), rtol=0, atol=0.1)
        loss = low.loss(given, labels)
        assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in low.parameters())
    assert any(p.grad.abs().max() > 0 for p in low.parameters())
    before = loss.item()
    for _ in range(3):
        low.accumulate(x.to(dtype), labels)
        low.update()
    assert low.loss(x, labels).item() < before + 1e-3
    torch.testing.assert_close(low.to(dtype).loss(x, labels), low.loss(x, labels), rtol=0, atol=0)
    assert {t.dtype for t in buffers(low).values()} == {torch.float32}
    assert {t.dtype for t in buffers(low.double()).values()} == {torch.float64}


@HALVES
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    head, x, labels = problem(name)
    exact, before = head(x), head.loss(x, labels)
    with torch.autocast("cpu", dtype):
        low, loss = head(x.to(dtype)), head.loss(x, labels)
        loss.backward()
        head.accumulate(x, labels)
        head.update()
    assert low.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0, atol=0.1)
    torch.testing.assert_close(loss, before, rtol=0.02, atol=0.05)
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert head.loss(x, labels) < before + 1e-3


@pytest.mark.parametrize("name", ["pool_softmax", "pool_l2"])
def test_what_was_accumulated_survives_the_conversion(name: str) -> None:
    head, x, points = problem(name)
    head.accumulate(x, points)
    low = copy.deepcopy(head).bfloat16()
    head.update()
    low.update()
    assert torch.equal(head.pool, low.pool)
