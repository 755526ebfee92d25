"""How to train: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .. import metrics
from .schedules import ANNEALINGS, LEARNING_RATES

__all__ = ["AMPS", "FREE", "SCHEDULES", "WATCHED", "TrainConfig"]

SCHEDULES = (*LEARNING_RATES, "plateau")
AMPS = ("off", "bf16", "fp16")
WATCHED = ("held_out", "loss")

FREE = ("rounds", "minutes", "workers", "pin", "cache", "log_every", "tensorboard")
"""What may differ when a run is resumed: where it ends, and what changes no number of it."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are for some hundreds to thousands of faces on a CPU.

    rounds, minutes: where to stop, whichever comes first; at least one is needed. Minutes are wall-clock time from the
    start of `fit`, pictures and evaluations included; the last round is cut short to keep them.
    steps: network steps a round; None: one pass over the training set, but at least `loop.MIN_STEPS`.
    batch: faces a step, over all ranks.
    rate, weight_decay: of AdamW.
    schedule: "cosine", "step", "constant", "multistep" or "plateau".
    milestones: of "multistep", shares of the run, increasing.
    drop: what "multistep" multiplies the rate by at each milestone, and "plateau" when the watched error is stuck, down
    to a hundredth of the rate.
    plateau: rounds without an improvement after which "plateau" drops.
    warmup: steps over which the learning rate rises linearly; steps, not a share of the run, because a run that its
    minutes end may have few on a busy machine, and unwarmed ones do lasting harm.
    steepness: (start, end) of the split nodes' steepness; None leaves it alone. annealing: "linear" or "exponential".
    leaf_faces: bound of the faces a leaf step accumulates over, drawn anew each round; 0: no leaf steps.
    leaf_updates: closed-form updates a leaf step, each over faces drawn anew.
    pretrain: share of the run, in [0, 1), in which a model that has `pretrain_loss` trains by that and no leaves move.
    patience: rounds without an improvement after which the run ends; None: it does not.
    min_delta: what counts as an improvement of the watched error, at least, in its own unit.
    watch: "held_out" (mean NME of the held-out faces) or "loss" (of the round's steps): what "plateau", patience and
    the best checkpoint go by.
    clip: largest norm of the gradient; None: not clipped.
    ema: decay of the weights' running average, used for evaluation; None: no average.
    amp: autocast of the network steps: "off", "bf16", or "fp16" with a scaled loss. True and False are "bf16", "off".
    cache: decoded faces are kept in "memory", or nowhere ("off"), or in a file in the folder of that name.
    workers, pin: processes that read ahead, into pinned memory, where the cache is not "memory".
    seed: of the order, augmentation and dropout (not of the model's first weights).
    normalizer: of the metrics; None: "inter_ocular" where the number of landmarks has it, else "box".
    threshold: of failure rate and AUC.
    log_every: steps between lines of steps.jsonl. tensorboard: write event files too.
    """

    rounds: int | None = None
    minutes: float | None = None
    steps: int | None = None
    batch: int = 32
    rate: float = 2e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75, 0.9)
    drop: float = 0.1
    plateau: int = 3
    warmup: int = 20
    steepness: tuple[float, float] | None = None
    annealing: str = "exponential"
    leaf_faces: int = 512
    leaf_updates: int = 1
    pretrain: float = 0.0
    patience: int | None = None
    min_delta: float = 0.0
    watch: str = "held_out"
    clip: float | None = 5.0
    ema: float | None = None
    amp: str | bool = "off"
    workers: int = 0
    pin: bool = False
    cache: str = "memory"
    seed: int = 0
    normalizer: str | None = None
    threshold: float = 0.08
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.amp, bool):
            object.__setattr__(self, "amp", "bf16" if self.amp else "off")
        for name in ("steepness", "milestones"):  # a checkpoint or a file gives lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rounds is None and self.minutes is None:
            raise ValueError("TrainConfig: rounds or minutes must be given, got neither")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"TrainConfig: {name} must be an integer of at least {least}, got {value!r}")
        for name, (wanted, holds) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"TrainConfig: {name} must {wanted}, got {value!r}")
        for name, allowed in NAMES.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(item) for item in allowed if item is not None)
                raise ValueError(f"TrainConfig: {name} must be one of {names}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Of a checkpoint: what an earlier version did not know is the default, what only it knew is left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


LEAST = {
    "rounds": 1,
    "steps": 1,
    "batch": 1,
    "plateau": 1,
    "warmup": 0,
    "leaf_faces": 0,
    "leaf_updates": 1,
    "patience": 1,
    "workers": 0,
    "seed": 0,
    "log_every": 1,
}

Holds = Callable[[Any], bool]
POSITIVE: tuple[str, Holds] = ("be a positive finite number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: tuple[str, Holds] = ("not be negative", lambda value: 0 <= value < math.inf)
SHARE: tuple[str, Holds] = ("be in [0, 1)", lambda value: 0 <= value < 1)
RANGES: dict[str, tuple[str, Holds]] = {
    **dict.fromkeys(("minutes", "rate", "clip", "threshold"), POSITIVE),
    **dict.fromkeys(("weight_decay", "min_delta"), NOT_NEGATIVE),
    **dict.fromkeys(("ema", "pretrain"), SHARE),
    "drop": ("be in (0, 1)", lambda value: 0 < value < 1),
    "milestones": (
        "be increasing shares of the run in (0, 1)",
        lambda value: all(low < high for low, high in zip((0, *value), (*value, 1), strict=True)),
    ),
    "steepness": ("be two positive numbers", lambda value: len(value) == 2 and all(0 < s < math.inf for s in value)),
}
NAMES: dict[str, tuple[str | None, ...]] = {
    "schedule": SCHEDULES,
    "annealing": ANNEALINGS,
    "watch": WATCHED,
    "amp": AMPS,
    "normalizer": (None, *metrics.KINDS),
}
