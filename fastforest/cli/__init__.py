"""The command line: python -m fastforest train | evaluate | predict | export | info. A command a module."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence

import torch

from . import evaluate, export, predict, train
from .common import Parser, guarded

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 after bad input (one line on standard error), 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: options.run(options), options)


def info(options: object) -> None:
    build = importlib.import_module("fastforest._C").build_info()
    print(f"fastforest {build['version']}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    print(f"built by   {build['compiler']}")
    print(
        f"processor  kernels for {', '.join(build['isas'])}; chosen: {build['isa']}; {torch.get_num_threads()} threads"
    )
    if build["cuda"]:
        print(f"CUDA       kernels built with {build['cuda']} for {', '.join(build['cuda_architectures'])}")
    else:
        print("CUDA       no kernels: nvcc was not found when this was built")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices    cpu{''.join(f', cuda:{i} {name}' for i, name in enumerate(devices))}")


def _parser() -> Parser:
    parser = Parser(prog="fastforest", description="Landmarks of faces by differentiable regression forests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate|predict|export|info")
    train.add_arguments(commands.add_parser("train", help="train a model, a checkpoint and a picture every round"))
    evaluate.add_arguments(commands.add_parser("evaluate", help="NME, failure rate and AUC of a checkpoint on a set"))
    predict.add_arguments(commands.add_parser("predict", help="find a face, write its landmarks and a picture of them"))
    export.add_arguments(commands.add_parser("export", help="a checkpoint as one file for torch.export.load"))
    commands.add_parser("info", help="versions, instruction sets, devices").set_defaults(run=info)
    return parser
