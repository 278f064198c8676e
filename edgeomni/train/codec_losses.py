"""Losses between waveforms: spectra, log-mel and, against discriminators, adversarial and of features.

Multi-resolution spectral convergence: Parallel WaveGAN (arXiv 1910.11480). Log-mel over several windows: DAC (arXiv
2306.06546). Least-squares adversarial loss and feature matching: HiFi-GAN (arXiv 2010.05646).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import F32
from .codec_config import EVAL_BANDS, EVAL_WINDOW, LossConfig

Judgement = tuple[Tensor, list[Tensor]]
"""What one discriminator says of a batch, and its inner features."""


def mel_bank(window: int, bands: int, rate: int) -> F32:
    """Triangular mel filters [bands, window // 2 + 1] up to rate / 2, by O'Shaughnessy's formula (1987).

    Each filter peaks at 1, wherever its peak falls between bins. A low filter that lies between two bins and would see
    nothing takes the bin nearest to its peak.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, window // 2 + 1)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.maximum(0, np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)))
    empty = np.flatnonzero(~bank.any(axis=1))
    bank[empty, np.abs(bins - peak[empty]).argmin(axis=1)] = 1
    return np.asarray(bank, np.float32)


class Spectrum(nn.Module):
    """Magnitudes and log10-mel at one window length (Hann, hop of a quarter).

    Magnitudes are scaled so that a sine of full scale is about 2 at its bin; the logarithm starts at `floor`.
    """

    def __init__(self, window: int, bands: int, rate: int, floor: float) -> None:
        super().__init__()
        self.window, self.floor = window, floor
        self.register_buffer("hann", torch.hann_window(window))
        self.register_buffer("bank", torch.from_numpy(mel_bank(window, bands, rate)))

    def forward(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """wave [B, S] float32 -> magnitudes [B, window // 2 + 1, t], log10-mel [B, bands, t]."""
        spectrum = torch.stft(
            wave, self.window, self.window // 4, window=self.hann, pad_mode="reflect", return_complex=True
        )
        # the small number keeps the root's slope finite in silence
        magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9) * (8 / self.window)
        return magnitude, torch.log10((self.bank @ magnitude).clamp_min(self.floor))


class ReconstructionLoss(nn.Module):
    """Means over all windows of log10-mel L1 distance and spectral convergence."""

    def __init__(self, config: LossConfig, rate: int) -> None:
        super().__init__()
        sizes = zip(config.windows, config.mel_bands, strict=True)
        self.spectra = nn.ModuleList([Spectrum(window, bands, rate, config.floor) for window, bands in sizes])

    def forward(self, decoded: Tensor, wave: Tensor) -> dict[str, Tensor]:
        """decoded, wave [B, S] float32 -> {"log_mel", "convergence"}, one number each."""
        log_mel, convergence = [], []
        for spectrum in self.spectra:
            (theirs, their_mel), (ours, our_mel) = spectrum(wave), spectrum(decoded)
            log_mel.append((our_mel - their_mel).abs().mean())
            convergence.append((ours - theirs).norm() / (theirs.norm() + 1e-3))
        return {"log_mel": torch.stack(log_mel).mean(), "convergence": torch.stack(convergence).mean()}


def eval_spectrum(rate: int, floor: float) -> Spectrum:
    """The spectrum of the figure `held_out`: mean |log10-mel difference| at 1024 samples and 80 bands."""
    return Spectrum(EVAL_WINDOW, EVAL_BANDS, rate, floor)


def discriminator_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """Sum over discriminators of mean (1 - D(x))^2 + D(G(x))^2 (HiFi-GAN, equation 1)."""
    losses = [((1 - r) ** 2).mean() + (f**2).mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    return torch.stack(losses).sum()


def generator_losses(real: Sequence[Judgement], fake: Sequence[Judgement]) -> dict[str, Tensor]:
    """{"adversarial": sum of mean (1 - D(G(x)))^2 (equation 2), "features": sum of mean |D_i(x) - D_i(G(x))| over all
    inner features (equation 4)}. What the discriminators say of `real` is a constant here.
    """
    adversarial = torch.stack([((1 - judged) ** 2).mean() for judged, _ in fake]).sum()
    pairs: list[tuple[Any, Any]] = [
        pair for (_, r), (_, f) in zip(real, fake, strict=True) for pair in zip(r, f, strict=True)
    ]
    features = torch.stack([(f - r.detach()).abs().mean() for r, f in pairs]).sum()
    return {"adversarial": adversarial, "features": features}
