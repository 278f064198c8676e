"""What to type to install more, for every way in which a copy of EdgeOmni may have come to a machine.

The module is copied into a folder laid out as pip would leave it, with the metadata that pip would write, and loaded
from there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeomni import install_hint
from edgeomni.cli.doctor import TOOLS
from edgeomni.engines import ENGINES

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[[str], str]
Install = Callable[[Any], Command]


def loaded_from(folder: Path) -> Command:
    """`install_command` of a copy of the module that lies in `folder`/edgeomni."""
    (folder / "edgeomni").mkdir(parents=True)
    copy = shutil.copy(install_hint.__file__, folder / "edgeomni")
    spec = importlib.util.spec_from_file_location("copied_hint", copy)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command: Command = module.install_command
    return command


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lays out site-packages with this direct_url.json (None: from an index) and returns the copy's function."""

    def laid_out(direct_url: Any) -> Command:
        site = tmp_path / "site-packages"
        info = site / "edgeomni-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeomni\nVersion: 0.1.0\n", encoding="utf-8")
        if direct_url is not None:
            text = direct_url if isinstance(direct_url, str) else json.dumps(direct_url)
            (info / "direct_url.json").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        return loaded_from(site)

    return laid_out


def checkout(folder: Path, name: str = "edgeomni") -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n', encoding="utf-8")
    return folder


def test_from_an_index_the_name_is_enough(install: Install) -> None:
    command = install(None)
    assert command("export") == 'pip install "edgeomni[export]"'
    assert command("") == "pip install edgeomni"


def test_a_checkout_that_runs_in_place_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "my checkout")
    command = loaded_from(root)
    assert command("export") == f'pip install -e "{root}[export]"'
    assert command("") == f'pip install -e "{root}"'


def test_a_foreign_project_around_the_package_is_no_checkout(install: Install, tmp_path: Path) -> None:
    """site-packages may lie beside another project's pyproject.toml, as with pip install --target."""
    command = install(None)
    (tmp_path / "site-packages" / "pyproject.toml").write_text('[project]\nname = "other"\n', encoding="utf-8")
    assert command("play") == 'pip install "edgeomni[play]"'


def test_a_folder_that_was_installed_from(install: Install, tmp_path: Path) -> None:
    source = checkout(tmp_path / "source code")
    command = install({"url": source.as_uri(), "dir_info": {}})
    assert "%20" in source.as_uri(), "the address is escaped, the command must not be"
    assert command("export") == f'pip install "{source}[export]"'
    shutil.rmtree(source)
    assert command("export") == 'pip install ".[export]" (in a checkout of EdgeOmni)'
    assert command("") == 'pip install "." (in a checkout of EdgeOmni)'


def test_a_wheel_that_was_installed_from(install: Install, tmp_path: Path) -> None:
    wheel = tmp_path / "edgeomni-0.1.0-py3-none-any.whl"
    wheel.touch()
    command = install({"url": wheel.as_uri(), "archive_info": {}})
    assert command("gguf") == f'pip install "{wheel}[gguf]"'
    wheel.unlink()
    assert str(tmp_path) not in command("gguf"), "a path that is gone helps nobody"


def test_addresses(install: Install) -> None:
    command = install({"url": "https://example.org/e.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}})
    assert command("export") == 'pip install "edgeomni[export] @ git+https://example.org/e.git"'


def test_an_archive_at_an_address(install: Install) -> None:
    command = install({"url": "https://example.org/edgeomni-0.1.0.tar.gz", "archive_info": {}})
    assert command("") == 'pip install "edgeomni @ https://example.org/edgeomni-0.1.0.tar.gz"'


@pytest.mark.parametrize("broken", ["{", "", "{}"])
def test_unreadable_metadata_falls_back_to_the_name(install: Install, broken: str) -> None:
    assert install(broken)("export") == 'pip install "edgeomni[export]"'


@pytest.mark.parametrize("mark", ['"', "$", "`", "\\"])
def test_a_path_that_a_shell_would_read_is_not_printed(tmp_path: Path, mark: str) -> None:
    command = loaded_from(checkout(tmp_path / f"a{mark}b"))
    assert command("export") == 'pip install ".[export]" (in a checkout of EdgeOmni)'


def test_no_other_module_spells_out_an_install_of_edgeomni() -> None:
    folders = [ROOT / name for name in ("edgeomni", "runtimes", "exporters")]
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    assert len(files) > 40
    spelt = {p.name for p in files if "pip install" in p.read_text(encoding="utf-8")}
    assert spelt == {"install_hint.py"}


def test_doctor_names_extras_that_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    assert all(
        f"\n{extra} = [" in text
        for extra in [*(e.extra for e in ENGINES.values()), *(e for e, _ in TOOLS.values())]
        if extra
    )
