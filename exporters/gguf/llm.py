"""The LLM -> GGUF: a body that llama.cpp runs on embeddings, and the heads and embedding rows for ggml."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from gguf.utility import model_weight_count_rounded_notation

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.errors import UsageError
from edgeomni.exporters.gguf.options import GgufOptions
from edgeomni.exporters.gguf.precisions import checked_precision, mixture, schemes_for
from edgeomni.exporters.gguf.tensors import (
    Importance,
    Stored,
    head_tensors,
    importance_of,
    linear_widths,
    stack_tensors,
    stacks,
)
from edgeomni.gguf_llm import (
    HEADS_ARCHITECTURE,
    MODEL_ID,
    Fact,
    body_facts,
    check_body,
    layout_facts,
    rope_type,
    yarn_magnitude,
)
from edgeomni.quantize.schemes import Scheme

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}
_WHAT = {
    "body": "transformer blocks without embedding and heads: they take embeddings and give hidden vectors",
    "tts": "blocks of the TTS adapter: they take the body's un-normed output and give what the audio heads read",
    "heads": "rows of the text head and the audio heads, and of the embedding where no head shares them",
}
IMATRIX = "imatrix"
_SAMPLES = 4096
"""Values of each parameter that the model's id is made of: enough to tell trainings apart, and quick."""


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: GgufOptions) -> Component:
    """Writes body.gguf, [tts.gguf,] heads.gguf into `out_dir`. The component's meta says "context", how many frames at
    most, and "kv", what keys and values are held in.

    Raises UsageError for a model that llama.cpp cannot run and for widths that a precision cannot store.
    """
    check_body(model.spec)
    _check_rotary(model)
    precision = checked_precision("llm", precision)
    schemes = used_schemes(model, precision, options)
    importance, extra = _importance(model, out_dir, options)
    paths = {role: out_dir / f"{role}.gguf" for role in (*stacks(model), "heads")}
    for role, (_, layers) in stacks(model).items():
        writer = _writer(model, role, paths[role], model.spec.body.kind, body_facts(model.spec, layers))
        writer.add_file_type(_FILE_TYPES[precision])
        _write(writer, stack_tensors(model, role, schemes, importance))
    _write(_writer(model, "heads", paths["heads"], HEADS_ARCHITECTURE, {}), head_tensors(model, schemes))
    return Component(
        name="llm",
        engine="llama.cpp",
        format="gguf",
        precision=precision,
        scheme={name: str(scheme) for name, scheme in schemes.items()},
        graphs={role: GraphEntry(path.relative_to(root).as_posix()) for role, path in paths.items()},
        meta={
            "context": model.spec.context,
            "kv": "f32" if precision == "fp32" else "f16",
            **({"imatrix": extra.relative_to(root).as_posix()} if extra else {}),
        },
        files=describe_files(root, [*paths.values(), *([extra] if extra else [])]),
    )


def _importance(model: OmniModel, out_dir: Path, options: GgufOptions) -> tuple[Importance | None, Path | None]:
    """The importance asked for, and the copy of its file, by which the export can be re-read."""
    if options.imatrix is None:
        return None, None
    importance = importance_of(model, Path(options.imatrix))
    return importance, Path(shutil.copyfile(options.imatrix, out_dir / IMATRIX))


def used_schemes(model: OmniModel, precision: str, options: GgufOptions) -> dict[str, Scheme]:
    """Tensor group, or single parameter where a mixture stores it otherwise than its group -> scheme."""
    schemes = schemes_for("llm", precision, options)
    found: dict[str, Scheme] = {}
    for role, (_, layers) in stacks(model).items():
        found |= mixture(precision, linear_widths(model, role), layers, f"{role}.linear")
    found |= {head: schemes[head] for head in ("text_head", "audio_head")}
    if not model.spec.tied or model.spec.tts_layers:
        found["embedding"] = schemes["embedding"]
    return found


def model_id(model: OmniModel) -> str:
    """An id of the LLM's weights, the same for every precision: the files of one model hold it in common."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name.startswith(("body.", "tts.", "embedding.", "text_head.", "audio_head.")):
            values = parameter.detach().reshape(-1)
            sample = values[:: max(1, len(values) // _SAMPLES)].cpu().float().numpy()
            found.update(f"{name} {tuple(parameter.shape)}".encode())
            found.update(np.ascontiguousarray(sample).tobytes())
    return found.hexdigest()[:32]


def _check_rotary(model: OmniModel) -> None:
    """YaRN's magnitude has several spellings; it must come out as the model itself computes it."""
    if rope_type(model.spec.body) != "yarn":
        return
    ours, theirs = yarn_magnitude(model.spec.body.rope_scaling or {}), float(model.body.rotary_emb.attention_scaling)
    if abs(ours - theirs) > 1e-6:
        raise UsageError(
            f"this YaRN scales attention by {theirs:g}, which is not written as GGUF; export the LLM to onnx "
            "(--llm onnx:int4)"
        )


def _writer(model: OmniModel, role: str, path: Path, architecture: str, facts: Mapping[str, Fact]) -> GGUFWriter:
    """A writer that holds all metadata: what the engine needs, and what tells a reader what the file is."""
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    source = str(model.provenance.get("source") or "a checkpoint")
    writer.add_name(f"{source}: LLM {role}")
    writer.add_description(f"{_WHAT[role]}; one of the files of a speech model's LLM, which EdgeOmni runs together")
    writer.add_size_label(model_weight_count_rounded_notation(_parameters(model, role), min_digits=2))
    writer.add_license(str(model.licences.get("llm") or "unknown"))
    writer.add_quantized_by(f"EdgeOmni {metadata.version('edgeomni')}")
    writer.add_tags(["speech", "edgeomni", role])
    for key in ("weights", "source_hash"):
        if model.provenance.get(key):
            writer.add_string(f"edgeomni.{key}", str(model.provenance[key]))
    writer.add_string("edgeomni.role", role)
    writer.add_string(MODEL_ID, model_id(model))
    for key, value in {**facts, **layout_facts(model.spec)}.items():
        adders: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adders[type(value)](key, value)
    return writer


def _parameters(model: OmniModel, role: str) -> int:
    if role == "heads":
        return int(model.text_rows().numel() + model.audio_rows().numel())
    return sum(int(p.numel()) for p in stacks(model)[role][0].parameters())


def _write(writer: GGUFWriter, tensors: Iterable[Stored]) -> None:
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.packed(), raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
