"""The command that installs more of EdgeOmni, as it has to be typed for this copy.

EdgeOmni may run from a checkout, from a wheel, or from a package index, and `pip install "edgeomni[export]"` is right
for the last of these only: elsewhere pip would look for the name on an index, which may not have it.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "edgeomni"
_PACKAGE = Path(__file__).resolve().parent
_UNSAFE = set('"$`\\\n')
"""What a shell would not take literally between double quotes."""


def install_command(extra: str = "") -> str:
    """The pip command that adds the optional dependencies `extra` ("" for those that every install has).

    From a checkout it names the checkout; after an installation from a folder, a file or an address it names that, and
    otherwise the distribution's name. A path is given only where it exists. Where it is gone, the command is the one
    to be typed in a checkout.
    """
    if _is_source_tree(_PACKAGE.parent):
        return _of_path(_PACKAGE.parent, extra, editable=True)
    url = _installed_from()
    if url is None:
        return _command(NAME, extra)
    if urlsplit(url).scheme != "file":
        return f'pip install "{NAME}{_bracketed(extra)} @ {url}"'
    path = Path(url2pathname(urlsplit(url).path))
    return _of_path(path, extra, editable=False) if path.exists() else _in_a_checkout(extra)


def build_command(distribution: str, cmake_arguments: str) -> str:
    """The command that compiles a distribution again with CMake's arguments, whatever wheel pip has kept of it."""
    return (
        f"CMAKE_ARGS={cmake_arguments} pip install --force-reinstall --no-cache-dir --no-deps "
        f"--no-binary {distribution} {distribution}"
    )


def replacing_command(distributions: str) -> str:
    """The command that puts a distribution's files over those of another one that writes the same folder."""
    return f"pip install --force-reinstall --no-deps {distributions}"


def _is_source_tree(folder: Path) -> bool:
    """Whether the folder that holds this package is EdgeOmni's checkout, and not site-packages."""
    project = folder / "pyproject.toml"
    return project.is_file() and f'name = "{NAME}"' in project.read_text(encoding="utf-8", errors="replace")


def _installed_from() -> str | None:
    """Where pip took the installed distribution from; None for a package index, or where nothing is known.

    A version control system's address gets pip's prefix ("git+https://...").
    """
    try:
        record = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    url = record.get("url")
    system = record.get("vcs_info", {}).get("vcs")
    return f"{system}+{url}" if system and url else url


def _of_path(path: Path, extra: str, *, editable: bool) -> str:
    if _UNSAFE & set(str(path)):
        return _in_a_checkout(extra)
    return _command(str(path), extra, editable=editable)


def _in_a_checkout(extra: str) -> str:
    return f"{_command('.', extra)} (in a checkout of EdgeOmni)"


def _command(what: str, extra: str, *, editable: bool = False) -> str:
    wanted = what + _bracketed(extra)
    return f"pip install {'-e ' if editable else ''}" + (f'"{wanted}"' if wanted != NAME else wanted)


def _bracketed(extra: str) -> str:
    return f"[{extra}]" if extra else ""
