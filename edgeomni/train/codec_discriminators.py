"""Discriminators of waveforms, as SNAC (arXiv 2410.14411) takes them over from DAC (arXiv 2306.06546).

Multi-period: HiFi-GAN (arXiv 2010.05646, section 2.3). Multi-band multi-resolution, on complex spectra: DAC, section
3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .codec_config import AdversarialConfig
from .codec_losses import Judgement

SLOPE = 0.1
"""Of the leaky ReLU between layers."""
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Borders of a spectrum's bands, as shares of half the sample rate (DAC)."""
_PERIOD_WIDTHS = (1, 4, 16, 32, 32)


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample of a waveform, folded into [B, 1, S / period, period]."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(channels * times for times in _PERIOD_WIDTHS)]
        strides = [(3, 1)] * (len(_PERIOD_WIDTHS) - 1) + [(1, 1)]
        self.layers = nn.ModuleList(
            [_conv(widths[i], widths[i + 1], (5, 1), stride) for i, stride in enumerate(strides)]
        )
        self.judge = _conv(widths[-1], 1, (3, 1))

    def forward(self, wave: Tensor) -> Judgement:
        """wave [B, S] -> judgement [B, 1, t, period] and the features of every layer."""
        wave = F.pad(wave[:, None], (0, -wave.shape[-1] % self.period), mode="reflect")
        x = wave.view(len(wave), 1, -1, self.period)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.judge(x), features


class SpectrumDiscriminator(nn.Module):
    """Looks at the complex spectrum of one window length; each band has layers of its own."""

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window))
        bins = window // 2 + 1
        borders = [round(share * bins) for share in BANDS]
        self.bands = list(zip(borders, borders[1:], strict=False))
        self.stacks = nn.ModuleList([_band_layers(channels) for _ in self.bands])
        self.judge = _conv(channels, 1, (3, 3))

    def forward(self, wave: Tensor) -> Judgement:
        """wave [B, S] -> judgement [B, 1, t, f] and the features of every layer of every band."""
        # bfloat16 has no Fourier transform: spectra are float32 under autocast, too
        spectrum = torch.view_as_real(
            torch.stft(wave.float(), self.window, self.window // 4, window=self.hann, return_complex=True)
        )
        x = spectrum.permute(0, 3, 2, 1)  # [B, 2, t, bins]
        features, ends = [], []
        for (low, high), stack in zip(self.bands, self.stacks, strict=True):
            band = x[..., low:high]
            for layer in stack:
                band = F.leaky_relu(layer(band), SLOPE)
                features.append(band)
            ends.append(band)
        return self.judge(torch.cat(ends, dim=-1)), features


def _band_layers(channels: int) -> nn.ModuleList:
    first = _conv(2, channels, (3, 9))
    halving = [_conv(channels, channels, (3, 9), (1, 2)) for _ in range(3)]
    return nn.ModuleList([first, *halving, _conv(channels, channels, (3, 3))])


class Discriminators(nn.Module):
    """All of them: one per period, one per window length."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        periods = [PeriodDiscriminator(period, config.channels) for period in config.periods]
        spectra = [SpectrumDiscriminator(window, config.channels) for window in config.windows]
        self.members = nn.ModuleList([*periods, *spectra])

    def forward(self, wave: Tensor) -> list[Judgement]:
        """wave [B, S] float32 in -1..1 -> what each member says of it."""
        return [member(wave) for member in self.members]
