"""Steps of the trainer: at nano's size against a plain transformers Trainer, and one step at Mini-Omni's size.

    python benchmarks/training.py [--steps 20] [--precision fp32|bf16] [--real]

Nano: 16 sequences of 120 positions, a Qwen2 body of 6 layers of width 256, a text head of 512 rows and seven audio
heads of 1088. The baseline is transformers' own Trainer with Qwen2ForCausalLM of the same body and a head of as many
rows, on the same number of positions with the same labels in number: what our streams, tasks and logging cost beyond it
is the overhead. Both run in this process, in turn, after warm-up steps. `--real` adds one step of stage 3 with LoRA and
gradient checkpointing at the real size, in a process of its own whose peak memory is told.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from edgeomni.data.sample import Sample
from edgeomni.model import checkpoints, codecs, encoders
from edgeomni.model.omni import OmniModel, fill, skeleton
from edgeomni.model.presets import draw, word_tokenizer
from edgeomni.model.tensors import shapes_of
from edgeomni.spec import AdapterSpec, BodySpec, EncoderSpec, OmniSpec, TokenLayout
from edgeomni.train import TrainConfig, fit
from edgeomni.train.config import OptimizerConfig, RunConfig

BATCH, POSITIONS, WORDS, SPECIALS = 16, 120, 448, 64
WARMUP = 3
SNAC = {
    "kind": "snac",
    "sampling_rate": 16000,
    "encoder_dim": 16,
    "encoder_rates": [4, 4, 4, 8],
    "decoder_dim": 256,
    "decoder_rates": [8, 4, 4, 4],
    "attn_window_size": None,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": False,
    "depthwise": True,
}


def nano() -> OmniModel:
    """A model of about nano's size with random weights: a layer more than the preset "nano", and larger codebooks."""
    encoder, codec = EncoderSpec(layers=4, width=192, heads=4, ffn=768, context=400), codecs.spec_of(SNAC)
    layout = TokenLayout(WORDS + SPECIALS, codec.codebook_size + 64, codec.codebook_size, codec.streams, SPECIALS)
    spec = OmniSpec(
        front_end=encoders.front_end(encoder, 80),
        encoder=encoder,
        adapter=AdapterSpec("swiglu", hidden=256),
        body=BodySpec("qwen2", 6, 256, 4, 2, head_dim=64, ffn=640, qkv_bias=True),
        layout=layout,
        codec=codec,
        context=512,
        padded_window=False,
    )
    model = skeleton(spec, SNAC)
    fill(model, {name: draw(name, shape, 0) for name, shape in shapes_of(model.state_dict()).items()})
    model.tokenizer_json = word_tokenizer(WORDS)
    return model


def spoken(model: OmniModel, count: int, frames: int) -> list[Sample]:
    """Samples of task ta whose sequences have `frames` positions, all with the same texts and codes of their own."""
    layout, rng = model.spec.layout, np.random.default_rng(0)
    question = "what is the number"
    prompt = len(question.split()) + 3
    codes = frames - prompt - layout.streams
    return [
        Sample(
            where=f"made:{i}",
            task="ta",
            text=question,
            answer="the answer is good",
            answer_codes=rng.integers(0, layout.codebook_size, (codes, layout.streams)),
        )
        for i in range(count)
    ]


def ours(steps: int, precision: str, lora: bool) -> list[float]:
    """Seconds of each step of `fit`, logging included."""
    model = nano()
    config = TrainConfig(
        stage="3",
        lora=lora,
        tasks={"ta": 1.0},
        optimizer=OptimizerConfig(steps=steps + WARMUP, batch=BATCH),
        run=RunConfig(log_every=1, save_every=10 * (steps + WARMUP), precision=precision),  # type: ignore[arg-type]
    )
    log = fit(model, spoken(model, 64, POSITIONS), config).log
    seconds = [line["seconds"] for line in log if "loss" in line]
    return [b - a for a, b in zip(seconds, seconds[1:], strict=False)][WARMUP - 1 :]


class Times(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_log(self, *_: Any, **__: Any) -> None:
        self.ends.append(perf_counter())


def plain(steps: int, precision: str, rows: int, labelled: int) -> list[float]:
    """Seconds of each step of transformers' Trainer, all weights learning."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
    )
    ids = torch.randint(rows, (64, POSITIONS))
    labels = ids.clone()
    labels[:, : POSITIONS - labelled] = -100
    data = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps + WARMUP,
            per_device_train_batch_size=BATCH,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=precision == "bf16",
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(Qwen2ForCausalLM(config), args, train_dataset=data, callbacks=[times])  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    gaps = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
    return gaps[WARMUP - 1 : WARMUP - 1 + steps]


def real() -> dict[str, float]:
    """One step of stage 3 with LoRA at Mini-Omni's size: seconds, and the peak memory of this process in GB."""
    model = checkpoints.preset("mini-omni", 0)
    config = TrainConfig(
        stage="3",
        tasks={"ta": 1.0},
        optimizer=OptimizerConfig(steps=2, batch=4),
        run=RunConfig(log_every=1, save_every=100, gradient_checkpointing=True),
    )
    log = fit(model, spoken(model, 4, POSITIONS), config).log
    seconds = [line["seconds"] for line in log if "loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"real_step_s": round(seconds[1] - seconds[0], 1), "real_peak_gb": round(peak, 2)}


def told(name: str, seconds: list[float]) -> dict[str, float]:
    middle, high = median(seconds), quantiles(seconds, n=20)[-1]
    print(f"{name:42s} median {middle * 1e3:7.0f} ms   p95 {high * 1e3:7.0f} ms   {1 / middle:5.2f} steps/s")
    return {f"{name} s": round(middle, 4), f"{name} p95 s": round(high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--real-alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.real_alone:
        print(json.dumps(real()))
        return
    layout = nano().spec.layout
    labelled = POSITIONS - 6
    found: dict[str, Any] = {
        "precision": given.precision,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    first = ours(given.steps, given.precision, lora=False)
    baseline = plain(given.steps, given.precision, layout.joint_vocab, labelled)
    again = ours(given.steps, given.precision, lora=False)
    found |= told("edgeomni, everything learns", [*first, *again])
    found |= told("transformers Trainer, same body", baseline)
    found |= told("edgeomni, LoRA on the body", ours(given.steps, given.precision, lora=True))
    found["overhead"] = round(median([*first, *again]) / median(baseline) - 1, 3)
    print(f"overhead over the plain Trainer: {100 * found['overhead']:.1f} %")
    if given.real:
        command = [sys.executable, str(Path(__file__).resolve()), "--real-alone"]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        found |= json.loads(child.stdout.splitlines()[-1])
        print(
            f"Mini-Omni's size, LoRA: {found['real_step_s']} s a step of 4 x {POSITIONS}, at most "
            f"{found['real_peak_gb']} GB"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
