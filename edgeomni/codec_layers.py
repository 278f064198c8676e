"""A codec's decoder as a manifest describes it: layers without their tensors, which a runtime builds its graph from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

Size = Annotated[int, Meta(ge=0, le=1 << 20)]


@dataclass(frozen=True)
class CodecLevel:
    """One level's codebook: tensor `lookup.<level>` [rows, width], each row held for `stride` latents."""

    rows: Size
    width: Size
    stride: Annotated[int, Meta(ge=1, le=1 << 16)]
    group: Size


@dataclass(frozen=True)
class CodecLayer:
    """One layer of a codec's decoder, as edgeomni/model/codec_plan.py describes them, without its tensors.

    Those are found in the file by the layer's name and their own: "layers.2.1.weight". `delay` is a residual's,
    `index` a noise block's; `window` to `rotary_scale` are those of attention layers, `blocks` are a transformer's.
    """

    op: Literal["conv", "up", "snake", "elu", "tanh", "noise", "residual", "local_attention", "transformer"]
    name: Annotated[str, Meta(min_length=1, max_length=40)]
    inputs: Size
    outputs: Size
    taps: Annotated[int, Meta(ge=1, le=1 << 12)] = 1
    stride: Annotated[int, Meta(ge=1, le=1 << 12)] = 1
    dilation: Annotated[int, Meta(ge=1, le=1 << 12)] = 1
    left: Size = 0
    right: Size = 0
    drop: Size = 0
    crop: Size = 0
    depthwise: bool = False
    bias: bool = False
    index: Size = 0
    delay: Size = 0
    window: Size = 0
    heads: Size = 0
    kv_heads: Size = 0
    head_dim: Size = 0
    hidden: Size = 0
    blocks: Annotated[int, Meta(ge=0, le=1024)] = 0
    eps: float = 0.0
    rotary_scale: float = 1.0
    body: Annotated[list[CodecLayer], Meta(max_length=64)] = field(default_factory=list)
    shortcut: CodecLayer | None = None
