"""Checkpoints whose numbers are wrong: NaN among the weights, configurations beyond what the files hold."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from edgeomni.errors import CheckpointError
from edgeomni.model import checkpoints
from edgeomni.model.tensors import refuse_deeper, refuse_unusable, state_of

NAN, INF = float("nan"), float("inf")
LARGE = 3e38
"""Two of them add up to infinity in float32, and each is finite."""


@pytest.fixture
def copy(shelf: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(shelf / kind, tmp_path / kind))


def change_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Hands the state dict in a weight file of either format to `change`, and writes it back."""
    if path.suffix == ".safetensors":
        state = load_file(path)
        change(state)
        save_file(state, path)
        return
    whole = torch.load(path, weights_only=True)
    change(whole.get("model_state_dict", whole))
    torch.save(whole, path)


# NaN and infinity

PLACES = [
    ("own", "model.safetensors", "body.norm.weight"),
    ("own", "model.safetensors", "codec.decoder.model.0.bias"),
    ("mini-omni", "lit_model.pth", "transformer.h.1.attn.attn.weight"),
    ("mini-omni", "small.pt", "encoder.blocks.0.attn.query.weight"),
    ("mini-omni", "snac/pytorch_model.bin", "decoder.model.0.bias"),
    ("parts", "encoder/model.safetensors", "encoder.layer_norm.bias"),
    ("parts", "llm/model.safetensors", "model.embed_tokens.weight"),
    ("parts", "codec/pytorch_model.bin", "decoder.model.0.bias"),
    ("mimi", "codec/model.safetensors", "upsample.conv.weight"),
]


@pytest.mark.parametrize(("kind", "file", "name"), PLACES)
def test_one_nan_is_found_and_its_tensor_named(copy: Callable[[str], Path], kind: str, file: str, name: str) -> None:
    directory = copy(kind)

    def spoil(state: dict[str, Any]) -> None:
        state[name].view(-1)[-1] = NAN

    change_tensors(directory / file, spoil)
    with pytest.raises(CheckpointError, match=rf"NaN or infinite numbers in {name.split('.', 1)[1]}|{name}"):
        checkpoints.load(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("wrong", [[NAN], [INF], [-INF], [INF, -INF]])
def test_every_kind_of_float_is_looked_through(dtype: torch.dtype, wrong: list[float]) -> None:
    good, bad = torch.ones(100, dtype=dtype), torch.ones(100)
    bad[40 : 40 + len(wrong)] = torch.tensor(wrong)
    tensors = {"fine": good, "bad": bad.to(dtype), "also bad": bad.to(dtype)}
    with pytest.raises(CheckpointError, match="^here: NaN or infinite numbers in also bad, bad;"):
        refuse_unusable("here", tensors)
    refuse_unusable("here", {"fine": good})


def test_large_numbers_are_no_infinity() -> None:
    refuse_unusable("here", {"sum overflows": torch.full((10,), LARGE), "half": torch.full((10,), 6e4).half()})
    with pytest.raises(CheckpointError, match="beyond float32"):
        refuse_unusable("here", {"beyond float32": torch.full((2,), 1e300, dtype=torch.float64)})


def test_weights_that_are_no_floats_are_named(copy: Callable[[str], Path]) -> None:
    directory = copy("own")

    def spoil(state: dict[str, Any]) -> None:
        state["body.norm.weight"] = state["body.norm.weight"].to(torch.int32)

    change_tensors(directory / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"no floating-point numbers: body\.norm\.weight \(int32\)"):
        checkpoints.load(directory)


@pytest.mark.parametrize(
    "tensor", [torch.ones(1).expand(1000, 1000), torch.ones(3, 3).to_sparse(), torch.empty(3, device="meta")]
)
def test_tensors_that_hold_less_than_their_shape_says(tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="fewer numbers than their shape announces: hollow;"):
        state_of({"fine": torch.ones(4, 4).T, "hollow": tensor}, "here")


# Sizes


@contextmanager
def little_time_and_memory() -> Iterator[None]:
    """Generous bounds: a model of 10**9 layers would take hours and terabytes."""
    began = perf_counter()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert perf_counter() - began < 60


def test_layers_are_counted_against_tensors() -> None:
    refuse_deeper("here", {"n_layer": 7, "others": 0}, 7)
    for wrong, said in ((8, "n_layer is 8, and the weights hold 7"), (-1, "n_layer must"), (1.5, "n_layer must")):
        with pytest.raises(CheckpointError, match=said):
            refuse_deeper("here", {"others": 1, "n_layer": wrong}, 7)
    for odd in (True, None, "5", [5]):
        with pytest.raises(CheckpointError, match="n_layer must be a whole number, 0 or more, not"):
            refuse_deeper("here", {"n_layer": odd}, 7)


HUGE = (10**9, 10**12, 10**30)
SIZES = [
    *(("mini-omni", "model_config.yaml", name) for name in ("n_layer", "n_embd", "intermediate_size")),
    *(("mini-omni", "model_config.yaml", name) for name in ("n_head", "text_vocab_size", "padded_vocab_size")),
    *(("mini-omni", "snac/config.json", name) for name in ("decoder_dim", "encoder_dim", "codebook_size")),
    *(("parts", "llm/config.json", name) for name in ("num_hidden_layers", "hidden_size", "vocab_size", "head_dim")),
    *(("parts", "encoder/config.json", name) for name in ("encoder_layers", "d_model", "num_mel_bins")),
    *(("parts", "codec/config.json", name) for name in ("decoder_dim", "codebook_dim", "attn_window_size")),
    *(("mimi", "codec/config.json", name) for name in ("num_hidden_layers", "num_quantizers", "num_filters")),
    *(("mimi", "codec/config.json", name) for name in ("hidden_size", "codebook_size", "num_residual_layers")),
]


@pytest.mark.parametrize(("kind", "file", "name"), SIZES)
def test_sizes_beyond_what_the_files_hold_end_at_once(
    copy: Callable[[str], Path], kind: str, file: str, name: str
) -> None:
    directory = copy(kind)
    path = directory / file
    text = path.read_text()
    config = yaml.safe_load(text)
    path.write_text(json.dumps({**config, name: HUGE[len(name) % 3]}))  # JSON is YAML, too
    with little_time_and_memory(), pytest.raises(CheckpointError):
        checkpoints.load(directory)


@pytest.mark.parametrize("where", ["encoder.layers", "body.layers", "tts_layers", "body.ffn", "layout.text_vocab"])
def test_sizes_of_our_own_checkpoint(copy: Callable[[str], Path], where: str) -> None:
    directory = copy("own")
    config = json.loads((directory / "config.json").read_text())
    *above, name = where.split(".")
    section = config["spec"][above[0]] if above else config["spec"]
    for size in HUGE:
        section[name] = size
        (directory / "config.json").write_text(json.dumps(config))
        with little_time_and_memory(), pytest.raises(CheckpointError):
            checkpoints.load(directory)


def test_a_codec_of_our_own_checkpoint_is_never_built_larger_than_its_file(copy: Callable[[str], Path]) -> None:
    directory = copy("own")
    config = json.loads((directory / "config.json").read_text())
    for changes in ({"decoder_dim": 10**6}, {"encoder_dim": 2**20}, {"decoder_rates": [2] * 10**5}):
        (directory / "config.json").write_text(json.dumps({**config, "codec": {**config["codec"], **changes}}))
        with little_time_and_memory(), pytest.raises(CheckpointError):
            checkpoints.load(directory)


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, "x", None, True])
def test_constants_that_are_no_usable_numbers(copy: Callable[[str], Path], name: str, value: Any) -> None:
    directory = copy("own")
    config = json.loads((directory / "config.json").read_text())
    config["spec"]["body"][name] = value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name):
        checkpoints.load(directory)


@pytest.mark.parametrize("changes", [{"vq_strides": [0, 1]}, {"vq_strides": [2048, 1]}, {"vq_strides": ["2", 1]}])
def test_strides_that_are_no_sizes(copy: Callable[[str], Path], changes: dict[str, Any]) -> None:
    directory = copy("parts")
    path = directory / "codec" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match="vq_strides .* are no whole numbers from 1 to 1024"):
        checkpoints.load(directory)


def test_yaml_that_would_explode_or_never_end(copy: Callable[[str], Path]) -> None:
    directory = copy("mini-omni")
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    for text in (laughs, "a: " + "[" * 100_000, "a: " + "{b: " * 100_000):
        (directory / "model_config.yaml").write_text(text)
        with little_time_and_memory(), pytest.raises(CheckpointError, match="aliases .* or is nested deeper"):
            checkpoints.load(directory)


@pytest.mark.parametrize("seed", [-1, "x", None, 2**63, [1]])
def test_a_recipe_with_a_seed_that_is_none(tmp_path: Path, seed: Any) -> None:
    recipe = checkpoints.save_preset("tiny", 0, tmp_path / "recipe")
    config = json.loads((recipe / "config.json").read_text())
    (recipe / "config.json").write_text(json.dumps({**config, "seed": seed}))
    with pytest.raises(CheckpointError, match=r"recipe.*(seed|no checkpoint layout)"):
        checkpoints.load(recipe)
    (recipe / "config.json").write_text(json.dumps({**config, "preset": [seed]}))
    with pytest.raises(CheckpointError, match=r"\$\.preset|no checkpoint layout"):
        checkpoints.load(recipe)
