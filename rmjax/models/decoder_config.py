"""What a decoder is: its sizes, constants and adapters. Importing this costs nothing."""

import dataclasses

from rmjax.models.families import FAMILIES, Family

SLIDING, FULL = "sliding_attention", "full_attention"  # the values of `layer_types`
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # the values of `hidden_act`, by transformers' names


@dataclasses.dataclass(unsafe_hash=True)
class Rope:
    """Rotary position embedding: its base and, for long contexts, how it is stretched.

    `dynamic` stretches samples longer than `max_position_embeddings` alone. These are refused, so
    that here it is `default`.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, like the two below
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What layers of one model may differ in.

    Attributes:
      window: of its sample a token sees itself and those before it, so many in all; None: all.
      rope: the rotary position embedding.
    """

    window: int | None
    rope: Rope


@dataclasses.dataclass(unsafe_hash=True)
class DecoderConfig:
    """What one decoder is; the names are those of Hugging Face's `config.json`.

    What all models of a family have is in `families.py`; docs/models.md explains both.

    Attributes:
      rope: of all layers, or of those without a window if there is a `rope_local`.
      attention_bias: whether q, k, v and o have biases.
      family: `model_type` in `config.json`, a key of `FAMILIES`.
      hidden_act: the MLP's activation, one of `ACTIVATIONS`.
      query_pre_attn_scalar: attention's logits are divided by its square root; None: `head_dim`.
      attn_logit_softcapping: attention's logits x become c tanh(x / c).
      final_logit_softcapping: those of the vocabulary likewise; no score depends on it.
      sliding_window: tokens that a layer with a window sees, the token itself included.
      layer_types: `sliding_attention`, which has the window, or `full_attention`, for each layer.
        Empty where all are alike: all have the window if there is one.
      rope_local: of the layers with a window, if it is another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope = dataclasses.field(default_factory=Rope)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    family: str = "llama"
    hidden_act: str = "silu"
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    rope_local: Rope | None = None

    @property
    def row(self) -> Family:
        """The family's row."""
        return FAMILIES[self.family]

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.row.qkv_bias

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys have norms."""
        return self.row.qk_norm

    @property
    def norms_after(self) -> bool:
        """Whether what attention and the MLP give has norms."""
        return self.row.norms_after

    def window_within(self, row_length: int) -> int | None:
        """The window, if a layer has one that a sample in a row of that length can be longer than.

        Otherwise such a layer sees all of any sample, and is computed like one without a window.
        """
        windows = [kind.window for kind in self.kinds if kind.window is not None]
        return windows[0] if windows and windows[0] < row_length else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it has none."""
        return tuple(kind.window for kind in self.layers_by_kind())

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers, those of the first layer first."""
        return tuple(dict.fromkeys(self.layers_by_kind()))

    @property
    def kind_of_layers(self) -> tuple[int, ...]:
        """The number of each layer's kind among `kinds`."""
        return tuple(self.kinds.index(kind) for kind in self.layers_by_kind())

    def layers_by_kind(self) -> list[LayerKind]:
        """The kind of each layer."""
        types = self.layer_types or (SLIDING,) * self.num_hidden_layers
        sliding = LayerKind(self.sliding_window, self.rope_local or self.rope)
        full = LayerKind(None, self.rope)
        windowed = self.sliding_window is not None
        return [sliding if windowed and name == SLIDING else full for name in types]


# The layers' products, which may have adapters.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
    """Which products get adapters, and how large these are.

    Attributes:
      rank: of A B; 0 for no adapters.
      alpha: what adapters give is multiplied by alpha / rank.
      dropout: share of the numbers of an adapter's input that are zero in training.
      targets: the products, of `TARGETS`.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def adapts(self, path: str) -> bool:
        """Whether the parameter at `path` ("layers/q") has an A and a B."""
        return self.rank > 0 and path.removeprefix("layers/") in self.targets

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


NO_LORA = LoraConfig()


# What LoRA trains: nothing else has gradients or optimizer state. A reward model's head is new, and
# so is trained with the adapters; a language model's is part of what is adapted, and is not.
ADAPTED = (r"layers/\w+_lora_[ab]|head|thresholds",)
