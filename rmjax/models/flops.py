"""How many FLOPs a model's definition calls for, whatever program computes it."""

import collections
import math
from collections.abc import Iterable, Sequence

from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.parameters import PRODUCTS, Parameter, adapter_parameters, axis_sizes


def model_flops(
    decoder: DecoderConfig,
    outputs: int,
    groups: Iterable[tuple[int, Sequence[int]]],
    *,
    training: bool,
    lora: LoraConfig = NO_LORA,
    read: int | None = None,
) -> float:
    """FLOPs of scoring samples, or of a training step on them.

    A product of an m x k with a k x n matrix is 2mkn. Counted are the products with weights, for
    every token; attention's two products, for the pairs of tokens that the mask allows and no
    others, n (n + 1) / 2 in a sample of n tokens where a layer has no window; and the head, at each
    place that it reads. What the samples of a group begin with is counted once, since computing it
    once is enough. Not counted: padding, looking up embeddings, norms, softmax, anything computed
    twice. Training is three times that: forward, and the gradients by activations and by weights;
    with LoRA the weights it freezes have no gradient, and its own count like the others.

    Args:
      decoder: the architecture.
      outputs: of the head: attributes, or the vocabulary.
      groups: of each group how many tokens its samples begin with in common, and the tokens of
        each sample, that beginning included. A sample by itself is `(0, [tokens])`.
      training: whether gradients are computed.
      lora: adapters.
      read: places that the head reads; None for one a sample. A policy's are those that predict a
        token of a response.
    """
    weights = _numbers(PRODUCTS, decoder, lora)
    adapters = _numbers(adapter_parameters(lora), decoder, lora)
    tokens = pairs = samples = 0
    windows = collections.Counter(decoder.windows)
    for shared, lengths in groups:
        tokens += shared + sum(n - shared for n in lengths)
        samples += len(lengths)
        for window, layers in windows.items():
            common = _pairs(shared, window)
            pairs += layers * (common + sum(_pairs(n, window) - common for n in lengths))
    product = 2 * tokens * decoder.num_hidden_layers
    forward = (
        product * (weights + adapters)
        + 4 * pairs * decoder.num_attention_heads * decoder.head_dim
        + 2 * (samples if read is None else read) * decoder.hidden_size * outputs
    )
    no_gradient = product * weights if lora.rank else 0
    return float(forward * 3 - no_gradient if training else forward)


def _pairs(tokens: int, window: int | None) -> int:
    """Of the tokens of a sample, each with itself and those before it that it sees."""
    whole = tokens * (tokens + 1) // 2
    hidden = 0 if window is None else max(0, tokens - window)
    return whole - hidden * (hidden + 1) // 2


def pair_cost(decoder: DecoderConfig) -> float:
    """What attention to one place costs another, in the products with weights of a place.

    It is of places that are computed for nothing, see `dispatch.computed_share`. The kernels that
    do so pass over none for a window either, so windows do not count.
    """
    return 2 * decoder.num_attention_heads * decoder.head_dim / _numbers(PRODUCTS, decoder)


def _numbers(rows: Iterable[Parameter], decoder: DecoderConfig, lora: LoraConfig = NO_LORA) -> int:
    """How many numbers parameters have, in one layer."""
    sizes = axis_sizes(decoder, lora)
    return sum(math.prod(sizes[axis] for axis in row.axes.split()) for row in rows)
