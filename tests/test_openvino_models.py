"""OpenVINO's compiled models by themselves, on one layer: what they are compiled with, their requests, their errors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from edgeomni.component_meta import OpenVinoArithmetic
from edgeomni.errors import EngineError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.openvino_library import ov
from edgeomni.runtimes.openvino import models
from edgeomni.runtimes.openvino.blocks import causal_mask
from edgeomni.runtimes.openvino.models import Model, ModelFactory, translated


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """x [n] -> x + x."""
    x = ov.opset13.parameter([-1], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    y = ov.opset13.result(ov.opset13.add(x, x), name="y")
    y.output(0).get_tensor().set_names({"y"})
    ov.save_model(ov.Model([y], [x], "doubling"), tmp_path / "doubling.xml", compress_to_fp16=False)
    return tmp_path / "doubling.xml"


def asked(model: Model, name: str) -> str:
    value = model.compiled.get_property(name)
    return value.to_string() if isinstance(value, ov.Type) else getattr(value, "name", str(value))


def test_a_cpu_computes_in_float32_for_one_answer_at_a_time(doubling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiled model itself reports it; and nothing is kept on the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(doubling.parent / "cache"))
    model = ModelFactory(1).open(doubling)
    assert {name: asked(model, name) for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")} == {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    assert asked(model, "DYNAMIC_QUANTIZATION_GROUP_SIZE") == "0"
    assert asked(model, "PERFORMANCE_HINT") == "LATENCY" and asked(model, "ENABLE_CPU_PINNING") == "False"
    assert not (doubling.parent / "cache").exists()


def test_threads_may_share_a_core_where_their_number_is_given() -> None:
    """Else OpenVINO would take no more of them than there are physical cores."""
    assert ModelFactory(2).properties["ENABLE_HYPER_THREADING"] is True
    assert ModelFactory(2).properties["INFERENCE_NUM_THREADS"] == 2
    assert not {"ENABLE_HYPER_THREADING", "INFERENCE_NUM_THREADS"} & ModelFactory().properties.keys()


def test_fewer_threads_are_asked_for_with_the_same_arithmetic() -> None:
    fast = OpenVinoArithmetic(compute="bf16", int8_inputs=True)
    fewer = ModelFactory(2, "cpu", fast).with_threads(1)
    assert fewer.threads == 1 and fewer.properties == ModelFactory(1, "cpu", fast).properties
    assert fewer.properties != ModelFactory(1).properties


def test_a_request_is_used_again_and_outputs_stay(doubling: Path) -> None:
    model = ModelFactory(1).open(doubling)
    first = model.run({"x": np.arange(3, dtype=np.float32)})["y"]
    second = model.run({"x": np.ones(3, np.float32), "unknown": np.zeros(1)})["y"]
    np.testing.assert_array_equal(first, [0, 2, 4])
    np.testing.assert_array_equal(second, [2, 2, 2])
    assert len(model._idle) == 1
    with pytest.raises(EngineError, match="the model doubling failed: .*; check memory, or verify the bundle"):
        model.run({"x": np.ones((2, 2, 2), np.float32)})
    assert len(model._idle) == 1


def test_a_run_that_came_to_its_end_all_the_same_is_interrupted(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set too late to stop a layer: the caller gets no outputs of a turn that is over."""
    interrupt = Interrupt()
    model = ModelFactory(1).open(doubling)
    request = model.request()

    class Late:
        """The request, but that its end is waited for before the interrupt is set."""

        def __getattr__(self, name: str) -> object:
            return getattr(request, name)

        def wait(self) -> None:
            request.wait()
            interrupt.set()

    with pytest.raises(Interrupted):
        model.run_request(Late(), {"x": np.ones(3, np.float32)}, interrupt)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Exception from a.cpp:1:\nCheck 'ok' failed at b.cpp:2:\nno such layer\n", "no such layer"),
        ("Exception from a.cpp:1:\nfirst\n\nException from b.cpp:2:\nCheck 'x' failed", "first"),
        ("no such layer\nChecked: two inputs wanted", "Checked: two inputs wanted"),
        ("Exception from a.cpp:1:", "Exception from a.cpp:1:"),
        ("x" * 1000, "x" * 300),
        ("", "RuntimeError"),
    ],
)
def test_of_what_openvino_says_the_reason_is_kept(said: str, reason: str) -> None:
    with pytest.raises(EngineError) as caught, translated("it failed", "do this"):
        raise RuntimeError(said)
    assert str(caught.value) == f"it failed: {reason}; do this"


def test_where_compiled_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("/somewhere", "/somewhere"), ("", "/home/me/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setenv("HOME", "/home/me")
        assert models.cache_directory() == Path(expected, "edgeomni", "openvino")
        assert ModelFactory(device="auto").properties["CACHE_DIR"] == str(models.cache_directory())


def test_auto_hands_every_device_its_own_properties() -> None:
    own = ModelFactory(1, "auto").properties["DEVICE_PROPERTIES"]
    assert own.keys() == set(models.core().available_devices)
    assert own["CPU"] == ModelFactory(1).properties


def test_the_first_of_two_new_frames_does_not_see_the_second() -> None:
    np.testing.assert_array_equal(causal_mask(2, 1), [[[[0, 0, -np.inf], [0, 0, 0]]]])
