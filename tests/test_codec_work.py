"""No codec sample is computed twice: what every convolution puts out, counted over a whole stream."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from codec_models import Codec, mimi, random_codes, snac, snac_spec, stream
from test_codec_streams import exported, model_of

from edgeomni.model import codec_plan as ops
from edgeomni.model.codec_reader import read_plan
from edgeomni.runtimes.onnxruntime.codec import OrtCodec
from edgeomni.runtimes.torch.codec import TorchCodec
from edgeomni.spec import CodecSpec

SIZES = [3, 1, 4, 2, 1, 5]


def codec_of(name: str) -> tuple[Codec, CodecSpec]:
    if name == "mimi":
        return mimi()
    codec = snac(name)
    return codec, snac_spec(codec)


def once(decoder: ops.CodecPlan, latents: int) -> list[int]:
    """Samples that each convolution puts out when the whole stream is decoded at once, upsamplings in input steps."""
    counts, before = [], ops.Pace()
    for op, pace in decoder.paces():
        if isinstance(op, ops.Up) and not op.depthwise:
            counts.append(latents * before.scale + op.right)
        if isinstance(op, ops.Conv):
            counts.append(latents * pace.scale)
        before = pace
    return sorted(counts)


@pytest.fixture
def torch_counts(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Output samples of every convolution that torch runs, by its weight."""
    counts: Counter[int] = Counter()
    conv1d, mm = torch.nn.functional.conv1d, torch.mm

    def count_conv(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        y = conv1d(x, weight, *args, **kwargs)
        counts[weight.data_ptr()] += y.shape[-1]
        return y

    def count_up(x: Any, weight: Any) -> Any:
        counts[weight.data_ptr()] += len(x)
        return mm(x, weight)

    monkeypatch.setattr(torch.nn.functional, "conv1d", count_conv)
    monkeypatch.setattr(torch, "mm", count_up)
    return counts


@pytest.mark.parametrize("name", ["snac24", "snac44", "mimi"])
def test_torch_computes_every_sample_once(name: str, torch_counts: Counter[int]) -> None:
    decoder = TorchCodec(model_of(*codec_of(name)))
    frames = sum(SIZES)
    stream(decoder, random_codes(decoder.spec, frames), SIZES, empty_end=True)
    latents = -(-frames // decoder.push_multiple) * decoder.push_multiple * decoder.spec.vq_strides[0]
    assert sorted(torch_counts.values()) == once(decoder.plan, latents)


class Profiled:
    """A session factory whose sessions record the shape of everything that a node puts out."""

    def __init__(self, folder: Path) -> None:
        self._prefix = str(folder / "profile")

    def open(self, path: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, self._prefix
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return self._session

    def counts(self, *kinds: str) -> Counter[str]:
        """Samples (matrix rows) put out by each node of these kinds over all runs."""
        with open(self._session.end_profiling()) as f:
            events = [e for e in json.load(f) if e["name"].endswith("_kernel_time")]
        total: Counter[str] = Counter()
        for event in events:
            if event["args"]["op_name"] in kinds:
                (shape,) = event["args"]["output_type_shape"][0].values()
                total[event["name"]] += shape[0] if len(shape) == 2 else shape[-1]
        return total


@pytest.mark.parametrize("name", ["snac24", "snac44", "mimi"])
@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_onnx_runtime_computes_every_sample_once(name: str, flavour: str, tmp_path: Path) -> None:
    codec, spec = codec_of(name)
    sessions: Any = Profiled(tmp_path)
    frames = sum(SIZES)
    decoder = OrtCodec(tmp_path, exported(codec, spec, tmp_path, flavour=flavour), model_of(codec, spec).spec, sessions)
    stream(decoder, random_codes(spec, frames), SIZES, empty_end=True)
    latents = -(-frames // decoder.push_multiple) * decoder.push_multiple * spec.vq_strides[0]
    found = sorted(sessions.counts("Conv", "FusedConv", "Gemm").values())
    assert found == once(read_plan(codec, spec), latents)


def test_noise_that_is_off_computes_nothing(tmp_path: Path) -> None:
    codec, spec = codec_of("snac24")
    sessions: Any = Profiled(tmp_path)
    decoder = OrtCodec(tmp_path, exported(codec, spec, tmp_path), model_of(codec, spec).spec, sessions)
    stream(decoder, random_codes(spec, 5), [3, 2])
    counts = sessions.counts("MatMul")
    assert len(counts) == 4 and not any(counts.values())
