"""Data-dependent initialisation of a SNAC (LSUV, arXiv 1511.06422): every convolution's output begins at unit scale.

With the package's own initialisation the signal dies on its way through the layers, all latents look alike, and every
level collapses to one code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .codec_quantizer import Quantizer

RESIDUAL_SCALE = 0.4
"""Of the last convolution of a residual unit: units that add to the signal must not make it grow."""
OUTPUT_SCALE = 0.15
"""Of the decoder's last convolution: about what speech has."""
NOISE_SCALE = 0.1
"""Of what SNAC's noise blocks multiply with noise."""


@torch.no_grad()
def initialise(codec: nn.Module, quantizer: Quantizer, wave: Tensor) -> None:
    """Sets gain and bias of every weight-normed convolution, in one pass over wave [B, 1, S], while it is computed.

    Convolutions get outputs of mean 0 and the wanted deviation per channel; transposed ones (whose gain is per input)
    mean 0 per channel and the wanted deviation over all. Latents stay unquantized.
    """
    wanted = _scales(codec)
    hooks = [module.register_forward_hook(lambda m, _, out: _scaled(m, out, wanted[m])) for module in wanted]
    try:
        codec.decoder(quantizer(codec.encoder(wave))[0])
    finally:
        for hook in hooks:
            hook.remove()


def _scales(codec: nn.Module) -> dict[nn.Module, float]:
    """Every weight-normed convolution -> the deviation that its output is to have."""
    convolutions = [m for m in codec.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))]
    ends = {unit.block[-1] for unit in codec.modules() if type(unit).__name__ == "ResidualUnit"}
    last = [m for m in codec.decoder.modules() if isinstance(m, nn.Conv1d)][-1]
    noise = {block.linear for block in codec.modules() if type(block).__name__ == "NoiseBlock"}
    scales = {last: OUTPUT_SCALE, **dict.fromkeys(ends, RESIDUAL_SCALE), **dict.fromkeys(noise, NOISE_SCALE)}
    return {m: scales.get(m, 1.0) for m in convolutions}


def _scaled(module: Any, out: Tensor, wanted: float) -> Tensor:
    """Changes the module's gain and bias; returns what it computes with them."""
    gain = module.parametrizations.weight.original0
    mean = out.mean((0, 2))
    whole = (out - mean[:, None]).std()
    if module.bias is None:  # without a bias the mean stays
        mean = torch.zeros_like(mean)
    if isinstance(module, nn.ConvTranspose1d):
        times = (wanted / (whole + 1e-6)).expand(out.shape[1])
        gain.mul_(times[0])
    else:
        times = wanted / (out.std((0, 2)) + 1e-3 * whole + 1e-6)  # a channel that is nearly constant stays small
        gain.mul_(times.view(-1, 1, 1))
    if module.bias is not None:
        module.bias.copy_((module.bias - mean) * times)
    return (out - mean[:, None]) * times[:, None]
