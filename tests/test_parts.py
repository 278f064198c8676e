"""Foreign parts are told from config.json alone, no code of theirs runs, and their windows bound the context."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import parts
import pytest
import torch
from click.testing import CliRunner

from edgeomni.cli import main
from edgeomni.errors import CheckpointError, UsageError
from edgeomni.model import checkpoints, sources

SPY = "from pathlib import Path\nPath({marker!r}).write_text('code of a checkpoint ran')\n"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    parts.whisper(root / "whisper"), parts.snac(root / "snac"), parts.mimi(root / "mimi"), parts.llm(root / "llm")
    return root


def composed(shelf: Path, *, encoder: str = "whisper", llm: str = "llm", codec: str = "snac", **options: Any) -> Any:
    return checkpoints.compose(*(str(shelf / name) for name in (encoder, llm, codec)), **options)


def with_config(shelf: Path, part: str, target: Path, weights: bool = False, **changes: Any) -> Path:
    """A directory with the part's config.json, changed (None drops a key), and with its weights or without."""
    target.mkdir()
    if weights:
        shutil.copytree(shelf / part, target, dirs_exist_ok=True)
    config = {**json.loads((shelf / part / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize(
    ("part", "kind", "said"),
    [
        ("whisper", "wav2vec2", "encoder type 'wav2vec2'; supported are whisper"),
        ("whisper", None, "no model_type; encoder types supported are whisper"),
        ("llm", "gpt2", "LLM type 'gpt2'; supported are llama, mistral, qwen2, qwen3"),
        ("llm", "gemma", "LLM type 'gemma'; supported are llama"),
        ("llm", ["qwen2"], r"LLM type \['qwen2'\]; supported are llama"),
        ("llm", None, "no model_type; LLM types supported are llama"),
        ("mimi", "dac", "codec type 'dac'; supported are snac, mimi"),
        ("mimi", None, "no model_type; codec types supported are snac, mimi"),
    ],
)
def test_foreign_parts_are_told_from_config_json_alone(
    shelf: Path, tmp_path: Path, part: str, kind: Any, said: str
) -> None:
    """The directory holds no weights: whoever looked for them first would say something else."""
    foreign = with_config(shelf, part, tmp_path / "foreign", model_type=kind)
    slot = {"whisper": "encoder", "mimi": "codec"}.get(part, part)
    with pytest.raises(CheckpointError, match=f"foreign: .*{said}"):
        composed(shelf, **{slot: str(foreign)})


def test_the_codec_is_judged_before_the_llm_is_read(shelf: Path, tmp_path: Path) -> None:
    empty = with_config(shelf, "llm", tmp_path / "empty")
    foreign = with_config(shelf, "mimi", tmp_path / "foreign", model_type="dac")
    with pytest.raises(CheckpointError, match="codec type 'dac'"):
        composed(shelf, llm=str(empty), codec=str(foreign))
    with pytest.raises(CheckpointError, match="empty: has no weights"):
        composed(shelf, llm=str(empty))


def test_quantized_weights_are_refused(shelf: Path, tmp_path: Path) -> None:
    part = with_config(shelf, "llm", tmp_path / "gptq", weights=True, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quantized .*give the original weights"):
        composed(shelf, llm=str(part))


@pytest.mark.parametrize("kind", ["qwen2", "spy"])
@pytest.mark.parametrize("part", ["encoder", "llm", "codec"])
def test_code_in_a_checkpoint_is_never_run(
    shelf: Path, tmp_path: Path, part: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "all"
    for name, source in (("encoder", "whisper"), ("llm", "llm"), ("codec", "mimi")):
        shutil.copytree(shelf / source, folder / name)
    marker, config = tmp_path / "marker", json.loads((folder / part / "config.json").read_text())
    (folder / part / "spy.py").write_text(SPY.format(marker=str(marker)))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    auto = dict.fromkeys(names, "spy.Spy")
    kinds = {"model_type": "spy"} if kind == "spy" else {}
    (folder / part / "config.json").write_text(json.dumps({**config, **kinds, "auto_map": auto}))
    answers = io.StringIO("y\ny\ny\n")
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(CheckpointError, match="code in a checkpoint is never run"):
        checkpoints.load(folder)
    assert not marker.exists() and answers.tell() == 0, "nobody was asked, and nothing ran"


# Where parts lie


@pytest.mark.parametrize(
    "source",
    [
        "./nowhere",
        "../nowhere",
        "/nowhere",
        "~/nowhere",
        "a/b/c",
        "whisper.pt",
        "x/model.safetensors",
        "here/nowhere",
        "a\\b",
    ],
)
def test_a_mistyped_path_does_not_ask_the_hub(
    source: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(sources, "cached_file", asked)
    monkeypatch.setattr(sources, "hub_answers", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for slot in range(3):
        given = [str(shelf / name) for name in ("whisper", "llm", "snac")]
        given[slot] = source
        with pytest.raises(CheckpointError, match="no such file or directory; give a local directory, or a hub id"):
            checkpoints.compose(*given)


@pytest.mark.parametrize("source", ["openai/whisper-small", "gpt2", "Qwen/Qwen2-0.5B", "hubertsiuzdak/snac_24khz"])
def test_hub_ids_are_no_paths(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not sources.looks_like_path(source)
    with pytest.raises(CheckpointError, match="name of a part is empty"):
        sources.check_exists("")


def test_without_network_the_hub_s_client_is_told_so(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own retries take 25 s per file; asked for local files only, it answers at once."""

    class Session:
        def head(self, url: str, timeout: float) -> None:
            tries.append(timeout)
            raise ConnectionError("no route")

    tries: list[float] = []
    monkeypatch.setattr(sources, "get_session", Session)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    sources.hub_answers.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="tests/none: no such directory .* hub does not answer; give a"):
                checkpoints.compose(str(shelf / "whisper"), "edgeomni-tests/none", str(shelf / "snac"))
    finally:
        sources.hub_answers.cache_clear()
    assert tries == [sources.PROBE_S], "asked once, not once per file"


def test_shards_are_read_and_must_lie_in_the_part(shelf: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    part = with_config(shelf, "llm", tmp_path / "sharded", weights=True)
    state = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    names = sorted(state)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == shard}, part / shard)
    index = part / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert torch.equal(composed(shelf, llm=str(part)).embedding.weight, composed(shelf).embedding.weight)
    index.write_text(json.dumps({"weight_map": {**places, names[0]: "../llm/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="shard '../llm/model.safetensors' .* is missing"):
        composed(shelf, llm=str(part))
    for wrong in ([1], None, {**places, names[0]: 1}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match="has no weight_map"):
            composed(shelf, llm=str(part))


# Sliding windows


@pytest.mark.parametrize(
    ("kind", "changes", "context"),
    [
        ("mistral", {}, 128),
        ("mistral-window", {}, 80),
        ("mistral-window", {"sliding_window": 300}, 128),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 80}, 128),
        ("qwen2-window", {}, 80),
        ("qwen2-window", {"max_window_layers": 2, "layer_types": None}, 128),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 0, "layer_types": None}, 50),
        ("llama", {"sliding_window": 50}, 128),
    ],
)
def test_a_sliding_window_bounds_the_context_and_is_said(
    shelf: Path, tmp_path: Path, kind: str, changes: dict[str, Any], context: int, caplog: pytest.LogCaptureFixture
) -> None:
    parts.llm(tmp_path / "llm", kind)
    part = with_config(tmp_path, "llm", tmp_path / "changed", weights=True, **changes)
    said = [f"the LLM attends to the last {context} frames only, so the context is {context}"]
    with caplog.at_level(logging.WARNING, "edgeomni"):
        model = composed(shelf, llm=str(part))
        assert model.spec.context == context
        assert [r.getMessage() for r in caplog.records] == (said if context < 128 else [])
        caplog.clear()
        checkpoints.load(checkpoints.save(model, tmp_path / "saved"))
        assert [r.getMessage() for r in caplog.records] == (said if context < 128 else []), "and again at export"


def test_attention_of_another_kind_is_refused(shelf: Path, tmp_path: Path) -> None:
    kinds = ["full_attention", "chunked_attention"]
    part = with_config(shelf, "llm", tmp_path / "changed", weights=True, layer_types=kinds)
    with pytest.raises(CheckpointError, match="chunked_attention"):
        composed(shelf, llm=str(part))


# Streams, and what init says


def test_streams_of_either_codec(shelf: Path) -> None:
    assert composed(shelf, codec="mimi", streams=2).spec.layout.streams == 2
    assert composed(shelf, codec="mimi").spec.layout.streams == 5, "all that the codec has, up to 8"
    assert composed(shelf, streams=3).spec.layout.streams == 3, "SNAC's own number is fine"
    with pytest.raises(CheckpointError, match="4 streams asked of this SNAC codec, which has 3"):
        composed(shelf, streams=4)
    with pytest.raises(CheckpointError, match="0 streams asked of Mimi, which has 5"):
        composed(shelf, codec="mimi", streams=0)


def test_tts_layers_and_seeds_out_of_range(shelf: Path) -> None:
    for layers in (-1, 101, 10**9):
        with pytest.raises(UsageError, match=f"0 to 100 layers, not {layers}"):
            composed(shelf, tts_layers=layers)
    with pytest.raises(UsageError, match="seed must be .* not -1"):
        composed(shelf, seed=-1)
    with pytest.raises(UsageError, match="seed must be .* not -1"):
        checkpoints.preset("tiny", -1)


@pytest.mark.parametrize("tts_layers", [0, 1])
def test_init_says_what_is_untrained(shelf: Path, tmp_path: Path, tts_layers: int) -> None:
    given = ["--encoder", str(shelf / "whisper"), "--llm", str(shelf / "llm"), "--codec", str(shelf / "mimi")]
    options = ["--streams", "3", "--tts-layers", str(tts_layers), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["init", *given, *options])
    names = "adapter, the TTS adapter, the special tokens" if tts_layers else "adapter, the special tokens"
    said = f"The {names} and the audio rows are untrained: this checkpoint answers noise until it is trained.\n"
    assert result.exit_code == 0 and said in result.output, result.output
    assert checkpoints.load(tmp_path / "out").spec.layout.streams == 3
