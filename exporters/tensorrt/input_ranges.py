"""What goes into linear layers whose inputs are rounded to 8 bits: measured with torch, and one scale chosen for each.

The encoder hears sounds in its full window, padded, as questions are, and in a shorter one: ranges measured on short
windows alone do not hold for padding. The LLM reads recorded turns again (OmniModel.recorded), or, where there are
none, answers synthetic sounds in two rows, its ids sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeomni.arrays import F32
from edgeomni.audio import log_mel
from edgeomni.generate import next_ids
from edgeomni.model.fake_quant import PREFIXES, computing_with
from edgeomni.probe_sound import probe
from edgeomni.prompts import build
from edgeomni.quantize.policy import scheme_of
from edgeomni.quantize.schemes import Scheme
from edgeomni.quantize.small_floats import E4M3_LARGEST
from edgeomni.quantize.tensorrt_kinds import LARGEST_CODE, STATIC, half_scale
from edgeomni.sampling import Sampler, Sampling, choose_frame
from edgeomni.spec import TASKS

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

_PROBE_SHARES = (0.15, 0.4, 0.9)
"""Parts of the encoder's window that the synthetic sounds fill."""
_MOST_SOUNDS = 8
_FIRST_SEED = 1000
"""The gate's own probes have small seeds: what judges is not what was calibrated on."""
_FEATURES, _FRAMES = 80, 48
"""Of one turn: features of the question at most, frames of the answer."""
_MOST_TURNS = 3
_SMALL = 20_000_000
"""Parameters up to which torch computes with one thread: more would only wait for each other."""
_SAMPLES = 1 << 16
"""Values of a layer's inputs that are kept of each call."""
_MOST_SAMPLES = 1 << 18
_SHARES = np.linspace(1, 0.2, 33)
"""Parts of the largest input that are tried as the largest that INT8 can tell."""
_HEADROOM = 2.0
"""E4M3 has steps relative to the value, so that room for larger inputs costs nothing."""


def input_scales(model: OmniModel, component: str, schemes: Mapping[str, Scheme]) -> dict[str, float]:
    """The model's linear layer -> the scale of its inputs, for the layers of "encoder" or "llm" with static schemes."""
    layers = dict(_static_layers(model, component, schemes))
    if not layers:
        return {}
    small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL
    with torch.no_grad(), computing_with(1 if small else None), _watched(layers) as seen:
        _compute(model, component)
    return {name: _scale(seen[name], layers[name][1].kind) for name in layers}


def _static_layers(
    model: OmniModel, component: str, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, tuple[nn.Linear, Scheme]]]:
    for name, module in model.named_modules():
        scheme = scheme_of(f"{name}.weight", schemes)
        ours = isinstance(module, nn.Linear) and name.startswith(PREFIXES[component])
        if ours and scheme is not None and scheme.kind in STATIC:
            yield name, (module, scheme)  # type: ignore[misc]


def _compute(model: OmniModel, component: str) -> None:
    """Has the component compute what is to be measured."""
    if component == "llm" and model.recorded is not None:
        for turn in model.recorded.inputs:
            model.hidden(turn[None].to(model.device))
        return
    for i, mel in enumerate(_windows(model)):
        features = model.encode(torch.from_numpy(mel)[None])[0]
        if component == "llm" and i < _MOST_TURNS:
            _answer(model, features[:_FEATURES], seed=i)


def _windows(model: OmniModel) -> list[F32]:
    """Log-mel windows [n_mels, t]: of each sound the full one, and of the first a shorter one too."""
    spec, full = model.spec.front_end, 2 * model.spec.encoder.context
    samples = full * spec.hop
    if model.recorded is not None and model.recorded.sounds:
        heard = model.recorded.sounds
        sounds = [sound[:samples] for sound in heard[:: -(-len(heard) // _MOST_SOUNDS)]]
    else:
        lengths = [share * samples / spec.sample_rate for share in _PROBE_SHARES]
        sounds = [probe(spec, seconds, _FIRST_SEED + i) for i, seconds in enumerate(lengths)]
    short = max(2, full // 8 * 2)
    return [*(log_mel(sound, spec, full) for sound in sounds), log_mel(sounds[0][: short * spec.hop], spec, short)]


def _answer(model: OmniModel, features: Tensor, seed: int) -> None:
    """A two-row turn, its ids sampled."""
    spec, rule = model.spec, Sampling(temperature=1.0, top_k=50, seed=_FIRST_SEED + seed)
    frames = min(_FRAMES, spec.context // 2)
    features = features[: max(1, spec.context - frames - 3)]
    prompt = build(replace(spec, tasks=TASKS), "aa", features=len(features), two_row=True)
    sampler, cache = Sampler(rule), model.new_cache(2, prompt.length + frames)
    ids, heard = prompt.ids, [(prompt.feature_start, features)]
    for _ in range(frames):
        text, audio = model.hidden(model.embed(torch.from_numpy(ids), heard), cache)
        said = sampler.text(model.text_logits(text[0, -1]).numpy())
        spoken = choose_frame(model.audio_logits(audio[0, -1]).numpy(), sampler.draws(spec.layout.streams), rule)
        ids, heard = next_ids(spec.layout, spoken, said, 2), []


@contextmanager
def _watched(layers: Mapping[str, tuple[nn.Linear, Scheme]]) -> Iterator[dict[str, list[F32]]]:
    """Within the context, values of what goes into each layer are kept: evenly chosen ones, and the largest."""
    seen: dict[str, list[F32]] = {name: [] for name in layers}

    def keep(name: str, x: Tensor) -> None:
        flat = x.detach().abs().flatten()
        chosen = flat[:: -(-len(flat) // _SAMPLES)]
        seen[name].append(np.append(flat.max().numpy(), chosen.numpy()).astype(np.float32))

    def hook(name: str) -> Any:
        return lambda _, args: keep(name, args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, (layer, _) in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _scale(seen: Sequence[F32], kind: str) -> float:
    """The scale of inputs of which `seen` holds magnitudes, each part's largest first."""
    peak = max(float(part[0]) for part in seen)
    most = LARGEST_CODE[kind]
    if most == E4M3_LARGEST:
        return float(half_scale(peak * _HEADROOM / most))
    values = np.concatenate([part[1:] for part in seen])
    values = values[:: -(-len(values) // _MOST_SAMPLES)]
    scales = half_scale(peak * _SHARES / most)
    errors = [np.square(np.minimum(np.rint(values / scale), most) * scale - values).mean() for scale in scales]
    return float(scales[int(np.argmin(errors))])
