"""Gaussian leaves against torch.distributions, scikit-learn and every formulation an expert would try."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, Bench
from torch import Tensor

import fastforest as ff
from fastforest.reference import gaussian as exact

Form = Callable[..., Any]


def leaves(count: int, dims: int) -> tuple[Tensor, Tensor]:
    lower = torch.randn(count, dims, dims).tril(-1) * (0.3 / math.sqrt(dims))
    tril = lower + torch.diag_embed(0.5 + torch.rand(count, dims))
    return torch.randn(count, dims).to(DEVICE), tril.to(DEVICE)


# rivals: densities


def inverse(mean: Tensor, tril: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W = L^-1, W mu and the normaliser."""
    count, dims = mean.shape
    eye = torch.eye(dims, dtype=tril.dtype, device=tril.device).expand(count, dims, dims)
    white = torch.linalg.solve_triangular(tril, eye, upper=False)
    offset = (white @ mean.unsqueeze(-1)).squeeze(-1)
    norm = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dims * math.log(2 * math.pi)
    return white, offset, norm


def distributions(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    law = torch.distributions.MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    return law.log_prob(x.unsqueeze(1))


def whitened(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    """One product [N, D] x [D, K D], then squares."""
    count, dims = mean.shape
    white, offset, norm = inverse(mean, tril)
    z = torch.addmm(offset.reshape(1, -1), x, white.reshape(count * dims, dims).T, beta=-1).view(-1, count, dims)
    return -0.5 * z.square().sum(-1) - norm


def batched(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    white, offset, norm = inverse(mean, tril)
    z = torch.baddbmm(offset.unsqueeze(1), x.expand(len(mean), *x.shape), white.mT, beta=-1)
    return (-0.5 * z.square().sum(-1) - norm.unsqueeze(1)).T


def leaf_loop(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    white, offset, norm = inverse(mean, tril)
    rows = [torch.addmm(offset[k], x, white[k].T, beta=-1).square_().sum(-1) for k in range(len(mean))]
    return torch.stack(rows).mul_(-0.5).sub_(norm.unsqueeze(1)).T


def blocks(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    """As `whitened`, 256 samples at a time: temporaries stay in the cache."""
    count, dims = mean.shape
    white, offset, norm = inverse(mean, tril)
    flat, shift = white.reshape(count * dims, dims).T, offset.reshape(1, -1)
    parts = [torch.addmm(shift, part, flat, beta=-1).view(-1, count, dims).square_().sum(-1) for part in x.split(256)]
    return torch.cat(parts).mul_(-0.5).sub_(norm)


@functools.cache
def lower_pairs(dims: int) -> tuple[Tensor, Tensor, Tensor]:
    i, j = torch.tril_indices(dims, dims, device=DEVICE)
    return i, j, torch.where(i == j, 1.0, 2.0)


def products(x: Tensor) -> Tensor:
    """Natural features: x_i x_j for i >= j, and x."""
    i, j, _ = lower_pairs(x.shape[1])
    return torch.cat([x[:, i] * x[:, j], x], 1)


def all_products(x: Tensor) -> Tensor:
    return torch.cat([(x.unsqueeze(2) * x.unsqueeze(1)).flatten(1), x], 1)


def products_by_row(x: Tensor) -> Tensor:
    i, j, _ = lower_pairs(x.shape[1])
    xt = x.T.contiguous()
    return torch.cat([xt[i] * xt[j], xt])


def natural(mean: Tensor, tril: Tensor, every: bool) -> tuple[Tensor, Tensor]:
    """Coefficients of the features [K, F] and the constant [K]. One product then gives all densities; it cancels."""
    white, offset, norm = inverse(mean, tril)
    precision = white.mT @ white
    linear = (precision @ mean.unsqueeze(-1)).squeeze(-1)
    if every:
        quadratic = precision.flatten(1)
    else:
        i, j, twice = lower_pairs(mean.shape[1])
        quadratic = precision[:, i, j] * twice
    return torch.cat([-0.5 * quadratic, linear], 1), -0.5 * offset.square().sum(-1) - norm


def quadratic(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    coefficients, constant = natural(mean, tril, False)
    return torch.addmm(constant, products(x), coefficients.T)


def quadratic_all(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    coefficients, constant = natural(mean, tril, True)
    return torch.addmm(constant, all_products(x), coefficients.T)


def quadratic_rows(x: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    coefficients, constant = natural(mean, tril, False)
    return torch.addmm(constant.unsqueeze(1), coefficients, products_by_row(x)).T


EAGER: dict[str, Form] = {
    "whitened gemm": whitened,
    "batched": batched,
    "quadratic gemm": quadratic,
    "quadratic gemm, all": quadratic_all,
    "quadratic gemm, rows": quadratic_rows,
}
COMPILED = ("whitened gemm", "quadratic gemm", "quadratic gemm, all", "quadratic gemm, rows")
SIZES = pytest.mark.parametrize(
    "samples, count, dims, forward, both",
    [(4096, 160, 2, 25, 3), (4096, 160, 20, 40, 1.5), (1024, 160, 136, 6, 1.8)],
    ids=["D2", "D20", "D136"],
)


def case_name(samples: int, count: int, dims: int) -> str:
    return f"N {samples} K {count} D {dims}"


@SIZES
def test_log_prob_forward(bench: Bench, samples: int, count: int, dims: int, forward: float, both: float) -> None:
    x, (mean, tril) = torch.randn(samples, dims, device=DEVICE), leaves(count, dims)
    contenders: dict[str, Form] = {"distributions": lambda: distributions(x, mean, tril)}
    for name, form in (EAGER | {"leaf loop": leaf_loop, "blocks": blocks}).items():
        contenders[f"eager {name}"] = lambda form=form: form(x, mean, tril)
    for name in COMPILED:
        compiled = torch.compile(EAGER[name])
        contenders[f"compile {name}"] = lambda form=compiled: form(x, mean, tril)
    with torch.no_grad():
        bench.compare(
            case_name(samples, count, dims),
            "gaussian_log_prob forward",
            lambda: ff.gaussian_log_prob(x, mean, tril),
            contenders,
            bars={"distributions": forward, "rival": 1},
            moved_bytes=4 * (samples * dims + count * dims * (dims + 3) / 2 + samples * count),
            flops=samples * count * dims * (dims + 4),
            exact=lambda: exact.gaussian_log_prob(x.double(), mean.double(), tril.double()),
        )
    torch._dynamo.reset()


@SIZES
def test_log_prob_backward(bench: Bench, samples: int, count: int, dims: int, forward: float, both: float) -> None:
    x = torch.randn(samples, dims, device=DEVICE, requires_grad=True)
    mean, tril = (t.requires_grad_() for t in leaves(count, dims))
    upstream = torch.randn(samples, count, device=DEVICE)

    def gradients(form: Form) -> Form:
        return lambda: torch.autograd.grad(form(x, mean, tril), (x, mean, tril), upstream)

    def reference() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_() for t in (x, mean, tril)]
        return torch.autograd.grad(exact.gaussian_log_prob(*wide), wide, upstream.double())

    contenders = {f"eager {name}": gradients(form) for name, form in EAGER.items()}
    contenders |= {f"compile {name}": gradients(torch.compile(EAGER[name])) for name in COMPILED}
    bench.compare(
        case_name(samples, count, dims),
        "gaussian_log_prob forward + backward",
        gradients(ff.gaussian_log_prob),
        contenders,
        bars={"rival": both},
        moved_bytes=4 * (3 * (samples * dims + count * dims * (dims + 3) / 2) + 2 * samples * count),
        flops=3 * samples * count * dims * (dims + 4),
        exact=reference,
    )
    torch._dynamo.reset()


# rivals: expectation maximisation


def em_shared(features: Form, every: bool) -> Form:
    """Densities and moments from the same natural features: two products."""

    def run(x: Tensor, log_weight: Tensor, mean: Tensor, tril: Tensor) -> tuple[Tensor, ...]:
        coefficients, constant = natural(mean, tril, every)
        q = features(x)
        joint = torch.addmm(log_weight, q, coefficients.T) + constant
        log_prob = torch.logsumexp(joint, 1)
        r = (joint - log_prob.unsqueeze(1)).exp()
        return r.T @ q, r.sum(0), log_prob.sum()

    return run


def em_rows(x: Tensor, log_weight: Tensor, mean: Tensor, tril: Tensor) -> tuple[Tensor, ...]:
    coefficients, constant = natural(mean, tril, False)
    q = products_by_row(x)
    joint = torch.addmm(log_weight, q.T, coefficients.T) + constant
    log_prob = torch.logsumexp(joint, 1)
    r = (joint - log_prob.unsqueeze(1)).exp()
    return (q @ r).T, r.sum(0), log_prob.sum()


def em_whitened(x: Tensor, log_weight: Tensor, mean: Tensor, tril: Tensor) -> tuple[Tensor, ...]:
    joint = log_weight + whitened(x, mean, tril)
    log_prob = torch.logsumexp(joint, 1)
    r = (joint - log_prob.unsqueeze(1)).exp()
    return r.T @ products(x), r.sum(0), log_prob.sum()


def em_blocks(x: Tensor, log_weight: Tensor, mean: Tensor, tril: Tensor) -> tuple[Tensor, ...]:
    """Streaming: features of a block stay in the cache, moments are added by the product."""
    count, dims = mean.shape
    coefficients, constant = natural(mean, tril, True)
    moments, total, likelihood = x.new_zeros(count, dims * dims + dims), x.new_zeros(count), x.new_zeros(())
    for part, weight in zip(
        x.split(1024 if dims < 64 else 256), log_weight.split(1024 if dims < 64 else 256), strict=True
    ):
        q = all_products(part)
        joint = torch.addmm(weight, q, coefficients.T).add_(constant)
        log_prob = torch.logsumexp(joint, 1)
        r = joint.sub_(log_prob.unsqueeze(1)).exp_()
        moments.addmm_(r.T, q)
        total += r.sum(0)
        likelihood = likelihood + log_prob.sum()
    return moments, total, likelihood


def scikit_learn(x: Tensor, mean: Tensor, tril: Tensor) -> Form:
    """Its E and M step, at one weight a leaf; the inverse factors are given, that of the new leaves is computed."""
    import numpy as np
    from sklearn.mixture import GaussianMixture

    count = len(mean)
    model = GaussianMixture(count, reg_covar=1e-3)
    factors, centres, samples = inverse(mean, tril)[0].mT.contiguous().numpy(), mean.numpy(), x.numpy()

    def run() -> Any:
        model.means_, model.precisions_cholesky_ = centres, factors
        model.weights_ = np.full(count, 1 / count, np.float32)
        _, log_r = model._e_step(samples)
        model._m_step(samples, log_r)
        return model.means_

    return run


@pytest.mark.parametrize(
    "samples, count, dims, library", [(20000, 160, 20, 25), (4096, 160, 136, 4)], ids=["D20", "D136"]
)
def test_statistics(bench: Bench, samples: int, count: int, dims: int, library: float) -> None:
    x, (mean, tril) = torch.randn(samples, dims, device=DEVICE), leaves(count, dims)
    log_weight = torch.randn(samples, count, device=DEVICE).log_softmax(1)
    forms = {
        "whitened": em_whitened,
        "shared features": em_shared(products, False),
        "shared features, all": em_shared(all_products, True),
        "shared features, rows": em_rows,
    }
    contenders: dict[str, Form] = {"eager blocks": lambda: em_blocks(x, log_weight, mean, tril)}
    for name, form in forms.items():
        compiled = torch.compile(form)
        contenders[f"eager {name}"] = lambda form=form: form(x, log_weight, mean, tril)
        contenders[f"compile {name}"] = lambda form=compiled: form(x, log_weight, mean, tril)
    bars = {"rival": 1.15}
    if DEVICE.type == "cpu":
        contenders["sklearn E + M"] = scikit_learn(x, mean, tril)
        bars["sklearn"] = library

    def reference() -> tuple[Tensor, ...]:
        wide = (t.double() for t in (x, log_weight, mean, tril))
        count_, first, _, likelihood = exact.gaussian_statistics(*wide)
        return count_, first, likelihood

    def ours() -> tuple[Tensor, ...]:
        s = ff.gaussian_statistics(x, log_weight, mean, tril)
        return s.count, s.first, s.log_likelihood

    with torch.no_grad():
        bench.compare(
            case_name(samples, count, dims),
            "gaussian_statistics",
            ours,
            contenders,
            bars=bars,
            moved_bytes=4 * (samples * (dims + count) + count * dims * (dims + 3)),
            flops=samples * count * (2 * dims * dims + 7 * dims + 5),
            exact=reference if dims < 64 else None,
            memory=True,
            rounds=5,
        )
    torch._dynamo.reset()
