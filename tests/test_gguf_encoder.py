"""The encoder as GGUF on ggml: against torch, what is stored, what is refused, and files that are damaged."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from edgeomni.bundle import Component
from edgeomni.errors import BundleError, EngineError, UsageError
from edgeomni.exporters import exporter_of, options_of
from edgeomni.gate.metrics import cosine
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.model.encoders import build_adapter
from edgeomni.model.omni import OmniModel
from edgeomni.quantize.policy import component_precisions
from edgeomni.runtimes.ggml.encoder import GgmlEncoder
from edgeomni.spec import AdapterSpec, FrontEndSpec

LEAST = {"fp32": 0.9999999, "f16": 0.99999, "bf16": 0.9999, "q8_0": 0.999}
"""Precision -> the least cosine to the original's features."""


def mel_of(model: Any, t: int) -> np.ndarray:
    return np.random.default_rng(t).standard_normal((model.spec.front_end.n_mels, t)).astype(np.float32)


def reference(model: Any, mel: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.encode(torch.from_numpy(mel)[None])[0].numpy())


def written(model: Any, out: Path, precision: str) -> Component:
    component: Component = exporter_of("gguf").export(model, "encoder", out, precision, options_of("gguf", {}))
    return component


def opened(model: Any, out: Path, precision: str = "fp32", threads: int = 1) -> GgmlEncoder:
    return GgmlEncoder(out, written(model, out, precision), model.spec, threads)


@pytest.mark.parametrize("precision", LEAST)
def test_features_are_torch_s_at_every_precision(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    encoder = opened(tiny_model, tmp_path, precision, threads=2)
    for t in (2, 120, 1000, 2 * tiny_model.spec.encoder.context):
        mel = mel_of(tiny_model, t)
        features, expected = encoder.encode(mel), reference(tiny_model, mel)
        assert features.shape == expected.shape and cosine(expected, features) > LEAST[precision]
        for wanted in (1, 65, t):
            part = encoder.encode(mel, wanted)
            assert part.shape == expected[:wanted].shape and cosine(expected[:wanted], part) > LEAST[precision]
    encoder.close()


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0"])
def test_the_stand_in_computes_what_is_computed(precision: str, tiny_model: OmniModel, tmp_path: Path) -> None:
    """Stored weights and inputs rounded as the kernels round them, in torch: much nearer than the original is.

    Attention and GELU are computed in float here, which the stand-in does not round either.
    """
    component = written(tiny_model, tmp_path, precision)
    mel = mel_of(tiny_model, 400)
    encoder = GgmlEncoder(tmp_path, component, tiny_model.spec, 1)
    encoder._exact = True
    features = encoder.encode(mel)
    with exporter_of("gguf").as_exported(tiny_model, component, exact=False):
        imitated = reference(tiny_model, mel)
    near, far = np.abs(features - imitated).std(), np.abs(features - reference(tiny_model, mel)).std()
    assert near < 0.6 * far
    assert exporter_of("gguf").stored_schemes(component)["adapter.proj"].kind == {"f16": "fp16"}.get(
        precision, precision
    )


@pytest.mark.parametrize("adapter", [AdapterSpec("linear", bias=True), AdapterSpec("swiglu", hidden=64, bias=True)])
@pytest.mark.parametrize("n_mels", [80, 128])
def test_other_adapters_and_mel_bands(tiny_model: Any, tmp_path: Path, adapter: AdapterSpec, n_mels: int) -> None:
    model = Variant(tiny_model, adapter, n_mels)
    mel = mel_of(model, 60)
    np.testing.assert_allclose(opened(model, tmp_path).encode(mel), reference(model, mel), atol=1e-5)
    component = written(model, tmp_path / "again", "q8_0")
    assert exporter_of("gguf").altered(model, component, tmp_path / "again") == []  # type: ignore[arg-type]


class Variant(torch.nn.Module):
    """An encoder of the tiny model's sizes with other mel bands, and another adapter behind it."""

    def __init__(self, tiny: Any, adapter: AdapterSpec, n_mels: int) -> None:
        from dataclasses import replace

        from edgeomni.model import encoders

        super().__init__()
        torch.manual_seed(0)
        self.spec = replace(tiny.spec, front_end=FrontEndSpec(n_mels=n_mels), adapter=adapter)
        self.encoder = encoders.build(self.spec.encoder, n_mels).eval()
        self.adapter = build_adapter(adapter, self.spec.encoder.width, self.spec.body.width)
        self.provenance: dict[str, Any] = {}
        self.licences: dict[str, str] = {}

    def encode(self, mel: torch.Tensor) -> torch.Tensor:
        from edgeomni.model import encoders

        return self.adapter(encoders.encode(self.encoder, mel))  # type: ignore[no-any-return]


def test_windows_of_many_lengths_share_a_few_graphs(tiny_model: OmniModel, tmp_path: Path) -> None:
    encoder = opened(tiny_model, tmp_path)
    for t in (20, 40, 60, 20, 200):
        for wanted in (1, 7, 10):
            mel = mel_of(tiny_model, t)
            np.testing.assert_allclose(encoder.encode(mel, wanted), reference(tiny_model, mel)[:wanted], atol=1e-5)
    assert len(encoder._graphs) == 2


# --- stopping


def test_an_interrupt_ends_the_run_and_leaves_the_encoder_usable(tiny_model: OmniModel, tmp_path: Path) -> None:
    encoder, mel = opened(tiny_model, tmp_path), mel_of(tiny_model, 3000)
    features = encoder.encode(mel, None, Interrupt())
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(Interrupted):
        encoder.encode(mel, None, interrupt)
    late = Interrupt()
    threading.Timer(0.001, late.set).start()
    with pytest.raises(Interrupted):
        for _ in range(1000):
            encoder.encode(mel, None, late)
    np.testing.assert_array_equal(encoder.encode(mel), features)


def test_a_closed_encoder_says_so(tiny_model: OmniModel, tmp_path: Path) -> None:
    encoder = opened(tiny_model, tmp_path)
    encoder.encode(mel_of(tiny_model, 20))
    encoder.close()
    encoder.close()
    with pytest.raises(EngineError, match="closed"):
        encoder.encode(mel_of(tiny_model, 20))


# --- what is refused


@pytest.mark.parametrize("shape", [(80, 3), (80, 0), (79, 10), (80, 3002), (80,)])
def test_other_shapes_are_refused_by_name(tiny_model: OmniModel, tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match="t even"):
        opened(tiny_model, tmp_path).encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("q4_0", "encoder:q4_0 is not offered as gguf: 8 bits are the speech encoder's floor; use encoder q8_0"),
        ("q6_k", "floor; use encoder q8_0"),
        ("int8", "encoder:int8 is not offered as gguf: known are fp32, f16, bf16, q8_0"),
    ],
)
def test_fewer_than_8_bits_and_other_names_are_refused(
    precision: str, message: str, tiny_model: OmniModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        written(tiny_model, tmp_path, precision)


def test_one_precision_for_all_keeps_the_floors() -> None:
    for low in ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q5_0"):
        assert component_precisions(low) == {"encoder": "q8_0", "llm": low, "codec": "f16"}
    assert component_precisions("bf16") == {"encoder": "bf16", "llm": "bf16", "codec": "f16"}
    for precision in ("f16", "q8_0", "fp32"):
        for name, chosen in component_precisions(precision).items():
            assert exporter_of("gguf").schemes_for(name, chosen, options_of("gguf", {}))


def test_widths_that_blocks_do_not_divide_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter\.proj\.weight has 48 inputs, which q8_0 cannot store"):
        written(Variant(tiny_model, AdapterSpec("swiglu", hidden=48), 80), tmp_path, "q8_0")


# --- the file


def test_the_file_tells_what_it_is_and_nothing_else_is_in_it(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, tmp_path, "q8_0")
    reader = GGUFReader(tmp_path / component.graphs["encoder"].path)
    told = {key: field.contents() for key, field in reader.fields.items()}
    spec = tiny_model.spec
    assert told["general.architecture"] == "edgeomni-encoder" and "log-mel in" in told["general.description"]
    assert told["edgeomni.encoder.layers"] == spec.encoder.layers
    assert told["edgeomni.encoder.output_width"] == spec.body.width
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["a.blk.1.attn_q.weight"] == kinds["mm.a.proj.weight"] == "Q8_0"
    assert kinds["a.conv1d.2.weight"] == kinds["a.blk.0.ln1.weight"] == kinds["a.position_embd.weight"] == "F32"
    parameters = [*tiny_model.encoder.named_parameters(), *tiny_model.adapter.named_parameters()]
    assert len(kinds) == len(parameters)


def test_exporting_twice_gives_the_same_bytes(tiny_model: OmniModel, tmp_path: Path) -> None:
    first, second = (written(tiny_model, tmp_path / name, "q8_0") for name in ("a", "b"))
    assert first.files == second.files


def test_every_changed_tensor_is_named(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, tmp_path, "q8_0")
    path, altered = tmp_path / component.graphs["encoder"].path, exporter_of("gguf").altered
    assert altered(tiny_model, component, tmp_path) == []
    raw = bytearray(path.read_bytes())
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    for name in ("a.blk.0.attn_k.weight", "mm.a.proj.weight", "a.conv1d.1.bias"):
        raw[int(tensors[name].data_offset) + 5] ^= 1
    path.write_bytes(raw)
    assert altered(tiny_model, component, tmp_path) == [
        f"encoder:{name}" for name in ("a.conv1d.1.bias", "a.blk.0.attn_k.weight", "mm.a.proj.weight")
    ]


# --- files that are not as they should be

CHANGES: list[tuple[Any, str]] = [
    (lambda raw: raw[: len(raw) // 2], "lies beyond the end of the file|no GGUF file"),
    (lambda raw: b"", "is no GGUF file that can be read"),
    (lambda raw: b"FUGG" + raw[4:], "is no GGUF file that can be read"),
    (lambda raw: raw.replace(b"edgeomni-encoder", b"edgeomni-decoder", 1), "of the architecture 'edgeomni-decoder'"),
    (lambda raw: raw.replace(b"a.blk.1.attn_q.weight", b"a.blk.7.attn_q.weight", 1), "lacks the tensor a.blk.1.attn_q"),
    (lambda raw: raw[:-64], "lies beyond the end of the file|no GGUF file"),
]


@pytest.mark.parametrize("case", range(len(CHANGES)))
def test_bad_files_are_refused_by_name(case: int, tiny_model: OmniModel, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    component = written(tiny_model, tmp_path, "f16")
    path = tmp_path / component.graphs["encoder"].path
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleError, match=message):
        GgmlEncoder(tmp_path, component, tiny_model.spec, 1)
    path.unlink()
    with pytest.raises(BundleError, match="no such file"):
        GgmlEncoder(tmp_path, component, tiny_model.spec, 1)


def test_another_model_s_file_is_refused(tiny_model: OmniModel, tmp_path: Path) -> None:
    component = written(tiny_model, tmp_path, "f16")
    other = Variant(tiny_model, AdapterSpec("swiglu", hidden=256), 128).spec
    with pytest.raises(BundleError, match=r"a.conv1d.1.weight is F32 of \[64, 240\], not F32 of \[64, 384\]"):
        GgmlEncoder(tmp_path, component, other, 1)


FUZZ = """
import pickle, random, sys
from pathlib import Path
import numpy as np
from edgeomni.errors import EdgeOmniError
from edgeomni.runtimes.ggml.encoder import GgmlEncoder
root = Path(sys.argv[1])
component, spec = pickle.loads((root / "how.pickle").read_bytes())
path = root / component.graphs["encoder"].path
good, rng, refused = path.read_bytes(), random.Random(0), 0
for i in range(int(sys.argv[2])):
    raw = bytearray(good)
    for _ in range(rng.choice([1, 1, 4, 32])):
        raw[rng.randrange(rng.choice([64, 4096, len(raw)]))] = rng.randrange(256)
    path.write_bytes(raw[: rng.choice([len(raw), len(raw), rng.randrange(len(raw))])])
    try:
        encoder = GgmlEncoder(root, component, spec, 1)
        encoder.encode(np.zeros((80, 20), np.float32))
        encoder.close()
    except EdgeOmniError:
        refused += 1
print("refused", refused)
"""


def test_no_changed_bytes_end_the_process(tiny_model: OmniModel, tmp_path: Path) -> None:
    """In a child process, which ggml would end: every file is opened and run, or refused by our own error."""
    import pickle

    component = written(tiny_model, tmp_path, "q8_0")
    (tmp_path / "how.pickle").write_bytes(pickle.dumps((component, tiny_model.spec)))
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path), "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 20 < int(done.stdout.split()[1]) < 60


def test_a_bundle_s_encoder_is_opened_by_the_engine_llama_cpp(tiny_model: OmniModel, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from edgeomni.components import OpenOptions
    from edgeomni.engines import engines_for
    from edgeomni.runtimes import runtime_of

    component = written(tiny_model, tmp_path, "f16")
    bundle: Any = SimpleNamespace(
        path=tmp_path, spec=tiny_model.spec, manifest=SimpleNamespace(components={"encoder": component})
    )
    (engine,) = engines_for("gguf", "encoder")
    runtime = runtime_of(engine)
    assert isinstance(runtime.open_component(bundle, "encoder", OpenOptions(1)), GgmlEncoder)
    assert runtime.open_exact(bundle, "encoder", OpenOptions(1)) is None
    with pytest.raises(EngineError, match="cannot start|no GPU backend"):
        runtime.open_component(bundle, "encoder", OpenOptions(1, "cuda"))


def test_attention_in_steps_is_attention(tiny_model: OmniModel, tmp_path: Path) -> None:
    """What a GPU computes where its fused kernel does not fit, on the CPU."""
    encoder, mel = opened(tiny_model, tmp_path), mel_of(tiny_model, 100)
    encoder._backend.on_cpu = False
    np.testing.assert_allclose(encoder.encode(mel, 30), reference(tiny_model, mel)[:30], atol=1e-5)
    encoder._backend.on_cpu = True
