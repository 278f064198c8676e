"""A decode step as a CUDA graph: its kernels are recorded once and then started together. Untested on a GPU.

Asked for by EDGEOMNI_CUDA_GRAPH=1. ONNX Runtime records a run when its provider is opened with enable_cuda_graph, and
replays it for the same gpu_graph_id: whatever the run reads and writes has to stay where it is, in the GPU's memory,
and nothing may depend on a number that the host has read (ONNX Runtime's documentation of its CUDA provider, "Using
CUDA Graphs"). So the inputs of a frame are written into buffers of their own, and graphs with GroupQueryAttention,
which reads the length of its cache on the host, are not recorded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeomni.arrays import F32

VARIABLE = "EDGEOMNI_CUDA_GRAPH"
CHECKED = 6
"""First frames of each recording that are computed both ways. ONNX Runtime records the third run and replays that."""
TOLERANCE = 1e-3
"""Largest difference of a replayed hidden from a computed one, over the largest number in it."""
GRAPH_ID = "gpu_graph_id"
NOT_RECORDED = "-1"
_ids = count(1)
_log = logging.getLogger("edgeomni")

Outputs = dict[str, NDArray[Any]]


def wanted(device: str, attention: str) -> bool:
    """Whether a stack's frames are to be recorded: on CUDA, where it was asked for and nothing is read on the host."""
    return device == "cuda" and attention != "gqa" and os.environ.get(VARIABLE) == "1"


class Recorded:
    """One kind of frame on one set of buffers. `bind_cache` binds keys and values to an IO binding.

    `inputs` and `outputs` are arrays of the shapes and types that stay bound; `device` is ONNX Runtime's name of the
    memory that they are in.
    """

    def __init__(
        self,
        session: Any,
        device: str,
        inputs: Outputs,
        outputs: Outputs,
        bind_cache: Callable[[Any], None],
    ) -> None:
        self._session, self._id, self._left, self.failed = session, str(next(_ids)), CHECKED, False
        self._io = session.io_binding()
        bind_cache(self._io)
        self._inputs = {name: _value(array, device) for name, array in inputs.items()}
        self._outputs = {name: _value(array, device) for name, array in outputs.items()}
        for name, value in self._inputs.items():
            self._io.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._io.bind_ortvalue_output(name, value)

    def run(self, inputs: Outputs, options: ort.RunOptions | None, compute: Callable[[], Outputs]) -> Outputs:
        """The outputs for these inputs. `compute` gives the same without a recording.

        The first frames are computed both ways, which writes the same keys and values twice. Where the two differ, this
        and all later frames are computed, and one warning says so.
        """
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
        options = options or ort.RunOptions()
        options.add_run_config_entry(GRAPH_ID, self._id)
        self._session.run_with_iobinding(self._io, options)
        found = {name: value.numpy() for name, value in self._outputs.items()}
        if not self._left:
            return found
        self._left -= 1
        right = compute()
        if not all(_alike(found[name], right[name]) for name in right):
            self.failed = True
            _log.warning(
                "a replayed CUDA graph gave other numbers than the run that it recorded, so frames are computed "
                "without it; leave %s unset",
                VARIABLE,
            )
        return right


def not_recorded(options: ort.RunOptions | None) -> ort.RunOptions:
    """Options for a run of a session that records, which is neither recorded nor replayed."""
    options = options or ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, NOT_RECORDED)
    return options


def _alike(found: F32, right: F32) -> bool:
    largest = float(np.abs(right).max(initial=0.0))
    return bool(np.abs(found - right).max(initial=0.0) <= TOLERANCE * largest)


def _value(array: NDArray[Any], device: str) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros_like(array), device, 0)
