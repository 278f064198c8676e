"""torch computing as an OpenVINO export computes in exact mode: the weights as stored, the inputs as they are.

With `--fast`, OpenVINO may compute in another float type than float32 and round the inputs of compressed layers to 8
bits, layer by layer as its plugin decides from shapes. That is not imitated: what it costs shows in the gate's quality
figures, which are taken from the fast mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeomni.bundle import Component
from edgeomni.exporters import stored
from edgeomni.model import fake_quant

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel


@contextmanager
def as_exported(model: OmniModel, component: Component, *, exact: bool, root: Path | None = None) -> Iterator[None]:
    """Within the context the encoder or the LLM of `model` holds its weights as `component` stores them.

    `exact` or not is the same: see above.
    """
    with fake_quant.holding_stored_weights(model, component.name, stored.schemes(component)):
        yield


def rounds_inputs(component: Component) -> bool:
    """False: whether OpenVINO's kernels round their inputs is its plugin's choice, and not imitated."""
    return False
