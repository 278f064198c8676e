"""A CTC head on the speech encoder, for training an encoder from nothing before the LLM learns from it.

CTC: connectionist temporal classification (Graves et al., ICML 2006). Of every position of the encoder the head says
which unit it hears, or none (blank); runs of one unit count once.
"""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, TrainError
from ..model.tensors import differences, read_safetensors, refuse, refuse_unusable, shapes_of, translated
from ..outputs import first_few, write_file
from ..schema import Source, parse_json, typed

logger = logging.getLogger("edgeomni")

Units = Literal["characters", "words"]
BLANK = 0
_META = "edgeomni_ctc"


@dataclass(frozen=True)
class CtcVocabulary:
    """What a head distinguishes: entries[i] has the id i + 1; id 0 is the blank. `lower`: texts are lower-cased."""

    units: Units
    lower: bool
    entries: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str], units: Units = "characters", lower: bool = True) -> CtcVocabulary:
        """All units of the texts, sorted. Raises TrainError where there are none."""
        empty = cls(units, lower, ())
        entries = tuple(sorted({unit for text in texts for unit in empty.split(text)}))
        if not entries:
            raise TrainError(
                "the texts for the CTC head are all empty; give samples of task asr with their transcripts"
            )
        return cls(units, lower, entries)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {unit: i for i, unit in enumerate(self.entries, start=BLANK + 1)}

    def split(self, text: str) -> list[str]:
        """The units of a text, in Unicode's composed form (NFC), with one space where there was white space."""
        words = unicodedata.normalize("NFC", text.lower() if self.lower else text).split()
        return words if self.units == "words" else list(" ".join(words))

    def ids(self, text: str) -> list[int]:
        """Raises TrainError that names the units which the vocabulary lacks."""
        units = self.split(text)
        if unknown := sorted(set(units) - self._ids.keys()):
            raise TrainError(
                f"the text {text[:60]!r} holds {self.units} that the CTC head does not know: "
                f"{first_few([repr(unit) for unit in unknown])}; train a new head on texts that hold them, or change it"
            )
        return [self._ids[unit] for unit in units]

    def text(self, ids: Iterable[int]) -> str:
        """The text of the best unit at every position: repeated ones count once, then blanks go."""
        heard = [self.entries[i - 1] for i, _ in groupby(ids) if i != BLANK]
        return " ".join(("" if self.units == "characters" else " ").join(heard).split())


class CtcHead(nn.Module):
    """Encoder features [B, T, width] -> logits [B, T, 1 + entries] of the blank and the vocabulary.

    `too_long` counts the texts that ctc_loss left out because they do not fit their recordings.
    """

    def __init__(self, width: int, vocabulary: CtcVocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.too_long = 0
        self.linear = nn.Linear(width, 1 + len(vocabulary.entries))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def note_too_long(self, texts: Sequence[str]) -> None:
        """Counts texts that have more units than their recordings have positions, and warns of the first."""
        if texts and not self.too_long:
            logger.warning(
                "the text %.60r has more %s than its recording has encoder positions, so the CTC loss leaves it out; "
                "`edgeomni data check` finds texts that cannot fit their duration",
                texts[0],
                self.vocabulary.units,
            )
        self.too_long += len(texts)

    @torch.no_grad()
    def decode(self, features: Tensor, lengths: Sequence[int]) -> list[str]:
        """The greedy transcript of every row of features [B, T, width], of which lengths[b] positions count."""
        best = self(features).argmax(-1).tolist()
        return [self.vocabulary.text(row[:n]) for row, n in zip(best, lengths, strict=True)]

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes a safetensors file with the vocabulary in its metadata, whole or not at all. Raises UsageError."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.linear.state_dict().items()}
        write_file(path, save(tensors, {_META: json.dumps(asdict(self.vocabulary))}), force)

    @classmethod
    def load(cls, path: str | os.PathLike[str], width: int) -> CtcHead:
        """A saved head, for an encoder of `width`. Raises CheckpointError for another file or another width."""
        path = Path(path)
        tensors = read_safetensors(path)
        vocabulary = _vocabulary(path)
        size = 1 + len(vocabulary.entries)
        refuse(
            f"{path} and an encoder of width {width}",
            differences({"weight": (size, width), "bias": (size,)}, shapes_of(tensors)),
        )
        refuse_unusable(str(path), tensors)
        head = cls(width, vocabulary)
        head.linear.load_state_dict(tensors)
        return head


class CtcLoss(NamedTuple):
    """Row by row: `totals` float32 [B], -log p(text) in nats; `counts` float32 [B], how many units the text has."""

    totals: Tensor
    counts: Tensor

    @property
    def total(self) -> Tensor:
        return self.totals.sum()

    @property
    def units(self) -> int:
        return int(self.counts.sum())


def ctc_loss(
    head: CtcHead, features: Tensor, lengths: Sequence[int], texts: Sequence[str], logits: Tensor | None = None
) -> CtcLoss:
    """The loss of features [B, T, width], of which lengths[b] positions are speech that says texts[b].

    `logits` [B, T, 1 + entries]: what something else than the head makes of them; None: the head's own.
    Rows with an empty text are left out, and so are texts that no alignment fits into their recordings; of these
    head.too_long keeps count. Computed in float32 whatever autocast says. Raises TrainError for units that the head
    does not know.
    """
    targets = [head.vocabulary.ids(text) for text in texts]
    fits = [positions(ids) <= n for ids, n in zip(targets, lengths, strict=True)]
    if logits is None:
        head.note_too_long([text for text, fit in zip(texts, fits, strict=True) if not fit])
        logits = head(features)
    rows = [row for row, ids in enumerate(targets) if ids and fits[row]]
    nothing = torch.zeros(len(texts), device=features.device)
    if not rows:
        return CtcLoss(nothing + logits.float().sum() * 0.0, nothing)
    chosen = [torch.tensor(targets[row]) for row in rows]
    losses = F.ctc_loss(
        logits[rows].float().log_softmax(-1).transpose(0, 1),
        nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=BLANK).to(features.device),
        torch.tensor([lengths[row] for row in rows]),
        torch.tensor([len(ids) for ids in chosen]),
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    at = torch.tensor(rows, device=features.device)
    counts = torch.tensor([float(len(ids)) for ids in chosen], device=features.device)
    return CtcLoss(nothing.index_put((at,), losses), nothing.index_put((at,), counts))


def positions(ids: Sequence[int]) -> int:
    """The fewest positions that can say `ids`: one each, and a blank between two that are equal."""
    return len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))


def _vocabulary(path: Path) -> CtcVocabulary:
    source = Source(str(path), CheckpointError, "give the ctc.safetensors of a run that trained a CTC head")
    with translated(f"{path}: cannot be read as safetensors"), safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(_META)
    if said is None:
        raise source.fault("holds no CTC head")
    vocabulary = typed(parse_json(said.encode(), source), CtcVocabulary, source)
    if not vocabulary.entries or len(set(vocabulary.entries)) != len(vocabulary.entries):
        raise source.fault("its entries are none at all, or stand twice", "$.entries")
    return vocabulary
