"""TensorRT itself, from either of its packages: which one is here, its log, and engines read from bytes.

`tensorrt` (Jetson, data-centre GPUs) and `tensorrt_rtx` (desktop GPUs) offer the same classes; an engine of one is
nothing to the other. Neither is imported before an engine is to be opened.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from edgeomni.engines import installed_version, release
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.install_hint import install_command

EXTRAS = {"tensorrt_rtx": "tensorrt", "tensorrt": "jetson"}
"""Import name -> the extra of EdgeOmni that brings it."""
_DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
OLDEST = {"tensorrt": (10, 15)}
"""Package -> the first version whose parser takes the graphs' opset and RotaryEmbedding, RMSNormalization and
TensorScatter (onnx-tensorrt's docs/Changelog.md, TensorRT 10.15). JetPack 6 has 10.3."""
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "BOOL": "bool"}
_SIZES = {"BF16": 2}
"""Bytes of element types that numpy does not have; their tensors stay on the device."""
_KEPT = 5
_log = logging.getLogger("edgeomni")


class Library:
    """One imported package: `name`, `version`, and what is read through it. Made by `library_of`."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module, self.version = name, module, str(module.__version__)
        self._said: deque[str] = deque(maxlen=_KEPT)
        self._runtime = module.Runtime(_logger(module, self._said))

    def deserialize(self, data: Any, what: str) -> Any:
        """An ICudaEngine of its serialized bytes. Raises EngineError with what TensorRT says of them."""
        self._said.clear()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            words = self.last_words()
            if "memory" in words.lower():
                raise EngineUnavailable("memory", f"{what}: {self.name} lacks memory for this engine ({words})")
            raise EngineUnavailable(
                "damaged",
                f"{what}: {self.name} {self.version} does not take this engine ({words}); it was made for another GPU "
                "or version, or is damaged. Export again with --target of this GPU",
            )
        return engine

    def last_words(self) -> str:
        """What TensorRT has complained of last."""
        return "; ".join(dict.fromkeys(self._said)) or "without a reason"

    def element(self, dtype: Any) -> tuple[np.dtype[Any] | None, int]:
        """Of a TensorRT DataType: numpy's (None where it has none), and bytes per element."""
        name = dtype.name
        if name in _NUMPY:
            found = np.dtype(_NUMPY[name])
            return found, found.itemsize
        if name in _SIZES:
            return None, _SIZES[name]
        raise EngineError(f"an engine has a tensor of type {name}, which this EdgeOmni does not feed; update it")


def library_of(name: str) -> Library:
    """The package of that import name. Raises EngineError where it is not installed or cannot be loaded."""
    try:
        return Library(name, import_module(name))
    except (ImportError, OSError, RuntimeError) as exc:
        raise EngineUnavailable(
            "package", f"{name} is not installed or cannot be loaded ({exc}); {install_command(EXTRAS[name])}"
        ) from exc


def no_package() -> str:
    """What to install where neither package is; "" where one is."""
    if installed():
        return ""
    rtx, other = (install_command(extra) for extra in EXTRAS.values())
    return f"TensorRT is not installed; for a desktop GPU: {rtx}; for a Jetson or a data-centre GPU: {other}"


def too_old(name: str) -> str:
    """Why the installed version of a package cannot build engines of a bundle's graphs; "" where it can."""
    version = version_of(name)
    oldest = OLDEST.get(name, ())
    if not version or release(version) >= oldest:
        return ""
    return (
        f"{name} {version} does not take the bundle's graphs, which need {name} {'.'.join(map(str, oldest))} or newer; "
        "update it (on a Jetson: JetPack), or use a bundle in another format, for instance gguf"
    )


def installed(names: Sequence[str] = tuple(EXTRAS)) -> list[str]:
    """Which of the packages are installed, found without loading them."""
    return [name for name in names if version_of(name)]


def version_of(name: str) -> str:
    """The installed version of a package, "" where there is none. Does not load it."""
    return installed_version(_DISTRIBUTIONS[name])


def _logger(module: ModuleType, said: deque[str]) -> Any:
    """A logger that keeps errors for the message of the EngineError, and hands warnings on to `logging`."""
    severity = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                said.append(message.strip())
            elif level == severity.WARNING:
                _log.debug("TensorRT: %s", message.strip())

    return Logger()
