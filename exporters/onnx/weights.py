"""One reader of the model's weights, for the builders of graphs and for the re-reader of what they wrote.

The graphs name their tensors as the model names its parameters, but some linear layers that read the same input are
packed into one; `PACKED` tells which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeomni.arrays import F32
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import ChosenCodes, Packed, Scheme, quantize, stacked

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

PACKED = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "adapter.fc": ("adapter.fc_1", "adapter.fc_2"),
}
"""End of a graph's linear layer's name -> the model's layers whose rows it holds, in order."""
Part = Literal["text", "audio"]
PARTS: tuple[Part, ...] = ("text", "audio")


def packed_parts(base: str) -> tuple[str, ...]:
    """The model's linear layers whose rows the graph's layer `base` holds: (base,) where nothing was packed."""
    for packed, names in PACKED.items():
        if base.endswith(packed):
            return tuple(base.removesuffix(packed) + n for n in names)
    return (base,)


class PackedWeights:
    """A model's tensors (name -> torch tensor) as numpy arrays, with linear layers packed and quantized on demand.

    `chosen` gives codes that were chosen for a parameter beforehand (OmniModel.chosen_codes).
    """

    def __init__(
        self, tensors: Mapping[str, Any], schemes: Mapping[str, Scheme], chosen: ChosenCodes | None = None
    ) -> None:
        self._tensors, self._schemes, self._chosen = tensors, schemes, chosen

    @classmethod
    def of(cls, model: OmniModel, schemes: Mapping[str, Scheme]) -> PackedWeights:
        return cls(dict(model.named_parameters()), schemes, model.chosen_codes)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> F32:
        """A tensor in float32, of its own shape. Raises KeyError for a name that the model does not have."""
        return _numpy(self._tensors[name])

    def linear(self, base: str) -> tuple[Packed, F32 | None]:
        """The packed weight [n, k] of the graph's layer `base`, and its bias [n].

        Where some of the packed layers have a bias, those without (Whisper's k_proj) count as zeros; where none has,
        the bias is None.
        """
        parts = packed_parts(base)
        scheme = scheme_of(f"{parts[0]}.weight", self._schemes) or Scheme("fp32")
        return stacked([self._packed(f"{p}.weight", scheme) for p in parts]), self._bias(parts)

    def _packed(self, name: str, scheme: Scheme) -> Packed:
        codes = self._chosen(name, scheme) if self._chosen else None
        return quantize(self.array(name), scheme) if codes is None else codes

    def _bias(self, parts: tuple[str, ...]) -> F32 | None:
        if not any(f"{p}.bias" in self for p in parts):
            return None
        zeros = {p: np.zeros(len(self._tensors[f"{p}.weight"]), np.float32) for p in parts}
        return np.concatenate([self.array(f"{p}.bias") if f"{p}.bias" in self else zeros[p] for p in parts])


def head_rows(model: OmniModel, part: Part) -> F32:
    """The rows [n, D] of the text head or of all audio heads."""
    return _numpy(model.text_rows() if part == "text" else model.audio_rows())


def embedding_rows(model: OmniModel, part: Part) -> F32:
    """The embedding's rows [n, D] of text ids or of audio ids."""
    rows, split = model.embedding.weight, model.spec.layout.text_vocab
    return _numpy(rows[:split] if part == "text" else rows[split:])


def _numpy(tensor: Any) -> F32:
    array: F32 = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
    return array
