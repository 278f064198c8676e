"""The operations of a graph, in numpy's terms: [rows, columns] with the last dimension the fastest.

Every method checks what ggml would assert, so that a mistake is an EngineError and never the end of the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeomni.errors import EngineError
from edgeomni.runtimes.ggml.functions import Tensor
from edgeomni.runtimes.ggml.library import F16, F32, I32

SIZES = {F32: 4, F16: 2, I32: 4}
"""Bytes of a value, by type."""


class Operations:
    """What Graph is made of. Tensors are ints (struct ggml_tensor *) of the graph's context or of weights."""

    _ggml: Any
    _context: int
    _most: int
    _made: int

    # --- operations

    def linear(self, weight: int, x: int, bias: int | None = None) -> int:
        """weight [n, k] of any type, x [t, k] float -> x weight^T + bias, [t, n]; batches as numpy.matmul has them."""
        w, of = self._of(weight), self._of(x)
        if w.ne[0] != of.ne[0] or of.type not in (F32, F16) or of.ne[2] % w.ne[2] or of.ne[3] % w.ne[3]:
            raise EngineError(f"a product of rows {self.shape(weight)} with inputs {self.shape(x)} was asked for")
        if w.nb[0] > w.nb[1] or of.nb[0] != SIZES[of.type]:
            raise EngineError("a product with transposed rows was asked for")
        product = self.new("ggml_mul_mat", weight, x)
        return product if bias is None else self.add(product, bias)

    def rows(self, table: int, ids: int) -> int:
        """table [n, k] of any type, ids int32 [t] -> [t, k] float32. The caller checks that 0 <= id < n."""
        if self._of(ids).type != I32:
            raise EngineError("rows are looked up by int32 ids")
        return self.new("ggml_get_rows", table, ids)

    def add(self, x: int, y: int) -> int:
        """x + y, y repeated along the dimensions that it lacks."""
        return self._elementwise("ggml_add", x, y)

    def mul(self, x: int, y: int) -> int:
        """x * y, y repeated along the dimensions that it lacks."""
        return self._elementwise("ggml_mul", x, y)

    def scaled(self, x: int, factor: float) -> int:
        """factor * x of contiguous x."""
        self.check_plain(x)
        return self.new("ggml_scale", x, factor)

    def norm(self, x: int, weight: int, bias: int, eps: float) -> int:
        """Layer norm of each row."""
        self._float(x)
        return self.add(self.mul(self.new("ggml_norm", x, eps), weight), bias)

    def unary(self, name: str, x: int) -> int:
        """ "gelu" (tanh form, by half-precision table), "gelu_erf" (exact), "elu", "tanh" or "sin" of contiguous x."""
        self._contiguous(x)
        return self.new(f"ggml_{name}", x)

    def swiglu(self, gate: int, up: int) -> int:
        """silu(gate) * up."""
        if self.shape(gate) != self.shape(up):
            raise EngineError(f"swiglu of {self.shape(gate)} and {self.shape(up)} was asked for")
        self._contiguous(gate)
        self._contiguous(up)
        return self.new("ggml_swiglu_split", gate, up)

    def softmax(self, x: int, mask: int | None, scale: float) -> int:
        """softmax(scale * x + mask) of rows [.., t, m]; mask [t, m] float32."""
        if mask is not None and list(self._of(mask).ne) != [*self._of(x).ne[:2], 1, 1]:
            raise EngineError(f"a mask {self.shape(mask)} for {self.shape(x)} was asked for")
        self._contiguous(x)
        return self.new("ggml_soft_max_ext", x, mask, scale, 0.0)

    def attention(self, q: int, k: int, v: int, scale: float) -> int:
        """q [h, t, n], k and v [h, m, n] -> softmax(scale q k^T) v as [t, h * n]; k and v float32 or float16."""
        of_q, of_k, of_v = (self._of(t) for t in (q, k, v))
        same = of_q.ne[0] == of_k.ne[0] == of_v.ne[0] and of_q.ne[2] == of_k.ne[2] == of_v.ne[2]
        if not same or of_k.ne[1] != of_v.ne[1] or of_k.type != of_v.type or of_q.type != F32 or of_q.ne[3] != 1:
            raise EngineError(f"attention of {self.shape(q)} over {self.shape(k)}, {self.shape(v)} was asked for")
        out = self.new("ggml_flash_attn_ext", q, k, v, None, scale, 0.0, 0.0)
        return self.reshaped(out, of_q.ne[1], of_q.ne[2] * of_q.ne[0])

    def depthwise(self, kernel: int, x: int, dilation: int) -> int:
        """Each channel's own convolution without padding: kernel [k, c] and x [n, c] -> [n - (k - 1) * dilation, c].

        ggml's two-dimensional operation with the time as height, in its layout that has the channels innermost: 3 to 40
        times as fast as its one-dimensional one.
        """
        (taps, channels), (n, found) = self.shape(kernel), self.shape(x)
        out = n - (taps - 1) * dilation
        if found != channels or out < 1 or taps < 2 or channels < 3 or self._of(kernel).type != F32:
            raise EngineError(f"a depthwise convolution of {self.shape(x)} with {self.shape(kernel)} was asked for")
        self.check_plain(x)
        self.check_plain(kernel)
        row = 4 * channels
        # The second stride belongs to a dimension of 1; it must lie between the others' for ggml to see the layout.
        signal = self.new("ggml_view_4d", x, channels, 1, n, 1, 8, row, row * n, 0)
        signal = self.new("ggml_permute", signal, 2, 0, 1, 3)
        weights = self.new("ggml_view_4d", kernel, channels, 1, 1, taps, 4, row, row, 0)
        weights = self.new("ggml_permute", weights, 3, 2, 0, 1)
        y = self.new("ggml_conv_2d_dw_direct", weights, signal, 1, 1, 0, 0, 1, dilation)
        return self.new("ggml_view_4d", y, channels, out, 1, 1, row, row * out, row * out, 0)

    # --- forms

    def shape(self, tensor: int) -> tuple[int, ...]:
        """As numpy has it, without leading dimensions of 1 beyond [rows, columns]."""
        ne = list(self._of(tensor).ne)
        while len(ne) > 2 and ne[-1] == 1:
            ne.pop()
        return tuple(reversed(ne))

    def reshaped(self, x: int, *shape: int) -> int:
        """The same values, contiguous, in another shape of up to four dimensions."""
        self._contiguous(x)
        if int(np.prod(shape)) != int(np.prod(self.shape(x))):
            raise EngineError(f"{self.shape(x)} cannot be read as {shape}")
        return self.new("ggml_reshape_4d", x, *reversed(shape), *[1] * (4 - len(shape)))

    def permuted(self, x: int, *order: int) -> int:
        """numpy.transpose of four dimensions: dimension i of the result is dimension order[i] of x."""
        if sorted(order) != [0, 1, 2, 3]:
            raise EngineError(f"{order} is no order of four dimensions")
        place = [0] * 4
        for to, source in enumerate(order):
            place[3 - source] = 3 - to
        return self.new("ggml_permute", x, *place)

    def contiguous(self, x: int) -> int:
        """x itself, or a contiguous copy."""
        return x if self.is_contiguous(x) else self.new("ggml_cont", x)

    def copied(self, x: int) -> int:
        """A contiguous copy, so that what x lies in need not be kept."""
        return self.new("ggml_cont", x)

    def cast(self, x: int, dtype: int) -> int:
        """A contiguous copy of another type."""
        return self.new("ggml_cast", x, dtype)

    def cut(self, x: int, start: int, stop: int) -> int:
        """Rows start .. stop - 1 of x [rows, columns], where they lie."""
        of = self._of(x)
        if not 0 <= start < stop <= of.ne[1] or of.ne[2] != 1 or of.ne[3] != 1:
            raise EngineError(f"rows {start} to {stop} of {self.shape(x)} were asked for")
        if (start, stop) == (0, of.ne[1]):
            return x
        size = (of.nb[1], of.nb[1] * (stop - start), of.nb[1] * (stop - start))
        return self.new("ggml_view_4d", x, of.ne[0], stop - start, 1, 1, *size, start * of.nb[1])

    def rows_of(self, x: int, start: int, stop: int) -> int:
        """x[..., start:stop, :], where it lies."""
        of = self._of(x)
        if not 0 <= start < stop <= of.ne[1]:
            raise EngineError(f"rows {start} to {stop} of {self.shape(x)} were asked for")
        return self.new("ggml_view_4d", x, of.ne[0], stop - start, *of.ne[2:], *of.nb[1:], start * of.nb[1])

    def columns(self, x: int, start: int, stop: int) -> int:
        """Columns start .. stop - 1 of x [.., columns], where they lie."""
        of = self._of(x)
        if not 0 <= start < stop <= of.ne[0]:
            raise EngineError(f"columns {start} to {stop} of {self.shape(x)} were asked for")
        return self.new("ggml_view_4d", x, stop - start, *of.ne[1:], *of.nb[1:], start * of.nb[0])

    def windows(self, x: int, count: int, step: int = 1) -> int:
        """Contiguous x [n, c] -> [(n - count) // step + 1, count * c], overlapping rows that lie in x itself.

        ggml checks a view's size without its strides, so that the view is made with one row, and the others after it.
        """
        self._contiguous(x)
        n, columns = self.shape(x)
        found = (n - count) // step + 1
        if count < 1 or step < 1 or found < 1:
            raise EngineError(f"windows of {count} rows, {step} apart, of {self.shape(x)} were asked for")
        row = 4 * columns
        view = self.new("ggml_view_4d", x, count * columns, 1, 1, 1, row, row, row, 0)
        of = self._of(view)
        of.ne[1] = found
        of.nb[1], of.nb[2], of.nb[3] = step * row, step * row * found, step * row * found
        return view

    def joined(self, x: int, y: int, axis: int = 0) -> int:
        """x and y one after the other, along the rows (axis 0) or the columns (axis 1)."""
        a, b, dim = self._of(x), self._of(y), 1 - axis
        if a.type != b.type or any(a.ne[i] != b.ne[i] for i in range(4) if i != dim):
            raise EngineError(f"{self.shape(x)} and {self.shape(y)} cannot be joined along axis {axis}")
        return self.new("ggml_concat", x, y, dim)

    def repeated(self, x: int, *shape: int) -> int:
        """x repeated to `shape`, of as many dimensions as it needs."""
        ne, wanted = list(self._of(x).ne), [*reversed(shape), *[1] * (4 - len(shape))]
        if any(n < 1 or n % m for n, m in zip(wanted, ne, strict=True)):
            raise EngineError(f"{self.shape(x)} cannot be repeated to {shape}")
        return self.new("ggml_repeat_4d", x, *wanted)

    def type_of(self, x: int) -> int:
        """Its ggml_type."""
        return int(self._of(x).type)

    def is_contiguous(self, x: int) -> bool:
        of = self._of(x)
        expected = SIZES.get(of.type, 0)
        for n, stride in zip(of.ne, of.nb, strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    # --- inside

    def new(self, operation: str, *arguments: Any) -> int:
        """What an operation gives. Every tensor of the graph is made here, so that it never outgrows its memory."""
        self._made += 1
        if self._made > self._most:
            raise EngineError(f"a graph of more than {self._most} tensors was asked for")
        self._check_open()
        return int(getattr(self._ggml, operation)(self._context, *arguments))

    def _elementwise(self, operation: str, x: int, y: int) -> int:
        if any(n % m for n, m in zip(self._of(x).ne, self._of(y).ne, strict=True)):
            raise EngineError(f"{self.shape(y)} cannot be repeated to {self.shape(x)}")
        self._float(x)
        self._float(y)
        return self.new(operation, x, y)

    def _float(self, x: int) -> None:
        if self._of(x).type != F32:
            raise EngineError("an operation on float32 values was asked for others")

    def check_plain(self, x: int) -> None:
        """Raises EngineError unless x is contiguous float32."""
        self._contiguous(x)
        self._float(x)

    def _contiguous(self, x: int) -> None:
        if self._of(x).type not in SIZES or not self.is_contiguous(x):
            raise EngineError("an operation on contiguous values was asked for others")

    def _check_open(self) -> None:
        """Raises EngineError once nothing can be added any more."""
        raise NotImplementedError

    def _of(self, tensor: int) -> Tensor:
        return Tensor.from_address(tensor)
