"""The codec's layer program on torch, fed piece by piece: the reference of the exported codec, and a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeomni.arrays import F32, I64
from edgeomni.model import codec_plan as ops
from edgeomni.model.codec_reader import read_plan
from edgeomni.runtimes.common.streaming_codec import StreamingCodec, Timing

if TYPE_CHECKING:
    from edgeomni.model.omni import OmniModel

Kept = dict[str, Tensor]


class TorchCodec(StreamingCodec[Kept]):
    """CodecDecoder on torch; `codec_plan` replaces the plan of model.codec."""

    def __init__(self, model: OmniModel | None, codec_plan: ops.CodecPlan | None = None) -> None:
        if codec_plan is None:
            assert model is not None
            codec_plan = read_plan(model.codec, model.spec.codec)
        noise = tuple((p.scale, p.lag) for p in codec_plan.noise_paces)
        super().__init__(
            codec_plan.spec,
            Timing(codec_plan.first_push, codec_plan.push_multiple, codec_plan.lag_samples, noise),
        )
        self.plan = codec_plan
        self._device = torch.device("cpu") if model is None else next(model.codec.parameters()).device
        self._tensors: dict[int, Tensor] = {}

    def _start(self) -> Kept:
        return {}

    @torch.inference_mode()
    def _push(self, codes: Sequence[I64], kept: Kept, last: bool, noise: Sequence[F32] | None) -> tuple[F32, Kept]:
        run = _Push(self, dict(kept), last, noise)
        x = run.lookup(self.plan.ops[0], codes)  # type: ignore[arg-type]
        for op in self.plan.ops[1:]:
            x = run(op, x)
        return x[0, 0].cpu().numpy(), run.kept

    def tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        """The plan's array on the device, converted once."""
        if id(array) not in self._tensors:
            self._tensors[id(array)] = torch.from_numpy(array).to(self._device)
        return self._tensors[id(array)]


class _Push:
    """One push through the program. Signals are [1, channels, samples]."""

    def __init__(self, codec: TorchCodec, kept: Kept, last: bool, noise: Sequence[F32] | None) -> None:
        self.t, self.kept, self.last, self.noise = codec.tensor, kept, last, noise
        self._do: dict[type, Callable[[Any, Tensor], Tensor]] = {
            ops.Conv: self.conv,
            ops.Up: self.up,
            ops.Snake: self.snake,
            ops.Noise: self.add_noise,
            ops.Residual: self.residual,
            ops.LocalAttention: self.local_attention,
            ops.Transformer: self.transformer,
            ops.Elu: lambda _, x: F.elu(x),
            ops.Tanh: lambda _, x: torch.tanh(x),
        }

    def __call__(self, op: ops.Op, x: Tensor) -> Tensor:
        return self._do[type(op)](op, x)

    def lookup(self, op: ops.Lookup, codes: Sequence[I64]) -> Tensor:
        groups: dict[int, Tensor] = {}
        for table, ids, stride, group in zip(op.tables, codes, op.strides, op.groups, strict=True):
            rows = self.t(table)[torch.from_numpy(ids).to(self.t(table).device)].repeat_interleave(stride, 0)
            groups[group] = groups[group] + rows if group in groups else rows
        return torch.cat(list(groups.values()), dim=1).T[None]

    def joined(self, name: str, x: Tensor, start: int, keep: int, tail: int) -> Tensor:
        """What was kept (at the start `start` zeros), then x, then at the end `tail` zeros; keeps the last `keep`."""
        before = self.kept.get(name)
        parts = [x.new_zeros(1, x.shape[1], start) if before is None else before, x]
        if self.last and tail:
            parts.append(x.new_zeros(1, x.shape[1], tail))
        joined = torch.cat(parts, dim=2)
        self.kept[name] = joined[:, :, joined.shape[2] - keep :]
        return joined

    def conv(self, op: ops.Conv, x: Tensor) -> Tensor:
        span = (op.weight.shape[2] - 1) * op.dilation
        if span:
            x = self.joined(op.name, x, op.left, span, op.right)
        bias = None if op.bias is None else self.t(op.bias)
        return F.conv1d(x, self.t(op.weight), bias, dilation=op.dilation, groups=op.groups)

    def up(self, op: ops.Up, x: Tensor) -> Tensor:
        first = op.name not in self.kept
        z = self.joined(op.name, x, op.left, op.left, op.right)
        windows = z[0].unfold(1, len(op.taps), 1).permute(1, 2, 0)  # [T, m, in]
        if op.depthwise:
            blocks = torch.einsum("tmc,msc->tsc", windows, self.t(op.taps))
        else:
            blocks = torch.mm(windows.flatten(1), self.t(op.matrix))
        y = blocks.reshape(1, -1, op.outputs)
        if op.bias is not None:
            y = y + self.t(op.bias)
        return y[:, op.drop if first else 0 : y.shape[1] - (op.crop if self.last else 0)].mT

    def snake(self, op: ops.Snake, x: Tensor) -> Tensor:
        alpha = self.t(op.alpha)[:, None]
        return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).square()

    def add_noise(self, op: ops.Noise, x: Tensor) -> Tensor:
        if self.noise is None:
            return x
        noise = torch.from_numpy(self.noise[op.index]).to(x)
        return x + noise * (self.t(op.weight) @ x)

    def residual(self, op: ops.Residual, x: Tensor) -> Tensor:
        y = x
        for inner in op.body:
            y = self(inner, y)
        if op.delay:
            x = self.joined(op.name, x, 0, op.delay, 0)[:, :, : y.shape[2]]
        return y + (x if op.shortcut is None else self.conv(op.shortcut, x))

    def local_attention(self, op: ops.LocalAttention, x: Tensor) -> Tensor:
        before = self.kept.get(op.name, x[:, :, :0])
        z = torch.cat([before, x], dim=2)
        whole = z.shape[2] // op.window * op.window
        x, self.kept[op.name] = z[:, :, :whole], z[:, :, whole:]
        y = F.layer_norm(x.mT, (op.channels,), self.t(op.norm[0]), self.t(op.norm[1]), op.eps)
        split = (y @ self.t(op.qkv).T).reshape(whole // op.window, op.window, 3, op.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each [windows, heads, window, head]
        cos, sin = self.t(op.cos), self.t(op.sin)
        attended = F.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
        return x + (attended.transpose(1, 2).reshape(1, whole, -1) @ self.t(op.out).T).mT

    def transformer(self, op: ops.Transformer, x: Tensor) -> Tensor:
        x = x.mT
        past = self.kept.get(op.name, torch.zeros(1, dtype=torch.int64))
        at = past.to(x.device) + torch.arange(x.shape[1], device=x.device)
        angles = (at[:, None].float() * self.t(op.inv_freq)).tile(2)
        rotary = (angles.cos() * op.rotary_scale, angles.sin() * op.rotary_scale)
        for block in op.blocks:
            x = self.block(op, block, x, rotary)
        self.kept[op.name] = past + x.shape[1]
        return x.mT

    def block(self, op: ops.Transformer, block: ops.Block, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], self.t(block.norm1[0]), self.t(block.norm1[1]), op.eps)
        qkv = F.linear(y, self.t(block.qkv), None if block.qkv_bias is None else self.t(block.qkv_bias))
        heads = qkv.unflatten(-1, (-1, op.head_dim)).transpose(1, 2)
        q, k, v = heads.split((op.heads, op.kv_heads, op.kv_heads), dim=1)
        k, v = self.cached(op, block.name, _rotated(k, *rotary), v)
        at = torch.arange(k.shape[2], device=x.device)
        distance = at[k.shape[2] - q.shape[2] :, None] - at
        seen = (distance >= 0) & (distance < op.window)
        y = F.scaled_dot_product_attention(
            _rotated(q, *rotary), k, v, attn_mask=seen, enable_gqa=op.heads != op.kv_heads
        )
        y = y.transpose(1, 2).flatten(2)
        x = x + F.linear(y, self.t(block.out), None if block.out_bias is None else self.t(block.out_bias))
        y = F.layer_norm(x, x.shape[-1:], self.t(block.norm2[0]), self.t(block.norm2[1]), op.eps)
        return x + F.linear(F.gelu(F.linear(y, self.t(block.fc1))), self.t(block.fc2))

    def cached(self, op: ops.Transformer, name: str, *new: Tensor) -> list[Tensor]:
        """Keys and values with the cached ones before them; keeps the last window - 1."""
        out = []
        for part, fresh in zip(("key", "value"), new, strict=True):
            before = self.kept.get(f"{name}.{part}", fresh[:, :, :0])
            out.append(torch.cat([before, fresh], dim=2))
            self.kept[f"{name}.{part}"] = out[-1][:, :, max(0, out[-1].shape[2] - op.window + 1) :]
        return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired: x [.., T, head], cos and sin [T, head]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
