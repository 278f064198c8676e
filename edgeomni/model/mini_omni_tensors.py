"""The tensors of lit_model.pth (LitGPT's names, Q, K and V fused) and OmniModel's: one to the other.

Facts from gpt-omni/mini-omni, litgpt/model.py: Q, K and V lie in one tensor, interleaved per KV group
([the group's query heads, its key head, its value head] per group), and text and audio share one output head.
"""

from __future__ import annotations

import re

from torch import Tensor

from ..spec import BodySpec
from .omni import OmniModel
from .tensors import Shapes, shapes_of

Tensors = dict[str, Tensor]

LM_HEAD = "lm_head.weight"
_BODY_NAMES = (
    (r"input_layernorm\.", "norm_1."),
    (r"post_attention_layernorm\.", "norm_2."),
    (r"self_attn\.o_proj\.", "attn.proj."),
    (r"self_attn\.[qkv]_proj\.", "attn.attn."),
    (r"mlp\.gate_proj\.", "mlp.fc_1."),
    (r"mlp\.up_proj\.", "mlp.fc_2."),
    (r"mlp\.down_proj\.", "mlp.proj."),
    (r"^body\.layers\.", "transformer.h."),
    (r"^tts\.layers\.", "transformer.post_adapter."),
    (r"^body\.norm\.", "transformer.ln_f."),
    (r"^tts\.norm\.", "transformer.post_adapter_audio_ln."),
    (r"^adapter\.", "whisper_adapter."),
    (r"^embedding\.", "transformer.wte."),
)
_TTS_HEAD = "transformer.post_adapter_audio_lm_head.weight"


def _released_name(name: str) -> str:
    """OmniModel's name -> LitGPT's; the projections q, k and v share one."""
    for pattern, replacement in _BODY_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _llm_shapes(model: OmniModel) -> dict[str, tuple[int, ...]]:
    """OmniModel's names and shapes of what lies in the released file: adapter, embedding, body, heads, TTS adapter."""
    return {n: s for n, s in shapes_of(model.state_dict()).items() if not n.startswith(("encoder.", "codec."))}


def released_shapes(model: OmniModel, padded_vocab: int | None) -> Shapes:
    """The shapes that the released file must have for this model: name in the file -> shape.

    `padded_vocab`: rows of its embedding and head, where they were padded beyond the joint vocabulary.
    """
    spec = model.spec
    rows = max(padded_vocab or 0, spec.layout.joint_vocab)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _llm_shapes(model).items():
        if name in ("text_head.weight", "audio_head.weight"):
            continue
        if name == "embedding.weight":
            shape = (rows, shape[1])
        if _fused(name):
            shape = ((spec.body.heads + 2 * spec.body.kv_heads) * spec.body.head_dim, *shape[1:])
        shapes[_source(model, name)] = shape
    if model.text_head is not None:
        shapes[LM_HEAD] = (rows, spec.body.width)
    if spec.tts_layers:
        shapes[_TTS_HEAD] = (spec.layout.streams * spec.layout.audio_vocab, spec.body.width)
    return shapes


def _source(model: OmniModel, name: str) -> str:
    """The name in the released file of the tensor that holds OmniModel's tensor `name`."""
    if model.spec.adapter.kind == "linear" and name.startswith("adapter."):
        return name.replace("adapter.proj.", "whisper_adapter.")
    return _released_name(name)


def _fused(name: str) -> re.Match[str] | None:
    """A match whose group 1 is q, k or v, for the projections that the released file holds in one tensor."""
    return re.search(r"self_attn\.([qkv])_proj\.", name)


def llm_tensors(model: OmniModel, released: Tensors) -> Tensors:
    """The released file's tensors, which fit `released_shapes`, under OmniModel's names: all but encoder and codec."""
    layout = model.spec.layout
    joint, text = layout.joint_vocab, layout.text_vocab
    tensors: dict[str, Tensor] = {}
    for name in _llm_shapes(model):
        if name == "text_head.weight":
            tensors[name] = released[LM_HEAD][:text]
        elif name == "audio_head.weight":
            tensors[name] = released[_TTS_HEAD] if model.spec.tts_layers else released[LM_HEAD][text:joint]
        elif match := _fused(name):
            tensors[name] = _split_qkv(released[_source(model, name)], model.spec.body, match[1])
        else:
            source = released[_source(model, name)]
            tensors[name] = source[:joint] if name == "embedding.weight" else source
    return tensors


def _split_qkv(fused: Tensor, body: BodySpec, part: str) -> Tensor:
    """[(heads + 2 * kv_heads) * head_dim, ...] interleaved per KV group -> the rows of q, k or v."""
    per_group = body.heads // body.kv_heads
    groups = fused.unflatten(0, (body.kv_heads, per_group + 2, body.head_dim))
    rows = {"q": groups[:, :per_group], "k": groups[:, per_group], "v": groups[:, per_group + 1]}[part]
    return rows.reshape(-1, *fused.shape[1:]).contiguous()
