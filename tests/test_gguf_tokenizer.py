"""A tokenizer rebuilt from a GGUF file: against the one that was written, and against llama.cpp's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf_writing
import parts
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgeomni.errors import CheckpointError
from edgeomni.model import gguf_tokenizer
from edgeomni.runtimes.llamacpp import library

TEXTS = [
    "What is two plus three? It's 5, isn't it?",
    "  Zahlen 12345 und 67, Umlaute äöü ẞ;\n\n  neue Zeile\t(Ende)",
    "日本語のテキスト and emoji 🙂🙂, déjà vu — e\u0301",
    "<|begin|>hello<|end|> world",
    "a" * 40 + "!!!   \n x",
]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = {"qwen2": WORDS % r"\p{N}", "llama-bpe": WORDS % r"\p{N}{1,3}", "gpt-2": None}
MARKERS = ["<|begin|>", "<|end|>"]


def trained(pre: str) -> Tokenizer:
    """A byte-pair tokenizer of some hundred entries, cut into pieces as the family does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PIECES[pre] is None)
    expression = PIECES[pre]
    tokenizer.pre_tokenizer = (
        bytes_
        if expression is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), bytes_])
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS])
    return tokenizer


def metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(n) for n in range(tokenizer.get_vocab_size())]
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": pre,
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__merges": [" ".join(pair) for pair in merges],
        "tokenizer__ggml__token_type": [3 if token in MARKERS else 1 for token in tokens],
        "tokenizer__ggml__add_bos_token": False,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "WORDS", 422)
        return parts.llm(tmp_path_factory.mktemp("model") / "llm")


def written(model: Path, path: Path, pre: str = "qwen2", **changed: Any) -> Tokenizer:
    tokenizer = trained(pre)
    gguf_writing.write(model, path, **{**metadata(tokenizer, pre), **changed})
    return tokenizer


def rebuilt(path: Path) -> Tokenizer:
    text = gguf_tokenizer.tokenizer_json(str(path))
    assert text
    return Tokenizer.from_str(text)


@pytest.mark.parametrize("pre", PIECES)
def test_ids_and_texts_are_those_of_the_tokenizer_that_was_written(model: Path, tmp_path: Path, pre: str) -> None:
    theirs = written(model, tmp_path / "some.gguf", pre)
    ours = rebuilt(tmp_path / "some.gguf")
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("pre", PIECES)
def test_ids_are_those_of_llama_cpp(model: Path, tmp_path: Path, pre: str) -> None:
    path = tmp_path / "some.gguf"
    written(model, path, pre)
    ours = rebuilt(path)
    plain = [text for text in TEXTS if "\u0301" not in text or pre != "qwen2"]  # llama.cpp does not compose letters
    assert [ours.encode(text).ids for text in plain] == [llama_cpp_ids(path, text) for text in plain]


def llama_cpp_ids(path: Path, text: str) -> list[int]:
    llama_cpp = library.llama()  # its messages go to logging, in every test of a process alike
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    raw, room = text.encode(), (llama_cpp.llama_token * 400)()
    count = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), raw, len(raw), room, 400, False, True)
    llama_cpp.llama_model_free(model)
    return list(room[:count])


def test_a_token_of_the_beginning_is_put_first(model: Path, tmp_path: Path) -> None:
    begin = trained("llama-bpe").token_to_id("<|begin|>")
    first = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": begin}
    theirs = written(model, tmp_path / "some.gguf", "llama-bpe", **first)
    ours = rebuilt(tmp_path / "some.gguf")
    assert ours.encode("hello").ids == [begin, *theirs.encode("hello").ids]


def test_a_tokenizer_beside_the_file_comes_first(model: Path, tmp_path: Path) -> None:
    written(model, tmp_path / "some.gguf")
    (tmp_path / "tokenizer.json").write_text('{"of": "the model"}')
    assert gguf_tokenizer.tokenizer_json(str(tmp_path / "some.gguf")) == '{"of": "the model"}'


@pytest.mark.parametrize(("kind", "pre"), [("llama", "default"), ("gpt2", "poro-chat"), ("none", "")])
def test_one_that_cannot_be_rebuilt_is_told(
    model: Path, tmp_path: Path, kind: str, pre: str, caplog: pytest.LogCaptureFixture
) -> None:
    written(model, tmp_path / "some.gguf", tokenizer__ggml__model=kind, tokenizer__ggml__pre=pre)
    with caplog.at_level(logging.WARNING, "edgeomni"):
        assert gguf_tokenizer.tokenizer_json(str(tmp_path / "some.gguf")) is None
    assert "put the model's tokenizer.json beside the file" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer__ggml__token_type": [1, 1, 3]},
        {"tokenizer__ggml__merges": ["nothing such"]},
        {"tokenizer__ggml__tokens": [f"<{n}>" for n in range(500)], "tokenizer__ggml__token_type": [1] * 500},
        {"tokenizer__ggml__tokens": ["a"] * 300, "tokenizer__ggml__token_type": [1] * 300},
        {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": 9000},
        {"tokenizer__ggml__add_bos_token": True},
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(model: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    written(model, tmp_path / "some.gguf", **changed)
    with pytest.raises(CheckpointError):
        gguf_tokenizer.tokenizer_json(str(tmp_path / "some.gguf"))
