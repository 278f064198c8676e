"""Hardware profiles: the shipped ones, and what is refused."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest

from edgeomni import hardware
from edgeomni.errors import GateError, ProfileError, UsageError
from edgeomni.hardware import closest_profile, detect, load_profile, profile_names

SHIPPED = {"desktop-rtx-4090", "jetson-agx-orin-64gb", "jetson-orin-nano-8gb", "x86-avx2", "x86-avx512"}
TEXT = (Path(__file__).resolve().parent.parent / "profiles" / "x86-avx2.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_is_whole(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.choices()) == {"encoder", "llm", "codec"}
    assert profile.device.source, "vendor figures need their source"
    assert profile.run.threads <= 2 * profile.device.cores
    assert profile.budgets.rtf is not None and profile.budgets.rtf < 1, "an answer must not outrun its own audio"
    assert profile.budgets.peak_rss_mb is not None and profile.budgets.peak_rss_mb < profile.device.memory_gb * 1e3


def test_the_first_five_devices_are_there() -> None:
    assert set(profile_names()) >= SHIPPED


@pytest.mark.parametrize(("cores", "most"), [(None, 64), (2, 64), (16, 64), (17, 68), (128, 512)])
def test_threads_are_bounded_by_the_machine(cores: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    for fine in (None, 1, most):
        hardware.check_threads(fine)
    wrong: list[Any] = [0, -1, most + 1, 100_000, 2.0, True, "2"]
    for threads in wrong:
        with pytest.raises(UsageError, match=f"from 1 to {most} here, not {threads!r}"):
            hardware.check_threads(threads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("cores = 6", "cores = 6\nwatts = 3"), r"unknown key.*\$\.device\.watts"),
        (("cores = 6", 'cores = "six"'), r"\$\.device\.cores: Expected `int`, got `str`"),
        (("cores = 6", "cores = 0"), r"\$\.device\.cores: Expected `int` >= 1"),
        (("cores = 6\n", ""), r"\$\.device: .*missing required field `cores`"),
        (("[budgets]", "[limits]"), r"unknown key.*\$\.limits"),
        (("rtf = 0.6", "rft = 0.6"), r"unknown key.*\$\.budgets\.rft"),
        (('use = "onnx:int4"', 'use = "gguf:int4"'), r"\$\.components\.llm\.use: .*gguf"),
        (('use = "onnx:int4"', 'use = "onnx:int2"'), r"\$\.components\.llm\.use: .*int2"),
        (
            ('engines = ["onnxruntime"]', 'engines = ["onnxruntime", "tensorflow"]'),
            r"encoder\.engines: 'tensorflow' runs no",
        ),
        (('engine = "onnxruntime"', 'engine = "torch"'), r"\$\.run\.engine: 'torch' runs no exported format"),
        (("[components.codec]", "[components.vocoder]"), r"\$\.components: must have exactly encoder, llm, codec"),
        (("title = ", "title == "), "not valid TOML"),
        (
            ('engines = ["onnxruntime"]', 'engines = ["onnxruntime", "torch"]'),
            r"engines: 'torch' runs no exported",
        ),
        (('precisions = ["fp32", "fp16"]', 'precisions = ["fp32", "int2"]'), r"codec\.precisions: 'int2'"),
        (("ttfa_s = 2.0", "ttfa_s = nan"), r"\$\.budgets\.ttfa_s: must be a finite number"),
        (("ttfa_s = 2.0", "ttfa_s = 0"), r"\$\.budgets\.ttfa_s: Expected `float` > 0"),
        (("cores = 6", "cores = true"), r"\$\.device\.cores: Expected `int`, got `bool`"),
        (("cores = 6", f"cores = {10**30}"), r"\$\.device\.cores: must be a number below"),
        (("cores = 6", "cores = 6\ncores = 6"), "not valid TOML"),
        (("title = ", 'schema = "2.0"\ntitle = '), r"\$\.schema: .*newer than 1\.0.*; update EdgeOmni"),
        (("title = ", 'schema = "0.9"\ntitle = '), r"\$\.schema: .*older than 1\.0"),
        (("title = ", 'name = "x"\ntitle = '), r"unknown key.*\$\.name"),
        (('matches = ["avx2"]', 'matches = ["avx2"]\ncolour = "red"'), "colour"),
    ],
)
def test_a_mistake_is_refused_by_file_and_key(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in TEXT
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(*change), encoding="utf-8")
    with pytest.raises(ProfileError, match=said) as caught:
        load_profile(str(path))
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf" + TEXT.encode(), "byte order mark"),
        (TEXT.encode() + b"\xff", "is not UTF-8"),
        (b"a = " + b"[" * 5000, "nested too deeply|not valid TOML"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
    ],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    with pytest.raises(ProfileError, match=f"mine.toml: .*({said})"):
        load_profile(str(path))


def test_unknown_keys_of_a_newer_minor_version_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'schema = "1.7"\ncolour = "red"\n' + TEXT.replace("cores = 6", "cores = 6\nfans = 2"), encoding="utf-8"
    )
    with caplog.at_level("WARNING", "edgeomni"):
        profile = load_profile(str(path))
    assert profile.device == load_profile("x86-avx2").device
    (record,) = caplog.records
    assert "mine.toml" in record.getMessage() and "$.colour, $.device.fans" in record.getMessage()


def test_a_profile_by_path_and_unknown_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT, encoding="utf-8")
    assert load_profile(str(path)).device == load_profile("x86-avx2").device
    with pytest.raises(ProfileError, match="no hardware profile 'toaster'; known are .*x86-avx2"):
        load_profile("toaster")
    with pytest.raises(ProfileError, match="gone.toml: cannot be read"):
        load_profile(str(tmp_path / "gone.toml"))


def test_budgets_name_every_figure_beyond_them() -> None:
    profile = load_profile("x86-avx2")
    profile.judge({"ttfa_s": 2.0, "rtf": 0.6, "peak_rss_mb": None})
    with pytest.raises(GateError, match="ttfa_s is 2.5, the budget of x86-avx2 is 2; rtf is 0.9") as caught:
        profile.judge({"ttfa_s": 2.5, "rtf": 0.9, "peak_rss_mb": 10})
    assert caught.value.exit_code == 3


def test_detect_tells_what_this_machine_is() -> None:
    machine = detect()
    assert machine.cores >= 1 and machine.cpu
    assert machine.memory_gb is None or machine.memory_gb > 0.1
    assert machine.label == machine.label.lower() and " " not in machine.label and "/" not in machine.label


@pytest.mark.parametrize(
    ("isa", "gpu", "board", "name"),
    [
        (("avx2", "avx512f", "avx512_vnni"), None, None, "x86-avx512"),
        (("avx2", "avx512f"), None, None, "x86-avx2"),
        (("avx2",), "NVIDIA GeForce RTX 4090, 24564 MiB", None, "desktop-rtx-4090"),
        (("neon",), None, "NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano-8gb"),
        (("neon",), None, "NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin-64gb"),
        (("neon",), None, "Raspberry Pi 5", None),
    ],
)
def test_the_closest_profile(isa: tuple[str, ...], gpu: str | None, board: str | None, name: str | None) -> None:
    assert closest_profile(hardware.Machine("Linux", "cpu", 4, isa, 8.0, gpu, board)) == name


def test_cpuinfo_is_read_on_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = {"Features": "fp asimd asimddp", "CPU part": "0xd42"}
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: arm)
    assert detect().isa == ("neon", "dotprod")
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: {})
    assert detect().isa == () and detect().cpu == (platform.processor() or platform.machine())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system ties no process to CPUs")
def test_cores_are_those_that_this_process_may_use() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert hardware.cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert hardware.cores() == len(mine)


def test_the_first_processor_of_the_list_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large and small cores differ; ARM's list ends with a block about the whole machine."""
    text = "processor: 0\nmodel name: Large\nFeatures: asimd asimddp\n\nmodel name: Small\nFeatures: sve\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / Path(name).name)
    assert hardware.cpu_name() == "Large" and hardware.detect().isa == ("neon", "dotprod")
    (tmp_path / "cpuinfo").unlink()
    assert hardware.cpu_name()
