"""The codec as GGUF on ggml: what is stored, what is refused, and files that are not as they should be.

That it streams what the original decodes offline is tested beside the other engines (test_codec_streams.py).
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_models import mimi, offline, pushes, random_codes, snac, snac_spec, stream
from gguf import GGUFReader
from numpy.testing import assert_allclose

from edgeomni.bundle import Bundle, Component
from edgeomni.errors import BundleError, EngineError, UsageError
from edgeomni.export import export_bundle
from edgeomni.exporters import exporter_of
from edgeomni.exporters.gguf import codec as exporter
from edgeomni.model.codec_plan import CodecPlan
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes.ggml import numpy_operations
from edgeomni.runtimes.ggml.codec import GgmlCodec
from edgeomni.runtimes.torch.codec import TorchCodec

Made = tuple[Any, Component]


def model_of(codec: Any, spec: Any) -> Any:
    return types.SimpleNamespace(codec=codec, spec=types.SimpleNamespace(codec=spec), provenance={}, licences={})


def model_named(name: str) -> Any:
    if name == "mimi":
        return model_of(*mimi())
    codec = snac(name)
    return model_of(codec, snac_spec(codec))


def written(model: Any, out: Path, precision: str = "f16") -> Component:
    """With its meta as a manifest holds it."""
    component = exporter.export(model, out, out, precision)
    component.meta = json.loads(json.dumps(component.meta))
    return component


def snr(signal: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(signal).sum() / np.square(signal - other).sum()))


# --- values


@pytest.mark.parametrize("name", ["snac24", "snac32", "snac_dense", "mimi"])
def test_f16_is_near_its_stand_in_and_the_original(name: str, tmp_path: Path) -> None:
    """Weights as stored, in torch: what is left is that products round their inputs to half precision."""
    model = model_named(name)
    component, spec = written(model, tmp_path), model.spec.codec
    plan = exporter_of("gguf").codec_as_exported(model, component)
    assert isinstance(plan, CodecPlan)
    decoder, twin = GgmlCodec(tmp_path, component, model.spec, 2), TorchCodec(None, plan)
    codes = random_codes(spec, decoder.first_push + 7)
    sizes = pushes(decoder.first_push + 7, decoder.first_push, seed=1)
    wave, stored = (np.concatenate(stream(d, codes, sizes)) for d in (decoder, twin))
    original = offline(model.codec, spec, codes)
    assert snr(original, wave) > 45 and snr(stored, wave) > snr(original, wave)
    assert exporter_of("gguf").codec_as_exported(model, written(model, tmp_path, "fp32")) is None


def test_a_first_push_holds_what_every_layer_needs_to_begin(tmp_path: Path) -> None:
    model = model_named("snac24")
    decoder = GgmlCodec(tmp_path, written(model, tmp_path, "fp32"), model.spec, 1)
    assert decoder.first_push == 3 and decoder.timing.lag_samples == 4757


def test_ggml_s_own_operations_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is given instead of numpy's operations, computed on the CPU."""
    model = model_named("snac24")
    component = written(model, tmp_path, "fp32")
    codes = random_codes(model.spec.codec, 9)
    plain, decoder = (GgmlCodec(tmp_path, component, model.spec, 1) for _ in range(2))
    expected = np.concatenate(stream(decoder, codes, [3, 2, 4], seed=1))
    plain._backend.numpy_operations = False
    monkeypatch.setattr(numpy_operations, "custom", lambda *_: pytest.fail("an operation of numpy's"))
    assert_allclose(np.concatenate(stream(plain, codes, [3, 2, 4], seed=1)), expected, atol=1e-5)


def test_graphs_are_used_again_and_few_are_kept(tmp_path: Path) -> None:
    model = model_named("snac24")
    decoder = GgmlCodec(tmp_path, written(model, tmp_path), model.spec, 1)
    codes = random_codes(model.spec.codec, 40)
    first = np.concatenate(stream(decoder, codes, [3, *[1] * 10, *[4] * 6, 3]))
    assert len(decoder._graphs) == 4
    np.testing.assert_array_equal(np.concatenate(stream(decoder, codes, [3, *[1] * 10, *[4] * 6, 3])), first)
    for size in range(1, 9):
        stream(decoder, codes, [3, size, 40 - 3 - size])
    assert len(decoder._graphs) == 6


# --- what is refused


def test_ids_that_no_table_has_are_refused_and_the_codec_goes_on(tmp_path: Path) -> None:
    model = model_named("snac24")
    spec, decoder = model.spec.codec, GgmlCodec(tmp_path, written(model, tmp_path), model.spec, 1)
    good = random_codes(spec, 3)
    for bad in (-1, spec.codebook_size):
        for level in range(3):
            codes = [c.copy() for c in good]
            codes[level][-1] = bad
            with pytest.raises(EngineError, match=f"no id {bad}; a level has 64"):
                decoder.decode(codes, decoder.open(), True)
    assert decoder.decode(good, decoder.open(), True).shape == (3 * spec.frame_samples,)


def test_a_closed_codec_says_so(tmp_path: Path) -> None:
    model = model_named("snac24")
    decoder, codes = GgmlCodec(tmp_path, written(model, tmp_path), model.spec, 1), random_codes(model.spec.codec, 3)
    state = decoder.open()
    decoder.decode(codes, state, False)
    decoder.close()
    decoder.close()
    with pytest.raises(EngineError, match="this codec is closed"):
        decoder.decode(codes, state, True)


@pytest.mark.parametrize("precision", ["q8_0", "q4_0", "bf16"])
def test_integers_and_bfloat16_are_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"codec:{precision} is not offered as gguf: .*use codec fp32 or f16"):
        written(model_named("snac24"), tmp_path, precision)
    with pytest.raises(UsageError, match="known are fp32, f16"):
        written(model_named("snac24"), tmp_path, "int8")


def test_convolutions_in_groups_are_refused(tmp_path: Path) -> None:
    model = model_named("snac_dense")
    from dataclasses import replace

    from edgeomni.model.codec_plan import Conv
    from edgeomni.model.codec_reader import read_plan

    plan = read_plan(model.codec, model.spec.codec)
    front = plan.ops[1]
    assert isinstance(front, Conv)
    grouped = replace(front, weight=front.weight[:, ::2], groups=2)
    with pytest.raises(UsageError, match="a convolution in 2 groups.*--codec onnx:fp32"):
        exporter.described(replace(plan, ops=(plan.ops[0], grouped, *plan.ops[2:])))


# --- the file


def test_the_file_tells_what_it_is_and_stores_matrices_in_half(tmp_path: Path) -> None:
    model = model_named("snac24")
    kinds = {}
    for precision in ("fp32", "f16"):
        component = written(model, tmp_path, precision)
        reader = GGUFReader(tmp_path / component.graphs["codec"].path)
        kinds[precision] = {t.name: t.tensor_type.name for t in reader.tensors}
    told = {key: field.contents() for key, field in reader.fields.items()}
    assert told["general.architecture"] == "edgeomni-codec" and told["edgeomni.codec.kind"] == "snac"
    assert told["edgeomni.codec.hop_samples"] == 512 and told["edgeomni.codec.latents_per_id"] == "4, 2, 1"
    assert set(kinds["fp32"].values()) == {"F32"}
    assert {n.rpartition(".")[2] for n, k in kinds["f16"].items() if k == "F16"} == {"weight"}
    assert kinds["f16"]["layers.0.1.weight"] == "F16" and kinds["f16"]["layers.0.3.1.weight"] == "F32"
    assert kinds["f16"]["front.weight"] == kinds["f16"]["layers.5.weight"] == "F32"


@pytest.mark.parametrize("name", ["snac32", "mimi"])
def test_every_changed_tensor_is_named(name: str, tmp_path: Path) -> None:
    model = model_named(name)
    component = written(model, tmp_path)
    path, altered = tmp_path / component.graphs["codec"].path, exporter_of("gguf").altered
    assert altered(model, component, tmp_path) == []
    raw, tensors = bytearray(path.read_bytes()), GGUFReader(path).tensors
    for tensor in tensors[:: len(tensors) // 4]:
        raw[int(tensor.data_offset) + 1] ^= 1
    path.write_bytes(raw)
    assert sorted(altered(model, component, tmp_path)) == sorted(
        f"codec:{t.name}" for t in tensors[:: len(tensors) // 4]
    )


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = model_named("snac24")
    first = written(model, tmp_path)
    assert first.files == written(model, tmp_path).files


# --- files and descriptions that are not as they should be


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Component, Path]:
    root = tmp_path_factory.mktemp("codec")
    model = model_named("snac24")
    return model, written(model, root), root


def first(meta: Any, op: str) -> Any:
    return next(layer for layer in meta["layers"] if layer["op"] == op)


def changed(kind: str, **values: Any) -> Callable[[Any], Any]:
    return lambda meta: first(meta, kind).update(values)


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (changed("up", stride=4), "32 samples per latent|layers give|layers.0.1.weight is F16"),
    (changed("up", left=3), "the sizes of layer layers.0.1 do not fit"),
    (changed("conv", inputs=24), "layer front takes 24 channels and is given 13"),
    (changed("conv", depthwise=True), "the sizes of layer front do not fit"),
    (changed("snake", op="noise"), "lacks the tensor|holds 'layers.0.0.alpha'"),
    (changed("snake", name="front"), "lacks the tensor|holds"),
    (changed("snake", op="warp"), "Invalid enum value 'warp'"),
    (changed("residual", body=[]), "sizes of layer layers.0.3 do not fit"),
    (changed("residual", outputs=7), "two ways through layer layers.0.3 do not meet"),
    (changed("residual", delay=4), "sizes of layer layers.0.3 do not fit"),
    (changed("conv", left=7), "sizes of layer front do not fit"),
    (changed("up", crop=16), "sizes of layer layers.0.1 do not fit"),
    (changed("up", right=3), "sizes of layer layers.0.1 do not fit"),
    (changed("conv", taps=0), ">= 1"),
    (changed("up", stride=10**9), "<= 4096"),
    (lambda meta: meta["levels"].pop(), "its levels hold ids for"),
    (lambda meta: meta["levels"][0].update(rows=3), "fewer than 64 rows"),
    (lambda meta: meta["levels"][0].update(group=1, width=9), "different widths|takes 13 channels"),
    (lambda meta: meta["layers"].pop(-2), "layer layers.6 takes 1 channels and is given 4"),
    (lambda meta: meta["layers"].clear(), "layers give"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_descriptions_that_make_no_codec_are_refused(case: int, made: tuple[Any, Component, Path]) -> None:
    (model, component, root), (change, message) = made, WRONG[case]
    wrong = copy.deepcopy(component)
    change(wrong.meta)
    with pytest.raises(BundleError, match=message):
        GgmlCodec(root, wrong, model.spec, 1)


FUZZ = """
import copy, pickle, random, sys
from pathlib import Path
import numpy as np
from edgeomni.errors import EdgeOmniError
from edgeomni.runtimes.ggml.codec import GgmlCodec
root = Path(sys.argv[1])
component, spec = pickle.loads((root / "how.pickle").read_bytes())
path = root / component.graphs["codec"].path
good, rng, refused = path.read_bytes(), random.Random(0), 0

def shaken(layers):
    layer = rng.choice(layers)
    while layer.get("body") and rng.random() < 0.8:
        layer = rng.choice(layer["body"])
    sizes = [k for k in layer if isinstance(layer[k], int)]
    key = rng.choice([*sizes, "taps", "left", "right", "drop", "crop", "delay"])
    layer[key] = rng.choice([0, 1, 2, layer.get(key, 1) + 1, 7, 4000])

for i in range(int(sys.argv[2])):
    raw, other = bytearray(good), copy.deepcopy(component)
    if i % 2:
        for _ in range(rng.choice([1, 4, 32])):
            raw[rng.randrange(rng.choice([64, 4096, len(raw)]))] = rng.randrange(256)
    else:
        shaken(other.meta["layers"])
    path.write_bytes(raw[: rng.choice([len(raw), len(raw), rng.randrange(len(raw))])] if i % 2 else raw)
    try:
        codec = GgmlCodec(root, other, spec, 1)
        state = codec.open()
        for last in (False, False, True):
            codes = [np.zeros(4 * n, np.int64) for n in spec.codec.ids_per_level]
            codec.decode(codes, state, last)
        codec.close()
    except EdgeOmniError:
        refused += 1
print("refused", refused)
"""


def test_no_changed_bytes_and_no_changed_description_end_the_process(tmp_path: Path) -> None:
    model = model_named("snac24")
    component = written(model, tmp_path)
    (tmp_path / "how.pickle").write_bytes(pickle.dumps((component, model.spec)))
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path), "80"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 20 < int(done.stdout.split()[1]) < 80


# --- in a bundle


def test_a_bundle_of_gguf_and_onnx_passes_the_gate_and_runs(tiny_model: OmniModel, tmp_path: Path) -> None:
    formats = {"encoder": "gguf:f16", "llm": "onnx:int8", "codec": "gguf:f16"}
    bundle = export_bundle(tiny_model, tmp_path / "bundle", formats=formats, threads=1)
    assert bundle.manifest.gate["passed"] is True and set(bundle.manifest.gate["engines"]) == {
        "onnxruntime",
        "llama.cpp",
    }
    again = Bundle.open(tmp_path / "bundle")
    engines = {name: component.engine for name, component in again.manifest.components.items()}
    assert engines == {"encoder": "llama.cpp", "llm": "onnxruntime", "codec": "llama.cpp"}
    from edgeomni.gate.run import replayed
    from edgeomni.runtimes import open_components

    components = open_components(again)
    assert isinstance(components.codec, GgmlCodec)
    assert replayed(again, components).missed == []
    components.close()
