"""Reads a loaded SNAC or MimiModel into the layer program of codec_ops.py: weight norm and linear parts folded.

SNAC: arXiv 2410.14411, package `snac` (layers.py, vq.py, attention.py). Mimi: arXiv 2410.00037, transformers
(modeling_mimi.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from snac import SNAC
from snac.attention import LocalMHA
from snac.layers import DecoderBlock, NoiseBlock, ResidualUnit, Snake1d
from torch import nn
from transformers import MimiModel

from ..arrays import F32
from ..errors import CheckpointError
from ..spec import CodecSpec
from .codec_plan import (
    Block,
    CodecPlan,
    Conv,
    Elu,
    LocalAttention,
    Lookup,
    Noise,
    Op,
    Residual,
    Snake,
    Tanh,
    Transformer,
    Up,
)

_MIMI_NEEDS = {"pad_mode": "constant", "hidden_act": "gelu", "use_causal_conv": True, "trim_right_ratio": 1.0}


def read_plan(codec: nn.Module, spec: CodecSpec) -> CodecPlan:
    """The decoder of `codec` for the levels that `spec` has. Raises CheckpointError for what cannot be streamed."""
    if isinstance(codec, SNAC):
        return CodecPlan(spec, tuple(_Snac(codec, spec).ops()))
    if isinstance(codec, MimiModel):
        return CodecPlan(spec, tuple(_mimi(codec, spec)))
    raise CheckpointError(f"a codec of type {type(codec).__name__} cannot be streamed; use SNAC or Mimi")


def halved(codec_plan: CodecPlan) -> CodecPlan:
    """The plan with its weights rounded to half precision, as an fp16 export stores them (biases stay float)."""
    return dataclasses.replace(codec_plan, ops=tuple(_halved(op) for op in codec_plan.ops))


STORED_HALF = frozenset({"weight", "taps", "tables", "qkv", "out", "fc1", "fc2"})
"""Fields of layers that an fp16 export stores in half precision."""


def _halved(op: Any) -> Any:
    def change(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _halved(value)
        if isinstance(value, tuple) and name not in ("norm", "norm1", "norm2"):
            return tuple(change(name, v) for v in value)
        half = name in STORED_HALF and isinstance(value, np.ndarray)
        return value.astype(np.float16).astype(np.float32) if half else value

    return dataclasses.replace(op, **{f.name: change(f.name, getattr(op, f.name)) for f in dataclasses.fields(op)})


def _array(tensor: Any) -> F32:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _bias(layer: nn.Module) -> F32 | None:
    return None if layer.bias is None else _array(layer.bias)


def _up(name: str, layer: nn.ConvTranspose1d, start: int, length_offset: int) -> Up:
    """`layer` whose output for T inputs is samples start .. start + T * stride + length_offset of the full one."""
    if layer.dilation != (1,) or length_offset:
        raise CheckpointError(f"codec layer {name}: an upsampling that does not give stride samples per input")
    weight, stride, groups = _array(layer.weight), layer.stride[0], layer.groups
    blocks = -(-weight.shape[-1] // stride)
    weight = np.pad(weight, ((0, 0), (0, 0), (0, blocks * stride - weight.shape[-1])))
    right = -(-start // stride)
    return Up(name, _taps(weight, blocks, groups), _bias(layer), start, right * stride - start, right)


def _taps(weight: F32, blocks: int, groups: int) -> F32:
    """weight [in, out / groups, blocks * stride] -> taps [blocks, stride, out, in], oldest input first."""
    inputs, per_group, length = weight.shape
    oldest_first = weight.reshape(inputs, per_group, blocks, length // blocks)[:, :, ::-1]
    if groups == inputs and per_group == 1:
        return np.ascontiguousarray(oldest_first[:, 0].transpose(1, 2, 0))
    taps = np.zeros((blocks, length // blocks, per_group * groups, inputs), np.float32)
    rows, columns = per_group, inputs // groups
    for g in range(groups):
        into, out = slice(g * columns, (g + 1) * columns), slice(g * rows, (g + 1) * rows)
        taps[:, :, out, into] = oldest_first[into].transpose(2, 3, 1, 0)
    return taps


class _Snac:
    def __init__(self, codec: SNAC, spec: CodecSpec) -> None:
        self.codec, self.spec, self.noises = codec, spec, 0

    def ops(self) -> Iterator[Op]:
        layers = list(self.codec.decoder.model)
        depthwise = layers[0].groups > 1
        yield from self._front(layers[:2] if depthwise else layers[:1])
        for i, layer in enumerate(layers[2 if depthwise else 1 :]):
            yield from self._layer(f"layers.{i}", layer)

    def _front(self, convs: list[nn.Conv1d]) -> list[Op]:
        """Codebooks, and all that is linear after them as one convolution.

        The projections' biases enter as weights of a channel of ones, so that they, too, end where the signal does.
        """
        levels = self.codec.quantizer.quantizers
        tables = [_array(q.codebook.weight) for q in levels]
        tables[-1] = np.append(tables[-1], np.ones((len(tables[-1]), 1), np.float32), axis=1)
        parts = [_array(q.out_proj.weight)[:, :, 0] for q in levels]
        parts.append(np.sum([_array(q.out_proj.bias) for q in levels], axis=0)[:, None])
        into = np.concatenate(parts, axis=1).astype(np.float64)
        first = _array(convs[0].weight)
        if len(convs) == 2:
            out = _array(convs[1].weight)[:, :, 0].astype(np.float64)
            weight = np.einsum("oc,ck,ci->oik", out, first[:, 0], into, optimize=True)
            bias = (out @ _array(convs[0].bias) + _array(convs[1].bias)).astype(np.float32)
        else:
            weight, bias = np.einsum("ock,ci->oik", first, into, optimize=True), _array(convs[0].bias)
        pad = convs[0].padding[0]
        levels_of = tuple(range(len(tables)))
        return [
            Lookup("codebooks", tuple(tables), self.spec.vq_strides, levels_of),
            Conv("front", weight.astype(np.float32), bias, pad, pad),
        ]

    def _layer(self, name: str, layer: nn.Module) -> Iterator[Op]:
        if isinstance(layer, DecoderBlock):
            for i, inner in enumerate(layer.block):
                yield from self._layer(f"{name}.{i}", inner)
        elif isinstance(layer, ResidualUnit):
            body = tuple(op for i, inner in enumerate(layer.block) for op in self._layer(f"{name}.{i}", inner))
            yield Residual(name, body, layer.block[0].alpha.numel())
        elif isinstance(layer, NoiseBlock):
            yield Noise(name, _array(layer.linear.weight)[:, :, 0], self.noises)
            self.noises += 1
        elif isinstance(layer, nn.ConvTranspose1d):
            (pad,), (stride,), (kernel,), (more,) = layer.padding, layer.stride, layer.kernel_size, layer.output_padding
            yield _up(name, layer, pad, kernel - stride - 2 * pad + more)
        else:
            yield self._simple(name, layer)

    def _simple(self, name: str, layer: nn.Module) -> Op:
        if isinstance(layer, Snake1d):
            return Snake(name, _array(layer.alpha).reshape(-1))
        if isinstance(layer, nn.Conv1d) and layer.stride == (1,):
            pad = layer.padding[0]
            return Conv(name, _array(layer.weight), _bias(layer), pad, pad, layer.dilation[0], layer.groups)
        if isinstance(layer, nn.Tanh):
            return Tanh(name)
        if isinstance(layer, LocalMHA):
            return _local_attention(name, layer)
        raise CheckpointError(f"codec layer {name}: a {type(layer).__name__} cannot be streamed")


def _local_attention(name: str, layer: LocalMHA) -> LocalAttention:
    rotary, width = layer.rel_pos, layer.to_out.weight.shape[0]
    head = width // layer.heads
    angles = np.zeros((layer.window_size, head))
    if rotary is not None:
        if rotary.use_xpos:
            raise CheckpointError(f"codec layer {name}: xpos scaling cannot be streamed")
        angles = np.tile(np.outer(np.arange(layer.window_size), rotary.inv_freq.cpu().numpy()), 2)
    return LocalAttention(
        name,
        layer.window_size,
        layer.heads,
        (_array(layer.norm.weight), _array(layer.norm.bias)),
        layer.norm.eps,
        _array(layer.to_qkv.weight),
        _array(layer.to_out.weight),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
    )


def _mimi(codec: MimiModel, spec: CodecSpec) -> Iterator[Op]:
    config, decoder = codec.config, codec.decoder
    for field, value in _MIMI_NEEDS.items():
        if getattr(config, field) != value:
            raise CheckpointError(f"Mimi with {field} {getattr(config, field)!r} cannot be streamed, only {value!r}")
    yield from _mimi_front(codec, len(spec.vq_strides))
    if decoder.upsample is not None:
        yield _mimi_up("upsample", decoder.upsample)
    yield _mimi_transformer(decoder.decoder_transformer)
    for i, layer in enumerate(decoder.decoder_seanet.layers):
        yield _mimi_layer(f"layers.{i}", layer)


def _mimi_front(codec: MimiModel, levels: int) -> list[Op]:
    split = codec.quantizer
    parts = [split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer]
    tables: list[F32] = []
    groups: list[int] = []
    projections: list[F32] = []
    for group, part in enumerate(parts):
        used = part.layers[: levels - len(tables)]
        tables += [_array(layer.codebook.embed) for layer in used]
        groups += [group] * len(used)
        if used:
            width = codec.config.hidden_size
            projections.append(
                np.eye(width, dtype=np.float32)[:, :, None]
                if part.output_proj is None
                else _array(part.output_proj.weight)
            )
    return [
        Lookup("codebooks", tuple(tables), (1,) * levels, tuple(groups)),
        Conv("front", np.concatenate(projections, axis=1), None),
    ]


def _mimi_up(name: str, layer: Any) -> Up:
    conv = layer.conv
    return _up(name, conv, 0, conv.kernel_size[0] - conv.stride[0] - layer.padding_right)


def _mimi_conv(name: str, layer: Any) -> Conv:
    conv = layer.conv
    return Conv(name, _array(conv.weight), _bias(conv), int(layer.padding_total), 0, conv.dilation[0], conv.groups)


def _mimi_layer(name: str, layer: Any) -> Op:
    if isinstance(layer, nn.ELU):
        return Elu(name)
    if hasattr(layer, "padding_total"):
        return _mimi_conv(name, layer)
    if hasattr(layer, "conv"):
        return _mimi_up(name, layer)
    body = tuple(_mimi_layer(f"{name}.{i}", inner) for i, inner in enumerate(layer.block))
    shortcut = None if isinstance(layer.shortcut, nn.Identity) else _mimi_conv(f"{name}.shortcut", layer.shortcut)
    return Residual(name, body, layer.block[1].in_channels, shortcut)


def _mimi_transformer(module: Any) -> Transformer:
    config, rotary = module.config, module.rotary_emb
    if rotary.rope_type != "default":
        raise CheckpointError(f"Mimi with rotary positions of type {rotary.rope_type!r} cannot be streamed")
    return Transformer(
        "transformer",
        tuple(_mimi_block(f"transformer.{i}", layer) for i, layer in enumerate(module.layers)),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.sliding_window,
        config.norm_eps,
        _array(rotary.inv_freq),
        float(rotary.attention_scaling),
    )


def _mimi_block(name: str, layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    scale1, scale2 = _array(layer.self_attn_layer_scale.scale), _array(layer.mlp_layer_scale.scale)
    biased = attention.o_proj.bias is not None
    return Block(
        name,
        _norm(layer.input_layernorm),
        np.concatenate([_array(p.weight) for p in parts]),
        np.concatenate([_array(p.bias) for p in parts]) if biased else None,
        _array(attention.o_proj.weight) * scale1[:, None],
        _array(attention.o_proj.bias) * scale1 if biased else None,
        _norm(layer.post_attention_layernorm),
        _array(mlp.fc1.weight),
        _array(mlp.fc2.weight) * scale2[:, None],
    )


def _norm(layer: nn.LayerNorm) -> tuple[F32, F32]:
    return _array(layer.weight), _array(layer.bias)
