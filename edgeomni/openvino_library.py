"""OpenVINO itself, imported without its telemetry, which would tell its vendor of every import over the network.

The package `openvino_telemetry` is an optional import of OpenVINO's conversion tools: where it cannot be imported they
take a stub of their own. It is hidden only while OpenVINO is imported, and only where nobody has imported it before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .engines import ENGINES
from .errors import EngineUnavailable

_TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    if _TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes `import openvino_telemetry` fail
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


try:
    with _without_telemetry():
        import openvino as ov
except ImportError as exc:
    raise EngineUnavailable(
        "package", f"the openvino engine is not installed or cannot be loaded ({exc}); {ENGINES['openvino'].install}"
    ) from exc

__all__ = ["ov"]
