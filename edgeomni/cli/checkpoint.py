"""What a checkpoint directory holds, read from its configuration and from file headers alone: no torch, no weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SpecError
from ..spec import OmniSpec

OWN_FORMAT = "edgeomni-checkpoint"
PARTS = ("encoder", "llm", "codec")
RUN_CONFIG, RUN_CHECKPOINT = "config.toml", "checkpoint"
RELEASED = ("lit_model.pth", "model_config.yaml")
KINDS = {
    "edgeomni": "EdgeOmni's own layout",
    "preset": "a recipe: the weights are drawn when it is loaded",
    "mini-omni": "the released Mini-Omni layout",
    "parts": "parts to compose a model from",
}
_UNTRAINED = "random, so it answers noise until it is trained"
_COUNTED = ("layers", "heads", "KV heads", "text rows", "frames", "Hz", "codebook entries")
_MOST_HEADER = 100_000_000
"""Bytes: what safetensors itself takes for a header at most."""


@dataclass
class Checkpoint:
    """`sizes`: part -> what it is; `parameters`: part -> numbers stored, of those parts where that can be told."""

    path: Path
    kind: str
    weights: str
    sizes: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    spec: OmniSpec | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """Every file below, by its path in the checkpoint -> bytes."""
        found = sorted(p for p in self.path.rglob("*") if p.is_file())
        return {p.relative_to(self.path).as_posix(): p.stat().st_size for p in found}

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "weights": self.weights,
            "sizes": self.sizes,
            "parameters": self.parameters,
            "spec": self.spec.to_dict() if self.spec else None,
            "provenance": self.provenance,
            "licences": self.licences,
            "files": self.files,
            "size": sum(self.files.values()),
        }


def read(directory: Path) -> Checkpoint:
    """Raises CheckpointError for what is no checkpoint, and for configurations that cannot be read."""
    if (directory / RUN_CONFIG).is_file():  # the folder of a training run stands for the checkpoint in it
        directory = directory / RUN_CHECKPOINT
    config = _json(directory / "config.json", required=False)
    try:
        if config.get("format") == OWN_FORMAT:
            return (_recipe if "preset" in config else _own)(directory, config)
        if any((directory / name).is_file() for name in RELEASED):
            return _released(directory)
        if all((directory / part / "config.json").is_file() for part in PARTS):
            return _parts(directory)
    except SpecError as exc:
        raise CheckpointError(f"{directory}: sizes that contradict each other: {exc}") from exc
    raise CheckpointError(
        f"{directory}: neither a bundle (it has no bundle.json) nor a checkpoint that EdgeOmni knows; make one with "
        "`edgeomni export` or `edgeomni init`"
    )


def _own(directory: Path, config: dict[str, Any]) -> Checkpoint:
    spec = _spec(config, directory)
    provenance = _section(config, "provenance")
    weights = "trained" if provenance.get("weights") == "trained" else _UNTRAINED
    if untrained := provenance.get("untrained"):
        weights = f"not trained yet are {untrained}, so it answers noise until it is trained"
    parameters = Counter[str]()
    for name, count in tensor_sizes(directory / "model.safetensors").items():
        parameters[name.partition(".")[0]] += count
    licences = _section(config, "licences")
    return Checkpoint(directory, "edgeomni", weights, describe(spec), dict(parameters), spec, provenance, licences)


def _recipe(directory: Path, config: dict[str, Any]) -> Checkpoint:
    spec = _spec(config, directory) if "spec" in config else None
    provenance = {"preset": config["preset"], "seed": config.get("seed", 0)}
    sizes = describe(spec) if spec else {}
    return Checkpoint(directory, "preset", _UNTRAINED, sizes, spec=spec, provenance=provenance)


def _released(directory: Path) -> Checkpoint:
    """Sizes that the YAML states. The pickles are not opened, so that parameters and Whisper's sizes are not told."""
    config = _yaml(directory / "model_config.yaml")
    shown = {
        "body": _stated(config, n_layer="layers", n_embd="width", n_head="heads", n_query_groups="KV heads"),
        "tokens": _stated(config, text_vocab_size="text rows", audio_vocab_size="rows per audio stream"),
        "context": _stated(config, block_size="frames"),
        "TTS adapter": _stated(config, post_adapter_layers="layers") if config.get("post_adapter") else "none",
    }
    snac = next((d for d in (directory / "snac", directory) if (d / "config.json").is_file()), directory / "snac")
    codec = _json(snac / "config.json", required=False)
    shown["codec"] = _stated(codec, sampling_rate="Hz", codebook_size="codebook entries", vq_strides="strides")
    needed = (*RELEASED, "tokenizer.json")
    missing = [name for name in needed if not (directory / name).is_file()]
    missing += [] if list(directory.glob("*.pt")) else ["a Whisper *.pt"]
    missing += [] if codec else ["SNAC's config.json"]
    weights = f"incomplete: {', '.join(missing)} missing" if missing else "trained"
    return Checkpoint(directory, "mini-omni", weights, {k: v for k, v in shown.items() if v})


def _parts(directory: Path) -> Checkpoint:
    sizes, parameters = {}, {}
    for part in PARTS:
        config = _json(directory / part / "config.json")
        layers = _stated(config, num_hidden_layers="layers", encoder_layers="layers")
        widths = _stated(config, hidden_size="width", d_model="width", codebook_size="codebook entries")
        sizes[part] = ", ".join(filter(None, [str(config.get("model_type", "snac")), layers, widths]))
        files = sorted((directory / part).glob("*.safetensors"))
        if files:
            parameters[part] = sum(sum(tensor_sizes(f).values()) for f in files)
    weights = "the parts keep theirs; adapter, special tokens and audio rows are new, so it answers noise until trained"
    return Checkpoint(directory, "parts", weights, sizes, parameters)


def describe(spec: OmniSpec) -> dict[str, str]:
    """Part -> its sizes in words."""
    encoder, body, layout, codec = spec.encoder, spec.body, spec.layout, spec.codec
    adapter = f"{spec.adapter.kind}" + (f", hidden {spec.adapter.hidden}" if spec.adapter.hidden else "")
    return {
        "encoder": f"Whisper, {encoder.layers} layers, width {encoder.width}, {spec.front_end.window_s} s window",
        "adapter": adapter,
        "body": f"{body.kind}, {body.layers} layers, width {body.width}, {body.heads} heads, {body.kv_heads} KV heads",
        "TTS adapter": f"{spec.tts_layers} layers" if spec.tts_layers else "none",
        "tokens": f"{layout.text_vocab} text rows, {layout.streams} audio streams of {layout.audio_vocab} rows",
        "context": f"{spec.context} frames",
        "codec": f"{codec.kind}, {codec.sample_rate} Hz, {codec.codebook_size} codebook entries",
        "tasks": ", ".join(spec.tasks),
    }


def tensor_sizes(path: Path) -> dict[str, int]:
    """Tensor -> how many numbers it has, from the header of a safetensors file. Raises CheckpointError."""
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length <= min(_MOST_HEADER, path.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(f.read(length))
        return {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"{path}: no readable safetensors file ({exc}); copy the checkpoint again") from exc


def lines(checkpoint: Checkpoint) -> Iterator[str]:
    """What people read, most important first."""
    size = sum(checkpoint.files.values())
    yield f"{checkpoint.path}: checkpoint, {KINDS[checkpoint.kind]}, {size / 1e6:.2f} MB"
    yield f"weights: {checkpoint.weights}"
    if total := sum(checkpoint.parameters.values()):
        yield f"parameters: {total / 1e6:.2f} million"
    if not checkpoint.sizes:
        yield "sizes: not stated in the files"


def _stated(config: dict[str, Any], **names: str) -> str:
    """The keys that are there, in words: "24 layers, width 896"."""
    found = [(word, config[key]) for key, word in names.items() if config.get(key) is not None]
    return ", ".join(f"{value} {word}" if word in _COUNTED else f"{word} {value}" for word, value in found)


def _spec(config: dict[str, Any], directory: Path) -> OmniSpec:
    if not isinstance(config.get("spec"), dict):
        raise CheckpointError(f"{directory / 'config.json'}: section spec is missing; copy the checkpoint again")
    return OmniSpec.from_dict(config["spec"])


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        if not required:
            return {}
        raise CheckpointError(f"{path}: cannot be read ({exc}); copy the checkpoint again") from exc
    return data if isinstance(data, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    """The file's keys; none where it is missing, or where this installation has no YAML reader."""
    try:
        import yaml
    except ImportError:
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc}); download it again") from exc
    return data if isinstance(data, dict) else {}
