"""The tensors that a codec's layers need, worked out from the manifest's description of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgeomni.codec_layers import CodecLayer
from edgeomni.component_meta import GgufCodecMeta
from edgeomni.errors import BundleError
from edgeomni.runtimes.ggml.files import REMEDY, Expected
from edgeomni.spec import CodecSpec

_LONGEST_WINDOW = 1 << 14
"""Latents that a codec's transformer looks back at; Mimi's has 250."""
_FLOAT, _STORED = ("F32",), ("F32", "F16")
Named = tuple[str, Expected]


def expected_tensors(meta: GgufCodecMeta, spec: CodecSpec) -> dict[str, Expected]:
    """Name -> shape and types, for every tensor of codec.gguf.

    Raises BundleError for layers that do not follow one another, or do not make this codec's samples of its ids.
    """
    _check_levels(meta, spec)
    widths = {level.group: level.width for level in meta.levels}
    channels, scale = _checked(meta.layers, sum(widths.values()))
    if (channels, scale) != (1, spec.hop):
        raise _odd(f"its layers give {channels} channels of {scale} samples per latent, not one of {spec.hop}")
    found = {f"lookup.{i}": Expected((level.rows, level.width), _STORED) for i, level in enumerate(meta.levels)}
    named = list(_layers(meta.layers))
    if len(named) + len(found) != len(found | dict(named)):
        raise _odd("two of its layers have the same name")
    return found | dict(named)


def _check_levels(meta: GgufCodecMeta, spec: CodecSpec) -> None:
    if tuple(level.stride for level in meta.levels) != spec.vq_strides:
        raise _odd(f"its levels hold ids for {[level.stride for level in meta.levels]} latents, not {spec.vq_strides}")
    if any(level.rows < spec.codebook_size or not level.width for level in meta.levels):
        raise _odd(f"its tables have fewer than {spec.codebook_size} rows")
    for level in meta.levels:
        if any(level.group == other.group and level.width != other.width for other in meta.levels):
            raise _odd("tables that are summed have different widths")


def _checked(layers: Sequence[CodecLayer], channels: int) -> tuple[int, int]:
    """The channels behind the layers and the samples that they make of one; raises BundleError for what cannot be."""
    scale = 1
    for layer in layers:
        if layer.inputs != channels or not layer.outputs:
            raise _odd(f"layer {layer.name} takes {layer.inputs} channels and is given {channels}")
        _check_sizes(layer)
        if layer.op == "residual":
            inner, inner_scale = _checked(layer.body, channels)
            beside = channels if layer.shortcut is None else _checked([layer.shortcut], channels)[0]
            if (inner, beside, inner_scale) != (layer.outputs, layer.outputs, 1) or not layer.body:
                raise _odd(f"the two ways through layer {layer.name} do not meet")
        channels, scale = layer.outputs, scale * (layer.stride if layer.op == "up" else 1)
    return channels, scale


def _check_sizes(layer: CodecLayer) -> None:
    same = layer.inputs == layer.outputs
    heads = layer.heads * layer.head_dim
    span, blocks = (layer.taps - 1) * layer.dilation, layer.taps * layer.stride
    fits = {
        "conv": max(layer.left, layer.right) <= span and (not layer.depthwise or same),
        "up": layer.left == layer.taps - 1
        and layer.right <= layer.taps
        and max(layer.drop, layer.crop) < blocks
        and (not layer.depthwise or same),
        "residual": layer.delay == sum(inner.right for inner in layer.body if inner.op == "conv"),
        "local_attention": same and heads == layer.inputs and layer.window > 0 and layer.head_dim % 2 == 0,
        "transformer": same
        and min(layer.heads, layer.kv_heads, layer.window, layer.hidden, layer.blocks) > 0
        and layer.heads % max(1, layer.kv_heads) == 0
        and layer.head_dim % 2 == 0
        and layer.head_dim > 0
        and layer.window <= _LONGEST_WINDOW,
    }
    if not fits.get(layer.op, same):
        raise _odd(f"the sizes of layer {layer.name} do not fit together")


def _layers(layers: Sequence[CodecLayer]) -> Iterator[Named]:
    for layer in layers:
        if layer.op == "residual":
            yield from _layers(layer.body)
            yield from [] if layer.shortcut is None else _layers([layer.shortcut])
        else:
            yield from ((f"{layer.name}.{name}", expected) for name, expected in _own(layer))


def _own(layer: CodecLayer) -> Iterator[Named]:
    """What exporters/gguf/codec.py stores of one layer."""
    n, m = layer.outputs, layer.inputs
    if layer.op == "conv":
        yield "weight", Expected((layer.taps, n), _FLOAT) if layer.depthwise else Expected((n, layer.taps * m), _STORED)
    elif layer.op == "up" and layer.depthwise:
        yield "weight", Expected((layer.taps * layer.stride, n), _FLOAT)
    elif layer.op == "up":
        yield "weight", Expected((layer.stride * n, layer.taps * m), _STORED)
    elif layer.op == "snake":
        yield "alpha", Expected((n,), _FLOAT)
    elif layer.op == "noise":
        yield "weight", Expected((n, n), _STORED)
    elif layer.op == "local_attention":
        yield from (("norm.gain", Expected((n,), _FLOAT)), ("norm.bias", Expected((n,), _FLOAT)))
        yield from (("qkv.weight", Expected((3 * n, n), _STORED)), ("out.weight", Expected((n, n), _STORED)))
        yield from ((name, Expected((layer.window, layer.head_dim), _FLOAT)) for name in ("cos", "sin"))
    elif layer.op == "transformer":
        yield "inv_freq", Expected((layer.head_dim // 2,), _FLOAT)
        for i in range(layer.blocks):
            yield from ((f"{i}.{name}", expected) for name, expected in _block(layer))
    if layer.op in ("conv", "up") and layer.bias:
        yield "bias", Expected((n,), _FLOAT)


def _block(layer: CodecLayer) -> Iterator[Named]:
    n, attended = layer.inputs, layer.heads * layer.head_dim
    qkv = attended + 2 * layer.kv_heads * layer.head_dim
    yield from ((f"{norm}.{kind}", Expected((n,), _FLOAT)) for norm in ("norm1", "norm2") for kind in ("gain", "bias"))
    for name, shape in (
        ("qkv", (qkv, n)),
        ("out", (n, attended)),
        ("fc1", (layer.hidden, n)),
        ("fc2", (n, layer.hidden)),
    ):
        yield f"{name}.weight", Expected(shape, _STORED)
    if layer.bias:
        yield from (("qkv.bias", Expected((qkv,), _FLOAT)), ("out.bias", Expected((n,), _FLOAT)))


def _odd(what: str) -> BundleError:
    return BundleError(f"the codec's description in bundle.json is of no codec: {what}; {REMEDY}")
