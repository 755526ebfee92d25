"""Gaussian leaves: densities, mixtures, posteriors, and the statistics of expectation maximisation.

Shapes: N samples x [N, D], K leaves of mean [K, D] and scale_tril [K, D, D]: lower triangular L with a positive diagonal,
covariance L L^T. D from 1 to 256. log_weight [N, K] are logarithms of what each sample's routing gives to each leaf;
-inf takes a leaf out. Densities exceed 1 and vanish: everything stays in log space, in nats.

Everywhere: float32 or float64 inside (bfloat16 and float16 are computed in float32). Differences from the mean are taken
before they are whitened, so that a narrow leaf far from the origin loses nothing; nothing of size N K D is stored. A
leaf whose diagonal is not positive has densities NaN. A density whose upstream gradient is 0 adds nothing to the
gradients, even if its sample is NaN or its leaf so narrow that float32 overflows. Deterministic, bit by bit, for any number
of threads; nothing waits for the GPU but `GaussianStatistics.fit`; CUDA graphs can capture the rest. `torch.vmap` works;
forward mode and second derivatives do not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastforest.ops._checks import check_choice, check_number, check_same, check_tensor, compute_dtype
from fastforest.ops._register import op, register

__all__ = [
    "GaussianFit",
    "GaussianStatistics",
    "MixtureMoments",
    "gaussian_log_prob",
    "gaussian_mixture_log_prob",
    "gaussian_responsibilities",
    "gaussian_statistics",
    "mixture_moments",
]

COVARIANCES = ("full", "diagonal", "spherical", "tied")
MOST_DIMENSIONS = 256


class MixtureMoments(NamedTuple):
    """mean [N, D], covariance [N, D, D], entropy [N]: an upper bound, nats."""

    mean: Tensor
    covariance: Tensor
    entropy: Tensor


class GaussianFit(NamedTuple):
    """New leaves: mean [K, D], scale_tril [K, D, D], and how many leaves were dead."""

    mean: Tensor
    scale_tril: Tensor
    dead: int


def gaussian_log_prob(x: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """Log density of every sample in every leaf: ``-(D log 2 pi) / 2 - sum_i log L_ii - |z|^2 / 2``, ``L z = x - mean``.

    Args:
        x: [N, D]. Gradient.
        mean: [K, D], of the same dtype. Gradient.
        scale_tril: [K, D, D]; only the lower triangle is read. Gradient, zero above the diagonal.

    Returns:
        [N, K] in nats. A sample with NaN is NaN in its row alone.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, naming the argument; D above 256.

    Cost: N K (D^2 + 4 D) flops forward, 3 N K D^2 more for all gradients (z is computed again); memory [N, K].
    Source: K. Murphy, Machine Learning, 2012, section 4.1.

    >>> x, mean = torch.zeros(3, 2), torch.zeros(4, 2)
    >>> gaussian_log_prob(x, mean, torch.eye(2).repeat(4, 1, 1))[0, 0]
    tensor(-1.8379)
    """
    return op("gaussian_log_prob")(*_leaves("gaussian_log_prob", x, mean, scale_tril))


def gaussian_mixture_log_prob(x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """Log density of a mixture: ``log p(x_n) = logsumexp_k(log w_nk + log N_nk)``, [N].

    Args:
        x, mean, scale_tril: as `gaussian_log_prob`. Gradients.
        log_weight: [N, K], -inf allowed. Gradient: the posterior.

    Returns:
        [N] in nats; -inf where no leaf has weight (its gradient is 0). NaN stays in its row.

    Raises:
        TypeError, ValueError: as `gaussian_log_prob`; no leaves.

    Cost: as `gaussian_log_prob` and an exponential a leaf. When nothing is differentiated, memory [N] and a few MB.

    >>> x, mean = torch.zeros(1, 1), torch.zeros(2, 1)
    >>> gaussian_mixture_log_prob(x, torch.full((1, 2), 0.5).log(), mean, torch.ones(2, 1, 1))
    tensor([-0.9189])
    """
    given = _mixture("gaussian_mixture_log_prob", x, log_weight, mean, scale_tril)
    return op("gaussian_mixture")(*given, _differentiated(*given))[0]


def gaussian_responsibilities(x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """Posterior of the leaves: ``r_nk = exp(log w_nk + log N_nk - log p(x_n))``, rows sum to 1.

    Args, raises, cost: as `gaussian_mixture_log_prob`, all with gradients.

    Returns:
        [N, K]; a row in which no leaf has weight is 0.

    >>> x, mean = torch.tensor([[1.0]]), torch.tensor([[1.0], [-1.0]])
    >>> gaussian_responsibilities(x, torch.zeros(1, 2), mean, torch.ones(2, 1, 1))
    tensor([[0.8808, 0.1192]])
    """
    given = _mixture("gaussian_responsibilities", x, log_weight, mean, scale_tril)
    return op("gaussian_mixture")(*given, True)[1]


def gaussian_statistics(
    x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor, weight: Tensor | None = None
) -> GaussianStatistics:
    """What expectation maximisation needs of a batch, about the present means: see `GaussianStatistics`.

    Args:
        x, log_weight, mean, scale_tril: as `gaussian_mixture_log_prob`. No gradients.
        weight: [N], of the same dtype, finite and at least 0: how often each sample counts. A factor of its
            responsibilities and its log density; in log_weight it would cancel, for a sample's responsibilities sum to 1
            whatever its row adds up to. None: each once.

    A sample whose log density is not finite (NaN, infinity, no weight anywhere) counts nothing.

    Raises:
        TypeError, ValueError: as `gaussian_mixture_log_prob`.
        RuntimeError: a weight that is negative or not finite, on the CPU. CUDA does not wait to look: one that is not
            finite reaches the sums, which `fit` refuses.

    Cost: N K (2 D^2 + 8 D) flops; memory O(K D^2) and a few MB (CUDA: N K more).
    Additive over batches and ranks while the leaves are fixed.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> s = gaussian_statistics(x, torch.zeros(2, 1), torch.tensor([[0.5]]), torch.ones(1, 1, 1))
    >>> s.count, s.first, s.second.flatten()
    (tensor([2.]), tensor([[1.]]), tensor([2.5000]))
    >>> s.fit().mean
    tensor([[1.]])
    """
    name = "gaussian_statistics"
    given = [t.detach() for t in _mixture(name, x, log_weight, mean, scale_tril)]
    if weight is not None:
        check_tensor(name, "weight", weight, "[N]", like=x)
        check_same(name, "weight", list(weight.shape), [x.shape[0]], "[N] of x")
        check_same(name, "weight's dtype", compute_dtype(weight.dtype), given[0].dtype, "computed in the dtype of x")
        weight = weight.detach().to(given[0].dtype)
    count, first, second, log_prob = op(name)(*given, weight)
    counted, factor = log_prob.isfinite(), 1.0 if weight is None else weight
    if weight is not None:
        counted = counted & (weight > 0)
    worst = torch.where(counted, log_prob, torch.inf).topk(min(len(log_prob), len(count)), largest=False)
    total = torch.where(counted, log_prob * factor, 0.0).sum()
    return GaussianStatistics(
        count, first, second, total, given[2], given[3], given[0][worst.indices], worst.values, counted.sum()
    )


class GaussianStatistics(NamedTuple):
    """Sums over samples with responsibilities r, times their weights, and the means mu that they were taken about.

    count [K] = sum r; first [K, D] = sum r (x - mu); second [K, D, D] = sum r (x - mu)(x - mu)^T; log_likelihood: scalar,
    sum of log p times the weights. mean, scale_tril: the leaves. worst [W, D], worst_log_prob [W]: the samples of lowest
    likelihood, at most K, in ascending order (inf: there was no such sample). samples: scalar, how many counted, whatever
    their weights.
    """

    count: Tensor  # type: ignore[assignment]
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    mean: Tensor
    scale_tril: Tensor
    worst: Tensor
    worst_log_prob: Tensor
    samples: Tensor

    def __add__(self, other: object) -> GaussianStatistics:
        """Statistics of both batches, about the same means. ValueError if the leaves differ in shape."""
        if not isinstance(other, GaussianStatistics):
            return NotImplemented
        check_same("GaussianStatistics", "mean", list(other.mean.shape), list(self.mean.shape), "of the same leaves")
        values, order = torch.cat([self.worst_log_prob, other.worst_log_prob]).sort(stable=True)
        keep = slice(0, len(self.count))
        return self._replace(
            count=self.count + other.count,
            first=self.first + other.first,
            second=self.second + other.second,
            log_likelihood=self.log_likelihood + other.log_likelihood,
            worst=torch.cat([self.worst, other.worst])[order[keep]],
            worst_log_prob=values[keep],
            samples=self.samples + other.samples,
        )

    def all_reduce(self, group: Any = None) -> GaussianStatistics:
        """The sum over the ranks of a `torch.distributed` process group, the same on every rank.

        All ranks must hold the same leaves; batches may differ in size, and be empty.
        """
        from torch import distributed

        ranks = distributed.get_world_size(group)
        flat = torch.cat(
            [self.count, self.first.flatten(), self.second.flatten(), self.log_likelihood[None], self.samples[None]]
        )
        distributed.all_reduce(flat, group=group)
        leaves, dims = self.first.shape
        count, first, second, log_likelihood, samples = flat.split([leaves, leaves * dims, leaves * dims * dims, 1, 1])
        worst = self.worst.new_zeros(leaves, dims + 1)
        worst[:, dims] = torch.inf
        worst[: len(self.worst), :dims], worst[: len(self.worst), dims] = self.worst, self.worst_log_prob
        gathered = [torch.empty_like(worst) for _ in range(ranks)]
        distributed.all_gather(gathered, worst, group=group)
        every = torch.cat(gathered)
        values, order = every[:, dims].sort(stable=True)
        return self._replace(
            count=count,
            first=first.view_as(self.first),
            second=second.view_as(self.second),
            log_likelihood=log_likelihood[0],
            worst=every[order[:leaves], :dims],
            worst_log_prob=values[:leaves],
            samples=samples[0].to(self.samples.dtype),
        )

    def fit(
        self,
        covariance: str = "full",
        *,
        floor: float = 1e-3,
        min_count: float = 1.0,
        dead: str = "keep",
    ) -> GaussianFit:
        """The leaves of highest likelihood: ``mu' = mu + S1 / S0``, ``Sigma' = S2 / S0 - (S1 / S0)(S1 / S0)^T``.

        Args:
            covariance: "full"; "diagonal"; "spherical" (one variance a leaf, the mean over dimensions); "tied" (one full
                covariance, shared).
            floor: relative to the pooled variance of the labels per dimension, v_d: with v = diag(v_d), every Sigma' is at
                least floor v (eigenvalues of v^-1/2 Sigma' v^-1/2 are raised to floor), so a Cholesky factor exists whatever
                the rank; floor v_d is at least the square of the rounding of the labels' mean (of 1e-3, if that is less).
            min_count: a leaf of a smaller S0 is dead, above 0.
            dead: "keep": a dead leaf stays as it is; "reseed": it moves to a sample of lowest likelihood (each leaf to
                another, while they last; the rest stay) with the pooled covariance. For "tied" a kept leaf gets the
                shared covariance as well.

        Returns:
            mean [K, D], scale_tril [K, D, D] lower triangular with positive diagonal, always finite, and the count of
            dead leaves. Computed in float64, returned in the dtype of the statistics. Without any sample everything
            stays as it is, all leaves dead.

        Raises:
            TypeError, ValueError: an argument out of range; statistics that are not finite.

        Waits for the GPU. Cost: K D^3 for "full".
        Source: Dempster, Laird, Rubin 1977; Shen et al., "Deep regression forests for age estimation", CVPR 2018.
        """
        name = "GaussianStatistics.fit"
        check_choice(name, "covariance", covariance, COVARIANCES)
        check_choice(name, "dead", dead, ("keep", "reseed"))
        check_number(name, "floor", floor, above=0)
        check_number(name, "min_count", min_count, above=0)
        count, first, second, old = (t.double() for t in (self.count, self.first, self.second, self.mean))
        if not bool((count.sum() + first.sum() + second.sum()).isfinite()):
            raise ValueError(f"{name}: the statistics must be finite, got NaN or infinity")
        alive = count >= min_count
        if not float(count.sum()) > 0:
            return GaussianFit(self.mean.clone(), self.scale_tril.clone(), len(count))
        pooled_mean, pooled = _pooled(count, first, second, old)
        # Labels that are all alike have no variance: a leaf is never narrower than what rounding hides.
        hidden = torch.finfo(self.mean.dtype).eps * pooled_mean.abs().clamp_min(1e-3)
        variance = torch.maximum(pooled.diagonal(), hidden.square() / floor)
        safe = torch.where(alive, count, 1.0)[:, None]
        step = torch.where(alive[:, None], first / safe, 0.0)
        scatter = second / safe[..., None] - step[:, :, None] * step[:, None, :]
        if covariance == "tied":
            weight = torch.where(alive, count, 0.0)
            scatter = (weight[:, None, None] * scatter).sum(0, keepdim=True) / weight.sum().clamp_min(1e-300)
        scale_tril = _factor(scatter, variance, covariance, floor)
        mean = old + step
        everywhere = _factor(pooled[None], variance, covariance, floor)
        if covariance == "tied":
            scale_tril = (scale_tril if bool(alive.any()) else everywhere).expand_as(self.second).clone()
        else:
            scale_tril = torch.where(alive[:, None, None], scale_tril, self.scale_tril.double().tril())
        if dead == "reseed":
            there = self.worst[self.worst_log_prob.isfinite()].double()
            empty = (~alive).nonzero()[:, 0][: len(there)]
            mean[empty] = there[: len(empty)]
            if covariance != "tied":
                scale_tril[empty] = everywhere
        return GaussianFit(mean.to(self.mean.dtype), scale_tril.to(self.mean.dtype), int((~alive).sum()))


def mixture_moments(weight: Tensor, mean: Tensor, scale_tril: Tensor) -> MixtureMoments:
    """Mean, covariance and a bound of the entropy of a mixture, for prediction with uncertainty.

    ``m = sum w mu``;  ``C = sum w (L L^T + mu mu^T) - m m^T``, about the mean of the leaves;  entropy at most
    ``sum_k w (H_k - log w)``, ``H_k = (D / 2) log(2 pi e) + sum_i log L_ii``: exact when the leaves do not overlap.

    Args:
        weight: [N, K], at least 0; rows are divided by their sum (a sum of 0 gives NaN). Gradient.
        mean: [K, D]; scale_tril: [K, D, D]. Gradients.

    Returns:
        mean [N, D], covariance [N, D, D] (symmetric), entropy [N] in nats; float32, or float64 for float64.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.

    Cost: N K D^2 flops, one matrix product; memory N D^2 + K D^2. Source: Huber et al., "On entropy approximation for
    Gaussian mixture random vectors", MFI 2008.

    >>> m = mixture_moments(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1, 1))
    >>> m.mean, m.covariance.flatten()
    (tensor([[0.]]), tensor([2.]))
    """
    name = "mixture_moments"
    check_tensor(name, "weight", weight, "[N, K]")
    check_tensor(name, "mean", mean, "[K, D]", like=weight)
    check_same(name, "weight", list(weight.shape), [weight.shape[0], mean.shape[0]], "[N, K] with the K of mean")
    mean, _, scale_tril = _leaves(name, mean, mean, scale_tril)
    with torch.autocast(weight.device.type, enabled=False):
        weight, lower, dims = weight.to(mean.dtype), scale_tril.tril(), mean.shape[1]
        weight = weight / weight.sum(-1, keepdim=True)
        centre = mean.detach().mean(0)
        apart = mean - centre  # sums of squares of coordinates would cancel far from the origin
        first = weight @ apart
        spread = lower @ lower.mT + apart[:, :, None] * apart[:, None, :]
        covariance = (weight @ spread.flatten(1)).view(-1, dims, dims) - first[:, :, None] * first[:, None, :]
        own = 0.5 * dims * (1 + math.log(2 * math.pi)) + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        entropy = weight @ own - torch.special.xlogy(weight, weight).sum(-1)
        return MixtureMoments(first + centre, covariance, entropy)


def _pooled(count: Tensor, first: Tensor, second: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of all samples, shifted by the leaves' common centre."""
    total = count.sum()
    centre = (count[:, None] * mean).sum(0) / total
    apart = mean - centre
    step = (first + count[:, None] * apart).sum(0) / total
    cross = apart[:, :, None] * first[:, None, :]
    outer = count[:, None, None] * apart[:, :, None] * apart[:, None, :]
    return centre + step, (second + cross + cross.mT + outer).sum(0) / total - step[:, None] * step[None, :]


def _factor(scatter: Tensor, variance: Tensor, covariance: str, floor: float) -> Tensor:
    """Cholesky factors [K, D, D] of covariances that are raised to floor * variance."""
    unit = variance.sqrt()
    if covariance == "spherical":
        share = scatter.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).maximum(floor * variance.mean())
        return torch.diag_embed(share.sqrt().expand(-1, len(variance)))
    if covariance == "diagonal":
        share = (scatter.diagonal(dim1=-2, dim2=-1) / variance).clamp_min(floor)
        return torch.diag_embed((share * variance).sqrt())
    relative = scatter / unit[:, None] / unit[None, :]
    values, vectors = torch.linalg.eigh((relative + relative.mT) / 2)
    raised = (vectors * values.clamp_min(floor).unsqueeze(-2)) @ vectors.mT
    return torch.linalg.cholesky((raised + raised.mT) / 2) * unit[:, None]


def _leaves(name: str, x: Tensor, mean: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_tensor(name, "x", x, "[N, D]")
    check_tensor(name, "mean", mean, "[K, D]", like=x)
    check_tensor(name, "scale_tril", scale_tril, "[K, D, D]", like=x)
    dims = x.shape[1]
    if not 1 <= dims <= MOST_DIMENSIONS:
        raise ValueError(f"{name}: D must be between 1 and {MOST_DIMENSIONS}, got x {list(x.shape)}")
    check_same(name, "mean", list(mean.shape), [mean.shape[0], dims], "[K, D] with the D of x")
    check_same(name, "scale_tril", list(scale_tril.shape), [mean.shape[0], dims, dims], "[K, D, D] of mean")
    dtype = compute_dtype(x.dtype)
    check_same(name, "mean's dtype", compute_dtype(mean.dtype), dtype, "computed in the dtype of x")
    check_same(name, "scale_tril's dtype", compute_dtype(scale_tril.dtype), dtype, "computed in the dtype of x")
    return x.to(dtype), mean.to(dtype), scale_tril.to(dtype)


def _mixture(
    name: str, x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, mean, scale_tril = _leaves(name, x, mean, scale_tril)
    check_tensor(name, "log_weight", log_weight, "[N, K]", like=x)
    check_same(name, "log_weight", list(log_weight.shape), [x.shape[0], mean.shape[0]], "[N, K] of x and mean")
    check_same(name, "log_weight's dtype", compute_dtype(log_weight.dtype), x.dtype, "computed in the dtype of x")
    if not len(mean):
        raise ValueError(f"{name}: mean must hold at least one leaf, got {list(mean.shape)}")
    return x, log_weight.to(x.dtype), mean, scale_tril


def _differentiated(*given: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in given)


def _log_prob_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(needs: tuple[bool, ...], grad: Tensor, *leaves: Tensor) -> tuple[Tensor | None, ...]:
    if not any(needs):
        return None, None, None
    grads = op("gaussian_log_prob_backward")(grad, *leaves, *needs)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(tuple(ctx.needs_input_grad), grad, *ctx.saved_tensors)


def _mixture_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.set_materialize_grads(False)


def _mixture_backward(ctx: Any, grad: Tensor | None, grad_posterior: Tensor | None) -> tuple[Any, ...]:
    """d log p / d a = r, d r_k / d a_l = r_k (delta_kl - r_l), for a = log w + log N."""
    x, log_weight, mean, scale_tril, posterior = ctx.saved_tensors
    if posterior.shape != log_weight.shape:  # a transform hid from the forward pass that it is differentiated
        posterior = op("gaussian_mixture")(x, log_weight, mean, scale_tril, True)[1]
    joint = None
    if grad is not None:
        joint = _Refuse.apply(grad.unsqueeze(-1) * posterior)
    if grad_posterior is not None:
        inner = posterior * (grad_posterior - (posterior * grad_posterior).sum(-1, keepdim=True))
        joint = _Refuse.apply(inner) if joint is None else joint + inner
    if joint is None:
        return None, None, None, None, None
    needs = ctx.needs_input_grad
    grad_x, grad_mean, grad_tril = _gradients((needs[0], needs[2], needs[3]), joint, x, mean, scale_tril)
    return grad_x, joint if needs[1] else None, grad_mean, grad_tril, None


class _Refuse(torch.autograd.Function):
    """The identity, for a gradient that is kept as a graph: it cannot be differentiated, and says so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("gaussian_mixture cannot be differentiated twice")


def _statistics_fake(
    x: Tensor, log_weight: Tensor, mean: Tensor, scale_tril: Tensor, weight: Tensor | None
) -> tuple[Tensor, ...]:
    leaves, dims = mean.shape
    return tuple(x.new_empty(s) for s in ((leaves,), (leaves, dims), (leaves, dims, dims), (x.shape[0],)))


register(
    "gaussian_log_prob",
    fake=lambda x, mean, scale_tril: x.new_empty((x.shape[0], mean.shape[0])),
    save=_log_prob_save,
    backward=_log_prob_backward,
    batch=(0,),
    autocast=torch.float32,
)
register(
    "gaussian_log_prob_backward",
    fake=lambda grad, x, mean, scale_tril, *needs: tuple(
        t.new_empty(t.shape if needed else (0,)) for t, needed in zip((x, mean, scale_tril), needs, strict=True)
    ),
    batch=(),
)
register(
    "gaussian_mixture",
    fake=lambda x, log_weight, mean, scale_tril, needs_posterior: (
        x.new_empty((x.shape[0],)),
        x.new_empty((x.shape[0] if needs_posterior else 0, mean.shape[0])),
    ),
    save=_mixture_save,
    backward=_mixture_backward,
    batch=(0, 1),
    autocast=torch.float32,
)
register("gaussian_statistics", fake=_statistics_fake, batch=(), autocast=torch.float32)
