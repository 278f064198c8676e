"""The structures and functions of ggml's C headers that EdgeOmni uses, as ctypes knows them: declarations only."""

from __future__ import annotations

import ctypes as c
from typing import Any

MAX_DIMS, MAX_SOURCES, MAX_NAME, MAX_PARAMS = 4, 10, 64, 16
_POINTER, _INT, _LONG, _SIZE, _BOOL, _TEXT = c.c_void_p, c.c_int, c.c_int64, c.c_size_t, c.c_bool, c.c_char_p
_FLOAT = c.c_float

LogCallback = c.CFUNCTYPE(None, _INT, _TEXT, _POINTER)
"""ggml_log_callback: level, text, nothing."""
AbortCallback = c.CFUNCTYPE(_BOOL, _POINTER)
"""ggml_abort_callback: whether the run ends now."""
CustomCallback = c.CFUNCTYPE(None, _POINTER, _INT, _INT, _POINTER)
"""ggml_custom_op_t: the result's tensor, this thread's number, the number of threads, nothing."""


class InitParams(c.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", _BOOL)]


class Tensor(c.Structure):
    """struct ggml_tensor. `ne` counts elements from the fastest dimension on, `nb` is the stride in bytes."""

    _fields_ = [
        ("type", _INT),
        ("buffer", _POINTER),
        ("ne", _LONG * MAX_DIMS),
        ("nb", _SIZE * MAX_DIMS),
        ("op", _INT),
        ("op_params", c.c_int32 * MAX_PARAMS),
        ("flags", c.c_int32),
        ("src", _POINTER * MAX_SOURCES),
        ("view_src", _POINTER),
        ("view_offs", _SIZE),
        ("data", _POINTER),
        ("name", c.c_char * MAX_NAME),
        ("extra", _POINTER),
        ("padding", c.c_char * 8),
    ]


def _operation(tensors: int, *others: Any) -> tuple[Any, ...]:
    """A function of the context, so many tensors and other values that gives a tensor."""
    return (_POINTER, _POINTER, *[_POINTER] * tensors, *others)


_OPERATIONS: dict[str, tuple[Any, ...]] = {
    "ggml_new_tensor_1d": _operation(0, _INT, _LONG),
    "ggml_new_tensor_2d": _operation(0, _INT, _LONG, _LONG),
    "ggml_new_tensor_4d": _operation(0, _INT, _LONG, _LONG, _LONG, _LONG),
    "ggml_view_1d": _operation(1, _LONG, _SIZE),
    "ggml_view_4d": _operation(1, *[_LONG] * 4, *[_SIZE] * 4),
    "ggml_reshape_4d": _operation(1, *[_LONG] * 4),
    "ggml_permute": _operation(1, *[_INT] * 4),
    "ggml_cont": _operation(1),
    "ggml_cast": _operation(1, _INT),
    "ggml_concat": _operation(2, _INT),
    "ggml_repeat_4d": _operation(1, *[_LONG] * 4),
    "ggml_add": _operation(2),
    "ggml_mul": _operation(2),
    "ggml_scale": _operation(1, _FLOAT),
    "ggml_sin": _operation(1),
    "ggml_elu": _operation(1),
    "ggml_tanh": _operation(1),
    "ggml_gelu": _operation(1),
    "ggml_gelu_erf": _operation(1),
    "ggml_swiglu_split": _operation(2),
    "ggml_norm": _operation(1, _FLOAT),
    "ggml_mul_mat": _operation(2),
    "ggml_get_rows": _operation(2),
    "ggml_soft_max_ext": _operation(2, _FLOAT, _FLOAT),
    "ggml_flash_attn_ext": _operation(4, _FLOAT, _FLOAT, _FLOAT),
    "ggml_conv_2d_dw_direct": _operation(2, *[_INT] * 6),
    "ggml_custom_4d": _operation(0, _INT, *[_LONG] * 4, _POINTER, _INT, CustomCallback, _INT, _POINTER),
}

BASE: dict[str, tuple[Any, ...]] = {
    **_OPERATIONS,
    "ggml_version": (_TEXT,),
    "ggml_log_set": (None, LogCallback, _POINTER),
    "ggml_init": (_POINTER, InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead_custom": (_SIZE, _SIZE, _BOOL),
    "ggml_new_graph_custom": (_POINTER, _POINTER, _SIZE, _BOOL),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_graph_n_nodes": (_INT, _POINTER),
    "ggml_graph_node": (_POINTER, _POINTER, _INT),
    "ggml_op_desc": (_TEXT, _POINTER),
    "ggml_nbytes": (_SIZE, _POINTER),
    "ggml_blck_size": (_LONG, _INT),
    "ggml_type_size": (_SIZE, _INT),
    "ggml_type_name": (_TEXT, _INT),
    "ggml_set_name": (_POINTER, _POINTER, _TEXT),
    "ggml_set_input": (None, _POINTER),
    "ggml_set_output": (None, _POINTER),
    "ggml_gallocr_new": (_POINTER, _POINTER),
    "ggml_gallocr_alloc_graph": (_BOOL, _POINTER, _POINTER),
    "ggml_gallocr_get_buffer_size": (_SIZE, _POINTER, _INT),
    "ggml_gallocr_free": (None, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_buffer_get_base": (_POINTER, _POINTER),
    "ggml_backend_buffer_set_usage": (None, _POINTER, _INT),
    "ggml_backend_tensor_alloc": (_INT, _POINTER, _POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buft_alloc_buffer": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_buft_get_alloc_size": (_SIZE, _POINTER, _POINTER),
    "ggml_backend_buft_name": (_TEXT, _POINTER),
    "ggml_backend_get_default_buffer_type": (_POINTER, _POINTER),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
    "ggml_backend_supports_op": (_BOOL, _POINTER, _POINTER),
    "ggml_backend_free": (None, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, _TEXT),
    "ggml_backend_reg_dev_get": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_dev_init": (_POINTER, _POINTER, _TEXT),
    "ggml_backend_dev_name": (_TEXT, _POINTER),
}
CPU: dict[str, tuple[Any, ...]] = {
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_reg": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_cpu_set_abort_callback": (None, _POINTER, AbortCallback, _POINTER),
}
REGISTRY: dict[str, tuple[Any, ...]] = {
    "ggml_backend_load_all": (None,),
    "ggml_backend_dev_by_type": (_POINTER, _INT),
}
