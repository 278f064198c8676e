"""Graphs of TensorRT bundles and in the portable flavour have operators that an older ONNX Runtime does not know.

ONNX Runtime 1.23, the last one for Python 3.10 and so for JetPack 6, refuses the whole opset; 1.24 has no kernel for
TensorScatter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from edgeomni.engines import release
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.onnx_files import NEW_OPSET_NEEDS, OLD_OPSET, opset

NEEDED_PYTHON = (3, 11)
"""The oldest Python that has wheels of it."""


@contextmanager
def demanded(path: Path) -> Iterator[None]:
    """Raises EngineUnavailable of kind "version" where a graph cannot be loaded because ONNX Runtime is too old for it.

    Any other EngineError is left as it is.
    """
    try:
        yield
    except EngineError as exc:
        if release(ort.__version__) >= NEW_OPSET_NEEDS or (has := opset(path)) <= OLD_OPSET:
            raise
        raise EngineUnavailable("version", _said(has)) from exc


def _said(has: int) -> str:
    needed, python = ".".join(map(str, NEW_OPSET_NEEDS)), ""
    if sys.version_info < NEEDED_PYTHON:
        python = (
            f" (none for Python {'.'.join(map(str, sys.version_info[:2]))}: take Python "
            f"{'.'.join(map(str, NEEDED_PYTHON))} or newer)"
        )
    return (
        f"graphs in ONNX's opset {has}, which --flavour portable and --format tensorrt write, need ONNX Runtime "
        f"{needed} or newer, and this is {ort.__version__}; update it{python}, or export the checkpoint to ONNX in its "
        "default flavour"
    )
