"""A training step's bytes and seconds by arithmetic, without a compiler.

Rough: it only ranks meshes, of which the best are then compiled.
"""

import dataclasses
import math

from rmjax.aot.hardware import Chip
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.flops import model_flops
from rmjax.models.heads import (
    Head,
    LanguageModelHead,
    head_outputs,
    model_parameters,
    model_sizes,
)
from rmjax.models.log_probabilities import chunk_size


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step of one device.

    Attributes:
      temporaries: bytes beside parameters, optimizer state and gradients.
      compute: seconds of matrix products at the chip's peak, empty rows and what is computed twice
        included.
      networks: seconds by mesh axis.
    """

    temporaries: float
    compute: float
    networks: dict[str, float]

    @property
    def floor(self) -> float:
        """The largest part: nothing can be faster."""
        return max(self.compute, *self.networks.values())

    @property
    def step(self) -> float:
        """Weights are gathered, and gradients scattered, beside products; all else by itself."""
        others = sum(seconds for axis, seconds in self.networks.items() if axis != "fsdp")
        return max(self.compute, self.networks["fsdp"]) + others


def estimate(
    decoder: DecoderConfig,
    head: Head,
    *,
    mesh: dict[str, int],
    chip: Chip,
    chips_per_host: int,
    rows: int,
    microbatches: int,
    length: int,
    group: tuple[int, list[int]],
    remat: str,
    predicted: int = 0,
) -> Estimate:
    """Estimates a step in which every micro-batch computes all of its rows.

    Args:
      decoder: the architecture.
      head: of the model.
      mesh: sizes of the axes.
      chip: what computes.
      chips_per_host: devices behind one switch; whatever spans more is on the slow network. Only
        for chips without a torus.
      rows: rows computed at once on a row shard.
      microbatches: of a step.
      length: positions of a row.
      group: what rows are filled with, as `flops.model_flops` wants it.
      remat: policy.
      predicted: tokens of a group that a language-model head predicts.
    """
    data, fsdp, context, tensor = (mesh[axis] for axis in ("data", "fsdp", "context", "tensor"))
    sizes = model_sizes(decoder, head)
    count = sum(
        math.prod(sizes[axis] for axis in row.all_axes) for row in model_parameters(decoder, head)
    )
    layers, embed = decoder.num_hidden_layers, decoder.hidden_size
    heads = decoder.num_attention_heads * decoder.head_dim
    wide = (
        heads + 2 * decoder.num_key_value_heads * decoder.head_dim + 2 * decoder.intermediate_size
    )
    positions = rows * length / context  # of one device

    # ---- bytes: what each layer keeps, and what one layer and the embeddings need while they run
    attended = (
        2 * heads + 2 * decoder.num_key_value_heads * decoder.head_dim
    )  # and what it is made of
    stored = {"full": 0.0, "attention": attended / tensor}
    kept = 2 * positions * (embed + stored.get(remat, (wide + heads) / tensor + 2 * embed))
    vocabulary = decoder.vocab_size * embed
    policy = isinstance(head, LanguageModelHead)
    outside = vocabulary * (2 if policy and not head.tied else 1)
    gathered = 2 * (count - outside) / layers / tensor
    running = 2 * gathered + 2 * 3 * positions * wide / tensor + 4 * 4 * positions * embed
    embeddings = 2 * vocabulary / tensor
    if policy:  # the matrix whole, its gradient, logits of a chunk and what is made of them
        logits = chunk_size(math.ceil(positions)) * decoder.vocab_size / tensor
        embeddings = (2 + 4) * vocabulary / tensor + 3 * 4 * logits + 4 * positions * embed

    # ---- seconds
    computed = microbatches * rows * data * fsdp
    shared, samples = group
    fit = max(1, length // (shared + sum(n - shared for n in samples)))
    read = predicted * computed * fit if policy else None
    groups = [group] * (computed * fit)
    outputs = head_outputs(decoder, head)
    flops = model_flops(decoder, outputs, groups, training=True, read=read)
    share = layers * embed * (attended - heads) / count  # of the products: those of q, k and v
    again = {"full": 4 / 3, "attention": 1 + (1 - share) / 3}.get(remat, 1.0)
    compute = again * flops / (data * fsdp * context * tensor * chip.flops)

    shards = fsdp * context
    weights = 2 * count / tensor * (shards - 1) / shards
    # Gathered for forward and backward, and the gradients summed and scattered, in bfloat16 each.
    sharded = 3 * microbatches * weights
    # Four sums of the residual stream a layer, two more where the forward pass runs twice.
    sums = (4 if remat == "dots" else 6) * layers * microbatches
    exchanged = sums * 2 * (tensor - 1) / tensor * 2 * positions * embed
    # Keys and values of the other parts of the row, forward and backward.
    keys = 2 * 2 * decoder.num_key_value_heads * decoder.head_dim / tensor
    passed = 3 * layers * microbatches * keys * positions * (context - 1)
    replicas = 2 * 4 * count / (tensor * shards) * (data - 1) / data
    moved = {"tensor": exchanged, "context": passed, "fsdp": sharded, "data": replicas}
    networks, inner = {}, 1
    for axis in ("tensor", "context", "fsdp", "data"):
        inner *= mesh[axis]
        slow = axis == "data" if chip.torus else inner > chips_per_host
        fast = (4 if chip.torus else 1) * chip.link
        networks[axis] = moved[axis] / (chip.slow if slow and mesh[axis] > 1 else fast)
    return Estimate(layers * kept + running + embeddings, compute, networks)
