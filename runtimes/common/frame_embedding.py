"""What a body is fed: the mean of a frame's K + 1 embedding rows, or of encoder features and the text's row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeomni.arrays import F32, I32
from edgeomni.components import Features
from edgeomni.errors import EngineError
from edgeomni.runtimes.common.embedding_table import RowTable
from edgeomni.spec import TokenLayout


class FrameEmbedding:
    """Rows of the text and the audio table of a bundle; `tables` is the manifest's meta["tables"].

    Raises BundleError for a table that cannot be read.
    """

    def __init__(self, root: Path, tables: Mapping[str, Any], layout: TokenLayout) -> None:
        self._layout = layout
        self._text, self._audio = RowTable(root, tables["text"]), RowTable(root, tables["audio"])

    def embed(self, ids: I32, features: Sequence[Features] = ()) -> F32:
        """ids [rows, K+1, t] -> [rows, t, D]: the mean over the K+1 streams, K of them replaced by a feature.

        Raises EngineError for an id without a row, and for features that do not fit the ids.
        """
        rows, streams, frames = ids.shape
        audio = self._audio[(ids[:, :-1] - self._layout.text_vocab).reshape(-1)]
        audio = audio.reshape(rows, streams - 1, frames, -1).sum(1)
        text = self._text[ids[:, -1].reshape(-1)].reshape(rows, frames, -1)
        return mean_of_streams(audio, text, streams, features)


def mean_of_streams(audio: F32, text: F32, streams: int, features: Sequence[Features]) -> F32:
    """audio [rows, t, D], summed over all streams but the text's, and text [rows, t, D] -> their mean, [rows, t, D].

    At the positions of a feature it counts `streams` - 1 times in the place of the audio, which is overwritten.
    Raises EngineError for features that do not fit.
    """
    frames, width = audio.shape[1:]
    for segment in features:
        if segment.start < 0 or segment.stop > frames or segment.values.shape[1] != width:
            raise EngineError(
                f"features {list(segment.values.shape)} for positions {segment.start} to {segment.stop} do not "
                f"fit {frames} positions of ids of width {width}"
            )
        audio[:, segment.start : segment.stop] = segment.values * np.float32(streams - 1)
    return np.ascontiguousarray((audio + text) / np.float32(streams))
