"""Codecs: SNAC (arXiv 2410.14411, PyPI `snac`) and Mimi (arXiv 2410.00037, transformers), codes -> waveform.

A codec's configuration is a plain dict: {"kind": "snac", **SNAC's keyword arguments} or
{"kind": "mimi", "streams": K, "config": MimiConfig.to_dict()}.
"""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MimiConfig, MimiModel

from ..errors import CheckpointError
from ..spec import CodecSpec
from .tensors import refuse, translated

with warnings.catch_warnings():  # snac scripts its activation with torch.jit, which newer torch deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from snac import SNAC
    from snac.layers import NoiseBlock

Noise = int | Sequence[Tensor] | None
LONGEST_STRIDE = 1024
"""Most latents that one id of SNAC may cover (24 kHz: 4, 32 kHz: 8)."""
MOST_LATENTS_PER_WINDOW = 4096
"""Largest attention window of SNAC's LocalMHA that is read (32 kHz: 32). Answers are padded to whole windows."""
_WEIGHT_NORM = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


class SwitchedNoise(NoiseBlock):  # type: ignore[misc]
    """SNAC's NoiseBlock, x + noise * linear(x), with the noise given from outside; None is off.

    The original draws fresh noise on every call, also at inference, so that nothing it decodes can be repeated.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, S], noise [1, 1, S] -> [B, C, S]."""
        return x if self.noise is None else x + self.noise.to(x) * self.linear(x)


def build(config: Mapping[str, Any]) -> nn.Module:
    """SNAC or MimiModel of that configuration, weights not loaded. Raises CheckpointError for a bad one."""
    kind, rest = config.get("kind"), {k: v for k, v in config.items() if k != "kind"}
    with _readable():
        if kind == "mimi":
            return MimiModel(MimiConfig.from_dict(dict(rest["config"]))).eval()
        if kind == "snac":
            return _with_switched_noise(SNAC(**rest)).eval()
    raise CheckpointError(f"codec kind {reprlib.repr(kind)}; supported are snac and mimi")


def spec_of(config: Mapping[str, Any]) -> CodecSpec:
    """CodecSpec of that configuration. Raises CheckpointError for a bad one."""
    with _readable():
        if config["kind"] == "mimi":
            return _mimi_spec(MimiConfig.from_dict(dict(config["config"])), config["streams"])
        hop = math.prod(config["decoder_rates"])
        window = config.get("attn_window_size")
        if window is not None and (type(window) is not int or not 1 <= window <= MOST_LATENTS_PER_WINDOW):
            raise CheckpointError(
                f"codec configuration: attn_window_size {reprlib.repr(window)} is no whole number from 1 to "
                f"{MOST_LATENTS_PER_WINDOW}"
            )
        strides = tuple(config["vq_strides"])
        if not all(type(stride) is int and 1 <= stride <= LONGEST_STRIDE for stride in strides):
            raise CheckpointError(
                f"codec configuration: vq_strides {reprlib.repr(strides)} are no whole numbers from 1 to "
                f"{LONGEST_STRIDE}"
            )
        return CodecSpec(
            "snac",
            config["sampling_rate"],
            config["codebook_size"],
            strides,
            hop,
            window,
        )


def depths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's numbers of layers by name, as tensors.refuse_deeper takes them, before anything is built."""
    if config.get("kind") == "mimi":
        own = config.get("config")
        own = own if isinstance(own, Mapping) else {}
        lists, counts = ["upsampling_ratios"], ["num_hidden_layers", "num_quantizers", "num_residual_layers"]
    else:
        own, lists, counts = config, ["encoder_rates", "decoder_rates", "vq_strides"], []
    lengths = {f"number of {name}": len(own[name]) for name in lists if isinstance(own.get(name), (list, tuple, str))}
    return {**lengths, **{name: own[name] for name in counts if name in own}}


def mimi_tensors(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a Mimi's weight files -> the same under the names of this transformers' MimiModel, float32.

    transformers renames its modules from time to time and knows the old names, so the renaming is left to it.
    Raises CheckpointError for tensors that are missing or of another shape. Nothing larger than `state` is built.
    """
    with torch.device("meta"):
        needed = sum(t.numel() for t in build(config).state_dict().values())
    if needed > (held := sum(t.numel() for t in state.values())):
        raise CheckpointError(f"{where}: config.json wants {needed} numbers, and the weights hold {held}")
    with translated(f"{where}: not readable as a Mimi codec; download it again"):
        typed = MimiConfig.from_dict(dict(config["config"]))
        given = {"config": typed, "state_dict": dict(state), "dtype": torch.float32, "trust_remote_code": False}
        model, report = MimiModel.from_pretrained(None, output_loading_info=True, **given)
    missing = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    refuse(where, missing + [f"wrong shape: {' '.join(map(str, key))}" for key in sorted(report["mismatched_keys"])])
    return dict(model.state_dict())


def check_streams(config: Mapping[str, Any], streams: int | None) -> None:
    """Raises CheckpointError where the codec cannot be spoken in `streams` streams (None: in as many as it has)."""
    have = spec_of(config).streams  # for Mimi this has checked the number
    if streams is not None and streams != have:
        raise CheckpointError(
            f"{streams} streams asked of this SNAC codec, which has {have}: leave --streams out, it is for Mimi"
        )


def _readable() -> AbstractContextManager[None]:
    return translated("codec configuration: not understood; use the codec's own config.json")


def decode(codec: nn.Module, codes: Sequence[Tensor], noise: Noise = None) -> Tensor:
    """codes[level] int64 [1, n * ids_per_level] -> waveform [S], float32 in -1..1.

    `noise` (SNAC): None is off; a seed draws what the published code draws after torch.manual_seed(seed); a
    sequence gives each noise block its [1, 1, samples at that block].
    With LocalMHA (SNAC 32/44 kHz) the codes are padded with id 0 to whole windows and the waveform is cropped.
    """
    with torch.inference_mode():
        if isinstance(codec, MimiModel):
            return codec.decode(torch.stack(list(codes), dim=1)).audio_values[0, 0]
        return _decode_snac(codec, codes, noise)


def noise_blocks(codec: nn.Module) -> list[SwitchedNoise]:
    """The decoder's noise blocks, in the order of the signal."""
    return [m for m in codec.modules() if isinstance(m, SwitchedNoise)]


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the older weight norm (weight_g, weight_v) -> those of torch's parametrizations."""
    return {_modern(name): t for name, t in state.items()}


def _modern(name: str) -> str:
    for old, new in _WEIGHT_NORM.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _with_switched_noise(codec: SNAC) -> SNAC:
    for block in list(codec.modules()):
        if isinstance(block, nn.Sequential):
            for i, layer in enumerate(block):
                if isinstance(layer, NoiseBlock):
                    block[i] = SwitchedNoise(layer.linear.in_channels)
    return codec


def _mimi_spec(config: MimiConfig, streams: int) -> CodecSpec:
    if not isinstance(streams, int) or not 1 <= streams <= config.num_quantizers:
        raise CheckpointError(
            f"{reprlib.repr(streams)} streams asked of Mimi, which has {config.num_quantizers} codebooks"
        )
    hop = round(config.sampling_rate / config.frame_rate)
    return CodecSpec("mimi", config.sampling_rate, config.codebook_size, (1,) * streams, hop)


def _decode_snac(codec: nn.Module, codes: Sequence[Tensor], noise: Noise) -> Tensor:
    latents = codes[-1].shape[-1]
    window = codec.attn_window_size
    if window:
        whole = math.lcm(window, codec.vq_strides[0])
        target = -(-latents // whole) * whole
        codes = [
            nn.functional.pad(c, (0, target // stride - c.shape[-1]))
            for c, stride in zip(codes, codec.vq_strides, strict=True)
        ]
    blocks = noise_blocks(codec)
    try:
        for block, values in zip(blocks, _noise_of(codec, codes[-1].shape[-1], noise), strict=bool(blocks)):
            block.noise = values
        wave = codec.decode(list(codes))[0, 0]
    finally:
        for block in blocks:
            block.noise = None
    return wave[: latents * math.prod(codec.decoder_rates)]


def _noise_of(codec: nn.Module, latents: int, noise: Noise) -> Sequence[Tensor | None]:
    rates = codec.decoder_rates
    if noise is None:
        return [None] * len(rates)
    if not isinstance(noise, int):
        return noise
    generator = torch.Generator().manual_seed(noise)
    lengths = [latents * math.prod(rates[: i + 1]) for i in range(len(rates))]
    return [torch.randn((1, 1, n), generator=generator) for n in lengths]
