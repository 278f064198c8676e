"""The LLM with float inputs in its transformer blocks: its stored weights, dequantized to float32 for llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgeomni.bundle import Bundle, GraphEntry
from edgeomni.components import OpenOptions
from edgeomni.gguf_llm import MODEL_ID, body_facts, layout_facts
from edgeomni.runtimes.llamacpp.files import read_stack
from edgeomni.runtimes.llamacpp.llm import LlamaLanguageModel
from edgeomni.spec import OmniSpec


def opened(bundle: Bundle, options: OpenOptions) -> LlamaLanguageModel:
    """The LLM of `bundle` in exact mode, keys and values in float32. Its heads round their inputs all the same.

    The float32 copy of the blocks lies in a temporary directory, which is gone once llama.cpp has mapped the file.
    """
    component, spec = bundle.manifest.components["llm"], bundle.spec
    layers = {"body": spec.body.layers, "tts": spec.tts_layers}
    with TemporaryDirectory(prefix="edgeomni-exact-") as directory:
        graphs = dict(component.graphs)
        for role in layers.keys() & graphs.keys():
            exact = Path(directory) / f"{role}.gguf"
            _write(exact, read_stack(bundle.file(graphs[role].path), spec, layers[role]), spec, layers[role])
            graphs[role] = _Anywhere(str(exact))
        floats = {name: "fp32" if name.startswith(("body.", "tts.")) else s for name, s in component.scheme.items()}
        exact_component = replace(component, graphs=graphs, scheme=floats, meta={**component.meta, "kv": "f32"})
        return LlamaLanguageModel(bundle.path, exact_component, spec, options.threads, options.device)


class _Anywhere(GraphEntry):
    """A graph outside of the bundle."""

    def __post_init__(self) -> None:
        """Its path may be absolute."""


def _write(path: Path, reader: Any, spec: OmniSpec, layers: int) -> None:
    from gguf import GGUFWriter, quants

    writer = GGUFWriter(path, spec.body.kind)
    writer.add_string(MODEL_ID, reader.fields[MODEL_ID].contents())
    for key, value in {**body_facts(spec, layers), **layout_facts(spec)}.items():
        adders: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adders[type(value)](key, value)
    for tensor in reader.tensors:
        shape = [int(n) for n in tensor.shape[::-1]]
        floats = quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(floats, np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
