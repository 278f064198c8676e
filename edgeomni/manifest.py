"""The types of bundle.json: what each key holds, and the rules that a manifest keeps within itself.

docs/bundle.md describes the same for people. A key that is new here raises the minor version of SCHEMA, a change that
older readers would misunderstand the major one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from msgspec import Meta

from .codec_layers import CodecLayer, CodecLevel
from .engines import COMPONENTS
from .errors import BundleError
from .schema import Source, below, is_newer, short, typed
from .spec import OmniSpec

SCHEMA = "2.2"
REMEDY = "export the checkpoint again, or copy the bundle again"

Count = Annotated[int, Meta(ge=0, le=1 << 40)]
"""A number of bytes, rows, samples or steps; the upper bound (10^12) only keeps sums within 64 bits."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
MOST_FILES = 1000
"""Of one component, and as many graphs; real components have fewer than ten."""
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
class FileEntry:
    """One file of a component, its path relative to the bundle, with '/' between parts."""

    path: str
    size: Count
    sha256: Sha256

    def __post_init__(self) -> None:
        check_path(self.path)


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; a dimension is a number, or a name where it varies."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class GraphEntry:
    """One graph that an engine opens: its file and its signature."""

    path: str
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_path(self.path)


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


@dataclass
class Component:
    """What runs one of encoder, llm, codec.

    `scheme` maps tensor groups to how they are stored ("body": "int4_b32"); `graphs` maps a graph's role to its
    file and signature; `meta` is what the engine's adapter needs beyond that, as META types it.
    """

    name: str
    engine: str
    format: str
    precision: str
    scheme: dict[str, str]
    graphs: Annotated[dict[str, GraphEntry], Meta(max_length=MOST_FILES)]
    meta: dict[str, Any] = field(default_factory=dict)
    files: Annotated[list[FileEntry], Meta(max_length=MOST_FILES)] = field(default_factory=list)

    def opened(self) -> dict[str, str]:
        """What the adapter opens beside graphs' external data: "graph body" or "table text" -> path."""
        tables = self.meta.get("tables", {})
        paths = {f"graph {role}": graph.path for role, graph in self.graphs.items()}
        paths |= {f"engine {i}": str(engine["path"]) for i, engine in enumerate(self.meta.get("engines", []))}
        return paths | {f"table {name}": str(table["file"]) for name, table in tables.items()}


Alternatives = Annotated[list[Component], Meta(max_length=16)]


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


@dataclass(frozen=True)
class OpenVinoEncoderMeta:
    """Nothing beyond the graph."""


@dataclass(frozen=True)
class OpenVinoLlmMeta:
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
    """`targets`: the GPUs that the export was asked for; `engines`: those built, which may be none."""

    targets: Annotated[list[str], Meta(max_length=64)]
    engines: Annotated[list[EngineFile], Meta(max_length=MOST_FILES)]
    recipes: Annotated[dict[str, EngineRecipe], Meta(max_length=MOST_FILES)]


@dataclass(frozen=True)
class TensorRtLlmMeta(TensorRtMeta):
    """`context`: frames that the caches hold, no more and no fewer; `prefill`: most frames appended at once; `kv`: what
    keys and values are held in."""

    context: Annotated[int, Meta(ge=1, le=1 << 20)]
    prefill: Annotated[int, Meta(ge=1, le=1 << 20)]
    kv: Literal["float16", "float"]
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


@dataclass(frozen=True)
class Provenance:
    """The known keys of `provenance`; others may stand beside them, each a text or a number."""

    weights: Literal["trained", "random"] | None = None
    kind: str = ""
    source: str = ""
    source_hash: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    command: str = ""


@dataclass
class Manifest:
    spec: OmniSpec
    components: dict[str, Component]
    tokenizer: FileEntry | None
    provenance: dict[str, Any]
    licences: dict[str, str]
    gate: dict[str, Any]
    reference: FileEntry | None = None
    """What the export gave when it was judged, for judging it again on the device."""
    alternatives: Annotated[dict[str, Alternatives], Meta(max_length=16)] = field(default_factory=dict)
    """Component -> the same component in other formats, each judged in the bundle that it came from."""
    schema: str = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Manifest:
        """Raises BundleError that names `where` and the key at fault.

        Unknown keys are refused, unless the document's minor version is newer than SCHEMA: then they are told once.
        """
        source = Source(where, BundleError, REMEDY)
        newer = is_newer(data.get("schema"), SCHEMA, source)
        manifest = typed(data, cls, source, newer=newer)
        check_provenance(manifest.provenance, source)
        components = data["components"]
        if missing := [name for name in COMPONENTS if name not in components]:
            raise source.fault(f"{', '.join(missing)} missing", "$.components")
        if extra := sorted(set(components) - set(COMPONENTS)):
            raise source.fault(f"unknown component(s) {', '.join(map(short, extra))}", "$.components")
        for name in COMPONENTS:
            _check_component(manifest.components[name], name, manifest.spec, source, newer)
        _check_alternatives(manifest, source, newer)
        return manifest


def check_provenance(provenance: dict[str, Any], source: Source) -> None:
    """Raises the source's error for a known key of another type, or an unknown one that is no text or number."""
    known = {key: value for key, value in provenance.items() if key in Provenance.__dataclass_fields__}
    typed(known, Provenance, source, path="$.provenance")
    for key in set(provenance) - set(known):
        if not isinstance(provenance[key], (str, int, float)):
            raise source.fault("must be a text or a number", below("$.provenance", key))


def _check_alternatives(manifest: Manifest, source: Source, newer: bool) -> None:
    """Each is what its component is, in a format that the component has not had yet."""
    for name, entries in manifest.alternatives.items():
        path = below("$.alternatives", name)
        if name not in COMPONENTS:
            raise source.fault(f"unknown component {short(name)}", "$.alternatives")
        formats = [manifest.components[name].format, *(entry.format for entry in entries)]
        if twice := sorted({kind for kind in formats if formats.count(kind) > 1}):
            raise source.fault(f"has the format {short(twice[0])} twice", path)
        for i, entry in enumerate(entries):
            _check_component(entry, name, manifest.spec, source, newer, f"{path}[{i}]")


def _check_component(
    component: Component, name: str, spec: OmniSpec, source: Source, newer: bool, path: str = ""
) -> None:
    path = path or below("$.components", name)
    if component.name != name:
        raise source.fault(f"is {short(component.name)}, not {short(name)}", f"{path}.name")
    typed_meta = META.get((component.format, name))
    if typed_meta is None:
        known = {key: value for key, value in component.meta.items() if key == "tables"}
        typed(known, AnyMeta, source, path=f"{path}.meta")
        return
    meta = typed(component.meta, typed_meta, source, newer=newer, path=f"{path}.meta")
    tts = {"tts"} if name == "llm" and spec.tts_layers else set[str]()
    if missing := sorted((ROLES[component.format, name] | tts) - set(component.graphs)):
        raise source.fault(f"{', '.join(missing)} missing", f"{path}.graphs")
    if isinstance(meta, (OnnxLlmMeta, OpenVinoLlmMeta, TensorRtLlmMeta)):
        _check_tables(meta, spec, source, f"{path}.meta.tables")


_Tables = OnnxLlmMeta | OpenVinoLlmMeta | TensorRtLlmMeta


def _check_tables(meta: _Tables, spec: OmniSpec, source: Source, path: str) -> None:
    layout = spec.layout
    for name, rows in (("text", layout.text_vocab), ("audio", layout.streams * layout.audio_vocab)):
        table: EmbeddingTable = getattr(meta.tables, name)
        if (table.rows, table.width) != (rows, spec.body.width):
            raise source.fault(
                f"{table.rows} rows of {table.width}, but the spec has {rows} of {spec.body.width}", f"{path}.{name}"
            )


def _allocatable(shape: list[int]) -> None:
    if len(shape) > 8 or math.prod(shape) > _MOST_ELEMENTS:
        raise BundleError(f"has the shape {short(str(shape))}, which no codec state has")
