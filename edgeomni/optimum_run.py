"""Runs one graph that optimum made, and ends: `python -m edgeomni.optimum_run GRAPH GIVEN.npz ANSWER.npy`.

GIVEN holds `mel` float32 [n_mels, t] for an encoder, or `ids` int64 [T] for an LLM. ANSWER gets the features [t', D] or
the logits [T, vocab], in the graph's own precision. A process of its own, since a damaged graph may end it. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
_OUTPUTS = ("logits", "last_hidden_state")


def main(graph: str, given: str, answer: str) -> int:
    """0 when ANSWER is written; 1 with the reason on stderr."""
    run = _openvino if graph.endswith(".xml") else _onnx
    try:
        with np.load(given) as arrays:
            found = run(Path(graph), dict(arrays))
        np.save(answer, found[0])
    except Exception as exc:  # an engine raises anything over a foreign graph, and the parent tells the reason
        print((str(exc).strip().splitlines() or [type(exc).__name__])[0][:300], file=sys.stderr)
        return 1
    return 0


def feed(name: str, shape: Sequence[int | None], kind: Any, given: Arrays) -> np.ndarray[Any, Any]:
    """What a graph's input of that name gets; None in `shape` is any size. Raises ValueError for an unknown input."""
    frames = len(given["ids"]) if "ids" in given else 0
    if name == "input_features" and "mel" in given:
        return given["mel"][None].astype(kind)
    if name == "input_ids" and frames:
        return given["ids"][None].astype(kind)
    if name == "attention_mask" and frames:
        return np.ones((1, frames), kind)
    if name == "position_ids" and frames:
        return np.arange(frames)[None].astype(kind)
    if name == "beam_idx":
        return np.zeros(1, kind)
    if name.startswith("past_key_values.") and len(shape) == 4:
        return np.zeros([size if size is not None else int(axis == 0) for axis, size in enumerate(shape)], kind)
    raise ValueError(f"the graph has an input {name!r}, of which it is not known what it wants")


def _onnx(path: Path, given: Arrays) -> np.ndarray[Any, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    fed = {}
    for entry in session.get_inputs():
        shape = [size if isinstance(size, int) else None for size in entry.shape]
        fed[entry.name] = feed(entry.name, shape, kinds[entry.type], given)
    (wanted,) = (output.name for output in session.get_outputs() if output.name in _OUTPUTS)
    answer: np.ndarray[Any, Any] = session.run([wanted], fed)[0]
    return answer


def _openvino(path: Path, given: Arrays) -> np.ndarray[Any, Any]:
    import openvino as ov

    core = ov.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = core.compile_model(core.read_model(path), "CPU", exact)
    fed = {}
    for entry in model.inputs:
        shape = [size.get_length() if size.is_static else None for size in entry.get_partial_shape()]
        fed[entry.any_name] = feed(entry.any_name, shape, entry.element_type.to_dtype(), given)
    (wanted,) = (output for output in model.outputs if output.get_names() & set(_OUTPUTS))
    return np.array(model.create_infer_request().infer(fed)[wanted])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
