"""What keeps the house in order: packages, links, and torch where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("exporters", "profiles", "runtimes")
OPTIMUM = ("optimum_register", "optimum.commands.register")
"""A namespace of another distribution, in which ours puts one file: so it has no __init__.py."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TORCH_SIDE = (
    "calibration.py",
    "exporters/",
    "gate/",
    "model/",
    "quantize/calibrate.py",
    "recorded.py",
    "runtimes/torch/",
    "train/",
)
HEAVY = {"torch", "transformers", "snac", "onnxscript"}


def package_folders() -> dict[str, str]:
    """Dotted name -> folder, for every folder with Python files, links left out."""
    found = {}
    for top, name in [("edgeomni", "edgeomni"), *((o, f"edgeomni.{o}") for o in OUTSIDE), OPTIMUM]:
        for folder in [ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir())]:
            inside_link = any((ROOT / top / p).is_symlink() for p in folder.relative_to(ROOT / top).parents) or (
                folder.is_symlink()
            )
            if not inside_link and any(folder.glob("*.py")):
                parts = folder.relative_to(ROOT / top).parts
                found[".".join([name, *parts])] = folder.relative_to(ROOT).as_posix()
    return found


def test_the_packages_list_is_what_lies_on_disk() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(package_folders())


def test_every_package_has_an_init() -> None:
    assert [f for f in package_folders().values() if not (ROOT / f / "__init__.py").is_file()] == [OPTIMUM[0]]


def test_the_mapping_and_the_links_say_the_same() -> None:
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    folders = {"edgeomni": "edgeomni", **{f"edgeomni.{o}": o for o in OUTSIDE}, OPTIMUM[1]: OPTIMUM[0]}
    assert mapping == folders
    for name in OUTSIDE:
        link = ROOT / "edgeomni" / name
        if link.is_symlink():  # a checkout without symlinks holds a small file in its place
            assert Path(link.readlink()).as_posix() == f"../{name}"


def python_files() -> list[Path]:
    folders = [ROOT / f for f in package_folders().values()]
    return sorted(p for folder in folders for p in folder.glob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level names imported anywhere in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_torch_side_imports_torch() -> None:
    offenders = {}
    for path in python_files():
        name = path.relative_to(ROOT).as_posix().removeprefix("edgeomni/")
        if not name.startswith(TORCH_SIDE) and (heavy := imports(path) & HEAVY):
            offenders[name] = heavy
    assert offenders == {}


def test_nothing_imports_the_outer_folders_by_their_bare_names() -> None:
    for path in python_files():
        assert not imports(path) & {*OUTSIDE}, f"{path}: import edgeomni.{{exporters,runtimes,profiles}}"


def test_the_outer_folders_import_absolutely() -> None:
    """Relative imports resolve to nothing in an editor that opened exporters/ or runtimes/ under its real path."""
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in OUTSIDE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_an_engine_is_one_folder_and_one_line() -> None:
    """No module outside an engine's own folder names it, but engines.py and those that are about it by nature."""
    from edgeomni.engines import ENGINES, FORMATS, Device, EngineName

    assert get_args(EngineName) == ("auto", *ENGINES), "the type that editors complete from"
    assert {"auto"} | {d for e in ENGINES.values() for d in e.devices} == set(get_args(Device))
    assert {e.folder for e in ENGINES.values()} <= {p.name for p in (ROOT / "runtimes").iterdir()}
    assert set(FORMATS) <= {p.name for p in (ROOT / "exporters").iterdir()}
    allowed = {"engines.py", "export.py"}  # export.py records the versions of the tools that wrote a bundle
    naming = {
        path.relative_to(ROOT).as_posix()
        for path in python_files()
        if path.relative_to(ROOT).parts[:2] not in (("runtimes", "onnxruntime"), ("exporters", "onnx"))
        and '"onnxruntime"' in path.read_text(encoding="utf-8")
    }
    assert {name for name in naming if name.rpartition("/")[2] not in allowed} == set()


def test_files_stay_small() -> None:
    long = {p.name: n for p in python_files() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize(
    "code",
    [
        "import edgeomni",
        "from click.testing import CliRunner; from edgeomni.cli import main; "
        "r = CliRunner().invoke(main, ['--help']); assert r.exit_code == 0 and 'export' in r.output, r.output",
        "from click.testing import CliRunner; from edgeomni.cli import main; "
        "r = CliRunner().invoke(main, ['doctor', '--json']); assert r.exit_code == 0, r.output",
    ],
)
def test_no_torch_at_import(code: str) -> None:
    check = f"import sys; {code}; heavy = {HEAVY!r} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT / "tests", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_fixed_engine_has_an_extra() -> None:
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    stated = {r.split(">")[0].split("=")[0].split("[")[0].split(";")[0].strip() for group in lists for r in group}
    fixed = "torch transformers optimum onnx onnxruntime tensorrt llama-cpp-python openvino click"
    assert set(fixed.split()) <= stated
    assert project["scripts"] == {"edgeomni": "edgeomni.cli:main"}
