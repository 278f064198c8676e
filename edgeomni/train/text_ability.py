"""What a model can still answer in text: measured before and after a run, so that forgetting is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..components import OpenOptions
from ..data.sample import Sample
from ..evaluate.run import Asking, evaluate
from ..model.omni import OmniModel
from ..runtimes.torch import components_of
from ..session import Session

LONGEST = 128
"""LLM frames of an answer at most: held-out questions have short answers, and a broken model does not end its own."""


def text_ability(model: OmniModel, samples: Sequence[Sample]) -> dict[str, Any]:
    """Exact answers and token F1 of task tt, greedy: {"exact": 0.5, "f1": 0.7, "samples": 20}."""
    training = model.training
    model.eval()
    with torch.no_grad():
        session = Session(components_of(model, OpenOptions()), model.spec, model.tokenizer_json)
        found = evaluate(session, samples, tasks=["tt"], asking=Asking(max_length=_frames(model, samples)))
    model.train(training)
    return {**{name: m.value for name, m in found.metrics("tt").items()}, "samples": len(found.of("tt"))}


def _frames(model: OmniModel, samples: Sequence[Sample]) -> int:
    longest = max(len(sample.text) + len(str(sample.system or "")) for sample in samples)
    return min(model.spec.context, longest + LONGEST)
