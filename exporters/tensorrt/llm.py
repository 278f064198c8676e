"""The LLM -> graphs for TensorRT: body, TTS adapter where there is one, text head, audio head; embedding rows.

An engine has two optimization profiles: prefill (one row, up to PREFILL frames at once) and decode (one or two rows of
one frame), so that the decode step always has the same few shapes and can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeomni.exporters.onnx.attention import Rope
from edgeomni.exporters.onnx.body import DecoderStack, build_with, rope_of
from edgeomni.exporters.onnx.graph import BFLOAT16, FLOAT, FLOAT16, INT64, Graph
from edgeomni.exporters.onnx.weights import PARTS, PackedWeights, Part, embedding_rows, head_rows
from edgeomni.exporters.tensorrt.attention import StaticCache
from edgeomni.exporters.tensorrt.input_ranges import input_scales
from edgeomni.exporters.tensorrt.made import Made, Recipe, compute_type, scales_meta
from edgeomni.exporters.tensorrt.operators import OPSET, TensorRtOperators
from edgeomni.exporters.tensorrt.options import TensorRtOptions
from edgeomni.exporters.tensorrt.precisions import FLOATS, block_for, schemes_for, sensitive_layers
from edgeomni.quantize.schemes import Packed, Scheme, quantize

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

PREFILL = 512
"""Frames of a prompt appended at once, at most: a question of ten seconds."""
_USUAL_PREFILL = 128
_KV = {FLOAT: "float", FLOAT16: "float16", BFLOAT16: "bfloat16"}


def make(model: OmniModel, precision: str, options: TensorRtOptions, inputs: Mapping[str, float] | None = None) -> Made:
    """The graphs body, [tts,] text_head and audio_head, their schemes and recipes.

    The meta says: "context", the frames M of the caches; "prefill", the most frames at once; "kv", their type.
    `inputs`: scales of linear layers' inputs that were measured before; None measures them where they are needed.
    """
    spec = model.spec
    block = None if precision in FLOATS else block_for("llm", spec, options)
    schemes = schemes_for("llm", precision, options, block)
    sensitive = sensitive_layers(spec, schemes)
    schemes |= sensitive
    frames = min(options.cache or spec.context, spec.context)
    if inputs is None:
        inputs = input_scales(model, "llm", schemes)
    compute = compute_type(precision)
    graphs = _stacks(model, schemes, frames, compute, inputs)
    prefill = min(PREFILL, frames)
    layers = {"body": spec.body.layers, "tts": spec.tts_layers}
    recipes = {role: _recipe(model, layers[role], frames, prefill, rows=2 if role == "body" else 1) for role in graphs}
    for part in PARTS:
        graphs[f"{part}_head"] = _head(model, part, schemes[f"{part}_head"])
        recipes[f"{part}_head"] = Recipe([])
    used = {
        *sensitive,
        "body.linear",
        "text_head",
        "audio_head",
        *(["tts.linear", "embedding"] if spec.tts_layers else []),
    }
    kept = {g: s for g, s in schemes.items() if g in used or (g == "embedding" and not spec.tied)}
    meta = {"context": frames, "prefill": prefill, "kv": _KV[compute], **scales_meta(inputs)}
    return Made(graphs, kept, recipes, meta)


def table_rows(model: OmniModel, part: Part, schemes: dict[str, Scheme]) -> tuple[Packed, bool]:
    """The rows of an embedding table, and whether they are the head's."""
    tied = model.spec.tied and not (part == "audio" and model.spec.tts_layers)
    if tied:
        return quantize(head_rows(model, part), schemes[f"{part}_head"]), True
    return quantize(embedding_rows(model, part), schemes["embedding"]), False


def _stacks(
    model: OmniModel, schemes: dict[str, Scheme], frames: int, compute: int, inputs: Mapping[str, float]
) -> dict[str, Graph]:
    spec, weights, whole = model.spec, PackedWeights.of(model, schemes), rope_of(model)
    rope = Rope(whole.cos[:frames], whole.sin[:frames])
    stacks = [DecoderStack("body", spec.body.layers, spec.body, rope, weights, every_position=bool(spec.tts_layers))]
    if spec.tts_layers:
        stacks.append(DecoderStack("tts", spec.tts_layers, spec.body, rope, weights))
    graphs = {}
    for stack in stacks:
        operators = TensorRtOperators(Graph(stack.name, OPSET), compute=compute, inputs=inputs)
        graphs[stack.name] = build_with(stack, operators, StaticCache(operators, spec.body, rope))
    return graphs


def _head(model: OmniModel, part: Part, scheme: Scheme) -> Graph:
    """hidden float [1, 1, D] -> logits float [1, 1, rows], and ids int64 [1, heads]: the likeliest of each head."""
    rows, layout = quantize(head_rows(model, part), scheme), model.spec.layout
    heads = layout.streams if part == "audio" else 1
    compute = FLOAT if scheme.kind == "fp32" else FLOAT16
    operators = TensorRtOperators(Graph(f"{part}_head", OPSET), compute=compute)
    g = operators.graph
    hidden = g.input("hidden", FLOAT, [1, 1, rows.k])
    logits = operators.rows_linear(hidden, f"{part}_head", rows)
    g.output("logits", FLOAT, [1, 1, len(rows.data)], logits)
    split = g.op("Reshape", [logits, g.ints(1, heads, -1)])
    g.output("ids", INT64, [1, heads], g.op("ArgMax", [split], axis=-1, keepdims=0))
    return g


def _recipe(model: OmniModel, layers: int, frames: int, prefill: int, rows: int) -> Recipe:
    usual = min(_USUAL_PREFILL, prefill)
    return Recipe(
        [
            _profile(model, layers, frames, (1, 1, 1), (1, usual, prefill)),
            _profile(model, layers, frames, (1, rows, rows), (1, 1, 1)),
        ]
    )


def _profile(
    model: OmniModel, layers: int, cache: int, rows: tuple[int, ...], frames: tuple[int, ...]
) -> dict[str, list[list[int]]]:
    """Least, usual and largest shape of each input with dimensions that vary."""
    body = model.spec.body
    pairs = list(zip(rows, frames, strict=True))
    shapes: dict[str, Any] = {
        "inputs_embeds": [[b, s, body.width] for b, s in pairs],
        "position_ids": [[b, s] for b, s in pairs],
        "write_indices": [[b] for b in rows],
    }
    for layer in range(layers):
        for part in ("key", "value"):
            shapes[f"past_{part}.{layer}"] = [[b, body.kv_heads, cache, body.head_dim] for b in rows]
    return shapes
