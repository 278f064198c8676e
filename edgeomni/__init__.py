"""EdgeOmni: take a speech-to-speech omni model from checkpoint to a proven bundle on an edge device."""

from .bundle import Bundle
from .errors import EdgeOmniError
from .sampling import Sampling
from .session import AudioChunk, Session, TextDelta, TurnEnd, load
from .spec import OmniSpec

__version__ = "0.1.0"

__all__ = [
    "AudioChunk",
    "Bundle",
    "EdgeOmniError",
    "OmniSpec",
    "Sampling",
    "Session",
    "TextDelta",
    "TurnEnd",
    "__version__",
    "load",
]
