"""What is handed out: the source distribution, the wheels that are built from it, and what a package index shows.

Everything is built by setuptools in processes of their own, in copies of the tracked files, without network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
import soundfile
from markdown_it import MarkdownIt
from test_device import COMMAND

ROOT = Path(__file__).resolve().parent.parent
LINKS = {f"edgeomni/{name}" for name in ("exporters", "profiles", "runtimes")}
GENERATED = ("PKG-INFO", "setup.cfg", "edgeomni.egg-info")
OWN = {".git", ".hypothesis", ".venv", "__pycache__", "build", "dist"}
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def tracked() -> set[str]:
    """Files of the project: git's where there is git, else (in an unpacked source distribution) all that lie here."""
    if not (ROOT / ".git").exists():
        found = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() and not p.parent.is_symlink())
        return {
            p.as_posix()
            for p in found
            if p.parts[0] not in GENERATED and not OWN & set(p.parts) and not any(n.endswith("_cache") for n in p.parts)
        } | LINKS
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)}


def copied(target: Path, *, symlinks: bool) -> Path:
    """The tracked files elsewhere; without `symlinks` as git writes them then: a small file that holds the target."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name not in LINKS:
            shutil.copy(ROOT / name, target / name)
        elif symlinks:
            (target / name).symlink_to(f"../{Path(name).name}")
        else:
            (target / name).write_text(f"../{Path(name).name}", encoding="utf-8")
    return target


def built(what: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built("sdist", copied(folder / "checkout", symlinks=True), folder)) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    (unpacked,) = (path for path in folder.glob("edgeomni-*") if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution."""
    return built("wheel", sdist, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def expected_in_a_wheel() -> list[str]:
    """Every module and data file, under the name that it is imported by; measured profiles are no data of a device."""
    outside = {PurePosixPath(link).name for link in LINKS}
    files = [name for name in tracked() - LINKS if not name.startswith("profiles/results/")]
    inner = [name for name in files if name.startswith("edgeomni/")]
    joined = [f"edgeomni/{name}" for name in files if name.partition("/")[0] in outside]
    namespace = [
        f"optimum/commands/register/{PurePosixPath(n).name}" for n in files if n.startswith("optimum_register/")
    ]
    return sorted([*inner, *joined, *namespace])


def test_the_source_distribution_is_what_is_tracked(sdist: Path) -> None:
    files = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    assert {f for f in files if not f.startswith(GENERATED)} == tracked() - LINKS


def test_its_files_are_not_altered(sdist: Path) -> None:
    assert [n for n in tracked() - LINKS if (sdist / n).read_bytes() != (ROOT / n).read_bytes()] == []
    assert os.access(sdist / ".ci" / "run", os.X_OK) == os.access(ROOT / ".ci" / "run", os.X_OK)


def test_a_wheel_has_every_module_once(wheel: Path) -> None:
    assert contents(wheel) == expected_in_a_wheel()


def test_a_wheel_of_a_clone_without_links_is_the_same(wheel: Path, tmp_path: Path) -> None:
    other = built("wheel", copied(tmp_path / "clone", symlinks=False), tmp_path)
    assert contents(other) == contents(wheel)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installation does."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(code: str, site: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process that works in `folder` and imports from `site` first."""
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_wheel_works_where_nothing_else_is(site: Path, tmp_path: Path) -> None:
    """Imported from the unpacked wheel, in a process that sees no checkout."""
    code = (
        "import edgeomni, edgeomni.runtimes.onnxruntime.llm, edgeomni.exporters, edgeomni.gate.judge\n"
        "from edgeomni.hardware import load_profile, profile_names\n"
        "from edgeomni.install_hint import _PACKAGE\n"
        "print(edgeomni.__file__, _PACKAGE, load_profile(profile_names()[0]).name, edgeomni.gate.judge.known_names())"
    )
    done = python(code, site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / "edgeomni"))


def test_a_wheel_brings_the_shipped_model(site: Path) -> None:
    needed = ("bundle/bundle.json", "checkpoint/model.safetensors", "question.wav", "question.txt")
    assert [name for name in needed if not (site / "edgeomni" / "nano" / name).is_file()] == []


def test_a_device_answers_aloud_right_after_the_installation(site: Path, tmp_path: Path) -> None:
    """`run nano` alone, without torch and in an empty folder: the question and the model came with the wheel."""
    done = python(COMMAND, site, tmp_path, "run", "nano", "-o", "answer.wav", "--max-seconds", "2")
    assert done.returncode == 0, done.stderr
    assert (site / "edgeomni" / "nano" / "question.txt").read_text(encoding="utf-8").strip() in done.stderr
    samples, rate = soundfile.read(tmp_path / "answer.wav")
    assert rate == 16000 and 0.2 < len(samples) / rate <= 2 and samples.any()


def targets(markdown: str) -> list[str]:
    """Where links and images lead, as a renderer finds them."""
    out, todo = list[str](), MarkdownIt().parse(markdown)
    while todo:
        token = todo.pop()
        todo += token.children or []
        out += [str(value) for key in ("href", "src") if (value := token.attrGet(key)) is not None]
    return out


def test_the_description_has_no_link_that_an_index_cannot_follow(sdist: Path) -> None:
    """A package index shows the README alone: a link to docs/ would lead nowhere. Of the picture it shows the words."""
    metadata = Parser().parsestr((sdist / "PKG-INFO").read_text(encoding="utf-8"))
    description = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown" and isinstance(description, str)
    assert "# EdgeOmni" in description
    leads_nowhere = [t for t in targets(description) if not t.startswith(("https://", "mailto:", "#"))]
    assert leads_nowhere == ["docs/nano.png"], "name the file without a link"
    assert "<img" not in description and "<a " not in description


def test_the_link_check_sees_links() -> None:
    text = "[a](docs/b.md) ![c](d.png) [e][f] `h.md`\n\n- <https://i>\n\n[f]: g.md"
    assert sorted(targets(text)) == ["d.png", "docs/b.md", "g.md", "https://i"]
