"""What a decoder is: its sizes, constants and adapters. Importing this costs nothing."""

import dataclasses


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


@dataclasses.dataclass(unsafe_hash=True)
class DecoderConfig:
    """Sizes and constants of a Llama; the names are those of Hugging Face's `config.json`."""

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
