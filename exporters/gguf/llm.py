"""The LLM -> GGUF: a body that llama.cpp runs on embeddings, and the heads and embedding rows for ggml."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType

from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.errors import UsageError
from edgeomni.exporters.gguf.options import GgufOptions
from edgeomni.exporters.gguf.precisions import schemes_for
from edgeomni.exporters.gguf.tensors import ARCHITECTURES, NO_EMBEDDING_ROWS, Stored, body_tensors, head_tensors
from edgeomni.quantize.gguf_kinds import TYPES
from edgeomni.quantize.schemes import Scheme, quantize
from edgeomni.spec import BodySpec

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

HEADS_ARCHITECTURE = "edgeomni-heads"
_FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "fp16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def export(model: OmniModel, out_dir: Path, root: Path, precision: str, options: GgufOptions) -> Component:
    """Writes body.gguf and heads.gguf into `out_dir`.

    Raises UsageError for a model that llama.cpp cannot run: with a TTS adapter, or rotary scaling that it has not.
    """
    _check(model)
    schemes = schemes_for("llm", precision, options)
    body, heads = out_dir / "body.gguf", out_dir / "heads.gguf"
    _write(_body_writer(model, body, schemes["body.linear"]), body_tensors(model, schemes))
    _write(_heads_writer(model, heads), head_tensors(model, schemes))
    paths = {"body": body, "heads": heads}
    return Component(
        name="llm",
        engine="llama.cpp",
        format="gguf",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items() if group in _used(model)},
        graphs={role: GraphEntry(path.relative_to(root).as_posix()) for role, path in paths.items()},
        meta={"context": model.spec.context},
        files=describe_files(root, list(paths.values())),
    )


def _used(model: OmniModel) -> set[str]:
    return {"body.linear", "text_head", "audio_head"} | (set() if model.spec.tied else {"embedding"})


def _check(model: OmniModel) -> None:
    if model.spec.tts_layers:
        raise UsageError("a TTS adapter is not written as GGUF; export the LLM to onnx (--llm onnx:int4)")
    scaling = model.spec.body.rope_scaling or {}
    if scaling.get("rope_type", "default") not in ("default", "linear"):
        raise UsageError(
            f"rotary scaling {scaling['rope_type']!r} is not written as GGUF; export the LLM to onnx (--llm onnx:int4)"
        )


def _body_writer(model: OmniModel, path: Path, scheme: Scheme) -> GGUFWriter:
    """The body's metadata, as llama.cpp and other readers of GGUF expect it."""
    spec: BodySpec = model.spec.body
    writer = GGUFWriter(path, ARCHITECTURES[spec.kind].name.lower())
    _describe(writer, model, "body, without embedding and heads: it takes embeddings and gives hidden vectors")
    writer.add_file_type(_FILE_TYPES[scheme.kind])
    writer.add_context_length(model.spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    if (spec.rope_scaling or {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float((spec.rope_scaling or {})["factor"]))
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(NO_EMBEDDING_ROWS)
    return writer


def _heads_writer(model: OmniModel, path: Path) -> GGUFWriter:
    layout = model.spec.layout
    writer = GGUFWriter(path, HEADS_ARCHITECTURE)
    _describe(writer, model, "text head and audio heads; where tied, their rows are the embedding's")
    for name in ("text_vocab", "audio_vocab", "codebook_size", "streams", "text_specials"):
        writer.add_uint32(f"edgeomni.layout.{name}", getattr(layout, name))
    writer.add_bool("edgeomni.tied", model.spec.tied)
    return writer


def _describe(writer: GGUFWriter, model: OmniModel, what: str) -> None:
    source = str(model.provenance.get("source", "a checkpoint"))
    writer.add_name(f"EdgeOmni LLM of {source}")
    writer.add_description(what)
    if licence := model.licences.get("llm"):
        writer.add_license(licence)


def _write(writer: GGUFWriter, tensors: Iterable[Stored]) -> None:
    for tensor in tensors:
        data, kind = stored_bytes(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_bytes(tensor: Stored) -> tuple[Any, GGMLQuantizationType]:
    """The tensor as the file holds it, and its GGML type. Gains and biases stay float32."""
    kind = GGMLQuantizationType[TYPES[tensor.scheme.kind]]
    if tensor.rows.ndim == 1:
        return tensor.rows, kind
    return quantize(tensor.rows, tensor.scheme).data, kind
