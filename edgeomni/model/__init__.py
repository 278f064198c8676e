"""The torch side: one OmniModel with swappable parts, and every checkpoint source that gives one."""

from __future__ import annotations

from .bodies import KVCache
from .omni import OmniModel

__all__ = ["KVCache", "OmniModel"]
