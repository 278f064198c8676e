"""Codec decoder -> codec.gguf and a description of its layers, which runtimes/ggml/codec.py computes piece by piece.

What the layers are is told in edgeomni/model/codec_plan.py. Signals lie there as [samples, channels], so that kernels
are stored as they meet them: a convolution as a matrix [outputs, taps * inputs], a transposed one as [stride * outputs,
inputs that meet * inputs], a depthwise one as [taps, channels].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeomni.arrays import F32
from edgeomni.bundle import Component, GraphEntry, describe_files
from edgeomni.codec_layers import CodecLayer, CodecLevel
from edgeomni.errors import UsageError
from edgeomni.exporters.gguf import speech
from edgeomni.exporters.gguf.options import GgufOptions
from edgeomni.exporters.gguf.speech_precisions import codec_schemes
from edgeomni.exporters.gguf.tensors import FLOAT, Stored
from edgeomni.model import codec_plan as ops
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.codec_reader import halved, read_plan
from edgeomni.quantize.schemes import Scheme, parse

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

ARCHITECTURE = "edgeomni-codec"
_WHAT = "Codec decoder, fed piece by piece: ids of several levels in, waveform out"
_FIRST = "front"
"""The name of the plan's first convolution."""
_SHORT_ROW = 64
_FEW_OUTPUTS = 8
"""Convolutions with fewer outputs stay float32: rounding their inputs costs more time than it saves."""
_OPS = {
    ops.Conv: "conv",
    ops.Up: "up",
    ops.Snake: "snake",
    ops.Elu: "elu",
    ops.Tanh: "tanh",
    ops.Noise: "noise",
    ops.Residual: "residual",
    ops.LocalAttention: "local_attention",
    ops.Transformer: "transformer",
}


def export(
    model: OmniModel, out_dir: Path, root: Path, precision: str, options: GgufOptions | None = None
) -> Component:
    """Writes out_dir/codec.gguf; the layers go into the component's meta. `options` are the LLM's alone.

    Raises UsageError for other convolutions.
    """
    schemes = codec_schemes(precision)
    plan = read_plan(model.codec, model.spec.codec)
    path = out_dir / "codec.gguf"
    layers = described(plan)
    speech.write(path, ARCHITECTURE, model, _WHAT, _facts(plan), list(tensors(plan, schemes["codec"])))
    return Component(
        name="codec",
        engine="llama.cpp",
        format="gguf",
        precision=precision,
        scheme={group: str(scheme) for group, scheme in schemes.items()},
        graphs={"codec": GraphEntry(path.relative_to(root).as_posix())},
        meta={
            "first_push": plan.first_push,
            "push_multiple": plan.push_multiple,
            "lag_samples": plan.lag_samples,
            "noise": [asdict(pace) for pace in plan.noise_paces],
            "levels": [asdict(level) for level in _levels(_lookup(plan))],
            "layers": [_short(layer) for layer in layers],
        },
        files=describe_files(root, [path]),
    )


def altered(model: OmniModel, component: Component, root: Path) -> list[str]:
    """Names of the stored tensors that are not what the codec's weights give."""
    plan = read_plan(model.codec, model.spec.codec)
    expected = tensors(plan, parse(component.scheme["codec"]))
    return [f"codec:{name}" for name in speech.differing(root / component.graphs["codec"].path, expected)]


def as_exported(model: OmniModel, component: Component) -> CodecPlan | None:
    """The decoder's plan holding its weights as stored; None where they are stored as they are."""
    if parse(component.scheme["codec"]).kind == "fp32":
        return None
    plan = read_plan(model.codec, model.spec.codec)
    return replace(plan, ops=tuple(_as_stored(op, plan) for op in plan.ops))


def tensors(plan: CodecPlan, scheme: Scheme) -> Iterator[Stored]:
    """Every tensor of codec.gguf; `scheme` stores codebooks and the matrices of layers."""
    lookup = _lookup(plan)
    for level, table in enumerate(lookup.tables):
        yield Stored(f"lookup.{level}", table, scheme if _halves(lookup) else FLOAT)
    for op in _flat(plan.ops[1:]):
        for name, value in _tensors_of(op):
            stored = scheme if value.ndim == 2 and _halves(op) and name.endswith("weight") else FLOAT
            yield Stored(f"{op.name}.{name}", np.ascontiguousarray(value, np.float32), stored)


def described(plan: CodecPlan) -> list[CodecLayer]:
    """The layers behind the lookup. Raises UsageError for a convolution that is neither dense nor depthwise."""
    layers, channels = [], _channels(_lookup(plan))
    for op in plan.ops[1:]:
        layers.append(_described(op, channels))
        channels = layers[-1].outputs
    return layers


def _described(op: Any, channels: int) -> CodecLayer:
    common: dict[str, Any] = {"op": _OPS[type(op)], "name": op.name, "inputs": channels, "outputs": channels}
    if isinstance(op, ops.Conv):
        if op.groups not in (1, op.inputs) or (op.groups > 1 and not op.depthwise):
            raise UsageError(
                f"codec layer {op.name} is a convolution in {op.groups} groups, which is not written as GGUF; export "
                "the codec to onnx (--codec onnx:fp32)"
            )
        own: dict[str, Any] = {"outputs": op.outputs, "taps": op.weight.shape[2], "dilation": op.dilation}
        own |= {"left": op.left, "right": op.right, "depthwise": op.depthwise, "bias": op.bias is not None}
    elif isinstance(op, ops.Up):
        own = {"outputs": op.outputs, "taps": len(op.taps), "stride": op.stride, "left": op.left, "right": op.right}
        own |= {"drop": op.drop, "crop": op.crop, "depthwise": op.depthwise, "bias": op.bias is not None}
    elif isinstance(op, ops.Residual):
        own = {"delay": op.delay, "body": _body(op.body, channels)}
        own["shortcut"] = None if op.shortcut is None else _described(op.shortcut, channels)
        own["outputs"] = own["body"][-1].outputs
    elif isinstance(op, ops.LocalAttention):
        own = {"window": op.window, "heads": op.heads, "head_dim": op.channels // op.heads, "eps": op.eps}
    elif isinstance(op, ops.Transformer):
        own = {"blocks": len(op.blocks), "heads": op.heads, "kv_heads": op.kv_heads, "head_dim": op.head_dim}
        own |= {"window": op.window, "eps": op.eps, "rotary_scale": op.rotary_scale, "hidden": len(op.blocks[0].fc1)}
        own["bias"] = op.blocks[0].qkv_bias is not None
    else:
        own = {"index": op.index} if isinstance(op, ops.Noise) else {}
    return CodecLayer(**(common | own))


def _body(body: Iterable[ops.Op], channels: int) -> list[CodecLayer]:
    layers: list[CodecLayer] = []
    for op in body:
        layers.append(_described(op, layers[-1].outputs if layers else channels))
    return layers


def _tensors_of(op: Any) -> Iterator[tuple[str, F32]]:
    """A layer's own tensors by their names, as they are stored."""
    if isinstance(op, ops.Conv):
        kernel = op.weight[:, 0].T if op.depthwise else op.weight.transpose(0, 2, 1).reshape(op.outputs, -1)
        yield "weight", kernel
    elif isinstance(op, ops.Up):
        yield "weight", op.taps.reshape(-1, op.outputs) if op.depthwise else op.matrix.T
    elif isinstance(op, ops.Snake):
        yield "alpha", op.alpha
    elif isinstance(op, ops.Noise):
        yield "weight", op.weight
    elif isinstance(op, ops.LocalAttention):
        yield from (("norm.gain", op.norm[0]), ("norm.bias", op.norm[1]))
        yield from (("qkv.weight", op.qkv), ("out.weight", op.out), ("cos", op.cos), ("sin", op.sin))
    elif isinstance(op, ops.Transformer):
        yield "inv_freq", op.inv_freq
        for i, block in enumerate(op.blocks):
            yield from ((f"{i}.{name}", value) for name, value in _block_tensors(block))
    if getattr(op, "bias", None) is not None:
        yield "bias", op.bias


def _block_tensors(block: ops.Block) -> Iterator[tuple[str, F32]]:
    for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
        yield from ((f"{name}.gain", norm[0]), (f"{name}.bias", norm[1]))
    yield from (("qkv.weight", block.qkv), ("out.weight", block.out))
    yield from (("fc1.weight", block.fc1), ("fc2.weight", block.fc2))
    if block.qkv_bias is not None and block.out_bias is not None:
        yield from (("qkv.bias", block.qkv_bias), ("out.bias", block.out_bias))


def _halves(op: Any) -> bool:
    """Whether f16 stores the layer's matrices in half precision.

    Depthwise kernels are small and computed as float. So are SNAC's codebooks, whose rows are short, and the first
    convolution: together they are 4 % of the bytes, and rounding them costs 1.5 dB of SNAC 24 kHz.
    """
    if isinstance(op, ops.Lookup):
        return all(table.shape[1] >= _SHORT_ROW for table in op.tables)
    if isinstance(op, (ops.Conv, ops.Up)):
        return not op.depthwise and op.outputs >= _FEW_OUTPUTS and op.name != _FIRST
    return True


def _as_stored(op: Any, plan: CodecPlan) -> Any:
    if isinstance(op, ops.Residual):
        shortcut = None if op.shortcut is None else _as_stored(op.shortcut, plan)
        return replace(op, body=tuple(_as_stored(inner, plan) for inner in op.body), shortcut=shortcut)
    return halved(replace(plan, ops=(op,))).ops[0] if _halves(op) else op


def _flat(layers: Iterable[Any]) -> Iterator[Any]:
    for op in layers:
        if isinstance(op, ops.Residual):
            yield from _flat(op.body)
            yield from [] if op.shortcut is None else [op.shortcut]
        else:
            yield op


def _lookup(plan: CodecPlan) -> ops.Lookup:
    assert isinstance(plan.ops[0], ops.Lookup)
    return plan.ops[0]


def _levels(op: ops.Lookup) -> list[CodecLevel]:
    parts = zip(op.tables, op.strides, op.groups, strict=True)
    return [CodecLevel(len(table), int(table.shape[1]), int(stride), int(group)) for table, stride, group in parts]


def _channels(op: ops.Lookup) -> int:
    return sum({group: table.shape[1] for table, group in zip(op.tables, op.groups, strict=True)}.values())


def _short(layer: CodecLayer) -> dict[str, Any]:
    """The layer as a manifest holds it: without what every layer has by default."""
    out: dict[str, Any] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default:
            out[field.name] = value
    if layer.body:
        out["body"] = [_short(inner) for inner in layer.body]
    if layer.shortcut is not None:
        out["shortcut"] = _short(layer.shortcut)
    return out


def _facts(plan: CodecPlan) -> dict[str, speech.Fact]:
    spec = plan.spec
    return {
        "kind": spec.kind,
        "sample_rate": spec.sample_rate,
        "codebook_size": spec.codebook_size,
        "levels": len(spec.vq_strides),
        "latents_per_id": ", ".join(map(str, spec.vq_strides)),
        "hop_samples": spec.hop,
        "lag_samples": plan.lag_samples,
    }
