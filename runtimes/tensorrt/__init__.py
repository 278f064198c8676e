"""TensorRT: the encoder, the LLM and the codec decoder of TensorRT bundles on an NVIDIA GPU. Untested on a GPU.

See edgeomni/runtimes/__init__.py for what these functions promise. CUDA and TensorRT are imported when one of them is
called.
"""

from __future__ import annotations

from typing import Any

from edgeomni.bundle import Bundle
from edgeomni.components import OpenOptions
from edgeomni.errors import EngineError


def open_component(bundle: Bundle, name: str, options: OpenOptions) -> Any:
    """Opens one component on the GPU, whatever `options` say of devices and threads.

    The first time on a machine that the bundle brings no engines for, they are built, which takes minutes and is told.
    Raises EngineUnavailable where there is no GPU, no package, or no engine that can be had; EngineError where one
    does not fit the model.
    """
    from edgeomni.runtimes.tensorrt.codec import TrtCodec
    from edgeomni.runtimes.tensorrt.encoder import TrtEncoder
    from edgeomni.runtimes.tensorrt.llm import TrtLanguageModel
    from edgeomni.runtimes.tensorrt.opening import Engines
    from edgeomni.runtimes.tensorrt.sources import serialized

    component = bundle.manifest.components[name]
    engines = Engines(name, lambda facts: serialized(bundle, component, facts))
    if name == "llm":
        return TrtLanguageModel(bundle.path, component, bundle.spec, engines)
    if name == "encoder":
        return TrtEncoder(bundle.spec, engines)
    return TrtCodec(component.meta, bundle.spec, engines)


def open_exact(bundle: Bundle, name: str, options: OpenOptions) -> Any | None:
    """None: TensorRT rounds no activations but where a graph says so."""
    return None


def wrong_kernels(bundle: Bundle, name: str) -> int | None:
    """None: an engine does not tell which kernels it runs on."""
    return None


def problem(device: str) -> str:
    """Why TensorRT cannot compute here, and what to do; "" where it can, as far as can be told without an engine."""
    from edgeomni.runtimes.tensorrt.device import acquire, release
    from edgeomni.runtimes.tensorrt.library import installed, no_package, too_old

    if said := no_package():
        return said
    if all(reasons := [too_old(name) for name in installed()]):
        return reasons[0]
    try:
        release(acquire())
    except EngineError as exc:
        return str(exc)
    return ""


def version() -> str:
    """Package and version of the TensorRT that is installed."""
    from edgeomni.runtimes.tensorrt.library import installed, version_of

    return ", ".join(f"{name} {version_of(name)}" for name in installed()) or "unknown"
