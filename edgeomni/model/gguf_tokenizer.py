"""The tokenizer in a GGUF file -> tokenizer.json, for byte-pair vocabularies of GPT-2's kind.

What pieces text is cut into before pairs are merged is in the file by name only (tokenizer.ggml.pre); known here are
those of the supported LLMs. Their expressions are the ones in those models' own tokenizer.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..gguf_files import GgufFile, read
from .gguf_llm import EMBEDDING
from .tensors import read_text, translated

logger = logging.getLogger("edgeomni")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PIECES: dict[str, str | None] = {
    "qwen2": _WORDS % r"\p{N}",
    "llama-bpe": _WORDS % r"\p{N}{1,3}",
    "gpt-2": None,  # ByteLevel's own
}
_CONTROL, _USER_DEFINED = 3, 4
"""llama.cpp's token types: markers that text never becomes, and words that are kept whole."""


def tokenizer_json(source: str) -> str | None:
    """tokenizer.json beside the file, or rebuilt from the file; None, with a warning, where neither can be had.

    Raises CheckpointError for a vocabulary that contradicts itself.
    """
    beside = Path(source).parent / "tokenizer.json"
    if beside.is_file():
        return read_text(beside)
    file = read(Path(source), CheckpointError)
    kind, pieces = file.get("tokenizer.ggml.model", str, "none"), file.get("tokenizer.ggml.pre", str, "")
    if kind != "gpt2" or pieces not in _PIECES:
        logger.warning(
            "%s: its tokenizer (%s %s) is not one that can be rebuilt, so the checkpoint takes and gives no text; put "
            "the model's tokenizer.json beside the file and run init again",
            source,
            kind,
            pieces,
        )
        return None
    with translated(f"{source}: its tokenizer cannot be rebuilt; put the model's tokenizer.json beside the file"):
        return str(_rebuilt(file, pieces).to_str())


def _rebuilt(file: GgufFile, pieces: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, merges = file.get("tokenizer.ggml.tokens", list, []), file.get("tokenizer.ggml.merges", list, [])
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    if len(set(tokens)) != len(tokens) or kinds is None or len(kinds) != len(tokens):
        raise CheckpointError(f"{file.path}: its tokens and their types do not fit together; convert the model again")
    rows = file.tensors[EMBEDDING].shape[0] if EMBEDDING in file.tensors else 0
    if len(tokens) > rows:
        raise CheckpointError(f"{file.path}: has {len(tokens)} tokens, and an embedding of {rows}; convert it again")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    ids = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=pieces == "llama-bpe"))
    expression = _PIECES[pieces]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    if expression is None:
        tokenizer.pre_tokenizer = bytes_
    else:
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    if pieces == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, kinds, strict=True))
    markers = [AddedToken(t, special=True, normalized=False) for t, k in typed if k == _CONTROL]
    words = [AddedToken(t, normalized=False) for t, k in typed if k == _USER_DEFINED]
    tokenizer.add_special_tokens(markers)
    tokenizer.add_tokens(words)
    if file.get("tokenizer.ggml.add_bos_token", bool, False):
        first = file.get("tokenizer.ggml.bos_token_id", int, -1)
        if not 0 <= first < len(tokens):
            raise CheckpointError(f"{file.path}: its token of the beginning is number {first}, which is none")
        begin = f"{tokens[first]}:0"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A:0", pair=f"{begin} $A:0 $B:1", special_tokens=[(tokens[first], first)]
        )
    return tokenizer
