"""A stack of transformer blocks on OpenVINO: inference requests whose states are the KV cache of one turn."""

from __future__ import annotations

import numpy as np

from edgeomni.arrays import F32
from edgeomni.interrupt import Interrupt
from edgeomni.runtimes.openvino.models import Model


class Blocks:
    """One turn's use of body.xml or tts.xml: appends frames to the rows that its states hold.

    Rows come and go with a call: its beam_idx (`_rows`) tells from which row of the states each of its rows goes on.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._request = model, model.request()
        self._rows = [0]

    def clear(self) -> None:
        """An empty cache of one row."""
        self._request.reset_state()
        self._rows = [0]

    def fork(self) -> None:
        """From the next call on there is one more row, which goes on from what row 0 holds."""
        self._rows.append(0)

    def drop(self) -> None:
        """From the next call on the last row is gone."""
        self._rows.pop()

    def append(self, embeds: F32, past: int, interrupt: Interrupt | None = None) -> tuple[F32, F32 | None]:
        """Appends embeds [rows, S, D] behind `past` frames.

        Returns hidden [rows, D] of the last position and body_out [rows, S, D], None where the model has none.
        """
        rows, frames, _ = embeds.shape
        inputs = {
            "inputs_embeds": embeds,
            "positions": np.arange(past, past + frames),
            "mask": causal_mask(frames, past),
            "beam_idx": np.array(self._rows, np.int32),
        }
        self._model.run_request(self._request, inputs, interrupt)
        self._rows = list(range(rows))
        outputs = self._model.outputs_of(self._request)
        return outputs["hidden"][:, 0], outputs.get("body_out")


def causal_mask(frames: int, past: int) -> F32:
    """[1, 1, frames, past + frames]: 0 where a new frame sees a frame, -inf where that comes after it."""
    mask = np.zeros((1, 1, frames, past + frames), np.float32)
    if frames > 1:
        later = np.triu(np.ones((frames, frames), bool), 1)
        mask[0, 0, :, past:][later] = -np.inf
    return mask
