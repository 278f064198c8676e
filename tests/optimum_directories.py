"""Makes directories as `optimum-cli export onnx|openvino` makes them, of tiny models with random weights.

It runs in another environment than EdgeOmni's, since optimum-onnx and optimum-intel pin older transformers:

    python3.11 -m venv /tmp/optimum-env
    /tmp/optimum-env/bin/pip install optimum-onnx==0.1.0 transformers==4.57.6 onnxruntime
    /tmp/optimum-env/bin/python tests/optimum_directories.py onnx OUT

OUT then holds, for each model, the directory that optimum made (without what nothing here reads) and NAME.npz with an
input and what transformers itself answers to it: ids and logits, or the first features of a drawn log-mel. The archives
in tests/optimum/ were made so, with --archive; docs/optimum.md says how to make them again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

WORDS = 40
MEL_SEED = 1
IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
WHISPER = {
    "d_model": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 8,
    "vocab_size": 40,
    "num_mel_bins": 6,
    "max_target_positions": 16,
    "begin_suppress_tokens": None,
    **IDS,
}
LLM = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FRAMES = {"onnx": 200, "openvino": 3000}
"""Mel frames of the window. OpenVINO's exporter cannot be told of another than Whisper's own."""
KEPT = ("config.json", "tokenizer.json", "encoder_model.onnx", "model.onnx")
KEPT += tuple(f"openvino_{name}.{end}" for name in ("encoder_model", "model") for end in ("xml", "bin"))


def moved(model: Any) -> Any:
    """transformers starts biases at 0 and norms at 1: equal tensors, which an exporter stores once for all."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def whisper(frames: int, equal: bool) -> tuple[Any, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**WHISPER, max_source_positions=frames // 2))
    model = model.eval() if equal else moved(model)
    mel = torch.randn(1, 6, frames, generator=torch.Generator().manual_seed(MEL_SEED))
    with torch.inference_mode():
        features = model.model.encoder(mel).last_hidden_state
    return model, {
        "mel_seed": np.array(MEL_SEED),
        "mel_shape": np.array(mel.shape),
        "features": features[0, :20].numpy(),
    }


def llm(kind: Any, tied: bool, equal: bool) -> tuple[Any, dict[str, np.ndarray]]:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(kind(**LLM, tie_word_embeddings=tied))
    model = model.eval() if equal else moved(model)
    ids = torch.randint(WORDS, (1, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits = model(ids).logits
    return model, {"ids": ids[0].numpy(), "logits": logits[0].numpy()}


MODELS = {
    "whisper": lambda frames: whisper(frames, False),
    "whisper-equal": lambda frames: whisper(frames, True),
    "qwen2": lambda _: llm(Qwen2Config, True, False),
    "qwen2-equal": lambda _: llm(Qwen2Config, True, True),
    "llama": lambda _: llm(LlamaConfig, False, False),
}
"""NAME-equal: weights as transformers draws them, with many equal tensors."""


def tokenizer(directory: Path) -> None:
    """A tokenizer of one token per word, without which optimum warns and OpenVINO's exporter stops."""
    vocab = {f"w{i}": i for i in range(WORDS)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def export(name: str, how: list[str], out: Path) -> None:
    model, answers = MODELS[name](FRAMES[how[0]])
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "model", Path(scratch) / "exported"
        model.save_pretrained(source)
        tokenizer(source)
        task = "text-generation-with-past"
        if name.startswith("whisper"):
            WhisperFeatureExtractor(feature_size=6, chunk_length=FRAMES[how[0]] // 100).save_pretrained(source)
            task = "automatic-speech-recognition"
            how = [*how, *(["--nb_max_frames", str(FRAMES["onnx"])] if how[0] == "onnx" else [])]
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", *how, "--task", task]
        subprocess.run([*command, "--model", str(source), str(target)], check=True, timeout=900)
        print(name, sorted(p.name for p in target.iterdir()))
        (out / name).mkdir(parents=True)
        for file in KEPT:
            if (target / file).is_file():
                (out / name / file).write_bytes((target / file).read_bytes())
    np.savez(out / f"{name}.npz", **answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=["onnx", "openvino"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--weight-format", help="OpenVINO only: fp32, fp16, int8, int4.")
    parser.add_argument("--archive", action="store_true", help="Also write OUT.zip.")
    args = parser.parse_args()
    how = [args.format, *(["--weight-format", args.weight_format] if args.weight_format else [])]
    for name in args.models:
        export(name, how, args.out)
    if args.archive:
        shutil.make_archive(str(args.out), "zip", args.out)


if __name__ == "__main__":
    main()
