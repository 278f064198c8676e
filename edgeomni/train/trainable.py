"""The model as it is trained: embedding and heads in blocks, one loss over all streams.

Cross-entropy of each stream over the positions that have a label, summed, with the number of labels beside it: sums
can be added over batches and processes before anything is divided, so that accumulation and several processes give
what one large batch would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model import encoders
from ..model.bodies import run_layers
from ..model.omni import OmniModel
from ..spec import TASKS
from .config import LossConfig
from .ctc import CtcHead, ctc_loss, positions
from .frames import IGNORED, padding
from .tables import Tables

_SHARPNESS = 40.0
"""A given that is exactly one word's makes another word, as far away as the mean, e^-20 times as likely."""
_DISTANCE = 0.3
"""What the squared distance counts beside the divergence in `loss.match` (benchmarks/LOG.md)."""


class TrainableOmni(nn.Module):
    """`omni`'s own modules, its tables in blocks, and a CTC head where one is wanted. Everything starts out frozen."""

    def __init__(
        self, omni: OmniModel, loss: LossConfig, ctc: CtcHead | None = None, units: Sequence[int] = ()
    ) -> None:
        """`units`: the text id of each entry of the CTC head's vocabulary, for `loss.match`."""
        super().__init__()
        self._units = torch.tensor(units, dtype=torch.int64)
        self.spec, self._loss, self._answers = omni.spec, loss, bool(loss.text or loss.audio)
        self.encoder, self.adapter, self.body, self.tts = omni.encoder, omni.adapter, omni.body, omni.tts
        self.tables = Tables(omni)
        self.ctc = ctc
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("ctc."))

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        tasks: Tensor,
        mels: Sequence[Mapping[str, Tensor]],
        transcripts: Sequence[str] = (),
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch as dataset.collate makes it -> `loss`, and `sums` float32 [len(TASKS), K+2, 2].

        `sums` holds the summed cross-entropies and the number of labels per task and stream (audio streams, text, CTC).
        `counts` [K+2]: labels per stream over everything that shares this update; None: those of this batch.
        """
        features, heard = self._features(mels)
        if self._answers:
            out = run_layers(self.body.layers, self.body.rotary_emb, self._embed(ids, features), None)
            entropies = self._entropies(out, labels)
        else:  # the CTC loss is all that is wanted
            labels = torch.full_like(labels, IGNORED)
            entropies = torch.zeros(labels.shape, device=labels.device)
        streams = torch.stack([entropies.sum(-1), (labels != IGNORED).sum(-1).float()], dim=-1)
        rows = torch.cat([streams, self._ctc_sums(heard, transcripts, len(ids))[:, None]], dim=1)
        counts = rows[..., 1].sum(0) if counts is None else counts
        sums = torch.zeros(len(TASKS), *rows.shape[1:], device=rows.device).index_add(0, tasks, rows.detach())
        loss = self.weighted(rows[..., 0].sum(0), counts) + self._anchor()
        if self._loss.match and heard:
            loss = loss + self._loss.match * self._mismatch(heard) / counts[-1].clamp(min=1)
        return {"loss": loss, "sums": sums}

    def checkpoint_gradients(self) -> None:
        """Computes activations of body and TTS adapter again in the backward pass instead of keeping them."""
        for part in (self.body, *([self.tts] if self.tts is not None else [])):
            for layer in part.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def logits(self, ids: Tensor, mels: Sequence[Mapping[str, Tensor]] = ()) -> tuple[Tensor, Tensor]:
        """ids int64 [B, K+1, T] -> text logits [B, T, text_vocab], audio logits [B, T, K, audio_vocab]."""
        out = run_layers(self.body.layers, self.body.rotary_emb, self._embed(ids, self._features(mels)[0]), None)
        everywhere = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        audio = self.tables.audio_logits(self._audio_hidden(out, everywhere)).unflatten(0, out.shape[:2])
        return self.tables.text_logits(self.body.norm(out).flatten(0, 1)).unflatten(0, out.shape[:2]), audio

    def weighted(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Summed cross-entropies [K+2] and numbers of labels [K+2] -> the loss: the weighted mean of their means."""
        weights = self._weights(sums.device)
        weights = torch.where(counts > 0, weights, 0)
        streams = weights[:-1].sum().clamp(min=1e-9)
        means = sums / counts.clamp(min=1)
        return (weights[:-1] * means[:-1]).sum() / streams + weights[-1] * means[-1]

    def _anchor(self) -> Tensor:
        """Zero, with a gradient of zero for every parameter that learns.

        A batch without sound leaves the adapter out, and processes that train together must all have every gradient.
        """
        firsts = [p.flatten()[0] for p in self.parameters() if p.requires_grad]
        return torch.stack(firsts).sum() * 0.0 if firsts else torch.zeros((), device=self.body.norm.weight.device)

    def _weights(self, device: torch.device) -> Tensor:
        """[K+2]: audio streams, text, CTC."""
        streams, loss = self.spec.layout.streams, self._loss
        audio = [loss.audio / streams * (loss.first_codebook if k == 0 else 1.0) for k in range(streams)]
        return torch.tensor([*audio, loss.text, loss.ctc], device=device)

    def _features(
        self, mels: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[tuple[Tensor, int, int]], dict[int, Tensor]]:
        """Adapter features (values [F, D], row, start) of each recording; encoder features [F, width] by row, for CTC.

        The encoder computes without gradients where it is frozen, the adapter on what is wanted of a window alone.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        raw: list[Tensor] = []
        places: list[tuple[int, int]] = []
        heard: dict[int, Tensor] = {}
        for group in mels:
            with torch.set_grad_enabled(learns):
                windows = encoders.encode(self.encoder, group["mel"])
            numbers = zip(group["row"].tolist(), group["start"].tolist(), group["count"].tolist(), strict=True)
            for window, (row, start, count) in zip(windows, numbers, strict=True):
                raw.append(window[:count])
                places.append((row, start))
                heard[row] = torch.cat([heard[row], raw[-1]]) if row in heard else raw[-1]
        adapted = self.adapter(torch.cat(raw)).split([len(r) for r in raw]) if raw else ()
        return [(values, row, start) for values, (row, start) in zip(adapted, places, strict=True)], heard

    def _embed(self, ids: Tensor, features: Sequence[tuple[Tensor, int, int]]) -> Tensor:
        """ids [B, K+1, T] -> [B, T, D]: OmniModel.embed with segments that differ by row."""
        streams = self.spec.layout.streams
        audio = self.tables.embed_audio(ids[:, :streams])
        if features:
            values = torch.cat([f for f, _, _ in features]).to(audio.dtype) * streams
            rows = torch.cat([torch.full((len(f),), row) for f, row, _ in features])
            places = torch.cat([torch.arange(start, start + len(f)) for f, _, start in features])
            audio = audio.index_put((rows.to(ids.device), places.to(ids.device)), values)
        return (audio + self.tables.embed_text(ids[:, streams])) / (streams + 1)

    def _entropies(self, out: Tensor, labels: Tensor) -> Tensor:
        """Un-normed body output [B, T, D] -> cross-entropies float32 [B, K+1, T], 0 where nothing is labelled.

        Heads are computed only where their labels are: of a prompt's hundreds of positions none is.
        """
        streams = self.spec.layout.streams
        text, audio = labels[:, streams], labels[:, :streams].transpose(1, 2)
        text_at, audio_at = text != IGNORED, (audio != IGNORED).any(-1)
        found = []
        if audio_at.any():
            logits = self.tables.audio_logits(self._audio_hidden(out, audio_at))
            found.append((_entropy(logits, audio[audio_at]), audio_at, slice(0, streams)))
        if text_at.any():
            logits = self.tables.text_logits(self.body.norm(out[text_at]))[:, None]
            found.append((_entropy(logits, text[text_at][:, None]), text_at, slice(streams, streams + 1)))
        result = torch.zeros(labels.shape, dtype=torch.float32, device=out.device)
        for values, at, rows in found:
            row, position = at.nonzero(as_tuple=True)
            stream = torch.arange(streams + 1, device=out.device)[rows]
            result = result.index_put((row[:, None], stream[None], position[:, None]), values)
        return result

    def _audio_hidden(self, out: Tensor, at: Tensor) -> Tensor:
        """What the audio heads read at the labelled positions, [N, D]. The TTS adapter sees all positions."""
        if self.tts is None:
            return self.body.norm(out[at])
        return self.tts(out, self.body.rotary_emb)[at]

    def _mismatch(self, heard: Mapping[int, Tensor]) -> Tensor:
        """How far what the LLM is given for sounds is from the words that the CTC head hears in them, in nats, summed.

        The teacher is the head: at every position of the encoder it says how probable the blank and each unit are
        (knowledge distillation, Hinton et al., arXiv 1503.02531). The pupil says so by distances: for a word w,
        written, the LLM is given its embedding instead of that of the text's padding, and padding on the audio streams;
        for a sound, the sum over the K streams divided by K (OmniModel.embed). A unit's logit is the squared distance
        from the given to that, times -_SHARPNESS / 2 over the mean squared distance between units; the blank is
        padding. The result is the sum of the Kullback-Leibler divergences and, with less weight, of the squared
        distances from what the head's words give in the mean, on the same scale: what is nearest to the right word may
        still be far from any, and then an LLM that reads words does not know it. Neither the head nor the embeddings
        learn from it: words that all moved apart would lower it as well.
        """
        assert self.ctc is not None
        features = torch.cat(list(heard.values()))
        silence, units = self._written_units(features.device)
        given = self.adapter(features) * self.spec.layout.streams - silence
        spread = 2 * len(units) / (len(units) - 1) * (units - units.mean(0)).square().sum(1).mean()
        scale = _SHARPNESS / spread
        logits = (given @ units.T - units.square().sum(1) / 2) * scale
        with torch.no_grad():
            said = self.ctc(features).float().softmax(-1)
        distances = (given - said @ units).float().square().sum() / 2 * scale
        return F.kl_div(logits.float().log_softmax(-1), said, reduction="sum") + _DISTANCE * distances

    @torch.no_grad()
    def _written_units(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The embedding of padding on all audio streams [D]; what blank and units add to that of padding [1 + U, D]."""
        pads = torch.from_numpy(padding(self.spec.layout)).long().to(device)[None]
        blank = self.tables.embed_text(pads[:, -1])
        words = self.tables.embed_text(self._units.to(device)[None])
        return self.tables.embed_audio(pads[:, :-1])[0, 0], torch.cat([blank, words], dim=1)[0] - blank[0]

    def _ctc_sums(self, heard: Mapping[int, Tensor], transcripts: Sequence[str], rows: int) -> Tensor:
        """Encoder features [F, width] by row -> summed CTC losses and numbers of units, float32 [B, 2]."""
        sums = torch.zeros(rows, 2, device=self.body.norm.weight.device)
        if self.ctc is None or not heard:
            return sums
        features = nn.utils.rnn.pad_sequence(list(heard.values()), batch_first=True)
        loss = ctc_loss(self.ctc, features, [len(f) for f in heard.values()], [transcripts[row] for row in heard])
        return sums.index_put((torch.tensor(list(heard), device=sums.device),), torch.stack(loss, dim=-1))

    def count_labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels per stream of a batch (audio streams, text, units of the CTC head), float32 [K+2]."""
        labels = (batch["labels"] != IGNORED).sum((0, 2)).float() * self._answers
        return torch.cat([labels, torch.tensor([float(self._ctc_units(batch))], device=labels.device)])

    def _ctc_units(self, batch: Mapping[str, Any]) -> int:
        if self.ctc is None:
            return 0
        lengths: Counter[int] = Counter()
        for group in batch["mels"]:
            for row, count in zip(group["row"].tolist(), group["count"].tolist(), strict=True):
                lengths[row] += count
        units = {row: self.ctc.vocabulary.ids(batch["transcripts"][row]) for row in lengths}
        return sum(len(ids) for row, ids in units.items() if positions(ids) <= lengths[row])


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [N, S, V], labels int64 [N, S] -> cross-entropies float32 [N, S], 0 where the label is IGNORED."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape)
