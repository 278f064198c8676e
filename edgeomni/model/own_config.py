"""config.json of EdgeOmni's own checkpoint directory, typed: a saved model, or a recipe for random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..errors import CheckpointError
from ..manifest import check_provenance
from ..schema import Source, is_newer, parse_json, read_bytes, typed
from ..spec import OmniSpec

FORMAT, VERSION = "edgeomni-checkpoint", "1.1"
_REMEDY = "copy the checkpoint again, or make it again with `edgeomni init`"

Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Rates = Annotated[list[Annotated[int, Meta(ge=1, le=1 << 12)]], Meta(min_length=1, max_length=16)]


@dataclass(frozen=True)
class SnacConfig:
    """The keyword arguments of SNAC (PyPI `snac`), as its own config.json has them."""

    kind: Literal["snac"]
    sampling_rate: Size
    encoder_dim: Size
    encoder_rates: Rates
    decoder_dim: Size
    decoder_rates: Rates
    codebook_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    codebook_dim: Size
    vq_strides: Rates
    latent_dim: Size | None = None
    attn_window_size: Size | None = None
    noise: bool = True
    depthwise: bool = True


@dataclass(frozen=True)
class MimiCodecConfig:
    """`config` is transformers' MimiConfig.to_dict()."""

    kind: Literal["mimi"]
    streams: Annotated[int, Meta(ge=1, le=1024)]
    config: dict[str, Any]


@dataclass(frozen=True)
class OwnConfig:
    """A saved model. `codec` is a SnacConfig or MimiCodecConfig as a plain dict, which model/codecs.py builds."""

    format: Literal["edgeomni-checkpoint"]
    version: str | int
    spec: OmniSpec
    codec: dict[str, Any]
    provenance: dict[str, Any]
    licences: dict[str, str]


@dataclass(frozen=True)
class RecipeConfig:
    """The name of a random preset, and the seed of its weights; `spec` is there for readers alone."""

    format: Literal["edgeomni-checkpoint"]
    version: str | int
    preset: str
    seed: int = 0
    spec: dict[str, Any] | None = None


def read(path: Path) -> OwnConfig | RecipeConfig:
    """Raises CheckpointError that names the file and the key at fault."""
    source = Source(str(path), CheckpointError, _REMEDY)
    data = parse_json(read_bytes(path, source), source)
    newer = is_newer(data.get("version"), VERSION, source, "version")
    if "preset" in data:
        return typed(data, RecipeConfig, source, newer=newer)
    config = typed(data, OwnConfig, source, newer=newer)
    check_provenance(config.provenance, source)
    kind = MimiCodecConfig if config.codec.get("kind") == "mimi" else SnacConfig
    typed(config.codec, kind, source, newer=newer, path="$.codec")
    return config
