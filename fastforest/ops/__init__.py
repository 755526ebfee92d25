"""The operators. Each room registers its own; everything public is re-exported by `fastforest`."""

from pathlib import Path

import torch

_library = Path(__file__).resolve().parent.parent / "_ops.so"
if not _library.exists():
    raise ImportError(
        f"fastforest: the operators were not built ({_library.name} is missing): run `make build` in a checkout, "
        "or `pip install --no-build-isolation .`"
    )
torch.ops.load_library(str(_library))
