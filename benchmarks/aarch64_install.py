"""Does the device install resolve for 64-bit ARM Linux (Jetson, Raspberry Pi) from wheels alone, with nothing compiled?

python benchmarks/aarch64_install.py [--python-version 3.11] [--most-mb 150] [--keep DIR]

Downloads what pip would install there, for the dependencies that pyproject.toml declares, and prints every wheel with
its size; the last line is one JSON object. Exits with 1 where a dependency has no wheel for that machine, or where all
of them together are larger than --most-mb (what docs/jetson.md promises of a device install). All three
platform tags are needed, since pip takes them literally: ONNX Runtime's wheels are for manylinux_2_28, others for
older ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


def dependencies(python_version: str) -> list[str]:
    """What pyproject.toml declares for that Python.

    Markers are resolved here: pip would resolve them for the Python that runs it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    target = {"python_version": python_version, "platform_machine": "aarch64", "sys_platform": "linux"}
    wanted = [Requirement(text) for text in project["dependencies"]]
    chosen = [r for r in wanted if r.marker is None or r.marker.evaluate(target)]
    return [f"{r.name}{r.specifier}" for r in chosen]


def download(folder: Path, python_version: str, requirements: list[str]) -> bool:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    command += [word for tag in TAGS for word in ("--platform", tag)]
    return subprocess.run([*command, *requirements], check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-version", default="3.11")
    parser.add_argument("--keep", type=Path, help="Folder to keep the wheels in, for a device without network.")
    parser.add_argument("--most-mb", type=float, default=150, help="Largest sum of the wheels' sizes.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeomni-aarch64-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        resolved = download(folder, args.python_version, dependencies(args.python_version))
        sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:7.2f} MB  {name}")
    total = sum(sizes.values()) / 1e6
    print(
        json.dumps({"python": args.python_version, "resolved": resolved, "wheels": len(sizes), "MB": round(total, 1)})
    )
    if total > args.most_mb:
        print(f"the wheels are {total:.1f} MB, and {args.most_mb:g} MB is the most", file=sys.stderr)
    return int(not resolved or total > args.most_mb)


if __name__ == "__main__":
    sys.exit(main())
