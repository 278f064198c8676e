"""Parts of codec training: quantizer, initialisation, the faster forward, and the count of codes in use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from codec_models import LAYOUTS, snac
from codec_train_parts import SIZES, changed, harmonic
from torch import nn

from edgeomni.errors import TrainError
from edgeomni.train import codec_files
from edgeomni.train.codec_config import CollapseConfig, QuantizerConfig
from edgeomni.train.codec_fast import faster
from edgeomni.train.codec_init import initialise
from edgeomni.train.codec_quantizer import Level, Quantizer
from edgeomni.train.codec_step import Learner
from edgeomni.train.codec_use import CodeUse, perplexity

CODES, WIDTH, DECAY = 5, 3, 0.8


def level(stride: int = 1) -> Level:
    from snac.vq import VectorQuantize

    torch.manual_seed(0)
    return Level(VectorQuantize(4, CODES, WIDTH, stride), DECAY)


def unit_vectors(n: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_codes_follow_their_latents_as_a_plain_computation_says() -> None:
    one = level()
    one.begin(unit_vectors(40, 0), 3, 20.0)
    codes = one.module.codebook.weight.detach().numpy().astype(np.float64)
    start = unit_vectors(40, 0).numpy()
    uses = np.array([max(0.3, np.sum(np.argmax(start @ codes.T, axis=1) == k)) for k in range(CODES)])
    counts = uses / uses.sum() * 20
    sums = codes * counts[:, None]
    for step in range(6):
        flat = unit_vectors(20, 1 + step)
        one.move(flat, one.nearest(flat), revive=0, below=0.0)
        chosen = [int(np.argmax([v @ code for code in codes])) for v in flat.numpy()]
        for k in range(CODES):
            mine = [v for v, c in zip(flat.numpy(), chosen, strict=True) if c == k]
            counts[k] = DECAY * counts[k] + (1 - DECAY) * len(mine)
            sums[k] = DECAY * sums[k] + (1 - DECAY) * np.sum(mine, axis=0, initial=0.0)
            codes[k] = sums[k] / np.linalg.norm(sums[k])
    np.testing.assert_allclose(one.module.codebook.weight.detach(), codes, atol=1e-5)
    np.testing.assert_allclose(one.counts, counts, rtol=1e-5)


def test_k_means_finds_the_clusters_and_their_shares() -> None:
    centres = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    sizes = [40, 20, 20, 10, 10]
    near = torch.cat([c + 0.05 * torch.randn(n, 3) for c, n in zip(centres, sizes, strict=True)])
    one = level()
    one.begin(nn.functional.normalize(near, dim=1), 12, 10.0)
    angles = centres @ one.directions.t()
    assert angles.max(dim=1).values.min() > 0.99
    assert one.counts[angles.argmax(dim=1)].tolist() == pytest.approx([4, 2, 2, 1, 1])


def test_codes_that_nothing_chooses_move_to_latents_of_the_batch() -> None:
    one = level()
    with torch.no_grad():
        one.module.codebook.weight.copy_(
            torch.tensor([[1.0, 0, 0], [-1, 0, 0], [-1, 0.01, 0], [-1, 0.02, 0], [0, 1, 0]])
        )
    one.radius = torch.ones(CODES)
    one.counts = torch.tensor([4.0, 0.001, 0.0, 0.0, 4.0])
    one.sums = one.directions * one.counts[:, None]
    flat = nn.functional.normalize(torch.tensor([[1.0, 0.1, 0], [0.1, 1, 0], [1, -0.1, 0.2]]), dim=1)
    one.move(flat, one.nearest(flat), revive=2, below=0.03)
    codes = one.module.codebook.weight
    assert all((flat @ codes[k]).max() > 0.9999 for k in (1, 2))
    torch.testing.assert_close(codes[3], nn.functional.normalize(torch.tensor([-1.0, 0.02, 0]), dim=0))
    assert one.counts[1] == one.counts[2] == pytest.approx(0.3 * 3 / CODES)


def test_a_code_unused_for_very_long_stays_where_it_is() -> None:
    one = level()
    before = one.directions[1].clone()
    one.begin_from_own(unit_vectors(30, 0), 30.0)
    flat = one.directions[:1].clone()
    for _ in range(3000):  # 0.8 ** 3000 is below the smallest float
        one.move(flat, torch.zeros(1, dtype=torch.int64), revive=0, below=0.0)
    torch.testing.assert_close(one.directions[1], before)


def test_a_codec_of_its_own_keeps_the_lengths_of_its_codes() -> None:
    one = level()
    with torch.no_grad():
        one.module.codebook.weight.mul_(torch.tensor([0.5, 1, 2, 3, 4])[:, None])
    one = Level(one.module, DECAY)
    table = one.module.codebook.weight.detach().clone()
    one.begin_from_own(unit_vectors(30, 0), 30.0)
    torch.testing.assert_close(one.module.codebook.weight, table)
    flat = unit_vectors(30, 5)
    one.move(flat, one.nearest(flat), revive=0, below=0.0)
    assert not torch.allclose(one.module.codebook.weight, table, atol=1e-3)
    torch.testing.assert_close(one.module.codebook.weight.norm(dim=1), table.norm(dim=1))


def test_ids_and_output_are_those_of_the_package() -> None:
    codec = snac("snac24")
    quantizer = Quantizer(codec, QuantizerConfig())
    quantizer.started = True
    z = torch.randn(2, codec.latent_dim, 12)
    ours, ids, _ = quantizer(z)
    theirs, codes = codec.quantizer(z)
    torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ids, codes, strict=True))
    assert [i.shape[1] for i in ids] == [3, 6, 12]


def test_gradients_pass_the_rounding_and_the_commitment_draws_latents_to_codes() -> None:
    torch.manual_seed(0)
    codec = codec_files.build(SIZES)
    del codec.quantizer.quantizers[1]
    quantizer = Quantizer(codec, QuantizerConfig())
    z = torch.randn(2, codec.latent_dim, 8, requires_grad=True)
    goal = torch.randn(2, codec.latent_dim, 8)
    (smooth,) = torch.autograd.grad((quantizer(z)[0] * goal).sum(), z)
    quantizer.started = True
    out, _, commitment = quantizer(z)
    (rounded,) = torch.autograd.grad((out * goal).sum(), z, retain_graph=True)
    torch.testing.assert_close(rounded, smooth)
    (pull,) = torch.autograd.grad(commitment, z)
    assert quantizer((z - 0.1 * pull).detach())[2] < commitment
    assert codec.quantizer.quantizers[0].codebook.weight.grad is None


def test_initialisation_gives_every_convolution_its_scale() -> None:
    torch.manual_seed(1)
    codec = codec_files.build(SIZES)
    wave = torch.stack([torch.from_numpy(harmonic(0.256, seed)) for seed in range(8)])[:, None]
    quantizer = Quantizer(codec, QuantizerConfig())
    initialise(codec, quantizer, wave)
    outputs: dict[nn.Module, torch.Tensor] = {}
    hooks: list[Any] = [
        m.register_forward_hook(lambda m, _, out: outputs.update({m: out.detach()}))
        for m in codec.modules()
        if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))
    ]
    codec.decoder(quantizer(codec.encoder(wave))[0])
    ends = {m.block[3] for m in codec.modules() if type(m).__name__ == "ResidualUnit"}
    last = codec.decoder.model[-2]
    assert len(outputs) == len(hooks) == (1 + 2 * 7 + 1) + 4 + (2 + 2 * 7 + 1)
    for module, out in outputs.items():
        wanted = 0.15 if module is last else 0.4 if module in ends else 1.0
        whole = out.std() if isinstance(module, nn.ConvTranspose1d) else out.std((0, 2)).median()
        assert float(whole) == pytest.approx(wanted, rel=0.02), module
        assert out.mean((0, 2)).abs().max() < 0.02 * wanted, module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_faster_way_computes_the_same(layout: str) -> None:
    codec = snac(layout, noise=False)
    wave = torch.randn(
        1, 1, 8 * 32 * 128 if layout != "snac_dense" else 240, generator=torch.Generator().manual_seed(0)
    )
    wave = codec.preprocess(wave[..., :5000])

    def computed() -> list[torch.Tensor]:
        out = codec.decoder(codec.encoder(wave))
        return [out, *torch.autograd.grad(out.square().mean(), list(codec.decoder.parameters()))]

    plain = computed()
    with faster(codec):
        assert sum("forward" in vars(m) for m in codec.modules()) > 4
        fast = computed()
    assert not any("forward" in vars(m) for m in codec.modules())
    for a, b in zip(plain, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_perplexity() -> None:
    assert perplexity(torch.full((10,), 3.0)) == pytest.approx(10)
    assert perplexity(torch.tensor([0.0, 5, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([1.0, 1, 2])) == pytest.approx(2**1.5)
    assert perplexity(torch.zeros(3)) == 0


def test_use_is_counted_over_the_last_steps() -> None:
    use = CodeUse(8, CollapseConfig(window=3))
    for step, ids in enumerate([[0, 1], [1, 2], [2, 2], [3, 3]], start=1):
        use.see(torch.tensor(ids), step)
    assert [use.used(step) for step in (3, 4, 5, 6, 9)] == [4, 3, 2, 1, 0]


def test_a_collapse_is_one_that_lasts() -> None:
    use = CodeUse(100, CollapseConfig(least_share=0.1, patience=5, after=10, window=2))
    rich, poor = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    for step in range(20, 100):  # codes since step 20: not looked at before 30, then never poor for 5 steps on end
        use.see(poor if step < 30 or step % 6 else rich, step)
        use.check(1, step, 20)
    with pytest.raises(TrainError, match=r"step 10\d: level 1 .* used 1 of 100 codes \(perplexity .*lsuv"):
        for step in range(100, 110):
            use.see(poor, step)
            use.check(1, step, 20)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = changed(optimizer={"steps": 100, "lr": 0.2, "warmup": 10, "flat": 0.5, "lr_end": 0.1})
    learner = Learner(config, codec_files.build(SIZES))
    assert [learner.rate(step) for step in (1, 5, 10, 30, 50)] == pytest.approx([0.02, 0.1, 0.2, 0.2, 0.2])
    assert [learner.rate(step) for step in (75, 100)] == pytest.approx([0.2 * (0.1 + 0.9 / 2), 0.02])


def test_decoder_only_learns_on_the_codes_of_whole_recordings() -> None:
    learner = Learner(changed(start="a codec", decoder_only=True), codec_files.build(SIZES))
    learner.quantizer.started = True
    unit, margin = SIZES.unit, learner.margin
    reach = (6 + 6 * (1 + 3 + 9) + 7) + 4 * (6 * (1 + 3 + 9) + 7) + 16 * 6
    assert margin % unit == 0 and reach / 2 <= margin < reach / 2 + unit
    recording = torch.from_numpy(harmonic(1.024, 3))[None, None]
    whole = learner.codec.encode(recording)
    start = margin + 5 * unit
    part = recording[..., start - margin : start + 4 * unit + margin]
    for ids, all_ids, stride in zip(learner.codec.encode(part), whole, SIZES.vq_strides, strict=True):
        first, inner = start // SIZES.hop // stride, margin // SIZES.hop // stride
        count = 4 * unit // SIZES.hop // stride
        assert torch.equal(ids[0, inner : inner + count], all_ids[0, first : first + count])


@pytest.mark.parametrize("own", [False, True])
def test_the_start_of_all_levels_one_after_the_other(own: bool) -> None:
    torch.manual_seed(0)
    codec = codec_files.build(SIZES)
    quantizer = Quantizer(codec, QuantizerConfig(revive=3))
    z = torch.randn(12, codec.latent_dim, 8)
    tables = [q.codebook.weight.detach().clone() for q in codec.quantizer.quantizers]
    quantizer.start(z, 0.25, own=own)
    after = [q.codebook.weight.detach() for q in codec.quantizer.quantizers]
    assert [torch.equal(a, b) for a, b in zip(tables, after, strict=True)] == [own, own]
    assert [level.counts.sum().item() for level in quantizer.levels] == pytest.approx([12 * 4 / 4, 12 * 8 / 4])
    with torch.no_grad():
        _, ids, commitment = quantizer(z)
        left, expected = z, 0.0
        for one, chosen in zip(quantizer.levels, ids, strict=True):
            unit = one.latents(left)
            code = nn.functional.normalize(one.module.codebook(chosen), dim=-1).transpose(1, 2)
            expected += (2 - 2 * (unit * code).sum(dim=1)).mean().item()  # of unit vectors, by their angle
            best = (unit.transpose(1, 2) @ one.directions.t()).max(dim=-1).values
            torch.testing.assert_close((unit * code).sum(dim=1), best)
            left = left - one.expand(one.module.codebook(chosen).transpose(1, 2))
            used, share = chosen.unique(), torch.bincount(chosen.reshape(-1), minlength=16) / chosen.numel()
            torch.testing.assert_close(one.counts[used] / one.counts.sum(), share[used], atol=0.02, rtol=0)
    assert commitment.item() == pytest.approx(expected, rel=1e-4)
    assert own or expected < 0.9  # k-means fits; the package's random codes are further away


def test_only_learning_moves_codes_and_only_revival_those_unused() -> None:
    torch.manual_seed(0)
    codec = codec_files.build(SIZES)
    quantizer = Quantizer(codec, QuantizerConfig(revive=16, revive_below=1.0))
    z = torch.randn(12, codec.latent_dim, 8)
    quantizer.start(z, 1 / 12, own=True)
    with torch.no_grad():
        for learn, revive in ((False, True), (True, False), (True, True)):
            before = [level.directions for level in quantizer.levels]
            _, ids, _ = quantizer(z[:1], learn=learn, revive=revive)
            for level, old, chosen in zip(quantizer.levels, before, ids, strict=True):
                moved = set(((level.directions - old).abs().amax(dim=1) > 1e-5).nonzero()[:, 0].tolist())
                unused = moved - set(chosen.reshape(-1).tolist())
                assert bool(moved) == learn and bool(unused) == (learn and revive)
