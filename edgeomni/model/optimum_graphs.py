"""Directories that `optimum-cli export onnx|openvino` made of a Whisper encoder or an LLM, as sources of those parts.

The weights are read out of the graph into our model, so that it is trained, quantized and exported as any other. What
was read is then held against the graph itself, run by its own engine on the same input.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..apart import module_command
from ..errors import CheckpointError
from ..install_hint import install_command
from . import encoders, graph_weights
from .graph_weights import Constant
from .omni import OmniModel
from .tensors import Shapes, refuse_deeper, translated

Part = Literal["encoder", "llm"]
GRAPHS: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder_model.onnx", "openvino_encoder_model.xml"),
    "llm": ("model.onnx", "openvino_model.xml"),
}
"""What optimum calls the graph of each part."""
_TORCH_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MOST_ERROR = {"float32": 1e-3, "float16": 3e-2}
"""Largest difference from the graph's answer, over the largest number in it, by the precision of that answer. Weights
read rightly differ by rounding alone (1e-6 in float32); one matrix of a small layer out of place gives 1e-2 or more."""
_IDS = 16
_TIMEOUT_S = 900


def graph_of(source: str, part: Part) -> Path | None:
    """The graph that stands for the part's weights in a local directory; None where it has others, or none."""
    directory = Path(source)
    if any((directory / f"{name}{end}").is_file() for name in _TORCH_WEIGHTS for end in ("", ".index.json")):
        return None
    return next((path for name in GRAPHS[part] if (path := directory / name).is_file()), None)


class GraphWeights:
    """The constants of a graph. Raises CheckpointError for a graph that cannot be read, or is quantized."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with translated(f"{path}: damaged, or no graph that optimum wrote; export it again"):
            self._constants = _constants(path)

    def refuse_deeper(self, layers: Mapping[str, Any]) -> None:
        """As tensors.refuse_deeper."""
        refuse_deeper(str(self._path), layers, len(self._constants))

    def read(self, expected: Shapes) -> dict[str, torch.Tensor]:
        """Name -> float32 tensor, in the shape expected. Raises CheckpointError for those that are not found."""
        with translated(f"{self._path}: its weights cannot be read; copy the whole directory again"):
            return graph_weights.found(self._path, self._constants, expected)


def _constants(path: Path) -> list[Constant]:
    if path.suffix == ".onnx":
        from . import onnx_constants

        return onnx_constants.constants(path)
    if importlib.util.find_spec("openvino") is None:
        raise CheckpointError(
            f"{path}: OpenVINO is needed to check what is read from it; {install_command('openvino')}"
        )
    from . import openvino_constants

    return openvino_constants.constants(path)


def held_against(model: OmniModel, given: Mapping[str, str]) -> str:
    """What the model's parts were held against, in words; "" where no part came from optimum. `given`: part -> source.

    Raises CheckpointError where a part computes other than the graph it was read from, or the graph does not run.
    """
    parts: tuple[Part, ...] = ("encoder", "llm")
    graphs = {part: graph for part in parts if given.get(part) and (graph := graph_of(given[part], part))}
    return ", ".join(f"{graph.name}: differs by {_checked(model, part, graph):.1e}" for part, graph in graphs.items())


@torch.inference_mode()
def _checked(model: OmniModel, part: Part, graph: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    if part == "encoder":
        front, frames = model.spec.front_end, 2 * model.spec.encoder.context
        mel = torch.randn(front.n_mels, frames, generator=generator)
        ours, given = encoders.encode(model.encoder, mel[None])[0], {"mel": mel.numpy()}
    else:
        layout = model.spec.layout
        words = layout.text_vocab - layout.text_specials
        ids = torch.randint(words, (min(_IDS, model.spec.context),), generator=generator)
        ours = model.text_logits(model.hidden(model.embedding(ids)[None])[0])[0, :, :words]
        given = {"ids": ids.numpy()}
    return _compared(graph, ours.numpy(), _run(graph, given))


def _compared(graph: Path, ours: np.ndarray, theirs: np.ndarray) -> float:
    limit = MOST_ERROR.get(str(theirs.dtype))
    if limit is None or ours.shape != theirs.shape:
        raise CheckpointError(
            f"{graph}: answers {theirs.dtype} {theirs.shape} where {ours.shape} in float32 or float16 is expected; "
            "use the graph and the config.json of one export"
        )
    error = float(np.abs(ours - theirs.astype(np.float32)).max() / max(float(np.abs(theirs).max()), 1e-30))
    if not error <= limit:
        raise CheckpointError(
            f"{graph}: the model that was read from it answers otherwise than the graph itself (they differ by "
            f"{error:.2g} of the largest number, at most {limit:g} may be); its config.json belongs to another model, "
            "or it was exported in a way that is not known here: give the model's original directory"
        )
    return error


def _run(graph: Path, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """The graph's answer, by its own engine in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="edgeomni-") as scratch:
        question, answer = Path(scratch) / "given.npz", Path(scratch) / "answer.npy"
        np.savez(question, **given)  # type: ignore[arg-type]
        command = module_command("edgeomni.optimum_run", str(graph), str(question), str(answer))
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONSAFEPATH": "1"},
            )
        except subprocess.TimeoutExpired as exc:
            raise CheckpointError(f"{graph}: gave no answer within {_TIMEOUT_S} s; export it again") from exc
        if done.returncode != 0 or not answer.is_file():
            reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
            raise CheckpointError(f"{graph}: cannot be run ({reason}); export it again")
        found: np.ndarray = np.load(answer)
        return found
