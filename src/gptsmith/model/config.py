"""The architecture of a model: ModelConfig and its presets."""

from __future__ import annotations

from typing import Any, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeScaling(BaseModel):
    """How rotary frequencies are scaled beyond the context the model was trained with.

    `linear` divides every frequency by `factor`. `llama3` divides only the low ones, with a
    smooth transition between the two wavelengths (Llama 3.1, `rope_type: llama3` in transformers).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    rope_type: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                f"{self.high_freq_factor}"
            )
        return self


_MAX_ROTARY = 1 << 27  # numbers in a table of rotations, 0.5 GB


class ModelConfig(BaseModel):
    """Architecture of a GPT. GPT-2, Llama, Qwen3 and our own presets are points in this space.

    The defaults are a small Llama with the sizes of the preset "fast". `gptsmith pretrain` starts
    from that preset itself, `ModelConfig.preset("fast")`, which differs in three fields:
    context_length 256, norm_eps 1e-6 and qk_norm.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    n_layer: int = Field(6, ge=1, le=1000)
    """Transformer blocks."""
    n_head: int = Field(6, ge=1)
    """Query heads (H)."""
    n_kv_head: int | None = Field(None, ge=1)
    """Key/value heads (K); fewer than n_head is grouped-query attention. Default: n_head."""
    n_embd: int = Field(384, ge=1)
    """Width of the residual stream (C)."""
    head_dim: int | None = Field(None, ge=1)
    """Size of a head (D). Default: n_embd / n_head."""
    d_ff: int | None = Field(None, ge=1)
    """Hidden width of the MLP. Default: 4 * n_embd, or 8/3 of it rounded up to 64 for swiglu."""
    context_length: int = Field(1024, ge=1)
    """Maximum sequence length (T)."""
    vocab_size: int = Field(50257, ge=1)
    """Number of token ids (V)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, on embeddings, attention weights and both residual branches."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    mlp: Literal["gelu", "gelu_erf", "swiglu", "relu2"] = "swiglu"
    """gelu: GPT-2's tanh approximation; gelu_erf: the exact function, as in nanoGPT."""
    position: Literal["learned", "rope"] = "rope"
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    bias: Literal["none", "qkv", "all"] = "none"
    """Biases in no linear layer, in the q/k/v projection only (Qwen2), or in all (GPT-2)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    tie_embeddings: bool = True
    """The output head shares its matrix with the token embedding."""
    mask: str = "causal()"
    """Attention mask: an expression (`causal() & sliding_window(128)`) or `file.py:function`."""
    labels: tuple[str, ...] = ()
    """Class names of a classifier, in the order of its outputs; empty: a language model."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        n_head, n_embd = values.get("n_head", 6), values.get("n_embd", 384)
        if not (isinstance(n_head, int) and isinstance(n_embd, int) and n_head > 0):
            return values  # the checks of the fields give a better message
        if values.get("n_kv_head") is None:
            values["n_kv_head"] = n_head
        if values.get("head_dim") is None:
            if n_embd % n_head:
                raise ValueError(
                    f"n_embd {n_embd} is not a multiple of n_head {n_head}: "
                    "change one of them or give head_dim"
                )
            values["head_dim"] = n_embd // n_head
        if values.get("d_ff") is None:
            swiglu = values.get("mlp", "swiglu") == "swiglu"
            values["d_ff"] = -(-8 * n_embd // 3 // 64) * 64 if swiglu else 4 * n_embd
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.n_head % self.K:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.K}")
        if self.rotary and self.D % 2:
            raise ValueError(f"head_dim {self.D} is odd: rope rotates pairs, take an even size")
        if self.rotary and self.context_length * self.D > _MAX_ROTARY:
            raise ValueError(
                f"context_length {self.context_length} is too long for the rotary tables of "
                f"head_dim {self.D}: at most {_MAX_ROTARY // self.D}"
            )
        if not self.rotary and self.rope_scaling is not None:
            raise ValueError(f"rope_scaling needs position: rope, not {self.position}")
        if len(self.labels) == 1:
            raise ValueError(f"labels has one class, {self.labels[0]!r}: give at least two")
        seen: set[str] = set()
        for label in self.labels:
            if label in seen:
                raise ValueError(f"labels has {label!r} twice: give each class once")
            seen.add(label)
        return self

    # The three sizes with derived defaults, as plain integers.
    @property
    def K(self) -> int:  # noqa: N802
        assert self.n_kv_head is not None
        return self.n_kv_head

    @property
    def D(self) -> int:  # noqa: N802
        assert self.head_dim is not None
        return self.head_dim

    @property
    def F(self) -> int:  # noqa: N802
        assert self.d_ff is not None
        return self.d_ff

    # The meaning of each option is decided once, by an exhaustive match: a new value is an error
    # everywhere until it is handled, and never counted, trained or exported as another one.
    @property
    def rotary(self) -> bool:
        """Whether attention rotates queries and keys."""
        match self.position:
            case "rope":
                return True
            case "learned":
                return False
            case unknown:
                assert_never(unknown)

    @property
    def learned_positions(self) -> bool:
        """Whether a learned vector for its position is added to each token's."""
        match self.position:
            case "learned":
                return True
            case "rope":
                return False
            case unknown:
                assert_never(unknown)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its hidden layer."""
        match self.mlp:
            case "swiglu":
                return True
            case "gelu" | "gelu_erf" | "relu2":
                return False
            case unknown:
                assert_never(unknown)

    @property
    def qkv_bias(self) -> bool:
        """Whether the q/k/v projection has a bias."""
        match self.bias:
            case "qkv" | "all":
                return True
            case "none":
                return False
            case unknown:
                assert_never(unknown)

    @property
    def linear_bias(self) -> bool:
        """Whether every other linear layer inside the blocks, and a LayerNorm, has a bias."""
        match self.bias:
            case "all":
                return True
            case "none" | "qkv":
                return False
            case unknown:
                assert_never(unknown)

    def change(self, **fields: Any) -> ModelConfig:
        """A validated copy with changed fields; sizes that depend on them are derived again."""
        values = self.model_dump()
        if {"n_head", "n_embd"} & fields.keys():
            values.update(n_kv_head=None, head_dim=None, d_ff=None)
        if "mlp" in fields:
            values.update(d_ff=None)
        return ModelConfig(**{**values, **fields})

    @classmethod
    def preset(cls, name: str, **fields: Any) -> ModelConfig:
        """The named preset, with some fields replaced.

        Raises ValueError for an unknown name, listing the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"no model preset {name!r}: choose one of {', '.join(PRESETS)}")
        config = cls(**PRESETS[name])
        return config.change(**fields) if fields else config


Quantization = Literal["nf4", "int8"]
"""Number formats of frozen linear layers (model/quantized.py)."""

BITS: dict[Quantization, float] = {"nf4": 4.5, "int8": 8.5}
"""Of a number of a quantized weight, its part of a scale included."""


class LoraConfig(BaseModel):
    """Low-rank adaptation: each target matrix W becomes W + alpha / rank * B @ A, W frozen."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    rank: int = Field(0, ge=0)
    """Rows of A and columns of B; 0: no LoRA."""
    alpha: float = Field(16.0, gt=0)
    """Scale of the update, divided by the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the input of A."""
    targets: tuple[str, ...] = ()
    """Linear layers to adapt (qkv, proj, up or gate_up, down); default: all in the blocks."""

    @model_validator(mode="after")
    def _no_idle_fields(self) -> LoraConfig:
        fields = type(self).model_fields
        idle = [n for n in fields if n != "rank" and getattr(self, n) != fields[n].default]
        if idle and not self.rank:
            raise ValueError(f"{idle[0]} has no effect with rank 0: give a rank, or omit it")
        return self


_GPT2: dict[str, Any] = dict(
    norm="layernorm", mlp="gelu", position="learned", bias="all", context_length=1024
)
_LLAMA: dict[str, Any] = dict(norm="rmsnorm", mlp="swiglu", position="rope", bias="none")
_SMOLLM2_135M: dict[str, Any] = dict(
    _LLAMA, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, d_ff=1536, context_length=8192,
    vocab_size=49152, rope_theta=100_000.0,
)  # fmt: skip
_QWEN3_0_6B: dict[str, Any] = dict(
    _LLAMA, n_layer=28, n_head=16, n_kv_head=8, head_dim=128, n_embd=1024, d_ff=3072,
    context_length=40960, vocab_size=151936, norm_eps=1e-6, rope_theta=1_000_000.0, qk_norm=True,
)  # fmt: skip

# name -> fields. The comments name the transformers class that a preset exports to.
PRESETS: dict[str, dict[str, Any]] = {
    # GPT2LMHeadModel (Radford et al. 2019; Sanh et al. 2019 for distilgpt2)
    "gpt2": dict(_GPT2, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(_GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(_GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(_GPT2, n_layer=48, n_head=25, n_embd=1600),
    "distilgpt2": dict(_GPT2, n_layer=6, n_head=12, n_embd=768),
    "tiny": dict(_GPT2, n_layer=2, n_head=4, n_embd=128, context_length=256),
    "nano": dict(_GPT2, n_layer=1, n_head=2, n_embd=64, context_length=128),
    # LlamaForCausalLM; smollm2-135m has the sizes of HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": _SMOLLM2_135M,
    "course": dict(_LLAMA, n_layer=12, n_head=8, n_embd=512, context_length=1024),
    # Qwen3ForCausalLM; the sizes of Qwen/Qwen3-0.6B
    "qwen3-0.6b": _QWEN3_0_6B,
    # Qwen3ForCausalLM: gptsmith's own, for CPUs and small corpora (experiments: docs/log.md)
    "fast": dict(
        _LLAMA, n_layer=6, n_head=6, n_embd=384, context_length=256, norm_eps=1e-6, qk_norm=True
    ),
}
