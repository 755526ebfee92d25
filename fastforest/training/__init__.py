"""Training: rounds of network and leaf steps, schedules, checkpoints, reports.

history = fit(model, train, held_out, TrainConfig(minutes=20), out=Path("runs/faces"))
"""

from .checkpoint import Checkpoint, CheckpointError, load, write_atomically
from .errors import TrainingError
from .evaluation import default_normalizer, predict
from .forests import ForestHistory, fit_forest
from .loop import fit, mean_shape
from .schedules import anneal, learning_rate_factor
from .sets import read, training_sets
from .settings import TrainConfig
from .state import History

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ForestHistory",
    "History",
    "TrainConfig",
    "TrainingError",
    "anneal",
    "default_normalizer",
    "fit",
    "fit_forest",
    "learning_rate_factor",
    "load",
    "mean_shape",
    "predict",
    "read",
    "training_sets",
    "write_atomically",
]
