"""OpenVINO: the encoder, the LLM and the codec decoder of OpenVINO bundles, on CPUs, Intel GPUs and NPUs.

See edgeomni/runtimes/__init__.py for what these functions promise. OpenVINO itself is imported when one of them is
called.
"""

from __future__ import annotations

from typing import Any

from edgeomni.bundle import Bundle
from edgeomni.components import OpenOptions
from edgeomni.engines import ENGINES
from edgeomni.errors import EngineError
from edgeomni.quantize.schemes import parse


def open_component(bundle: Bundle, name: str, options: OpenOptions) -> Any:
    """Opens one component. Raises EngineError where OpenVINO is missing or cannot load a model."""
    return _open(bundle, name, options, exact=False)


def open_exact(bundle: Bundle, name: str, options: OpenOptions) -> Any | None:
    """The LLM with float inputs in every kernel; None where its weights are float, and for other components."""
    integer = any(parse(scheme).blocked for scheme in bundle.manifest.components[name].scheme.values())
    return _open(bundle, name, options, exact=True) if name == "llm" and integer else None


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
    models = ModelFactory(options.threads, options.device, exact=exact)
    return adapters[name](bundle.path, component, bundle.spec, models)
