"""What every encoder checks before it runs."""

from __future__ import annotations

from edgeomni.arrays import F32
from edgeomni.errors import EngineError
from edgeomni.spec import OmniSpec


def wanted_features(mel: F32, wanted: int | None, spec: OmniSpec) -> int:
    """How many features of log-mel [n_mels, t] are computed at the least: `wanted`, or all t // 2 where that is None.

    Raises EngineError for a shape that the model's encoder does not take.
    """
    n_mels, most = spec.front_end.n_mels, 2 * spec.encoder.context
    if mel.ndim != 2 or len(mel) != n_mels or not 2 <= mel.shape[1] <= most or mel.shape[1] % 2:
        raise EngineError(
            f"the encoder takes log-mel [{n_mels}, t] with t even, 2 to {most}, not {list(mel.shape)}; split the audio"
        )
    frames = int(mel.shape[1]) // 2
    return min(wanted or frames, frames)
