"""What the closed-form least-squares updates of the rooms share."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_least_squares(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(gram + ridge mean(diag(gram)) I)^-1 cross, float64: gram [K, K], cross [K, C].

    Cholesky; where that fails (a singular gram at ridge 0) the minimum-norm solution by eigenvalues.
    """
    # The solve is small beside the statistics, and a gram squares the condition of the selection: float64.
    size = len(gram)
    system = gram.double()
    system = system + ridge * system.diagonal().mean() * torch.eye(size, dtype=system.dtype, device=system.device)
    right = cross.double()
    factor, failed = torch.linalg.cholesky_ex(system)
    # A pivot lost to rounding passes the factorisation and spoils the solution.
    pivots = factor.diagonal()
    if not bool(failed) and bool(pivots.min() > pivots.max() * size * torch.finfo(system.dtype).eps ** 0.5):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(system)
    kept = values > values.abs().max() * size * torch.finfo(gram.dtype).eps
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse.unsqueeze(-1) * (vectors.T @ right))


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of each row on the probability simplex (Held, Wolfe and Crowder 1974)."""
    ordered = v.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    support = (ordered * rank > excess).sum(-1, keepdim=True)
    return (v - excess.gather(-1, support - 1) / support).clamp_min(0)
