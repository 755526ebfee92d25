"""One KL leaf update of a label-distribution forest, and its loss forward + backward, against PyTorch's products."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, Bench
from torch import Tensor

import fastforest as ff
from fastforest.reference import categorical as exact


def normalised(leaves: Tensor) -> Tensor:
    return leaves / leaves.sum(-1, keepdim=True)


def update_bmm(weight: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    by_tree = weight.transpose(0, 1)
    return normalised(leaves * torch.bmm(by_tree.mT, target / torch.bmm(by_tree, leaves)))


def update_inplace(weight: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    by_tree = weight.transpose(0, 1)
    ratio = torch.bmm(by_tree, leaves)
    torch.div(target, ratio, out=ratio)
    fresh = torch.bmm(by_tree.mT, ratio).mul_(leaves)
    return fresh.div_(fresh.sum(-1, keepdim=True))


def update_einsum(weight: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    ratio = target.unsqueeze(1) / torch.einsum("ntl,tlc->ntc", weight, leaves)
    return normalised(leaves * torch.einsum("ntl,ntc->tlc", weight, ratio))


def update_loop(weight: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    fresh = []
    for tree, q in enumerate(leaves):
        p = weight[:, tree]
        fresh.append(normalised(q * (p.T @ (target / (p @ q)))))
    return torch.stack(fresh)


def loss_bmm(weight: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    yhat = torch.bmm(weight.transpose(0, 1), leaves)
    return torch.special.xlogy(target, target).sum(-1) - (target * yhat.log()).sum(-1)


def loss_einsum(weight: Tensor, leaves: Tensor, target: Tensor) -> Tensor:
    yhat = torch.einsum("ntl,tlc->ntc", weight, leaves)
    return torch.special.xlogy(target, target).sum(-1, keepdim=True) - (target.unsqueeze(1) * yhat.log()).sum(-1)


SIZES = {"update": [(4096, 5, 64, 100)], "loss": [(4096, 5, 64, 100), (256, 3, 32, 4096)]}


class Inputs:
    def __init__(self, samples: int, trees: int, leaves: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def softmax(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).softmax(-1).to(DEVICE)

        self.weight, self.leaves = softmax(samples, trees, leaves), softmax(trees, leaves, classes)
        self.target = softmax(samples, classes)
        self.all = (self.weight, self.leaves, self.target)
        self.flops = 2 * samples * trees * leaves * classes
        self.bytes = 4 * (self.weight.numel() + self.target.numel() + 2 * self.leaves.numel())

    def double(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().double() for t in self.all)


def name(size: tuple[int, ...]) -> str:
    return "N {} T {} L {} C {}".format(*size)


@pytest.mark.parametrize("size", SIZES["update"], ids=name)
def test_update(bench: Bench, size: tuple[int, int, int, int]) -> None:
    x = Inputs(*size)
    rivals = {"bmm": update_bmm, "bmm in place": update_inplace, "einsum": update_einsum, "tree loop": update_loop}
    runs = {f"eager {k}": f for k, f in rivals.items()} | {f"compile {k}": torch.compile(f) for k, f in rivals.items()}

    def reference() -> Tensor:
        weight, leaves, target = x.double()
        statistics = exact.categorical_statistics(weight, leaves, target)
        return exact.categorical_update(statistics, leaves)[0]

    row = bench.compare(
        name(size),
        "categorical_statistics + categorical_update",
        lambda: ff.categorical_update(ff.categorical_statistics(*x.all), x.leaves).leaves,
        {k: lambda f=f: f(*x.all) for k, f in runs.items()},
        bars={"rival": 1.2},
        moved_bytes=x.bytes,
        flops=2 * x.flops,
        exact=reference,
        memory=True,
        rounds=21,
    )
    assert row.error is not None and row.error < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("with_leaves", [False, True], ids=["weights", "weights and leaves"])
@pytest.mark.parametrize("size", SIZES["loss"], ids=name)
def test_loss(bench: Bench, size: tuple[int, int, int, int], with_leaves: bool) -> None:
    x = Inputs(*size)
    x.weight.requires_grad_()
    x.leaves.requires_grad_(with_leaves)
    wanted = (x.weight, x.leaves) if with_leaves else (x.weight,)

    def grad(function):
        return lambda: torch.autograd.grad(function(*x.all).mean(), wanted)

    def reference():
        weight, leaves, target = x.double()
        given = (weight.requires_grad_(), leaves.requires_grad_())[: len(wanted)]
        return torch.autograd.grad(exact.categorical_kl_loss(weight, leaves, target).mean(), given)

    row = bench.compare(
        name(size),
        f"categorical_kl_loss forward + backward, {'weights and leaves' if with_leaves else 'weights'}",
        grad(ff.categorical_kl_loss),
        {
            "eager bmm": grad(loss_bmm),
            "eager einsum": grad(loss_einsum),
            "compile bmm": grad(torch.compile(loss_bmm)),
            "compile einsum": grad(torch.compile(loss_einsum)),
        },
        bars={"rival": 1.0},
        moved_bytes=x.bytes + 8 * x.weight.numel(),
        flops=(3 if with_leaves else 2) * x.flops,
        exact=reference,
        memory=True,
        rounds=11,
    )
    assert row.error is not None and row.error < 1e-5
    torch._dynamo.reset()
