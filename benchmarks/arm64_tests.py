"""The device install and its tests on 64-bit ARM Debian, emulated by qemu on this machine. No figure of speed is taken.

sudo apt-get install debootstrap qemu-user-static binfmt-support
sudo .venv/bin/python benchmarks/arm64_tests.py --work /tmp/arm64 [--only MODULE ...] [--with NAME==VERSION ...]

DIR/root becomes a minimal Debian for arm64 (kept and used again). This checkout's wheel, its dependencies' aarch64
wheels and pytest are put into it by this machine's pip, nothing is compiled. Inside, in a mount namespace that ends
with it: `edgeomni doctor`, `edgeomni verify nano --gate` (the shipped bundle must choose as on the machine that judged
it), `edgeomni run nano`, and the tests that tests/run_pythons.py runs on a device, on bundles that this machine exports
of the golden layouts. Needs root, a package index and about 1.2 GB. The last line is one JSON object; exits with 1 if
anything failed. An emulated processor takes some 20 times as long, so give --only where time is short. Under qemu 7.2
(Debian 12) `import onnxruntime` of 1.29, 1.31 and 1.32 ends with a segmentation fault; 1.25 works, hence --with
onnxruntime==1.25.0 there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aarch64_install import TAGS, dependencies

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from run_pythons import MODULES, NEED_MORE, export_bundles, source_distribution  # noqa: E402

RELEASE, PYTHON = "bookworm", "3.11"
TOOLS = ("hypothesis", "pytest", "pytest-timeout")
ABOUT_THE_CHECKOUT = ("test_layout.py", "test_packaging.py")
"""They build distributions and read the sources, which no processor changes."""
COMMANDS = {
    "doctor": "edgeomni doctor",
    "verify": "edgeomni verify nano --load --gate",
    "run": "edgeomni run nano -o /tmp/answer.wav --max-seconds 2",
}


def debian(root: Path) -> None:
    """A minimal Debian with Python. Its packages' scripts run under qemu, registered with the kernel by binfmt_misc."""
    if (root / "usr/bin/python3").exists():
        return
    command = ["debootstrap", "--arch=arm64", "--variant=minbase", "--include=python3", RELEASE, str(root)]
    subprocess.run(command, check=True)


def install(root: Path, source: Path, wheels: Path, wanted: Sequence[str] = ()) -> None:
    """Puts this checkout and what it needs where the Debian's Python looks, all of it as wheels for its machine."""
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    subprocess.run(
        [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True
    )
    there = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    there += [word for tag in TAGS for word in ("--platform", tag)]
    needed = [*dependencies(PYTHON), *TOOLS, *wanted]
    subprocess.run([*PIP, "download", "-q", "--dest", str(wheels), *there, *needed], check=True)
    site = root / f"usr/local/lib/python{PYTHON}/dist-packages"
    shutil.rmtree(site, ignore_errors=True)
    found = [str(path) for path in sorted(wheels.glob("*.whl"))]
    subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", str(site), *there, *found], check=True)


INSIDE = "srv/edgeomni"
"""In the Debian: the folder of sources and bundles."""
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def inside(root: Path, command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in the Debian, with /proc, /dev and /sys that are gone when it ends."""
    place = shlex.quote(str(root))
    mounts = f"mount -t proc proc {place}/proc && mount --bind /dev {place}/dev && mount --rbind /sys {place}/sys"
    whole = f"{mounts} && exec chroot {place} /bin/sh -c {shlex.quote(command)}"
    environment = {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin", "LANG": "C.UTF-8", "HOME": "/root"}
    environment |= {"OMP_NUM_THREADS": "1", "EDGEOMNI_DEVICE_BUNDLES": f"/{INSIDE}/bundles"}
    try:
        return subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", whole],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        said = exc.stdout.decode(errors="replace") if isinstance(exc.stdout, bytes) else exc.stdout or ""
        return subprocess.CompletedProcess(command, 124, said + f"\nended after {timeout:.0f} s")


def checked(root: Path, name: str, command: str, timeout: float) -> bool:
    start = time.monotonic()
    done = inside(root, command, timeout)
    print(
        f"== {name}: exit code {done.returncode}, {time.monotonic() - start:.0f} s emulated\n{done.stdout}", flush=True
    )
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for the Debian, wheels and bundles.")
    parser.add_argument("--only", nargs="*", metavar="MODULE", help="These test modules instead of all.")
    parser.add_argument("--with", dest="wanted", nargs="*", default=[], metavar="NAME==VERSION", help="Also install.")
    parser.add_argument("--timeout", type=float, default=7200, help="Seconds for each command inside.")
    args = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.error("needs root: debootstrap and chroot do")
    work = args.work.resolve()
    root, wheels = work / "root", work / "wheels"
    work.mkdir(parents=True, exist_ok=True)
    debian(root)
    source = source_distribution(work)
    install(root, source, wheels, args.wanted)
    shutil.rmtree(root / INSIDE, ignore_errors=True)
    shutil.copytree(source, root / INSIDE / "source")
    export_bundles(root / INSIDE / "bundles")
    modules = args.only if args.only is not None else [name for name in MODULES if name not in ABOUT_THE_CHECKOUT]
    passed = {}
    for name, command in COMMANDS.items():
        passed[name] = checked(root, name, command.replace("edgeomni", "python3 -m edgeomni", 1), args.timeout)
    for module in modules:  # -P: the installed package is tested, not the sources beside the tests
        command = f"cd /{INSIDE}/source && python3 -P -m pytest -q -p no:cacheprovider --timeout 3600 tests/{module}"
        command += "".join(f" --deselect=tests/{name}" for name in NEED_MORE)
        passed[module] = checked(root, module, command, args.timeout)
    print(json.dumps({"machine": inside(root, "uname -m", 60).stdout.strip(), "passed": passed}))
    return int(not all(passed.values()))


if __name__ == "__main__":
    sys.exit(main())
