"""ggml, as llama-cpp-python's own libraries bring it: a small layer over its C interface, and graphs written on it.

functions.py declares the functions, library.py checks that the library is the one they are declared for; backend.py is
what computes, a CPU or a GPU; files.py opens GGUF files after checking every tensor; operations.py and graph.py build
and run graphs, numpy_operations.py adds what ggml has no fast form of. On these stand encoder.py, codec.py (with
decoding.py, pushes.py, codec_tensors.py, codec_attention.py) and heads.py, the LLM's heads. Users name the engine
llama.cpp (runtimes/llamacpp), which opens these for encoder and codec.
"""

from __future__ import annotations

from typing import Any

from edgeomni.bundle import Bundle
from edgeomni.components import OpenOptions


def open_component(bundle: Bundle, name: str, options: OpenOptions) -> Any:
    """Opens the encoder or the codec of a bundle.

    Raises BundleError for a file that is not this model's, EngineError where ggml or the device is missing.
    """
    component = bundle.manifest.components[name]
    if name == "encoder":
        from edgeomni.runtimes.ggml.encoder import GgmlEncoder

        return GgmlEncoder(bundle.path, component, bundle.spec, options.threads, options.device)
    from edgeomni.runtimes.ggml.codec import GgmlCodec

    return GgmlCodec(bundle.path, component, bundle.spec, options.threads, options.device)
