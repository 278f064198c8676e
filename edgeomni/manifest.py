"""The types of bundle.json: what each key holds, and the rules that a manifest keeps within itself.

docs/bundle.md describes the same for people. A key that is new here raises the minor version of SCHEMA, a change that
older readers would misunderstand the major one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from .component_meta import (
    META,
    MOST_FILES,
    ROLES,
    AnyMeta,
    Count,
    EmbeddingTable,
    OnnxLlmMeta,
    OpenVinoLlmMeta,
    TensorRtLlmMeta,
    WithTables,
    check_path,
)
from .engines import COMPONENTS
from .errors import BundleError
from .schema import Source, below, is_newer, short, typed
from .spec import OmniSpec

SCHEMA = "2.2"
REMEDY = "export the checkpoint again, or copy the bundle again"

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


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


def _check_tables(meta: WithTables, spec: OmniSpec, source: Source, path: str) -> None:
    layout = spec.layout
    for name, rows in (("text", layout.text_vocab), ("audio", layout.streams * layout.audio_vocab)):
        table: EmbeddingTable = getattr(meta.tables, name)
        if (table.rows, table.width) != (rows, spec.body.width):
            raise source.fault(
                f"{table.rows} rows of {table.width}, but the spec has {rows} of {spec.body.width}", f"{path}.{name}"
            )
