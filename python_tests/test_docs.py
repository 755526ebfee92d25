"""What the documentation shows runs: every doctest, and the README's example."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastforest

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(fastforest.__path__, "fastforest.")
    if not m.name.endswith(("__main__", "_C", "_ops", "_shim"))
)
ROOMS = [m.name for m in pkgutil.iter_modules(fastforest.ops.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", ["fastforest", *MODULES])
def test_doctests(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_the_operators_have_doctests():
    for room in ROOMS:
        assert doctest.testmod(importlib.import_module(f"fastforest.ops.{room}")).attempted > 0


def test_the_readme_examples_run():
    readme = Path(fastforest.__file__).parent.parent / "README.md"
    scope: dict = {}
    for example in re.findall(r"```python\n(.*?)```", readme.read_text(), re.S):
        exec(example, scope)
    assert scope["predicted"].shape == (8, 68, 2)
    assert scope["age"].mean.shape == (64, 1)


def test_the_readme_is_complete():
    root = Path(fastforest.__file__).parent.parent
    readme = (root / "README.md").read_text()
    assert not re.search(r"@[A-Z]+@", readme)
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert "://" in target or (root / target).exists(), target


def test_every_public_operator_is_documented():
    rooms = [importlib.import_module(f"fastforest.ops.{room}") for room in ROOMS]
    readme = (Path(fastforest.__file__).parent.parent / "README.md").read_text()
    for room in rooms:
        for name in room.__all__:
            assert getattr(room, name).__doc__, name
            if name[0].islower():
                assert f"`{name}" in readme, f"{name} is not in the README's table"
