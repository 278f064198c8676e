"""llama.cpp, through llama-cpp-python: all of a GGUF bundle. Only the LLM's body runs on llama.cpp itself; the rest are
graphs on the ggml that it brings (runtimes/ggml).

See edgeomni/runtimes/__init__.py for what these functions promise. The libraries are loaded when one of them is called.
"""

from __future__ import annotations

from typing import Any

from edgeomni.bundle import Bundle
from edgeomni.components import OpenOptions
from edgeomni.engines import ENGINES
from edgeomni.errors import EngineError


def open_component(bundle: Bundle, name: str, options: OpenOptions) -> Any:
    """Opens a component; encoder and codec are graphs on ggml alone (runtimes/ggml).

    Raises BundleError for files that are not this model's, EngineError where the engine or the device is missing.
    """
    if name != "llm":
        from edgeomni.runtimes import ggml

        return ggml.open_component(bundle, name, options)
    from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel

    return LlamaLanguageModel(
        bundle.path, bundle.manifest.components[name], bundle.spec, options.threads, options.device
    )


def open_exact(bundle: Bundle, name: str, options: OpenOptions) -> Any | None:
    """The LLM with its stored weights dequantized, so that its transformer blocks round no inputs."""
    if name != "llm":
        return None
    from edgeomni.runtimes.llamacpp import exact

    return exact.opened(bundle, options)


def wrong_kernels(bundle: Bundle, name: str) -> int | None:
    """None: llama.cpp does not tell which kernels it runs."""
    return None


def problem(device: str) -> str:
    """Why llama.cpp cannot compute on that device here, and what to do; "" where it can."""
    try:
        from edgeomni.runtimes.llamacpp.library import use_device

        use_device(device)
    except EngineError as exc:
        return str(exc)
    return ""


def version() -> str:
    """The version of the installed llama-cpp-python."""
    return ENGINES["llama.cpp"].version
