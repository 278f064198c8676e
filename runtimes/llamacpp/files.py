"""The LLM's GGUF files, checked before any C code sees them: tensors, and the metadata that llama.cpp computes by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeomni.errors import BundleError
from edgeomni.gguf_llm import (
    HEADS_ARCHITECTURE,
    MODEL_ID,
    Fact,
    body_facts,
    float_shapes,
    head_shapes,
    layout_facts,
    linear_shapes,
)
from edgeomni.runtimes.ggml.files import REMEDY, Expected, read
from edgeomni.spec import OmniSpec

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""GGML types of rows that EdgeOmni writes."""
_FREE = ("general.", "edgeomni.", "GGUF.")
"""Metadata that llama.cpp computes nothing by; all other keys must be the expected ones."""
_NOT_FREE = ("general.alignment",)
_KINDS: dict[type, str] = {int: "UINT32", float: "FLOAT32", str: "STRING"}


def read_stack(path: Path, spec: OmniSpec, layers: int) -> Any:
    """A GGUFReader of body.gguf or tts.gguf. Raises BundleError for a file that is not this model's."""
    shapes = linear_shapes(spec.body)
    expected = {name: Expected(shape, ("F32",)) for name, shape in float_shapes(spec.body, layers).items()}
    for i in range(layers):
        expected |= {f"blk.{i}.{name}.weight": Expected(shape, TYPES) for name, shape in shapes.items()}
    reader = read(path, spec.body.kind, expected)
    _check_facts(path, reader, body_facts(spec, layers), spec)
    return reader


def read_heads(path: Path, spec: OmniSpec) -> Any:
    """A GGUFReader of heads.gguf. Raises BundleError for a file that is not this model's."""
    reader = read(path, HEADS_ARCHITECTURE, {name: Expected(shape, TYPES) for name, shape in head_shapes(spec).items()})
    _check_facts(path, reader, {}, spec)
    return reader


def check_same_model(readers: Mapping[Path, Any]) -> None:
    """Raises BundleError unless all files hold the same model's id."""
    ids = {path: _value(reader, MODEL_ID) for path, reader in readers.items()}
    first = next(iter(ids))
    for path, found in ids.items():
        if not found or found != ids[first]:
            raise BundleError(f"{path} and {first} belong to different models ({found!r}, {ids[first]!r}); {REMEDY}")


def _check_facts(path: Path, reader: Any, facts: Mapping[str, Fact], spec: OmniSpec) -> None:
    wanted = {**facts, **layout_facts(spec)}
    for key, value in wanted.items():
        found, kind = _value(reader, key), _kind(reader, key)
        right = np.float32(value) if isinstance(value, float) else value
        if kind != _KINDS[type(value)] or found != right:
            raise BundleError(f"{path}: {key} is {str(found)[:40]!r} ({kind}), not {value!r}; {REMEDY}")
    for key in reader.fields:
        if key in _NOT_FREE or (key not in wanted and not key.startswith(_FREE)):
            raise BundleError(f"{path}: holds {key[:60]!r}, which no such model has; {REMEDY}")


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    try:
        return None if field is None else field.contents()
    except (IndexError, ValueError, UnicodeDecodeError):
        return None


def _kind(reader: Any, key: str) -> str:
    field = reader.fields.get(key)
    return "missing" if field is None or not field.types else str(field.types[0].name)
