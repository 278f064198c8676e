"""OpenVINO: the encoder, the LLM and the codec decoder of OpenVINO bundles, on CPUs, Intel GPUs and NPUs.

See edgeomni/runtimes/__init__.py for what these functions promise. OpenVINO itself is imported when one of them is
called.
"""

from __future__ import annotations

from typing import Any

from edgeomni.bundle import Bundle, Component
from edgeomni.component_meta import OpenVinoArithmetic
from edgeomni.components import OpenOptions
from edgeomni.engines import ENGINES
from edgeomni.errors import EngineError


def open_component(bundle: Bundle, name: str, options: OpenOptions) -> Any:
    """Opens one component. Raises EngineError where OpenVINO is missing or cannot load a model."""
    return _open(bundle, name, options, exact=False)


def open_exact(bundle: Bundle, name: str, options: OpenOptions) -> Any | None:
    """The LLM in float32 where the bundle may compute it otherwise; else None, and for other components."""
    faster = _judged(bundle.manifest.components[name]) != OpenVinoArithmetic()
    return _open(bundle, name, options, exact=True) if name == "llm" and faster else None


def wrong_kernels(bundle: Bundle, name: str) -> int | None:
    """Linear layers whose compressed weights OpenVINO would turn into floats; None where none are compressed."""
    from edgeomni.runtimes.openvino import kernel_check

    return kernel_check.wrong_kernels(bundle, bundle.manifest.components[name])


def problem(device: str) -> str:
    """Why OpenVINO cannot compute on that device here, and what to do; "" where it can."""
    try:
        from edgeomni.runtimes.openvino import models
    except EngineError as exc:  # it is not installed
        return str(exc)
    return models.problem(device)


def version() -> str:
    """The version of the installed OpenVINO."""
    return ENGINES["openvino"].version


def _open(bundle: Bundle, name: str, options: OpenOptions, *, exact: bool) -> Any:
    from edgeomni.runtimes.openvino.codec import OvCodec
    from edgeomni.runtimes.openvino.encoder import OvEncoder
    from edgeomni.runtimes.openvino.llm import OvLanguageModel
    from edgeomni.runtimes.openvino.models import ModelFactory

    component = bundle.manifest.components[name]
    adapters: dict[str, Any] = {"encoder": OvEncoder, "llm": OvLanguageModel, "codec": OvCodec}
    # The gate judges on a CPU, so that other devices compute in float32.
    arithmetic = OpenVinoArithmetic() if exact or options.device != "cpu" else _judged(component)
    models = ModelFactory(options.threads, options.device, arithmetic)
    return adapters[name](bundle.path, component, bundle.spec, models)


def _judged(component: Component) -> OpenVinoArithmetic:
    own = {key: component.meta[key] for key in ("compute", "int8_inputs") if key in component.meta}
    return OpenVinoArithmetic(**own)
