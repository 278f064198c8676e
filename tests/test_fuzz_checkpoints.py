"""Damaged and hostile checkpoints: each is loaded or refused with an EdgeOmniError, and nothing else happens.

Configurations have values replaced, left out or cut; weight files have bytes flipped or are cut. The bounds on memory
stand in test_bad_checkpoints.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeomni.errors import EdgeOmniError
from edgeomni.model import checkpoints

BOUNDED = settings(max_examples=8, derandomize=True, deadline=None, database=None)
NASTY: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, "", "x", "9" * 5000, [], {}, [10**9], [0], -1, 0, 1, 2, 1.5, float("nan"), float("inf"), 10**6, 10**12]
)
CONFIGS = {
    "own/config.json": json,
    "mini-omni/model_config.yaml": yaml,
    "mini-omni/snac/config.json": json,
    "parts/encoder/config.json": json,
    "parts/llm/config.json": json,
    "parts/codec/config.json": json,
    "mimi/codec/config.json": json,
}
WEIGHTS = (
    "own/model.safetensors",
    "mini-omni/lit_model.pth",
    "mini-omni/small.pt",
    "mini-omni/snac/pytorch_model.bin",
    "parts/llm/model.safetensors",
    "parts/codec/pytorch_model.bin",
)
flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)
near_the_start = st.lists(st.tuples(st.floats(0, 0.01), st.integers(0, 255)), max_size=2)
lengths = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))


@pytest.fixture
def file(request: pytest.FixtureRequest, shelf: Path) -> Iterator[Path]:
    """The file of the shelf that a test damages; put back afterwards."""
    path: Path = shelf / request.param
    content = path.read_bytes()
    checkpoints.load(shelf / str(request.param).split("/")[0])
    yield path
    path.write_bytes(content)


def load_or_refuse(file: Path, shelf: Path) -> None:
    try:
        model = checkpoints.load(shelf / file.relative_to(shelf).parts[0])
    except EdgeOmniError as exc:
        assert len(str(exc)) < 20_000, "a message stays readable, whatever the file holds"
        return
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def places(config: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a configuration."""
    pairs: Any = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return [place for key, value in pairs for place in [(*above, key), *places(value, (*above, key))]]


def replaced(config: Any, place: tuple[Any, ...], value: Any, drop: bool) -> Any:
    copy = json.loads(json.dumps(config))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if drop:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


@pytest.mark.parametrize("file", CONFIGS, indirect=True)
def test_configurations(file: Path, shelf: Path) -> None:
    text = file.read_text()
    language = CONFIGS[file.relative_to(shelf).as_posix()]
    config = language.safe_load(text) if language is yaml else json.loads(text)

    @BOUNDED
    @given(st.sampled_from(places(config)), NASTY, st.sampled_from([False, False, False, True]))
    def check(place: tuple[Any, ...], value: Any, drop: bool) -> None:
        changed = replaced(config, place, value, drop)
        file.write_text(yaml.safe_dump(changed) if language is yaml else json.dumps(changed))
        load_or_refuse(file, shelf)

    check()
    for other in ("", "[]", "null", "{", "[" * 100_000, text[: len(text) // 2], "\x00", "- &a [1]\n- *a"):
        file.write_text(other)
        load_or_refuse(file, shelf)
    file.write_bytes(b"\xff\xfe" + text.encode())
    load_or_refuse(file, shelf)


@pytest.mark.parametrize("file", WEIGHTS, indirect=True)
def test_weight_files(file: Path, shelf: Path) -> None:
    content = file.read_bytes()

    @BOUNDED
    @given(flips, near_the_start, lengths)
    def check(anywhere: list[tuple[float, int]], start: list[tuple[float, int]], keep: float) -> None:
        data = bytearray(content)
        for place, value in anywhere + start:
            data[int(place * len(data))] = value
        file.write_bytes(data[: int(keep * len(data))])
        load_or_refuse(file, shelf)

    check()


@pytest.mark.parametrize(
    "file", ["own/tokenizer.json", "mini-omni/tokenizer.json", "parts/llm/tokenizer.json"], indirect=True
)
def test_tokenizers_that_are_no_text(file: Path, shelf: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgeOmniError, match=r"tokenizer\.json: not readable as text"):
        checkpoints.load(shelf / file.relative_to(shelf).parts[0])
