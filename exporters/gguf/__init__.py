"""Torch components -> GGUF files for llama.cpp and ggml: the LLM (a headless body, heads), encoder, codec."""

from __future__ import annotations

from edgeomni.exporters.gguf.options import GgufOptions as Options
from edgeomni.exporters.gguf.precisions import PRECISIONS, schemes_for

__all__ = ["PRECISIONS", "Options", "schemes_for"]
