"""What `doctor` tells of llama.cpp's build."""

from __future__ import annotations

import json
import platform

import pytest
from click.testing import CliRunner

from edgeomni.cli.doctor import doctor_
from edgeomni.cli.llama_build import backends, build_line, llama_build
from edgeomni.hardware import detect


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86's features")
def test_a_build_that_runs_here_asks_for_nothing_that_this_processor_lacks() -> None:
    build = llama_build()
    names = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16"}
    assert build["backends"]["CPU"]
    assert {names[f] for f in build["backends"]["CPU"] if f in names} <= set(detect().isa)


def test_llama_cpps_line_is_taken_apart() -> None:
    told = "CUDA : ARCHS = 870 | USE_GRAPHS = 1 | CPU : NEON = 1 | DOTPROD = 1 | OPENMP = 1 | "
    found = {"CUDA": ["ARCHS = 870", "USE_GRAPHS"], "CPU": ["NEON", "DOTPROD", "OPENMP"]}
    assert backends(told) == found
    assert build_line({"backends": found, "gpu": True}) == (
        "llama.cpp was built with: CUDA (ARCHS = 870, USE_GRAPHS); CPU (NEON, DOTPROD, OPENMP)"
    )


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "built for another processor"),
        ("raise OSError('libllama.so: no such file')", "cannot be loaded (OSError: libllama.so"),
        ("import os; os.abort()", "cannot be loaded (exit -6)"),
    ],
)
def test_a_build_that_does_not_run_here_says_why(probe: str, told: str) -> None:
    assert told in build_line(llama_build(probe))


def test_doctor_tells_it_in_both_forms() -> None:
    report = json.loads(CliRunner().invoke(doctor_, ["--json"]).output)
    assert report["llama_cpp"] == llama_build()
    assert "llama.cpp was built with" in CliRunner().invoke(doctor_).output
