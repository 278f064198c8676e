"""Manifests, profiles and checkpoint configurations that nobody meant: each gives an object or an EdgeOmniError.

The documents start out valid and are then mutated: keys and values dropped, replaced, added at any depth; or bytes
flipped, cut, inserted. Any exception but EdgeOmniError fails the test, and hypothesis' deadline stands for a hang.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes import small_bundle, small_spec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgeomni.bundle import MANIFEST, Bundle
from edgeomni.cli.bundles import describe, tables
from edgeomni.errors import EdgeOmniError
from edgeomni.hardware import load_profile
from edgeomni.schema import Source, parse_toml

PROFILE = Path(__file__).resolve().parent.parent / "profiles" / "desktop-rtx-4090.toml"

bounded = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**40, -(10**9), 10**12, 10**9]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        ["../x", "/etc/passwd", "a\0b", "llm/body.onnx", "C:\\x", "\x1b[2J", "[red]", "x" * 5000, "2.1", ""]
    ),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from places(value)


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document after one to three changes."""
    data = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(data))
        if not spots:
            break
        container, key = spots[draw(st.integers(0, len(spots) - 1))]
        match draw(st.sampled_from(["drop", "replace", "replace", "swap", "add"])):
            case "drop":
                del container[key]
            case "replace":
                container[key] = draw(values)
            case "swap":
                other, at = spots[draw(st.integers(0, len(spots) - 1))]
                container[key] = copy.deepcopy(other[at])
            case _ if isinstance(container, dict):
                container[draw(st.text(max_size=6))] = draw(values)
            case _:
                container.append(draw(values))
    return data


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes after some were flipped, cut off, inserted or repeated."""
    out = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(out)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip" if at < len(out):
                out[at] ^= draw(st.integers(1, 255))
            case "cut" if draw(st.integers(0, 4)) == 0:
                del out[at:]
            case "repeat":
                out[at:at] = out[at : at + 40] * draw(st.integers(1, 3))
            case _:
                out[at:at] = draw(st.binary(min_size=1, max_size=4))
    return bytes(out)


# Bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("fuzz") / "bundle", small_spec())


def manifest() -> Any:
    """What small_bundle writes, made once more for hypothesis, which draws before fixtures are there."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return json.loads((small_bundle(Path(folder) / "b", small_spec()) / MANIFEST).read_text())


def opened_or_refused(root: Path) -> bool:
    """Whether it opened; then all that `inspect` shows of it can be shown."""
    try:
        found = Bundle.open(root, hashes=False)
    except EdgeOmniError as exc:
        assert str(root) in str(exc)
        return False
    json.dumps(describe(found))
    assert list(tables(found))
    for entry in found.entries():
        found.file(entry.path)
    return True


@bounded
@given(mutated(manifest()))
def test_mutated_manifests(bundle: Path, data: Any) -> None:
    (bundle / MANIFEST).write_text(json.dumps(data))
    opened_or_refused(bundle)


@bounded
@given(damaged(json.dumps(manifest(), indent=1).encode()))
@example(b"")
@example(b"[" * 200_000)
@example(b'{"schema":' * 50_000)
def test_damaged_manifests(bundle: Path, raw: bytes) -> None:
    (bundle / MANIFEST).write_bytes(raw)
    opened_or_refused(bundle)


def test_the_document_that_is_mutated_opens(bundle: Path) -> None:
    (bundle / MANIFEST).write_text(json.dumps(manifest()))
    assert opened_or_refused(bundle)


# Profiles


def toml(data: Any) -> str:
    """A document as TOML; keys are quoted, and null, which TOML does not have, is left out."""
    if isinstance(data, dict):
        pairs = (f"{json.dumps(k)} = {toml(v)}" for k, v in data.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(toml(v) for v in data if v is not None) + "]"
    return json.dumps(data)


def profile_opens(path: Path) -> bool:
    try:
        load_profile(str(path))
    except EdgeOmniError as exc:
        assert str(path) in str(exc)
        return False
    return True


def profile() -> Any:
    return parse_toml(PROFILE.read_bytes(), Source("profile", EdgeOmniError, ""))


@bounded
@given(mutated(profile()))
def test_mutated_profiles(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in data.items() if v is not None))
    profile_opens(path)


@bounded
@given(damaged(PROFILE.read_bytes()))
@example(b"a = " + b"[" * 100_000)
@example(b"a.b" + b".b" * 2_000 + b" = 1")
@example(b"a = nan")
@example(b"a = 1979-05-27T07:32:00Z")
def test_damaged_profiles(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    profile_opens(path)


def test_the_profile_that_is_mutated_opens(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in profile().items()))
    assert profile_opens(path)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path_factory.mktemp("fuzz") / "checkpoint"))


def checkpoint_opens(path: Path) -> bool:
    from edgeomni.model import checkpoints

    try:
        checkpoints.load(path)
    except EdgeOmniError as exc:
        assert str(path) in str(exc)
        return False
    return True


@settings(bounded, max_examples=60)
@given(st.data())
def test_mutated_configurations(checkpoint: Path, tiny_dir: Path, data: st.DataObject) -> None:
    config = data.draw(mutated(json.loads((tiny_dir / "config.json").read_text())))
    (checkpoint / "config.json").write_text(json.dumps(config))
    checkpoint_opens(checkpoint)


@settings(bounded, max_examples=60)
@given(st.data())
def test_damaged_configurations(checkpoint: Path, tiny_dir: Path, data: st.DataObject) -> None:
    (checkpoint / "config.json").write_bytes(data.draw(damaged((tiny_dir / "config.json").read_bytes())))
    checkpoint_opens(checkpoint)
