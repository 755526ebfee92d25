"""Small images that the tests make, and where the light of one is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def dot(size: int, x: float, y: float, sigma: float) -> torch.Tensor:
    """A Gaussian spot of peak 250 at (x, y): uint8 [3, size, size]."""
    cell = torch.arange(size, dtype=torch.float64)
    spot = torch.exp(-((cell - x) ** 2)[None] / (2 * sigma**2) - ((cell - y) ** 2)[:, None] / (2 * sigma**2))
    return (spot * 250).round().to(torch.uint8).expand(3, -1, -1).contiguous()


def centroid(image: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) of the first channel of [3, H, W]."""
    mass = image[0].double()
    height, width = mass.shape
    x = (mass.sum(0) * torch.arange(width)).sum() / mass.sum()
    y = (mass.sum(1) * torch.arange(height)).sum() / mass.sum()
    return float(x), float(y)


def save_image(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB", seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    smooth.convert(mode).save(path)
    return path
