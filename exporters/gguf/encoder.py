"""Whisper encoder (arXiv 2212.04356) and adapter -> encoder.gguf, which runtimes/ggml/encoder.py computes.

Tensors have the names that the `gguf` package gives to audio encoders ("a.blk.0.attn_q.weight"), and the adapter's the
checkpoint's own ones behind "mm.a.". Convolutions stay float32 and are stored as matrices [outputs, taps * inputs]:
quantizing them costs accuracy and saves 2 % of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map

from edgeomni.arrays import F32
from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.exporters import stored
from edgeomni.exporters.gguf import speech
from edgeomni.exporters.gguf.options import GgufOptions
from edgeomni.exporters.gguf.speech_precisions import encoder_schemes
from edgeomni.exporters.gguf.tensors import FLOAT, Stored
from edgeomni.quantize.gguf_kinds import check_width
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Scheme

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

ARCHITECTURE = "edgeomni-encoder"
_CONVOLUTIONS = 2
"""The package numbers them as if they were blocks."""
_WHAT = "Whisper encoder with the adapter to the LLM's width: log-mel in, features out"


def export(
    model: OmniModel, out_dir: Path, root: Path, precision: str, options: GgufOptions | None = None
) -> Component:
    """Writes out_dir/encoder.gguf; `options` are the LLM's. Raises UsageError for a width that cannot be stored."""
    schemes = encoder_schemes(precision)
    if model.spec.adapter.kind == "linear":
        del schemes["adapter.linear"]  # it has but one layer, proj
    path = out_dir / "encoder.gguf"
    speech.write(path, ARCHITECTURE, model, _WHAT, _facts(model), list(tensors(model, schemes)))
    return Component(
        name="encoder",
        engine="llama.cpp",
        format="gguf",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"encoder": GraphEntry(path.relative_to(root).as_posix())},
        meta={},
        files=describe_files(root, [path]),
    )


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of the stored tensors that are not what the model's weights give."""
    expected = tensors(model, stored.schemes(component))
    return [f"encoder:{n}" for n in speech.differing(root / component.graphs["encoder"].path, expected)]


def tensors(model: OmniModel, schemes: Mapping[str, Scheme]) -> Iterator[Stored]:
    """Every tensor of encoder.gguf. Raises UsageError for a width that a scheme cannot store."""
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, max(model.spec.encoder.layers, _CONVOLUTIONS + 1))
    for part, module in (("encoder", model.encoder), ("adapter", model.adapter)):
        for name, parameter in module.named_parameters():
            rows: F32 = np.ascontiguousarray(parameter.detach().cpu().float().numpy())
            if rows.ndim == 3:  # a convolution [outputs, inputs, taps]: tap by tap, as windows of its input lie
                rows = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(len(rows), -1)
            scheme = scheme_of(f"{part}.{name}", schemes) or FLOAT
            check_width(f"{part}.{name}", rows.shape[-1], scheme)
            if part == "adapter":
                yield Stored(f"mm.a.{name}", rows, scheme)
            else:
                yield Stored(_gguf_name(names, name), rows, scheme)


def _gguf_name(names: object, name: str) -> str:
    found = names.get_name(f"audio_tower.{name}", try_suffixes=(".weight", ".bias"))  # type: ignore[attr-defined]
    if found is None:
        raise AssertionError(f"the gguf package has no name for the encoder's {name}")
    return str(found)


def _facts(model: OmniModel) -> dict[str, speech.Fact]:
    spec = model.spec
    return {
        "n_mels": spec.front_end.n_mels,
        "sample_rate": spec.front_end.sample_rate,
        "hop_samples": spec.front_end.hop,
        "layers": spec.encoder.layers,
        "width": spec.encoder.width,
        "heads": spec.encoder.heads,
        "ffn": spec.encoder.ffn,
        "context": spec.encoder.context,
        "layer_norm_eps": 1e-5,
        "adapter": spec.adapter.kind,
        "output_width": spec.body.width,
    }
