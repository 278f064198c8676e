"""What the `meta` of a component holds in bundle.json, by format and component: what its engine has to know."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from msgspec import Meta

from .codec_layers import CodecLayer, CodecLevel
from .errors import BundleError
from .schema import short

Count = Annotated[int, Meta(ge=0, le=1 << 40)]
"""A number of bytes, rows, samples or steps; the upper bound (10^12) only keeps sums within 64 bits."""
MOST_FILES = 1000
"""Of one component, and as many graphs; real components have fewer than ten."""
_MOST_LAYERS = 100_000
_MOST_ELEMENTS = 1 << 28
"""Of one codec state, which the device allocates (1 GiB of float32); SNAC's largest has 10^5."""


def check_path(path: str) -> None:
    """Raises BundleError unless `path` is relative, goes down only, and is spelled in the one canonical way."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path:
        raise BundleError(f"path {short(path)} leaves the bundle; do not trust this bundle")
    if len(path) > 1024 or not path.isprintable() or path == "." or parts.as_posix() != path:
        raise BundleError(f"path {short(path)} is not spelled as the path of a file; do not trust this bundle")


@dataclass(frozen=True)
class Place:
    """Where an array lies in a file: from byte `offset` on, row by row."""

    offset: Count
    dtype: str
    shape: list[Count]


@dataclass(frozen=True)
class EmbeddingTable:
    """The rows of one embedding: codes and, where they are quantized, scales, in one file of the component."""

    file: str
    rows: Count
    width: Count
    scheme: str
    codes: Place
    scales: Place | None = None

    def __post_init__(self) -> None:
        check_path(self.file)


@dataclass(frozen=True)
class OnnxEncoderMeta:
    flavour: str


@dataclass(frozen=True)
class OnnxTables:
    text: EmbeddingTable
    audio: EmbeddingTable


@dataclass(frozen=True)
class OnnxLlmMeta:
    """`attention` says which position inputs the body has, `context` the frames that its rotary caches cover."""

    flavour: str
    attention: Literal["gqa", "scatter"]
    context: Annotated[int, Meta(ge=1, le=1 << 20)]
    tables: OnnxTables


@dataclass(frozen=True)
class CodecState:
    """An input state.<name> of the streaming graph, zeros of this shape at first."""

    name: str
    shape: list[Count]
    dtype: Literal["float32", "int64"]

    def __post_init__(self) -> None:
        _allocatable(self.shape)


@dataclass(frozen=True)
class CodecTail:
    """An input of zeros [1, channels, length] at the stream's end."""

    name: str
    channels: Count
    length: Count

    def __post_init__(self) -> None:
        _allocatable([self.channels, self.length])


@dataclass(frozen=True)
class CodecBound:
    """An input that is `then` in the first or the last push, `otherwise` in others."""

    name: str
    push: Literal["first", "last"]
    then: int
    otherwise: int


@dataclass(frozen=True)
class NoisePace:
    """After N latents a noise input has seen N * scale - lag samples."""

    scale: Annotated[int, Meta(ge=1, le=1 << 24)]
    lag: Count


@dataclass(frozen=True)
class CodecMeta:
    """What a runtime feeds to the streaming graph of exporters/onnx/codec.py."""

    first_push: Annotated[int, Meta(ge=1, le=1 << 20)]
    push_multiple: Annotated[int, Meta(ge=1, le=1 << 20)]
    lag_samples: Count
    states: list[CodecState]
    tails: list[CodecTail]
    bounds: list[CodecBound]
    noise: list[NoisePace]


@dataclass(frozen=True)
class OnnxCodecMeta(CodecMeta):
    flavour: str


@dataclass(frozen=True, kw_only=True)
class OpenVinoArithmetic:
    """What the gate has judged, so that a CPU may compute with it: `compute`, the float type between layers, and
    `int8_inputs`, inputs of compressed layers rounded to 8 bits."""

    compute: Literal["f32", "bf16", "f16"] = "f32"
    int8_inputs: bool = False


@dataclass(frozen=True)
class OpenVinoEncoderMeta(OpenVinoArithmetic):
    """Nothing else beyond the graph."""


@dataclass(frozen=True)
class OpenVinoLlmMeta(OpenVinoArithmetic):
    """`context`: the frames that its rotary caches cover."""

    context: Annotated[int, Meta(ge=1, le=1 << 20)]
    tables: OnnxTables


@dataclass(frozen=True)
class GgufLlmMeta:
    """`context`: the frames that the model was made for; `kv`: what keys and values are held in; `imatrix`: the file by
    which the body was quantized."""

    context: Annotated[int, Meta(ge=1, le=1 << 20)]
    kv: Literal["f16", "f32"]
    imatrix: str | None = None


@dataclass(frozen=True)
class GgufEncoderMeta:
    """Nothing: the spec says it all."""


@dataclass(frozen=True)
class GgufCodecMeta:
    """How the decoder runs behind its input (as OnnxCodecMeta has it), and what it is built of."""

    first_push: Annotated[int, Meta(ge=1, le=1 << 20)]
    push_multiple: Annotated[int, Meta(ge=1, le=1 << 20)]
    lag_samples: Count
    noise: list[NoisePace]
    levels: Annotated[list[CodecLevel], Meta(max_length=1024)]
    layers: Annotated[list[CodecLayer], Meta(max_length=1024)]


Shape = Annotated[list[Annotated[int, Meta(ge=1, le=1 << 31)]], Meta(max_length=8)]
Profile = dict[str, Annotated[list[Shape], Meta(min_length=3, max_length=3)]]
"""Input -> its least, usual and largest shape."""


@dataclass(frozen=True)
class EngineRecipe:
    """How a graph's TensorRT engine is built (tensorrt_builder.Recipe)."""

    profiles: Annotated[list[Profile], Meta(max_length=8)]
    tf32: bool


@dataclass(frozen=True)
class EngineFile:
    """An engine built from the graph `role`, by which package of which version, for which GPUs."""

    role: str
    path: str
    package: Literal["tensorrt_rtx", "tensorrt"]
    version: str
    targets: Annotated[list[str], Meta(max_length=64)]

    def __post_init__(self) -> None:
        check_path(self.path)


@dataclass(frozen=True)
class TensorRtMeta:
    """`targets`: the GPUs that the export was asked for; `engines`: those built, which may be none.

    `input_scales`: linear layer -> the scale by which its inputs are rounded, at precisions that round them.
    """

    targets: Annotated[list[str], Meta(max_length=64)]
    engines: Annotated[list[EngineFile], Meta(max_length=MOST_FILES)]
    recipes: Annotated[dict[str, EngineRecipe], Meta(max_length=MOST_FILES)]
    input_scales: Annotated[dict[str, Annotated[float, Meta(gt=0)]], Meta(max_length=_MOST_LAYERS)] = field(
        default_factory=dict, kw_only=True
    )


@dataclass(frozen=True)
class TensorRtLlmMeta(TensorRtMeta):
    """`context`: frames that the caches hold, no more and no fewer; `prefill`: most frames appended at once; `kv`: what
    keys and values are held in."""

    context: Annotated[int, Meta(ge=1, le=1 << 20)]
    prefill: Annotated[int, Meta(ge=1, le=1 << 20)]
    kv: Literal["float16", "bfloat16", "float"]
    tables: OnnxTables


@dataclass(frozen=True)
class TensorRtCodecMeta(TensorRtMeta):
    """How the decoder runs behind its input, its states of fixed size, and the most latents that a push holds."""

    first_push: Annotated[int, Meta(ge=1, le=1 << 20)]
    push_multiple: Annotated[int, Meta(ge=1, le=1 << 20)]
    lag_samples: Count
    states: list[CodecState]
    noise: list[NoisePace]
    largest_push: Annotated[int, Meta(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class AnyMeta:
    """Of a format that this version knows nothing of beyond the tables."""

    tables: dict[str, EmbeddingTable] = field(default_factory=dict)


_ONNX_META: dict[str, type[Any]] = {"encoder": OnnxEncoderMeta, "llm": OnnxLlmMeta, "codec": OnnxCodecMeta}
META: dict[tuple[str, str], type[Any]] = {("onnx", name): kind for name, kind in _ONNX_META.items()}
META["gguf", "encoder"] = GgufEncoderMeta
META["gguf", "llm"] = GgufLlmMeta
META["gguf", "codec"] = GgufCodecMeta
META |= {
    ("openvino", "encoder"): OpenVinoEncoderMeta,
    ("openvino", "llm"): OpenVinoLlmMeta,
    ("openvino", "codec"): CodecMeta,
    ("tensorrt", "encoder"): TensorRtMeta,
    ("tensorrt", "llm"): TensorRtLlmMeta,
    ("tensorrt", "codec"): TensorRtCodecMeta,
}
"""(format, component) -> what its `meta` holds."""

ROLES = {
    ("onnx", "encoder"): {"encoder"},
    ("onnx", "llm"): {"body", "text_head", "audio_head"},
    ("onnx", "codec"): {"codec"},
    ("gguf", "encoder"): {"encoder"},
    ("gguf", "llm"): {"body", "heads"},
    ("gguf", "codec"): {"codec"},
    ("openvino", "encoder"): {"encoder"},
    ("openvino", "llm"): {"body", "text_head", "audio_head"},
    ("openvino", "codec"): {"codec"},
    ("tensorrt", "encoder"): {"encoder"},
    ("tensorrt", "llm"): {"body", "text_head", "audio_head"},
    ("tensorrt", "codec"): {"codec"},
}
"""(format, component) -> the graphs or files without which it cannot run."""

WithTables = OnnxLlmMeta | OpenVinoLlmMeta | TensorRtLlmMeta


def _allocatable(shape: list[int]) -> None:
    if len(shape) > 8 or math.prod(shape) > _MOST_ELEMENTS:
        raise BundleError(f"has the shape {short(str(shape))}, which no codec state has")
