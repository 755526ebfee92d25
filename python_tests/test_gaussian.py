"""Room `gaussian`: the contract, agreement with SciPy, torch.distributions and scikit-learn, and what must survive."""

from __future__ import annotations

import doctest
import itertools
import math

import contract
import numpy as np
import pytest
import torch
from contract import Case, Operator
from torch import Tensor

import fastforest as ff
from fastforest.ops import gaussian as ops
from fastforest.ops._register import op
from fastforest.reference import gaussian as reference


def statistics(**given: Tensor) -> tuple[Tensor, ...]:
    return tuple(ops.gaussian_statistics(**given))[:4]


LEAVES = ("mean", "scale_tril")
LOG_PROB = Operator(ops.gaussian_log_prob, reference.gaussian_log_prob, ("x",))
MIXTURE = Operator(ops.gaussian_mixture_log_prob, reference.gaussian_mixture_log_prob, ("x", "log_weight"))
# A posterior of one leaf is 1 whatever the input: gradients of 0 are held against the size that they have elsewhere.
POSTERIOR = Operator(
    ops.gaussian_responsibilities,
    reference.gaussian_responsibilities,
    ("x", "log_weight"),
    fused=False,  # its gradient of log w + log N is PyTorch's
    scale=dict.fromkeys(("x", "log_weight", *LEAVES), 1.0),
)
STATISTICS = Operator(statistics, reference.gaussian_statistics, (), fused=False)  # so is the sum of its likelihoods
MOMENTS = Operator(ops.mixture_moments, reference.mixture_moments, ("weight",), fused=False, scale={"weight": 100.0})


def leaves(g: torch.Generator, count: int, dims: int) -> dict[str, Tensor]:
    lower = torch.randn(count, dims, dims, generator=g, dtype=torch.float64).tril(-1) * (0.3 / math.sqrt(dims))
    diagonal = 0.5 + torch.rand(count, dims, generator=g, dtype=torch.float64)
    mean = torch.randn(count, dims, generator=g, dtype=torch.float64)
    return {"mean": mean, "scale_tril": lower + torch.diag_embed(diagonal)}


def log_prob_inputs(samples: int, count: int, dims: int):
    return lambda g: {"x": torch.randn(samples, dims, generator=g, dtype=torch.float64), **leaves(g, count, dims)}


def mixture_inputs(samples: int, count: int, dims: int):
    def make(g: torch.Generator) -> dict[str, Tensor]:
        weight = torch.randn(samples, count, generator=g, dtype=torch.float64).log_softmax(-1)
        return log_prob_inputs(samples, count, dims)(g) | {"log_weight": weight}

    return make


def weighted_inputs(samples: int, count: int, dims: int):
    """Samples that count 0 to 3 times, the last not at all."""

    def make(g: torch.Generator) -> dict[str, Tensor]:
        weight = 3 * torch.rand(samples, generator=g, dtype=torch.float64)
        weight[1:][-1:] = 0
        return mixture_inputs(samples, count, dims)(g) | {"weight": weight}

    return make


def moments_inputs(samples: int, count: int, dims: int):
    def make(g: torch.Generator) -> dict[str, Tensor]:
        return {"weight": torch.rand(samples, count, generator=g, dtype=torch.float64)} | leaves(g, count, dims)

    return make


SIZES = [(1, 1, 1), (3, 5, 2), (67, 17, 3), (70, 16, 4), (33, 3, 5), (5, 2, 16), (65, 18, 20), (6, 2, 33), (70, 1, 71)]
EVERY = []
for sizes in SIZES:
    name = "x".join(map(str, sizes))
    EVERY += [
        (LOG_PROB, Case(name, log_prob_inputs(*sizes), {}, ("x", *LEAVES))),
        (MIXTURE, Case(name, mixture_inputs(*sizes), {}, ("x", "log_weight", *LEAVES))),
        (POSTERIOR, Case(name, mixture_inputs(*sizes), {}, ("x", "log_weight", *LEAVES))),
        (STATISTICS, Case(name, mixture_inputs(*sizes))),
        (STATISTICS, Case(name, weighted_inputs(*sizes))),
        (MOMENTS, Case(name, moments_inputs(*sizes), {}, ("weight", *LEAVES))),
    ]


def name_of(value: object) -> str:
    if isinstance(value, Case):
        return value.id
    return value.function.__name__ if isinstance(value, Operator) else str(value)


every = pytest.mark.parametrize("operator, case", EVERY, ids=name_of)
differentiable = pytest.mark.parametrize(
    "operator, case",
    [(o, c) for o, c in EVERY if c.differentiable and c.id in ("1x1x1", "3x5x2", "33x3x5")],
    ids=name_of,
)
chosen = pytest.mark.parametrize("operator, case", [(o, c) for o, c in EVERY if c.id == "67x17x3"], ids=name_of)
fused = pytest.mark.parametrize(
    "operator, case", [(o, c) for o, c in EVERY if c.id == "67x17x3" and o is not MOMENTS], ids=name_of
)
batched = pytest.mark.parametrize(
    "operator, case", [(o, c) for o, c in EVERY if c.id == "67x17x3" and o is not STATISTICS], ids=name_of
)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
@every
def test_contract_agreement(operator: Operator, case: Case, backend: str, dtype: torch.dtype) -> None:
    # The reference cannot solve in 16 bits; what is computed is float32 of the same values.
    if dtype in contract.ROUNDING:
        with contract.on(backend) as device:
            given = contract.tensors(case, dtype, device)
            got, grads = contract.with_gradients(operator.function, case, given)
            wide = {k: v.float() for k, v in given.items()}
            expected, expected_grads = contract.with_gradients(operator.function, case, wide)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        for k, b in expected_grads.items():
            assert grads[k].dtype == dtype
            assert contract.error(grads[k], b) <= contract.ROUNDING[dtype]
        return
    contract.check_agreement(operator, case, backend, dtype)


@differentiable
def test_contract_gradcheck(operator: Operator, case: Case, backend: str) -> None:
    """The lower triangle alone is an input: what stands above the diagonal is not read."""

    def function(**given: Tensor):
        return operator.function(**given | {"scale_tril": given["scale_tril"].tril()})

    contract.check_gradcheck(Operator(function, operator.reference, operator.batched), case, backend)


@chosen
def test_contract_strides(operator: Operator, case: Case, backend: str) -> None:
    contract.check_strides(operator, case, backend)


@chosen
def test_contract_repeatable(operator: Operator, case: Case, backend: str) -> None:
    contract.check_repeatable(operator, case, backend)


@pytest.mark.parametrize("operator", [LOG_PROB, STATISTICS], ids=name_of)
def test_contract_repeatable_over_many_tasks(operator: Operator, backend: str) -> None:
    sizes = (1100, 35, 6) if backend != "shim" else (600, 18, 2)
    inputs = log_prob_inputs(*sizes) if operator is LOG_PROB else mixture_inputs(*sizes)
    case = Case("many", inputs, {}, ("x", *LEAVES) if operator is LOG_PROB else ())
    contract.check_repeatable(operator, case, backend)
    contract.check_agreement(operator, case, backend, torch.float32)


def test_contract_statistics_piece_by_piece() -> None:
    """More samples than the posterior of one piece holds."""
    case = Case("pieces", weighted_inputs(9000, 300, 2))
    contract.check_repeatable(STATISTICS, case, "cpu")
    contract.check_agreement(STATISTICS, case, "cpu", torch.float32)


@chosen
def test_contract_rows_apart(operator: Operator, case: Case, backend: str) -> None:
    with contract.on(backend) as device:
        given = contract.tensors(case, torch.float32, device)
        poisoned = "weight" if operator is MOMENTS else "x"
        if operator is STATISTICS:  # a broken sample counts nothing: the others alone give the same
            rest = {k: v[1:] if v.shape[0] == 67 else v for k, v in given.items()}
            plain = contract.outputs(operator.function(**rest))
        else:
            plain, plain_grads = contract.with_gradients(operator.function, case, given)
        for value in (math.nan, math.inf, -math.inf, 1e30):
            bad = given | {poisoned: given[poisoned].clone()}
            bad[poisoned][0, -1] = value
            if operator is STATISTICS:
                for a, b in zip(contract.outputs(operator.function(**bad)), plain, strict=True):
                    assert contract.error(a, b) <= 1e-6
                continue
            got, grads = contract.with_gradients(operator.function, case, bad)
            for a, b in [*zip(got, plain, strict=True), *((grads[k], plain_grads[k]) for k in operator.batched)]:
                assert torch.equal(a[1:], b[1:]), value


@pytest.mark.parametrize("value", [1.0, 1e25, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e-39], ids=str)
@pytest.mark.parametrize("dims", [2, 4, 6, 20, 35])
def test_contract_a_pair_without_gradient_adds_nothing(backend: str, dims: int, scale: float, value: float) -> None:
    """Whatever it holds: z, W^T z or W itself leave float32 here, and 0 times infinity would be NaN."""
    g = torch.Generator().manual_seed(dims)
    given = {k: v.float() for k, v in log_prob_inputs(9, 3, dims)(g).items()}
    given["x"][0, -1] = value
    given["scale_tril"][1] = scale * torch.eye(dims)
    upstream = torch.randn(9, 3, generator=g)
    upstream[0] = 0
    upstream[:, 1] = 0

    def gradients(device: str, x: Tensor, mean: Tensor, scale_tril: Tensor, grad: Tensor) -> list[Tensor]:
        inputs = [t.to(device).requires_grad_() for t in (x, mean, scale_tril)]
        return [t.cpu() for t in torch.autograd.grad(ops.gaussian_log_prob(*inputs), inputs, grad.to(device))]

    with contract.on(backend) as device:
        got = gradients(device, *given.values(), upstream)
        rest = gradients(
            device, given["x"][1:], given["mean"][::2], given["scale_tril"][::2].clone(), upstream[1:, ::2]
        )
    assert all(t.eq(0).all() for t in (got[0][0], got[1][1], got[2][1]))
    for a, b in zip((got[0][1:], got[1][::2], got[2][::2]), rest, strict=True):
        assert contract.error(a, b) <= 1e-6


@every
def test_contract_soiled_memory(operator: Operator, case: Case, backend: str) -> None:
    contract.check_soiled_memory(operator, case, backend, torch.float32)


@chosen
def test_contract_empty(operator: Operator, case: Case, backend: str) -> None:
    with contract.on(backend) as device:
        given = contract.tensors(case, torch.float32, device)
        none = {k: v[:0] if v.shape[0] == 67 else v for k, v in given.items()}
        got, grads = contract.with_gradients(operator.function, case, none)
        if operator is STATISTICS:
            assert [list(o.shape) for o in got] == [[17], [17, 3], [17, 3, 3], []]
            assert all(o.eq(0).all() for o in got)
            return
        for o, full in zip(got, contract.outputs(operator.function(**given)), strict=True):
            assert list(o.shape) == [0, *full.shape[1:]]
        for k in grads:
            assert grads[k].shape == none[k].shape and grads[k].eq(0).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(rerun_under, isa: str) -> None:
    rerun_under(isa, __file__, "test_contract and cpu or narrow")


@chosen
def test_compile(operator: Operator, case: Case) -> None:
    contract.check_compile(operator, case)


@batched
def test_vmap(operator: Operator, case: Case, backend: str) -> None:
    contract.check_vmap(operator, case, backend)


@fused
def test_autocast(operator: Operator, case: Case, backend: str) -> None:
    contract.check_autocast(operator, case, backend, same=False)


def test_opcheck(backend: str) -> None:
    with contract.on(backend) as device:
        given = contract.tensors(Case("", mixture_inputs(5, 3, 2)), torch.float64, device)
        x, log_weight, mean, tril = (given[k].requires_grad_() for k in ("x", "log_weight", *LEAVES))
        contract.check_opcheck(op("gaussian_log_prob").default, x, mean, tril)
        contract.check_opcheck(op("gaussian_mixture").default, x, log_weight, mean, tril, True)
        plain = [t.detach() for t in (x, log_weight, mean, tril)]
        contract.check_opcheck(op("gaussian_statistics").default, *plain, None)
        contract.check_opcheck(op("gaussian_statistics").default, *plain, torch.rand(5, dtype=torch.float64).to(device))
        if backend != "shim":
            grad = torch.rand(5, 3, dtype=torch.float64, device=device)
            arguments = (grad, plain[0], *plain[2:], True, False, True)
            contract.check_opcheck(op("gaussian_log_prob_backward").default, *arguments)


X, M, S, W = torch.rand(4, 2), torch.rand(3, 2), torch.eye(2).repeat(3, 1, 1), torch.zeros(4, 3)
ERRORS = [
    (lambda: ff.gaussian_log_prob(1.0, M, S), TypeError, r"gaussian_log_prob: x must be a tensor \[N, D\], got float"),
    (lambda: ff.gaussian_log_prob(X.long(), M, S), TypeError, "x must be float32, .* got int64"),
    (lambda: ff.gaussian_log_prob(X[0], M, S), ValueError, r"x must be \[N, D\], got \[2\]"),
    (lambda: ff.gaussian_log_prob(X, M[:, :1], S), ValueError, r"mean must be \[3, 2\] .*got \[3, 1\]"),
    (lambda: ff.gaussian_log_prob(X, M, S[:2]), ValueError, r"scale_tril must be \[3, 2, 2\] .*got \[2, 2, 2\]"),
    (lambda: ff.gaussian_log_prob(X, M.double(), S), ValueError, "mean's dtype must be torch.float32"),
    (lambda: ff.gaussian_log_prob(X, M, S.double()), ValueError, "scale_tril's dtype must be torch.float32"),
    (lambda: ff.gaussian_log_prob(X, M.to("meta"), S), ValueError, "mean must be on cpu .* got meta"),
    (lambda: ff.gaussian_log_prob(X[:, :0], M, S), ValueError, r"D must be between 1 and 256, got x \[4, 0\]"),
    (
        lambda: ff.gaussian_log_prob(torch.zeros(1, 257), torch.zeros(1, 257), torch.zeros(1, 257, 257)),
        ValueError,
        "D must be between 1 and 256",
    ),
    (
        lambda: ff.gaussian_mixture_log_prob(X, W[:, :2], M, S),
        ValueError,
        r"gaussian_mixture_log_prob: log_weight must be \[4, 3\] .*got \[4, 2\]",
    ),
    (lambda: ff.gaussian_responsibilities(X, W.double(), M, S), ValueError, "log_weight's dtype must be torch.float32"),
    (lambda: ff.gaussian_statistics(X, W[:, :0], M[:0], S[:0]), ValueError, "mean must hold at least one leaf"),
    (
        lambda: ff.gaussian_statistics(X, W, M, S, torch.ones(3)),
        ValueError,
        r"gaussian_statistics: weight must be \[4\] .*got \[3\]",
    ),
    (lambda: ff.gaussian_statistics(X, W, M, S, W), ValueError, r"weight must be \[N\], got \[4, 3\]"),
    (lambda: ff.gaussian_statistics(X, W, M, S, X[:, 0].double()), ValueError, "weight's dtype must be torch.float32"),
    (
        lambda: ff.gaussian_statistics(X, W, M, S, torch.tensor([1.0, 0.0, -2.0, 1.0])),
        RuntimeError,
        "gaussian_statistics: weight must be finite and at least 0, got -2 in sample 2",
    ),
    (
        lambda: ff.gaussian_statistics(X, W, M, S, torch.tensor([1.0, math.nan, 1.0, 1.0])),
        RuntimeError,
        "weight must be finite and at least 0, got nan in sample 1",
    ),
    (
        lambda: ff.gaussian_statistics(X, W, M, S).fit("banded"),
        ValueError,
        "covariance must be one of 'full'.*'banded'",
    ),
    (lambda: ff.gaussian_statistics(X, W, M, S).fit(floor=0.0), ValueError, "floor must be above 0, got 0"),
    (lambda: ff.gaussian_statistics(X, W, M, S).fit(min_count=-1.0), ValueError, "min_count must be above 0, got -1"),
    (lambda: ff.gaussian_statistics(X, W, M, S).fit(dead="drop"), ValueError, "dead must be one of 'keep', 'reseed'"),
    (
        lambda: ff.gaussian_statistics(X, W, M, S)._replace(count=torch.full((3,), math.nan)).fit(),
        ValueError,
        "the statistics must be finite",
    ),
    (
        lambda: ff.gaussian_statistics(X, W, M, S) + ff.gaussian_statistics(X, W[:, :2], M[:2], S[:2]),
        ValueError,
        r"GaussianStatistics: mean must be \[3, 2\]",
    ),
    (lambda: ff.mixture_moments(W[:, :2], M, S), ValueError, r"weight must be \[4, 3\] .*got \[4, 2\]"),
    (
        lambda: torch.ops.fastforest.gaussian_log_prob(X[0], M, S),
        RuntimeError,
        r"gaussian_log_prob: x must be \[N, D\] with D from 1 to 256, got \[2\]",
    ),
]


@pytest.mark.parametrize("call, kind, pattern", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(call, kind: type[Exception], pattern: str) -> None:
    contract.check_error(call, kind, pattern)


def test_twice_differentiated_is_refused() -> None:
    x = X.clone().requires_grad_()
    for function in (lambda: ff.gaussian_log_prob(x, M, S), lambda: ff.gaussian_mixture_log_prob(x, W, M, S)):
        (grad,) = torch.autograd.grad(function().sum(), x, create_graph=True)
        contract.check_error(lambda g=grad: g.sum().backward(), RuntimeError, "cannot be differentiated twice")


def test_docstrings() -> None:
    result = doctest.testmod(ops, extraglobs={"torch": torch})
    assert result.attempted >= 5 and result.failed == 0


# agreement with others


@pytest.mark.parametrize("dims", [1, 2, 7, 20])
def test_scipy_and_torch_distributions(backend: str, dims: int) -> None:
    from scipy.stats import multivariate_normal

    samples, count = (40, 3) if backend == "shim" else (200, 9)
    given = contract.tensors(Case("", log_prob_inputs(samples, count, dims)))
    x, mean, tril = given["x"], given["mean"], given["scale_tril"]
    with contract.on(backend) as device:
        got = ops.gaussian_log_prob(x.to(device), mean.to(device), tril.to(device)).cpu()
    theirs = torch.distributions.MultivariateNormal(mean, scale_tril=tril).log_prob(x[:, None])
    torch.testing.assert_close(got, theirs, rtol=1e-6, atol=1e-9)
    covariance = (tril @ tril.mT).numpy()
    for k in range(count):
        expected = multivariate_normal(mean[k].numpy(), covariance[k]).logpdf(x.numpy())
        np.testing.assert_allclose(got[:, k].numpy(), expected, rtol=1e-6, atol=1e-9)


def test_one_step_of_em_is_that_of_scikit_learn(backend: str) -> None:
    from sklearn.mixture import GaussianMixture

    samples, count, dims = (60, 3, 2) if backend == "shim" else (400, 5, 3)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(samples, dims, generator=g, dtype=torch.float64) @ torch.randn(dims, dims, generator=g).double()
    start = leaves(g, count, dims)
    precisions = torch.linalg.inv(start["scale_tril"] @ start["scale_tril"].mT)
    model = GaussianMixture(
        count,
        reg_covar=0.0,
        max_iter=1,
        weights_init=np.full(count, 1 / count),
        means_init=start["mean"].numpy(),
        precisions_init=precisions.numpy(),
    )
    with pytest.warns(Warning, match="did not converge"):
        model.fit(x.numpy())
    weight = torch.full((samples, count), -math.log(count), dtype=torch.float64)
    with contract.on(backend) as device:
        s = ops.gaussian_statistics(*(t.to(device) for t in (x, weight, start["mean"], start["scale_tril"])))
        mean, tril, dead = (t.cpu() if isinstance(t, Tensor) else t for t in s.fit(floor=1e-9, min_count=1e-9))
    assert dead == 0
    np.testing.assert_allclose(mean.numpy(), model.means_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose((tril @ tril.mT).numpy(), model.covariances_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose((s.count / samples).cpu().numpy(), model.weights_, rtol=1e-8)


@pytest.mark.parametrize("dims", [2, 4, 7, 20, 64])
def test_narrow_leaves_far_from_the_origin(backend: str, dims: int) -> None:
    """Condition number 1e6 of the covariance, samples drawn from the leaf, a mean 1000 of its smallest deviations away:
    1e-5 relative in float32, where natural parameters keep no digit."""
    samples = 16 if backend == "shim" else 256
    g = torch.Generator().manual_seed(dims)
    turn = torch.linalg.qr(torch.randn(dims, dims, generator=g, dtype=torch.float64))[0]
    deviations = torch.logspace(0, -3, dims, dtype=torch.float64)
    tril = torch.linalg.cholesky(turn @ torch.diag(deviations**2) @ turn.T).float()[None]
    mean = torch.ones(1, dims)
    x = (mean.double() + torch.randn(samples, dims, generator=g, dtype=torch.float64) @ tril[0].double().T).float()
    expected = reference.gaussian_log_prob(x.double(), mean.double(), tril.double())
    with contract.on(backend) as device:
        got = ops.gaussian_log_prob(x.to(device), mean.to(device), tril.to(device))
    assert contract.error(got, expected) <= 1e-5


# expectation maximisation


def clusters(samples: int, count: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(count, dims, generator=g, dtype=torch.float64)
    x = centres[torch.arange(samples) % count] + torch.randn(samples, dims, generator=g, dtype=torch.float64)
    return x, x[torch.randperm(samples, generator=g)[:count]], torch.eye(dims, dtype=torch.float64).repeat(count, 1, 1)


@pytest.mark.parametrize("covariance", ops.COVARIANCES)
def test_em_never_lowers_the_likelihood(covariance: str) -> None:
    x, mean, tril = clusters(300, 4, 3)
    weight = torch.full((300, 4), 0.25, dtype=torch.float64).log()
    seen = []
    for _ in range(30):
        s = ops.gaussian_statistics(x, weight, mean, tril)
        seen.append(float(s.log_likelihood))
        mean, tril, dead = s.fit(covariance, floor=1e-6)
        assert dead == 0
    assert seen[-1] > seen[0] + 100
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(seen))


def test_statistics_add_up_over_batches() -> None:
    x, mean, tril = clusters(101, 3, 2)
    weight = torch.randn(101, 3, dtype=torch.float64).log_softmax(-1)
    whole = ops.gaussian_statistics(x, weight, mean, tril)
    parts = [ops.gaussian_statistics(x[i::3], weight[i::3], mean, tril) for i in range(3)]
    total = parts[0] + parts[1] + parts[2]
    for name in ("count", "first", "second", "log_likelihood", "worst", "worst_log_prob", "samples"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))


def test_a_weight_counts_as_so_many_samples(backend: str) -> None:
    x, mean, tril = clusters(40, 3, 2)
    log_weight = torch.randn(40, 3, dtype=torch.float64)
    times = torch.arange(40) % 3
    with contract.on(backend) as device:
        given = [t.to(device) for t in (x, log_weight)]
        rest = [t.to(device) for t in (mean, tril)]
        whole = ops.gaussian_statistics(*given, *rest, times.double().to(device))
        copies = ops.gaussian_statistics(*(t.repeat_interleave(times.to(device), 0) for t in given), *rest)
        for name in ("count", "first", "second", "log_likelihood"):
            torch.testing.assert_close(getattr(whole, name), getattr(copies, name))
        assert int(whole.samples) == int((times > 0).sum())
        assert whole.worst_log_prob[0] == copies.worst_log_prob[0]


@pytest.mark.parametrize("dead", ["keep", "reseed"])
@pytest.mark.parametrize("covariance", ops.COVARIANCES)
def test_rank_deficient_labels_survive(covariance: str, dead: str) -> None:
    """136 dimensions, 40 samples, 100 iterations: every covariance is singular without its floor."""
    x = torch.randn(40, 136, generator=torch.Generator().manual_seed(0))
    mean, tril = x[:8].clone(), torch.eye(136).repeat(8, 1, 1)
    for _ in range(100):
        s = ops.gaussian_statistics(x, torch.full((40, 8), -math.log(8.0)), mean, tril)
        mean, tril, _ = s.fit(covariance, dead=dead)
        assert s.log_likelihood.isfinite() and int(s.samples) == 40
    assert mean.isfinite().all() and tril.isfinite().all() and (tril.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("value", [0.0, 7.0, -1e4])
@pytest.mark.parametrize("covariance", ops.COVARIANCES)
def test_identical_labels_survive(covariance: str, value: float) -> None:
    x = torch.full((50, 3), value)
    mean, tril = x[:4].clone(), torch.eye(3).repeat(4, 1, 1)
    for _ in range(20):
        s = ops.gaussian_statistics(x, torch.zeros(50, 4), mean, tril)
        mean, tril, dead = s.fit(covariance)
        assert s.log_likelihood.isfinite() and dead == 0
    torch.testing.assert_close(mean, x[:4])
    assert tril.isfinite().all() and (tril.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_dead_leaves_are_kept_or_reseeded() -> None:
    x, mean, tril = clusters(60, 2, 2)
    x[7] = torch.tensor([30.0, -30.0])  # the sample that is explained worst
    weight = torch.zeros(60, 3, dtype=torch.float64)
    weight[:, 2] = -math.inf
    mean, tril = torch.cat([mean, mean[:1] + 9]), torch.cat([tril, tril[:1]])
    s = ops.gaussian_statistics(x, weight, mean, tril)
    kept = s.fit()
    assert kept.dead == 1
    assert torch.equal(kept.mean[2], mean[2]) and torch.equal(kept.scale_tril[2], tril[2])
    fresh = s.fit(dead="reseed")
    assert fresh.dead == 1 and torch.equal(fresh.mean[2], x[7])
    torch.testing.assert_close(fresh.scale_tril[2] @ fresh.scale_tril[2].T, torch.cov(x.T, correction=0))
    assert torch.equal(fresh.mean[:2], kept.mean[:2])


def test_without_samples_everything_stays() -> None:
    _, mean, tril = clusters(10, 2, 2)
    fit = ops.gaussian_statistics(mean[:0], mean[:0], mean, tril).fit(dead="reseed")
    assert fit.dead == 2 and torch.equal(fit.mean, mean) and torch.equal(fit.scale_tril, tril)


def test_densities_that_overflow_in_linear_space(backend: str) -> None:
    """exp of these log densities is infinite or 0 in float32: the posterior is neither NaN nor lost."""
    with contract.on(backend) as device:
        mean = torch.zeros(2, 20, device=device)
        mean[1] = 1e-6
        tril = (1e-7 * torch.eye(20, device=device)).repeat(2, 1, 1)
        x = torch.stack([mean[0], mean[1], mean[0] + 1.0])
        weight = torch.full((3, 2), -math.log(2.0), device=device)
        log_prob = ops.gaussian_mixture_log_prob(x, weight, mean, tril)
        assert float(log_prob[0]) > 280 and float(log_prob[2]) < -1e14
        posterior = ops.gaussian_responsibilities(x, weight, mean, tril)
        torch.testing.assert_close(posterior[:2].cpu(), torch.eye(2))
        torch.testing.assert_close(posterior.sum(-1).cpu(), torch.ones(3))


def test_a_row_without_weight(backend: str) -> None:
    with contract.on(backend) as device:
        x, mean, tril = (t.to(device) for t in clusters(3, 2, 2))
        weight = torch.zeros(3, 2, dtype=torch.float64, device=device)
        weight[1] = -math.inf
        weight.requires_grad_()
        log_prob = ops.gaussian_mixture_log_prob(x, weight, mean, tril)
        assert log_prob[1] == -math.inf and log_prob[[0, 2]].isfinite().all()
        assert ops.gaussian_responsibilities(x, weight, mean, tril)[1].eq(0).all()
        (grad,) = torch.autograd.grad(log_prob[[0, 2]].sum(), weight)
        assert grad.isfinite().all() and grad[1].eq(0).all()
        assert int(ops.gaussian_statistics(x, weight, mean, tril).samples) == 2


def test_a_broken_leaf_touches_no_other(backend: str) -> None:
    with contract.on(backend) as device:
        x, mean, tril = (t.to(device) for t in clusters(5, 3, 2))
        plain = ops.gaussian_log_prob(x, mean, tril)
        for value in (0.0, -1.0, math.nan):
            broken = tril.clone()
            broken[1, 1, 1] = value
            got = ops.gaussian_log_prob(x, mean, broken)
            assert got[:, 1].isnan().all() and torch.equal(got[:, ::2], plain[:, ::2])
