"""Buffers that stay precise in a module of 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """Base of modules whose buffers named in `PRECISE` stay float32 (or float64) under `.to(torch.bfloat16)`, `.half()`.

    What is learned in closed form, or sums over batches, would lose in 16 bits what it is for; parameters are converted
    as they are anywhere.
    """

    PRECISE: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before: dict[str, Tensor] = {name: t for name in self.PRECISE if (t := getattr(self, name, None)) is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, tensor.to(after.device))
        return self
