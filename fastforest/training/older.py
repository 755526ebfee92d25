"""Checkpoints of earlier versions, as this one has them."""

from __future__ import annotations

from typing import Any

__all__ = ["from_version_1"]

RENAMED = {"dense": {"head.": "heads.0.", "maps.": "maps.0."}}
"""By model, how names of weights began and begin."""


def from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one backbone, whose options stood among the model's; no loss scaling, no batch but the configured
    one, no settings."""
    config = dict(content.get("config", {}))
    options = {name: config.pop(name) for name in ("width", "blocks", "code") if name in config}
    content = content | {"config": config | {"backbone": "small", "backbone_options": options}}
    for part in ("weights", "ema"):
        if content.get(part) is not None:
            content[part] = _renamed(content[part], RENAMED.get(content.get("model", ""), {}))
    batch = content.get("train", {}).get("batch")
    return content | {"version": 2, "scaler": {}, "batch": batch, "settings": {}}


def _renamed(weights: dict[str, Any], starts: dict[str, str]) -> dict[str, Any]:
    def now(name: str) -> str:
        before = next((start for start in starts if name.startswith(start)), None)
        return name if before is None else starts[before] + name[len(before) :]

    return {now(name): tensor for name, tensor in weights.items()}
