"""How the codebooks of a SNAC learn: unit vectors, each drawn to the mean of the latents that chose it.

Residual quantization at several rates is SNAC's (arXiv 2410.14411). Codes on the unit sphere: ViT-VQGAN (arXiv
2110.04627). Codebooks moved by exponential means instead of gradients: VQ-VAE (arXiv 1711.00937, appendix A.1).
Revival of codes that nothing chooses: SoundStream (arXiv 2107.03312). All parameters stay in the SNAC itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codec_config import QuantizerConfig

_FEWEST = 0.3
"""Uses that a code without any starts with, and share of an even share that a revived one is given."""


_FORGOTTEN = 1e-12
"""Mean use under which a code stays where it is: what remains of its sums is too small to tell a direction."""


class Level:
    """One codebook: its module in the SNAC, and the means that move it.

    `counts` [N] and `sums` [N, D]: exponential means of uses and of the latents' sums, per step. `radius` [N]: lengths
    of the codes, which a codec's own keep; from scratch they are 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.stride: int = module.stride
        table = module.codebook.weight
        self.counts = torch.zeros(len(table), device=table.device)
        self.sums = torch.zeros_like(table)
        self.radius = table.detach().norm(dim=1)

    @property
    def directions(self) -> Tensor:
        """The codes' directions [N, D]."""
        return F.normalize(self.module.codebook.weight.detach(), dim=1)

    def latents(self, residual: Tensor) -> Tensor:
        """What is left to quantize [B, C, T] -> unit vectors [B, D, T / stride]."""
        if self.stride > 1:
            residual = F.avg_pool1d(residual, self.stride, self.stride)
        return F.normalize(self.module.in_proj(residual), dim=1)

    def expand(self, vectors: Tensor) -> Tensor:
        """Vectors of codes [B, D, T / stride] -> their part of the latents [B, C, T]."""
        out = self.module.out_proj(vectors)
        return out.repeat_interleave(self.stride, dim=-1) if self.stride > 1 else out

    @torch.no_grad()
    def nearest(self, flat: Tensor) -> Tensor:
        """Unit vectors [n, D] -> ids [n] of the codes nearest in angle."""
        return (flat @ self.directions.t()).argmax(dim=1)

    @torch.no_grad()
    def move(self, flat: Tensor, ids: Tensor, revive: int, below: float) -> None:
        """One step of the exponential means; then up to `revive` codes of least use move to random latents."""
        uses, sums = _tally(flat, ids, len(self.counts))
        self.counts.mul_(self.decay).add_(uses, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        even = len(flat) / len(self.counts)
        dead = (self.counts < below * even).nonzero()[:, 0][:revive]
        chosen = torch.randint(len(flat), (len(dead),)).to(flat.device)  # drawn on the CPU: one sequence everywhere
        self.counts[dead] = _FEWEST * even
        self.sums[dead] = flat[chosen] * _FEWEST * even
        known = (self.counts > _FORGOTTEN)[:, None]
        self._store(torch.where(known, F.normalize(self.sums, dim=1), self.directions))

    @torch.no_grad()
    def begin(self, flat: Tensor, iterations: int, per_step: float) -> None:
        """Spherical k-means of unit vectors [n, D] gives the codes. `per_step`: vectors that a training step has.

        A code without vectors takes a random one.
        """
        n = len(self.counts)
        chosen = torch.randperm(len(flat))[:n]
        missing = torch.randint(len(flat), (n - len(chosen),))  # fewer vectors than codes: some stand twice
        self.radius = torch.ones_like(self.radius)
        self._store(flat[torch.cat([chosen, missing]).to(flat.device)])
        for _ in range(iterations):
            uses, sums = _tally(flat, self.nearest(flat), n)
            empty = (uses == 0).nonzero()[:, 0]
            sums[empty] = flat[torch.randint(len(flat), (len(empty),)).to(flat.device)]
            self._store(F.normalize(sums, dim=1))
        self.begin_from_own(flat, per_step)

    @torch.no_grad()
    def begin_from_own(self, flat: Tensor, per_step: float) -> None:
        """Starts the means from the codes as they are, with the uses that the vectors [n, D] make of them."""
        uses = torch.bincount(self.nearest(flat), minlength=len(self.counts)).float().clamp_min(_FEWEST)
        self.counts = uses / uses.sum() * per_step
        self.sums = self.directions * self.counts[:, None]

    def _store(self, directions: Tensor) -> None:
        self.module.codebook.weight.copy_(directions * self.radius[:, None])


class Quantizer:
    """The levels of one SNAC, one after the other on what the former left. `started` False: nothing is rounded yet."""

    def __init__(self, codec: nn.Module, config: QuantizerConfig) -> None:
        self.config = config
        self.levels = [Level(module, config.decay) for module in codec.quantizer.quantizers]
        self.started = False

    def __call__(self, z: Tensor, *, learn: bool = False, revive: bool = False) -> tuple[Tensor, list[Tensor], Tensor]:
        """Latents z [B, C, T] -> quantized [B, C, T], ids per level [B, T / stride], commitment loss.

        Gradients pass the rounding unchanged (arXiv 1711.00937). `learn` moves the codebooks. Before the start there
        are no ids, and the loss is 0.
        """
        total, left, commitment = torch.zeros_like(z), z, z.new_zeros((), dtype=torch.float32)
        ids: list[Tensor] = []
        for level in self.levels:
            unit = level.latents(left).float()
            vectors = unit
            if self.started:
                flat = unit.detach().transpose(1, 2).reshape(-1, unit.shape[1])
                chosen = level.nearest(flat).view(len(unit), -1)
                code = level.module.codebook(chosen).detach().transpose(1, 2)
                commitment = commitment + ((unit - F.normalize(code, dim=1)) ** 2).sum(dim=1).mean()
                vectors = unit + (code - unit).detach()
                ids.append(chosen)
                if learn:
                    level.move(flat, chosen.view(-1), self.config.revive if revive else 0, self.config.revive_below)
            part = level.expand(vectors)
            total, left = total + part, left - part
        return total, ids, commitment

    @torch.no_grad()
    def start(self, z: Tensor, per_batch: float, *, own: bool) -> None:
        """Starts all codebooks from latents z [n, C, T]: by k-means, or `own`: from the codec's own codes.

        `per_batch`: the share of z that a training step has.
        """
        left = z
        for level in self.levels:
            unit = level.latents(left)
            flat = unit.transpose(1, 2).reshape(-1, unit.shape[1])
            if own:
                level.begin_from_own(flat, len(flat) * per_batch)
            else:
                level.begin(flat, self.config.kmeans_iterations, len(flat) * per_batch)
            codes = level.module.codebook(level.nearest(flat).view(len(unit), -1)).transpose(1, 2)
            left = left - level.expand(codes)
        self.started = True

    def state(self) -> dict[str, Any]:
        """All that the codec's own tensors do not hold."""
        levels = [{"counts": level.counts, "sums": level.sums, "radius": level.radius} for level in self.levels]
        return {"started": self.started, "levels": levels}

    def restore(self, state: dict[str, Any]) -> None:
        self.started = state["started"]
        for level, saved in zip(self.levels, state["levels"], strict=True):
            for name in ("counts", "sums", "radius"):
                setattr(level, name, saved[name].to(level.counts.device))


def _tally(flat: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """How often each of `n` codes was chosen [n], and the sums of what chose it [n, D]."""
    uses = torch.bincount(ids, minlength=n).to(flat.dtype)
    return uses, torch.zeros(n, flat.shape[1], dtype=flat.dtype, device=flat.device).index_add_(0, ids, flat)
