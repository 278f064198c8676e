"""Training: three stages and end-to-end, by LoRA or in full, and the codec.

from edgeomni.train import TrainConfig, fit

trained = fit(model, "train.jsonl", TrainConfig(stage="3"), "run")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .fitting import Trained, fit
    from .merging import merge

__all__ = ["TrainConfig", "Trained", "fit", "merge"]
_PLACES = {"TrainConfig": "config", "Trained": "fitting", "fit": "fitting", "merge": "merging"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: a run's configuration and log can be read without torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
