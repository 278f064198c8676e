"""Rotary scaling in GGUF metadata -> transformers' rope_parameters.

llama.cpp states linear scaling and YaRN (arXiv 2309.00071) by their parameters. Llama 3's scaling (transformers,
modeling_rope_utils.py) it states as factors by which the frequencies are divided, so its parameters are found again
from these and accepted only if they give the same factors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import F64
from ..errors import CheckpointError
from ..gguf_files import GgufFile

_NEAR = 1e-5
"""Relative difference of float32 factors that still are the same."""
_HIGH, _LLAMA3_POSITIONS = 4.0, 8192
"""Llama 3's own high_freq_factor and original length, where the factors leave them open."""
_BETAS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
_UNUSUAL = ("yarn_ext_factor", "yarn_log_multiplier", "yarn_attn_factor", "attn_factor")


def parameters(file: GgufFile, architecture: str, head_dim: int, factors: str) -> dict[str, Any]:
    """transformers' rope_parameters. `factors`: the tensor of Llama 3's factors, float32 [head_dim // 2].

    Raises CheckpointError for a scaling that is not supported, or factors that Llama 3's rule does not give.
    """
    theta = float(_value(file, architecture, "freq_base", 10000.0))
    kind = file.get(f"{architecture}.rope.scaling.type", str, "none")
    if factors in file.tensors:
        if kind != "none":
            raise CheckpointError(f"{file.path}: states both {kind!r} rotary scaling and {factors}; one is supported")
        return _llama3(file, head_dim, theta, file.rows(factors).astype(np.float64))
    old = float(_value(file, architecture, "scale_linear", 1.0))  # as files before 2023-11 state it
    factor = float(_value(file, architecture, "scaling.factor", old))
    if kind == "none" and old == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "yarn":
        raise CheckpointError(f"{file.path}: rotary scaling {kind[:40]!r}; supported are none, linear, yarn")
    if unusual := [key for key in _UNUSUAL if f"{architecture}.rope.scaling.{key}" in file.metadata]:
        raise CheckpointError(f"{file.path}: YaRN with {unusual[0]} of its own, which is not supported")
    positions = _value(file, architecture, "scaling.original_context_length", 0)
    betas = {ours: _value(file, architecture, f"scaling.{theirs}", None) for ours, theirs in _BETAS.items()}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        **({"original_max_position_embeddings": int(positions)} if positions else {}),
        **{name: float(value) for name, value in betas.items() if value is not None},
    }


def _value(file: GgufFile, architecture: str, key: str, default: Any) -> Any:
    return file.get(f"{architecture}.rope.{key}", (int, float), default)


def _llama3(file: GgufFile, head_dim: int, theta: float, factors: F64) -> dict[str, Any]:
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or (factors < 1 - _NEAR).any():
        raise CheckpointError(f"{file.path}: its rotary factors are not {head_dim // 2} numbers of 1 or more")
    factor = float(factors.max())
    if factor <= 1 + _NEAR:
        return {"rope_type": "default", "rope_theta": theta}
    lengths = 2 * np.pi * theta ** (2 * np.arange(head_dim // 2) / head_dim)
    low, high, positions = 1.0, _HIGH, float(_LLAMA3_POSITIONS)
    between = (factors > 1 + _NEAR) & (factors < factor * (1 - _NEAR))
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)  # = (positions / length - low) / (high - low)
    if between.sum() >= 2:
        # A line through (1 / length, smooth). Only the ratios of low, high and positions show, so low is set to 1.
        slope, start = np.polyfit(1 / lengths[between], smooth[between], 1)
        if start < 0:
            high = float(_plain(low - low / start))
            positions = float(_plain(slope * (high - low)))
    elif between.any():
        positions = float(_plain((smooth[between] * (high - low) + low)[0] * lengths[between][0]))
    found = np.clip((positions / lengths - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - found) / factor + found), factors, rtol=10 * _NEAR):
        raise CheckpointError(f"{file.path}: its rotary factors are not those of Llama 3's scaling, which is supported")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(_plain(factor)),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(positions),
    }


def _plain(value: float) -> float:
    """A whole number where it is one but for rounding."""
    return round(value) if abs(value - round(value)) < 1e-3 * abs(value) else value
