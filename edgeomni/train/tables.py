"""The joint table taken apart for training: words, specials and audio rows, each a module that can be frozen alone.

A block is a Parameter on the storage of the table's own rows, so that the parts of a table learn in place and nothing
has to be joined; peft copies the blocks that it trains, and `join` writes those copies back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.omni import OmniModel


class Rows(nn.Module):
    """Some rows of a table, [rows, D]: looked up by their position in the block, or used as a head."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.detach(), requires_grad=False)

    def forward(self, x: Tensor, head: bool = False) -> Tensor:
        """int64 [...] -> [..., D]; with `head`, [..., D] -> logits [..., rows]."""
        return F.linear(x, self.weight) if head else F.embedding(x, self.weight)


class Tables(nn.Module):
    """All tables of a model in blocks. Where the heads are tied, they use the embedding's blocks."""

    def __init__(self, model: OmniModel) -> None:
        super().__init__()
        layout = model.spec.layout
        self._eot, self._text, self._streams = layout.eot, layout.text_vocab, layout.streams
        table = model.embedding.weight
        self.words = Rows(table[: layout.eot])
        self.specials = Rows(table[layout.eot : layout.text_vocab])
        self.audio = Rows(table[layout.text_vocab :])
        head = model.text_head
        self.words_head = None if head is None else Rows(head.weight[: layout.eot])
        self.specials_head = None if head is None else Rows(head.weight[layout.eot :])
        self.audio_head = None if model.audio_head is None else Rows(model.audio_head.weight)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Ids of the text stream, int64 [B, T] -> [B, T, D]."""
        special = (ids >= self._eot)[..., None]
        words, specials = ids.clamp(max=self._eot - 1), (ids - self._eot).clamp(min=0)
        return torch.where(special, self.specials(specials), self.words(words))

    def embed_audio(self, ids: Tensor) -> Tensor:
        """Ids of the audio streams in the joint vocabulary, int64 [B, K, T] -> their sum over the streams [B, T, D]."""
        return self.audio(ids - self._text).sum(1)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, text_vocab]."""
        words, specials = self.words_head or self.words, self.specials_head or self.specials
        return torch.cat([words(hidden, head=True), specials(hidden, head=True)], dim=-1)

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, K, audio_vocab]."""
        return (self.audio_head or self.audio)(hidden, head=True).unflatten(-1, (self._streams, -1))

    @torch.no_grad()
    def join(self, model: OmniModel) -> None:
        """Writes every block back to its rows of the model's tables. What learned in place is there already."""
        layout = model.spec.layout
        places = {
            "words": model.embedding.weight[: layout.eot],
            "specials": model.embedding.weight[layout.eot : layout.text_vocab],
            "audio": model.embedding.weight[layout.text_vocab :],
        }
        if model.text_head is not None:
            places |= {
                "words_head": model.text_head.weight[: layout.eot],
                "specials_head": model.text_head.weight[layout.eot :],
            }
        if model.audio_head is not None:
            places["audio_head"] = model.audio_head.weight
        for name, place in places.items():
            block = getattr(self, name).weight
            if block.data_ptr() != place.data_ptr():
                place.copy_(block)
