"""OmniModel's own arithmetic, and the torch runtime, each against a second way to the same numbers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edgeomni.components import Features, OpenOptions
from edgeomni.errors import AudioError, EngineError, SpecError
from edgeomni.interrupt import Interrupt, Interrupted
from edgeomni.model import bodies, checkpoints, codecs, encoders
from edgeomni.model.omni import OmniModel, fill, skeleton
from edgeomni.model.presets import draw
from edgeomni.model.tensors import shapes_of
from edgeomni.runtimes.torch import TorchLanguageModel, components_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from snac import SNAC


def random_ids(model: OmniModel, rows: int, frames: int, seed: int = 0) -> torch.Tensor:
    layout = model.spec.layout
    generator = torch.Generator().manual_seed(seed)
    audio = [
        torch.randint(layout.codebook_size, (rows, 1, frames), generator=generator) + layout.shift(k)
        for k in range(layout.streams)
    ]
    return torch.cat([*audio, torch.randint(layout.eot, (rows, 1, frames), generator=generator)], 1)


@pytest.fixture(scope="module")
def tts_model(tiny_model: Any) -> Any:
    model = skeleton(replace(tiny_model.spec, tts_layers=2), tiny_model.codec_config)
    return fill(model, {n: draw(n, shape, 1) for n, shape in shapes_of(model.state_dict()).items()})


def test_embedding_is_the_mean_with_features_in_the_audio_streams(tiny_model: Any) -> None:
    ids = random_ids(tiny_model, 2, 9)
    features = torch.randn(4, tiny_model.spec.body.width)
    with torch.inference_mode():
        got = tiny_model.embed(ids, [(2, features[:1]), (3, features[1:])])
        for row in range(2):
            for t in range(9):
                vectors = [tiny_model.embedding.weight[i] for i in ids[row, :, t]]
                if 2 <= t < 6:
                    vectors[:-1] = [features[t - 2]] * tiny_model.spec.layout.streams
                assert torch.allclose(got[row, t], torch.stack(vectors).mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="exceed"):
        tiny_model.embed(ids, [(7, features)])


def test_short_windows_use_the_first_positions(tiny_model: Any) -> None:
    spec = tiny_model.spec.encoder
    short = WhisperEncoder(
        WhisperConfig(
            d_model=spec.width,
            encoder_layers=spec.layers,
            encoder_attention_heads=spec.heads,
            encoder_ffn_dim=spec.ffn,
            max_source_positions=21,
        )
    ).eval()
    state = tiny_model.encoder.state_dict()
    short.load_state_dict({**state, "embed_positions.weight": state["embed_positions.weight"][:21]})
    mel = torch.randn(1, 80, 42)
    with torch.inference_mode():
        assert torch.allclose(encoders.encode(tiny_model.encoder, mel), short(mel).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("frames", [0, 41, 3002])
def test_windows_that_do_not_fit(tiny_model: Any, frames: int) -> None:
    with pytest.raises(AudioError, match=f"{frames} mel frames"):
        tiny_model.encode(torch.zeros(1, 80, frames))


@pytest.mark.parametrize("pieces", [(12,), (5, 1, 1, 5), (1,) * 12])
@pytest.mark.parametrize("which", ["tiny_model", "tts_model"])
def test_cached_pieces_equal_one_pass(request: pytest.FixtureRequest, which: str, pieces: tuple[int, ...]) -> None:
    model = request.getfixturevalue(which)
    with torch.inference_mode():
        embeds = model.embed(random_ids(model, 2, 12))
        whole, cache = model.hidden(embeds), model.new_cache(2, 12)
        parts = [model.hidden(piece, cache) for piece in embeds.split(pieces, 1)]
    for i in range(2):
        assert torch.allclose(torch.cat([p[i] for p in parts], 1), whole[i], atol=1e-4)


def test_tts_adapter_runs_on_the_unnormed_output(tts_model: Any) -> None:
    body = bodies.build(replace(tts_model.spec.body, layers=5), tts_model.spec.context).eval()
    state = {
        **tts_model.body.state_dict(),
        "norm.weight": tts_model.tts.norm.weight,
        **{f"layers.{3 + int(n[7])}.{n[9:]}": t for n, t in tts_model.tts.state_dict().items() if n[:6] == "layers"},
    }
    body.load_state_dict(state)
    with torch.inference_mode():
        embeds = tts_model.embed(random_ids(tts_model, 1, 7))
        expected = body.norm(bodies.run_layers(body.layers, body.rotary_emb, embeds, None))
        assert torch.allclose(tts_model.hidden(embeds)[1], expected, atol=1e-5)
    assert tts_model.audio_rows() is tts_model.audio_head.weight


def test_tied_heads_are_views_of_the_embedding(tiny_model: Any) -> None:
    table = tiny_model.embedding.weight
    assert tiny_model.text_rows().data_ptr() == table.data_ptr()
    assert len(tiny_model.text_rows()) + len(tiny_model.audio_rows()) == len(table)
    assert not [n for n in tiny_model.state_dict() if "head" in n or "embed_tokens" in n]


def test_seeded_noise_is_what_the_published_decoder_draws(tiny_model: Any) -> None:
    config = {k: v for k, v in tiny_model.codec_config.items() if k != "kind"}
    original = SNAC(**config).eval()
    original.load_state_dict(tiny_model.codec.state_dict())
    codes = [torch.randint(config["codebook_size"], (1, 3 * n)) for n in (1, 2, 4)]
    with torch.inference_mode():
        torch.manual_seed(7)
        expected = original.decode(codes)[0, 0]
    assert torch.equal(tiny_model.decode_codes(codes, noise=7), expected)
    assert not torch.allclose(tiny_model.decode_codes(codes), expected, atol=1e-3)


def test_noise_is_off_again_after_an_error(tiny_model: Any) -> None:
    codes = [torch.zeros(1, n, dtype=torch.long) for n in (1, 2, 4)]
    with pytest.raises(ValueError):
        tiny_model.decode_codes(codes, noise=[torch.zeros(1, 1, 32)])
    assert all(block.noise is None for block in codecs.noise_blocks(tiny_model.codec))


def test_biases_that_a_body_type_lacks(tiny_model: Any) -> None:
    with pytest.raises(SpecError, match="qkv_bias False"):
        bodies.build(replace(tiny_model.spec.body, qkv_bias=False), 64)


# The torch runtime


@pytest.mark.parametrize("which", ["tiny_model", "tts_model"])
def test_runtime_rows_equal_the_model(request: pytest.FixtureRequest, which: str) -> None:
    """Prefilled once, forked, stepped, one row dropped: the same as whole rows through the model."""
    model = request.getfixturevalue(which)
    lm = TorchLanguageModel(model)
    ids, features = random_ids(model, 2, 12), torch.randn(4, model.spec.body.width)
    ids[1, :, :8] = ids[0, :, :8]
    with torch.inference_mode():
        text, audio = model(ids, [(1, features)])
    state, steps = lm.start(2, 12), ids.to(torch.int32).numpy()
    lm.forward(steps[:1, :, :8], [Features(1, features.numpy())], state)
    lm.fork(state)
    hidden = lm.forward(steps[:, :, 8:11], (), state)
    assert np.allclose(lm.text_logits(hidden, 1), text[1, 10], atol=1e-4)
    assert np.allclose(lm.audio_logits(hidden, 0), audio[0, 10], atol=1e-4)
    lm.drop(state, 1)
    hidden = lm.forward(steps[:1, :, 11:], (), state)
    assert np.allclose(lm.audio_logits(hidden, 0), audio[0, 11], atol=1e-4) and state.length == 12
    with pytest.raises(EngineError, match="exceed"):
        lm.forward(steps[:1, :, 11:], (), state)


def test_runtime_refuses_rows_that_are_not_there(tiny_model: Any) -> None:
    lm = TorchLanguageModel(tiny_model)
    state = lm.start(1, 4)
    with pytest.raises(EngineError, match="fork"):
        lm.fork(state)
    with pytest.raises(EngineError, match="dropped"):
        lm.drop(state, 0)
    with pytest.raises(EngineError, match="2 rows"):
        lm.forward(np.zeros((2, 8, 1), np.int32), (), state)


def test_components(tiny_model: Any) -> None:
    components = components_of(tiny_model)
    mel = np.random.default_rng(0).normal(size=(80, 20)).astype(np.float32)
    with torch.inference_mode():
        expected = tiny_model.encode(torch.from_numpy(mel)[None])[0]
    assert np.allclose(components.encoder.encode(mel), expected, atol=1e-5)
    interrupt = Interrupt()
    assert np.allclose(components.encoder.encode(mel, 5, interrupt), expected[:5], atol=1e-5)
    interrupt.set()
    with pytest.raises(Interrupted):
        components.encoder.encode(mel, None, interrupt)
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="CUDA"):
            components_of(tiny_model, OpenOptions(device="cuda"))


def test_real_shape_has_the_published_sizes() -> None:
    """LAB: 532.0 M with the adapter of 11.8 M, encoder 87 M (its positions not counted), SNAC 19.8 M."""
    from edgeomni.model.presets import PRESETS, _spec_of

    shape = PRESETS["mini-omni"]
    model = skeleton(_spec_of(shape), shape.snac)
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert model.spec.layout.joint_vocab == 181120
    assert count["embedding"] + count["body"] + count["adapter"] == pytest.approx(532.0, abs=0.1)
    assert count["encoder"] == pytest.approx(88.2, abs=0.2) and count["codec"] == pytest.approx(19.8, abs=0.1)
    assert checkpoints.preset("tiny").provenance["weights"] == "random"
