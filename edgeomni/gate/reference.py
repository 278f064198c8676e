"""What an export gave on the machine that judged it, kept in the bundle, so that a device can judge itself.

`edgeomni verify BUNDLE --gate` replays it: the same window through the encoder, the same ids through the LLM, the same
codes through the codec. It needs no torch. Another version of an engine, or another processor, may round otherwise; it
must not choose otherwise, except where the recorded logits themselves hardly prefer one id (near-ties).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import F32, I32, I64
from ..bundle import Bundle
from ..components import Components
from ..errors import BundleError
from ..spec import OmniSpec
from . import metrics, teacher_forcing
from .figures import NEAR_TIE, Measured, Outputs, spread
from .judge import Graded, Report, judge

FILE = "reference.npz"
_KEPT_FEATURES = 64
"""Encoder features kept of the window."""
_KEPT_LOGITS = 16
"""Logits kept per position and head; an id that is not among them cannot be a near-tie."""
_NOISES = 4
"""Times the noise that rounding causes in the logits within which a preference is a near-tie."""
Arrays = Mapping[str, Any]


def write(outputs: Outputs, measured: Measured, path: Path) -> Path:
    """Keeps the export's outputs in an .npz of about 1 MB at Mini-Omni's size."""
    arrays: dict[str, Any] = {
        "mel": outputs.mel,
        "features": outputs.features[:_KEPT_FEATURES],
        "turn_features": outputs.turn.features,
        "turn_ids": np.stack(outputs.turn.ids),
        "wave": outputs.wave,
        "codec_within_reach": np.float64(measured.within_reach.get("codec.si_sdr", np.inf)),
        **{f"codes.{level}": ids for level, ids in enumerate(outputs.codes)},
    }
    details = measured.details["llm"]["heads"]
    for name, logits in outputs.logits.heads().items():
        ids, values = _largest(logits)
        noise = details[name].get("rounded_noise", 0.0)
        arrays[f"ids.{name}"], arrays[f"logits.{name}"] = ids, values
        arrays[f"tolerance.{name}"] = np.float64(max(NEAR_TIE, _NOISES * noise) * spread(logits))
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def replay(bundle: Bundle, components: Components) -> Report:
    """Runs the bundle's recorded inputs through `components` and judges what comes out.

    Raises BundleError where the bundle holds no such recording, or one that cannot be read.
    """
    arrays = _read(bundle)
    measured = Measured({"device": {}})
    try:
        _encoder(components, arrays, measured)
        _llm(components, bundle.spec, arrays, measured)
        _codec(components, bundle.spec, arrays, measured)
    except (KeyError, IndexError, ValueError) as exc:
        raise BundleError(f"{bundle.path}: {FILE} does not fit this bundle ({exc}); export again") from exc
    graded = {name: Graded.of(c) for name, c in bundle.manifest.components.items()}
    return judge(
        measured.figures,
        graded,
        trained=True,
        details=measured.details,
        within_reach=measured.within_reach,
        parts=("device",),
    )


def _read(bundle: Bundle) -> Arrays:
    entry = bundle.manifest.reference
    if entry is None:
        raise BundleError(f"{bundle.path}: holds no recorded outputs to compare with; export the checkpoint again")
    try:
        with bundle.file(entry.path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as exc:
        raise BundleError(f"{bundle.path}: {entry.path} cannot be read ({exc}); copy the bundle again") from exc


def _encoder(components: Components, arrays: Arrays, out: Measured) -> None:
    features = components.encoder.encode(arrays["mel"])[: len(arrays["features"])]
    out.figures["device"]["encoder.cosine"] = metrics.cosine(arrays["features"], features)


def _llm(components: Components, spec: OmniSpec, arrays: Arrays, out: Measured) -> None:
    ids = tuple(arrays["turn_ids"].astype(np.int32))
    turn = teacher_forcing.Script(arrays["turn_features"], len(ids), seed=0, ids=ids)
    heads = {}
    for name, logits in teacher_forcing.follow(components.llm, spec, turn).heads().items():
        kept = arrays[f"ids.{name}"], arrays[f"logits.{name}"]
        top1, ties = decided(*kept, logits.argmax(-1), float(arrays[f"tolerance.{name}"]))
        heads[name] = {"top1": top1, "near_ties": ties}
    out.figures["device"]["llm.top1"] = min(h["top1"] for h in heads.values())
    out.figures["device"]["llm.near_ties"] = max(h["near_ties"] for h in heads.values())
    out.details["llm"] = {"heads": heads}


def _codec(components: Components, spec: OmniSpec, arrays: Arrays, out: Measured) -> None:
    codes = [arrays[f"codes.{level}"] for level in range(len(spec.codec.vq_strides))]
    wave = teacher_forcing.decoded(components.codec, spec.codec, codes)
    out.figures["device"]["codec.si_sdr"] = metrics.si_sdr(arrays["wave"], wave)
    out.within_reach["codec.si_sdr"] = float(arrays["codec_within_reach"])


def _largest(logits: F32) -> tuple[I32, F32]:
    """The largest logits of each position [N, V], in falling order: ids [N, kept] and values [N, kept]."""
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :_KEPT_LOGITS].astype(np.int32)
    return order, np.take_along_axis(logits, order, -1)


def decided(ids: I32, logits: F32, chosen: I64, tolerance: float) -> tuple[float, float]:
    """(share of agreeing positions, near-ties apart; share of near-ties).

    `ids` and `logits` [N, kept] are the recorded ones in falling order, `chosen` [N] the ids of this machine. A
    position counts as a near-tie where the recorded logits prefer their first id to the chosen one by no more than
    `tolerance`. An id that was not kept is no near-tie.
    """
    same = ids == chosen[:, None]
    margins = logits[:, 0] - np.where(same, logits, -np.inf).max(-1)
    differs = ~same[:, 0]
    ties = differs & (margins <= tolerance)
    return float(1 - (differs & ~ties).mean()), float(ties.mean())
