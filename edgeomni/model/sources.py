"""Where a part lies: a local directory or a repository of the Hugging Face hub. Finds its files and reads them.

No code of a checkpoint is ever run: only config.json, tensors and tokenizer.json are read, never a Python module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from torch import Tensor
from transformers.utils import cached_file

from ..errors import CheckpointError
from ..gguf_files import is_gguf
from . import gguf_llm, gguf_tokenizer
from .tensors import digest, read_json, read_safetensors, read_text, read_torch, state_of, translated

PROBE_S = 3.0
"""Seconds to wait for the hub's first answer. Without this probe, the hub's client retries for about 25 s per file."""
_FILE_SUFFIXES = (".bin", ".gguf", ".json", ".onnx", ".pt", ".pth", ".safetensors", ".yaml")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_EITHER = "give a local directory, or a hub id (openai/whisper-small) with the network up"
# As the hub pages of these parts state them.
_KNOWN_LICENCES = {
    "openai/whisper": "Apache-2.0",
    "Qwen/Qwen2-": "Apache-2.0",
    "Qwen/Qwen3-": "Apache-2.0",
    "hubertsiuzdak/snac": "MIT",
    "kyutai/mimi": "CC-BY-4.0",
}


def looks_like_path(source: str) -> bool:
    """Whether `source` can only be meant as a local path. A hub id is `name` or `owner/name`."""
    first = source.split("/")[0]
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
        or source.lower().endswith(_FILE_SUFFIXES)
        or ("/" in source and Path(first).exists())
    )


def check_exists(source: str) -> None:
    """Raises CheckpointError at once for a local path that is not there, instead of asking the hub for it."""
    if not source:
        raise CheckpointError(f"the name of a part is empty; {_EITHER}")
    if not Path(source).exists() and looks_like_path(source):
        raise CheckpointError(f"{source}: no such file or directory; {_EITHER}")


def find(source: str, name: str) -> Path | None:
    """The file `name` of a local directory or hub repository; None where that has no such file.

    While the hub does not answer, only its cache is looked through. Raises CheckpointError for a local path or a
    repository that does not exist.
    """
    check_exists(source)
    if Path(source).exists():
        path = Path(source) / name
        return path if path.is_file() else None
    with translated(f"{source}: no such directory here, and the hub does not give it; {_EITHER}"):
        found = cached_file(
            source,
            name,
            local_files_only=not hub_answers(),
            _raise_exceptions_for_missing_entries=False,
        )
    return Path(found) if found else None


def config_json(source: str) -> dict[str, Any]:
    """The part's config.json, or what a GGUF file says in its place.

    Raises CheckpointError where there is none, or no JSON object in it.
    """
    if is_gguf(Path(source)):
        return gguf_llm.config_of(source)
    path = find(source, "config.json")
    if path is not None:
        return read_json(path)
    if Path(source).exists() or hub_answers():
        raise CheckpointError(f"{source}: has no config.json; {_EITHER}")
    raise CheckpointError(
        f"{source}: no such directory here, not in the hub's cache, and the hub does not answer; {_EITHER}"
    )


def weights(source: str, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of a part that `keep` wants by name: model.safetensors, pytorch_model.bin, shards of either, or GGUF.

    Raises CheckpointError where there are no weights, or they cannot be read.
    """
    if is_gguf(Path(source)):
        found = gguf_llm.weights(source, gguf_llm.config_of(source))
        return {name: tensor for name, tensor in found.items() if keep(name)}
    for name in _WEIGHT_FILES:
        if (path := find(source, name)) is not None:
            return _tensors(path, keep)
        if (index := find(source, f"{name}.index.json")) is not None:
            return _sharded(source, index, keep)
    raise CheckpointError(f"{source}: has no weights ({' or '.join(_WEIGHT_FILES)}); download it again")


def tokenizer_json(source: str) -> str | None:
    """The text of the LLM's tokenizer.json, None where it has none. Raises CheckpointError where it is no text."""
    if is_gguf(Path(source)):
        return gguf_tokenizer.tokenizer_json(source)
    path = find(source, "tokenizer.json")
    return read_text(path) if path else None


def _sharded(source: str, index: Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index}: has no weight_map that names the shard of each tensor; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({place for name, place in places.items() if keep(name)}):
        if Path(shard).name != shard or (path := find(source, shard)) is None:
            raise CheckpointError(f"{source}: the shard {shard!r} that {index.name} names is missing")
        tensors |= _tensors(path, keep)
    return tensors


def _tensors(path: Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, keep)
    return {name: tensor for name, tensor in state_of(read_torch(path), path).items() if keep(name)}


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub answers within PROBE_S seconds; asked once per process. HF_HUB_OFFLINE counts as no."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_S)
    except Exception:  # its HTTP library differs by version; whatever it raises, the hub did not answer
        return False
    return True


def mark(source: str) -> str:
    """What tells one version of a part from another: the hash of its files, or the hub's commit."""
    path = Path(source)
    if path.exists():
        return digest([path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()])
    config = find(source, "config.json")
    return f"{source}@{config.parent.name if config else 'unknown'}"


def short_name(source: str) -> str:
    """The hub id, or the last component of a local path: no machine's paths go into a checkpoint."""
    return Path(source).resolve().name if Path(source).exists() else source


def licence(source: str) -> str:
    """The licence that the part's hub page or README.md states, with the part's name."""
    for prefix, known in _KNOWN_LICENCES.items():
        if source.startswith(prefix):
            return f"{known} ({source})"
    if is_gguf(Path(source)) and (told := gguf_llm.licence(source)):
        return f"{told} ({short_name(source)})"
    readme = Path(source) / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    stated = re.search(r"^license:\s*(\S+)", text, re.M)
    return f"{stated[1] if stated else 'not stated'} ({short_name(source)})"
