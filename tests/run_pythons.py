"""Installs EdgeOmni as a device would, without torch, on every Python that this machine has, and tests it there.

python tests/run_pythons.py --work DIR [--python PATH ...] [--only test_device.py ...]

Each Python gets an environment of its own in DIR, with EdgeOmni built from this checkout's source distribution, its
dependencies from the package index, and pytest; the tests are those of the unpacked source distribution. The bundles
that they answer from are exported once, by the Python that runs this script. OpenVINO, where it has a wheel for that
Python, is added afterwards, and the device's answers are tested again. The last line is one JSON object. Exits with 1
if a test failed on any Python, or if there was none to test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
TOOLS = ("hypothesis", "pytest", "pytest-timeout", "setuptools>=77")
MODULES = (
    "test_apart.py",
    "test_audio.py",
    "test_bundle.py",
    "test_cancel.py",
    "test_chat.py",
    "test_chat_turns.py",
    "test_cli.py",
    "test_cli_answers.py",
    "test_cli_shipped.py",
    "test_data_chat.py",
    "test_data_check.py",
    "test_data_native.py",
    "test_data_readers.py",
    "test_data_slam.py",
    "test_device.py",
    "test_embedding_table.py",
    "test_front_end.py",
    "test_generate.py",
    "test_hardware.py",
    "test_install_hint.py",
    "test_layout.py",
    "test_limits.py",
    "test_loop.py",
    "test_loop_choices.py",
    "test_new_directory.py",
    "test_onnxruntime_providers.py",
    "test_outputs.py",
    "test_packaging.py",
    "test_prefill.py",
    "test_profiling.py",
    "test_prompts.py",
    "test_question.py",
    "test_renames.py",
    "test_runtime_common.py",
    "test_sampling.py",
    "test_shipped.py",
    "test_sound_writer.py",
    "test_spans.py",
    "test_streaming.py",
    "test_streaming_codec.py",
    "test_terminal.py",
    "test_text.py",
    "test_tokens.py",
    "test_turn_events.py",
    "test_turns.py",
    "test_workspaces.py",
)
"""The tests of what a device has."""
NEED_MORE = (
    "test_audio.py::test_log_mel_is_whispers",
    "test_cli.py::test_init_does_not_take_a_folder_for_a_checkpoint",
    "test_cli.py::test_init_needs_the_name_of_an_output",
)
"""Tests among them that need transformers or torch."""
ASK = "import sys; print(sys.version_info >= (3, 10), '%d.%d' % sys.version_info[:2])"
REPORT = (
    "import json; from importlib import metadata as m; "
    "print(json.dumps({n: m.version(n) for n in ('numpy', 'onnxruntime', 'tokenizers')}))"
)


def pythons() -> dict[str, str]:
    """Version -> interpreter, of those on PATH and of pyenv's."""
    found: dict[str, str] = {}
    folders = [None, *sorted(Path.home().glob(".pyenv/versions/3.*/bin"), reverse=True)]
    for version in VERSIONS:
        for folder in folders:
            path = shutil.which(f"python{version}", path=str(folder) if folder else None)
            if path and version not in found and works(path, version):
                found[version] = path
    return found


def works(python: str, version: str) -> bool:
    """A shim of pyenv lies on PATH and may yet start nothing."""
    done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.split() == ["True", version]


def export_bundles(folder: Path) -> Path:
    """The bundles that tests/test_device.py answers from."""
    from edgeomni.export import export_bundle

    sys.path.insert(0, str(ROOT / "tests"))
    from test_device import EXPORTED

    for layout in sorted(path.parent for path in (ROOT / "tests" / "golden").glob("*/golden.npz")):
        for name, how in EXPORTED.items():
            export_bundle(layout, folder / f"{layout.name}-{name}", **how, force=True)
    return folder


def source_distribution(folder: Path) -> Path:
    """The source distribution of this checkout, unpacked."""
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.check_output([sys.executable, "-c", build, str(folder)], cwd=ROOT, text=True)
    archive = folder / done.split()[-1]
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    shutil.rmtree(unpacked, ignore_errors=True)
    shutil.unpack_archive(archive, folder)
    return unpacked


def installed(python: str, folder: Path, source: Path) -> Path:
    """The folder of programs of a fresh environment with the device install."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    programs = folder / "bin"
    subprocess.run([str(programs / "python"), "-m", "pip", "install", "-q", str(source), *TOOLS], check=True)
    return programs


def tested(programs: Path, source: Path, bundles: Path, modules: Sequence[str] = MODULES) -> bool:
    """Runs the tests that lie in `source` on the installed package: pytest, unlike python -m pytest, does not add the
    current folder to what can be imported."""
    command = [str(programs / "pytest"), "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in modules)]
    command += [f"--deselect=tests/{name}" for name in NEED_MORE]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"EDGEOMNI_DEVICE_BUNDLES": str(bundles), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=source, env=environment, check=False).returncode == 0


def with_openvino(programs: Path, source: Path, bundles: Path) -> bool | None:
    """Whether the device also answers with OpenVINO installed; None where no wheel of it is for this Python."""
    install = [str(programs / "python"), "-m", "pip", "install", "-q", "--only-binary=:all:", "openvino>=2025.3"]
    if subprocess.run(install, check=False).returncode != 0:
        return None
    return tested(programs, source, bundles, ["test_device.py"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for environments and bundles.")
    parser.add_argument("--python", action="append", default=[], help="Test this interpreter instead.")
    parser.add_argument("--only", nargs="*", metavar="MODULE", help="These test modules instead of all.")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = {p.strip("/").replace("/", "-"): p for p in args.python} or pythons()
    bundles, source = export_bundles(work / "bundles"), source_distribution(work)
    results = {}
    for version, python in chosen.items():
        print(f"== Python {version}: {python}", flush=True)
        programs = installed(python, work / f"venv-{version}", source)
        versions = json.loads(subprocess.check_output([str(programs / "python"), "-c", REPORT], text=True))
        results[version] = {"passed": tested(programs, source, bundles, args.only or MODULES), **versions}
        results[version]["openvino"] = with_openvino(programs, source, bundles)
    print(json.dumps(results))
    return int(not results or not all(r["passed"] and r["openvino"] is not False for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
