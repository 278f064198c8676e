"""OmniSpec: every size of a staged omni model, stated once; all others are derived from it.

Shape legend used by every public docstring:
    B rows, K audio streams, T frames (LLM steps), S samples, F encoder features,
    D LLM width, L layers, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from .chat import ChatSpec
from .errors import SpecError
from .limits import LARGEST, positive, sized
from .schema import Source, short, typed

Task = Literal["asr", "at", "aa", "tt", "ta"]
TASKS: tuple[Task, ...] = get_args(Task)
"""What goes in and comes out: first letter the question, the rest the answer (a audio, t text)."""
AUDIO_IN: frozenset[Task] = frozenset({"asr", "at", "aa"})
AUDIO_OUT: frozenset[Task] = frozenset({"aa", "ta"})


@dataclass(frozen=True)
class FrontEndSpec:
    """Log-mel front end of the speech encoder (Whisper's: 25 ms windows, 10 ms hop)."""

    sample_rate: int = 16000
    n_fft: int = 400
    hop: int = 160
    n_mels: int = 80
    window_s: int = 30

    def __post_init__(self) -> None:
        sized("front_end", **asdict(self))


@dataclass(frozen=True)
class EncoderSpec:
    """Whisper encoder (arXiv 2212.04356): two convolutions, `layers` pre-norm blocks, `context` positions."""

    layers: int
    width: int
    heads: int
    ffn: int
    context: int = 1500

    def __post_init__(self) -> None:
        sized("encoder", **asdict(self))
        if self.width % self.heads:
            raise SpecError(f"encoder.width {self.width} is not a multiple of encoder.heads {self.heads}")


@dataclass(frozen=True)
class AdapterSpec:
    """Maps encoder features to LLM width: `linear`, or `swiglu` (proj(silu(fc_1 x) * fc_2 x))."""

    kind: Literal["linear", "swiglu"]
    hidden: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "swiglu"):
            raise SpecError(f"adapter.kind must be linear or swiglu, not {self.kind!r}")
        if self.kind == "swiglu":
            sized("adapter", hidden=self.hidden)


@dataclass(frozen=True)
class BodySpec:
    """A Qwen2/Qwen3/Llama-type decoder body: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    kind: Literal["qwen2", "qwen3", "llama"]
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        sized(
            "body",
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn=self.ffn,
        )
        if self.kind not in ("qwen2", "qwen3", "llama"):
            raise SpecError(f"body.kind must be qwen2, qwen3 or llama, not {self.kind!r}")
        if self.heads % self.kv_heads:
            raise SpecError(f"body.heads {self.heads} is not a multiple of body.kv_heads {self.kv_heads}")
        positive("body", rope_theta=self.rope_theta, norm_eps=self.norm_eps)


@dataclass(frozen=True)
class CodecSpec:
    """Neural codec. `vq_strides[i]` is how many latents one id of level i covers (SNAC 24 kHz: 4, 2, 1).

    SNAC: arXiv 2410.14411. Mimi (arXiv 2410.00037): every level has stride 1.
    """

    kind: Literal["snac", "mimi"]
    sample_rate: int
    codebook_size: int
    vq_strides: tuple[int, ...]
    hop: int
    """Samples per latent of the finest level (SNAC 24 kHz: 512; Mimi: 1920)."""
    attn_window: int | None = None
    """Latents per window of SNAC's LocalMHA, None without it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vq_strides", tuple(self.vq_strides))
        sized("codec", sample_rate=self.sample_rate, codebook_size=self.codebook_size, hop=self.hop)
        if self.attn_window is not None:
            sized("codec", attn_window=self.attn_window)
        if bad := [s for s in self.vq_strides if not isinstance(s, int) or not 1 <= s <= LARGEST["streams"]]:
            raise SpecError(f"codec.vq_strides holds {short(bad[0])}; each must be 1 to {LARGEST['streams']}")
        if self.kind not in ("snac", "mimi"):
            raise SpecError(f"codec.kind must be snac or mimi, not {self.kind!r}")
        for coarse, fine in zip(self.vq_strides, self.vq_strides[1:], strict=False):
            if coarse % fine:
                raise SpecError(f"codec.vq_strides {self.vq_strides}: {coarse} is not a multiple of {fine}")
        if not self.vq_strides or self.vq_strides[-1] != 1:
            raise SpecError(f"codec.vq_strides {self.vq_strides} must end in 1")
        sized("codec", streams=self.streams)

    @property
    def ids_per_level(self) -> tuple[int, ...]:
        """Ids of each level in one codec frame (SNAC 24 kHz: 1, 2, 4)."""
        return tuple(self.vq_strides[0] // s for s in self.vq_strides)

    @property
    def streams(self) -> int:
        """K: ids in one codec frame."""
        return sum(self.ids_per_level)

    @property
    def frame_samples(self) -> int:
        """Samples in one codec frame (SNAC 24 kHz: 2048)."""
        return self.hop * self.vq_strides[0]

    @property
    def level_of_stream(self) -> tuple[int, ...]:
        """Level of each stream: the id tree walked depth first (SNAC 24 kHz: 0 1 2 2 1 2 2)."""
        out: list[int] = []

        def walk(level: int) -> None:
            out.append(level)
            if level + 1 < len(self.vq_strides):
                for _ in range(self.vq_strides[level] // self.vq_strides[level + 1]):
                    walk(level + 1)

        walk(0)
        return tuple(out)


@dataclass(frozen=True)
class TokenLayout:
    """Ids of the parallel streams. The joint vocabulary is text rows, then `streams` blocks of audio rows.

    The text specials are the last `text_specials` rows of `text_vocab`, in the order eot, pad_t, input_t,
    answer_t, asr; the audio specials are the rows of `audio_vocab` beyond `codebook_size`, in the order eoa,
    pad_a, input_a, answer_a (gpt-omni/mini-omni, inference.py).
    """

    text_vocab: int
    audio_vocab: int
    codebook_size: int
    streams: int
    text_specials: int = 64

    def __post_init__(self) -> None:
        sized("layout", **asdict(self))
        if self.text_specials < 5 or self.text_vocab <= self.text_specials:
            raise SpecError(f"layout: text_vocab {self.text_vocab} must hold text_specials {self.text_specials} >= 5")
        if self.audio_vocab - self.codebook_size < 4:
            raise SpecError(
                f"layout: audio_vocab {self.audio_vocab} leaves no room for the 4 audio specials "
                f"beyond the codebook's {self.codebook_size} entries"
            )
        sized("layout", joint_vocab=self.joint_vocab)

    @property
    def joint_vocab(self) -> int:
        return self.text_vocab + self.streams * self.audio_vocab

    @property
    def eot(self) -> int:
        """End of text."""
        return self.text_vocab - self.text_specials

    @property
    def pad_t(self) -> int:
        return self.eot + 1

    @property
    def input_t(self) -> int:
        return self.eot + 2

    @property
    def answer_t(self) -> int:
        return self.eot + 3

    @property
    def asr(self) -> int:
        """Marks the answer as a transcript."""
        return self.eot + 4

    @property
    def eoa(self) -> int:
        """End of audio (unshifted)."""
        return self.codebook_size

    @property
    def pad_a(self) -> int:
        return self.codebook_size + 1

    @property
    def input_a(self) -> int:
        return self.codebook_size + 2

    @property
    def answer_a(self) -> int:
        return self.codebook_size + 3

    def shift(self, stream: int) -> int:
        """Layer shift: first row of audio stream `stream` in the joint vocabulary."""
        return self.text_vocab + stream * self.audio_vocab


@dataclass(frozen=True)
class OmniSpec:
    """The whole model. `context` bounds prompt + answer, in frames."""

    front_end: FrontEndSpec
    encoder: EncoderSpec
    adapter: AdapterSpec
    body: BodySpec
    layout: TokenLayout
    codec: CodecSpec
    context: int = 2048
    tied: bool = True
    """Heads share the embedding's rows."""
    tts_layers: int = 0
    """Blocks of the TTS adapter on the body's un-normed output; 0 = none. Its audio heads are its own."""
    padded_window: bool = True
    """Trained on audio padded to the full window: a shorter encoder window changes the answer."""
    history_turns: int = 0
    """Earlier turns the checkpoint was trained to see."""
    tasks: tuple[Task, ...] = field(default=TASKS)
    chat: ChatSpec = ChatSpec()
    """Chat template, system prompt and stop words; by default as the published model, which has none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        sized("spec", context=self.context)
        sized("spec", least=0, tts_layers=self.tts_layers, history_turns=self.history_turns)
        if self.layout.streams != self.codec.streams:
            raise SpecError(f"layout has {self.layout.streams} audio streams, the codec {self.codec.streams}")
        if self.layout.codebook_size != self.codec.codebook_size:
            raise SpecError(
                f"layout has a codebook of {self.layout.codebook_size}, the codec of {self.codec.codebook_size}"
            )
        if bad := [t for t in self.tasks if t not in TASKS]:
            raise SpecError(f"unknown task(s) {bad}; known are {', '.join(TASKS)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OmniSpec:
        """Inverse of `to_dict`. Raises SpecError that names an unknown, missing or ill-typed key."""
        return typed(data, cls, Source("spec", SpecError, "use the file that EdgeOmni wrote"))
