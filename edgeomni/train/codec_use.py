"""Which codes a codec in training uses, and when that has gone wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError
from .codec_config import CollapseConfig

_DECAY = 0.99
_REMEDY = (
    "the codebook has collapsed, and training on would not mend it. Start again with quantizer.init = lsuv, a "
    "quantizer.revive above 0, a lower optimizer.lr, or a smaller codec.codebook_size; for less data than the codebook "
    "can use, lower collapse.least_share"
)


class CodeUse:
    """Counts the ids of one level. `last` [N]: step at which each code was last used; `mean` [N]: its recent use."""

    def __init__(self, codes: int, config: CollapseConfig) -> None:
        self.config = config
        self.last = torch.full((codes,), -1, dtype=torch.int64)
        self.mean = torch.zeros(codes)
        self.per_step = 0
        self.poor_since: int | None = None

    def see(self, ids: Tensor, step: int) -> None:
        """Counts one batch of ids, of any shape, at that step."""
        counts = torch.bincount(ids.reshape(-1).cpu(), minlength=len(self.last)).float()
        self.per_step = ids.numel()
        self.last[counts > 0] = step
        self.mean.mul_(_DECAY).add_(counts, alpha=1 - _DECAY)

    def used(self, step: int) -> int:
        """Different codes used in the last `window` steps up to `step`."""
        return int((self.last > max(step - self.config.window, -1)).sum())

    def perplexity(self) -> float:
        """exp(entropy) of the recent use: the number of codes that would be as varied if all were used alike."""
        return perplexity(self.mean)

    def check(self, level: int, step: int, started: int) -> None:
        """Raises TrainError where this level has collapsed (see CollapseConfig). `started`: first step with codes."""
        seen = self.per_step * min(self.config.window, step - started + 1)
        most = min(len(self.last), max(1, seen))
        poor = self.used(step) < self.config.least_share * most and step >= started + self.config.after
        self.poor_since = (step if self.poor_since is None else self.poor_since) if poor else None
        if self.poor_since is not None and step - self.poor_since + 1 >= self.config.patience:
            raise TrainError(
                f"step {step}: level {level} of the codec used {self.used(step)} of {len(self.last)} codes (perplexity "
                f"{self.perplexity():.1f}) in the last {self.config.window} steps, less than "
                f"{self.config.least_share:.0%} for {self.config.patience} steps on end: {_REMEDY}"
            )

    def state(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("last", "mean", "per_step", "poor_since")}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy (in nats) of counts [N]; 0 where nothing was counted."""
    share = counts[counts > 0].double()
    if not len(share):
        return 0.0
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def used_per_level(ids: Sequence[Tensor]) -> list[int]:
    """Ids per level, of any shape -> how many different ones each level has."""
    return [len(level.unique()) for level in ids]
