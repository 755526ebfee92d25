"""fastforest export: a checkpoint as one file for `torch.export.load`, from images to points and spread."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import inference
from ..training import checkpoint
from .common import BadInput, check_writable

__all__ = ["add_arguments", "export"]


def export(options: argparse.Namespace) -> None:
    if options.out.suffix != ".pt2":
        raise BadInput(f"--out must end in .pt2, got {options.out}")
    saved = checkpoint.load(options.checkpoint)
    model = saved.build(options.checkpoint)
    check_writable(options.out.parent)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    inference.export(
        model,
        options.out,
        saved.size,
        saved.mean_shape,
        pixels=options.pixels,
        padding=saved.padding,
        crop=saved.crop,
    )
    kind = "uint8" if options.pixels == "uint8" else "float32 in [0, 1]"
    print(
        f"{options.out}: images {kind} [B, 3, {saved.size}, {saved.size}] -> points [B, {saved.landmarks}, 2], "
        f"spread [B, {saved.landmarks}]"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True)
    add("--out", type=Path, required=True, metavar="FILE.pt2")
    add("--pixels", choices=inference.PIXELS, default="uint8", help="of its images: 0..255, or float32 in [0, 1]")
    parser.set_defaults(run=export)
