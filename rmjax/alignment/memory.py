"""What of a run lies on each device, and when: from shapes, before anything is loaded."""

import dataclasses
from collections.abc import Sequence

from rmjax.alignment.reference import reference_shapes
from rmjax.alignment.steps import sampled_model
from rmjax.alignment.weights import changes
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import AlignConfig
from rmjax.generation.programs import cache_shapes
from rmjax.generation.sampler import Sampler
from rmjax.models.attention.dispatch import choose, platform
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import TABLE, flatten
from rmjax.runtime.sharding import local_bytes
from rmjax.training.optimizer import partition
from rmjax.training.step import TrainState

ALWAYS, SAMPLING, UPDATE = "at all times", "more while it samples", "more in an update"


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
      name: what it is.
      when: it is there: `ALWAYS`, `SAMPLING` or `UPDATE`.
      bytes: of one device.
    """

    name: str
    when: str
    bytes: int


def plan_memory(
    config: AlignConfig, model: Model, states: Sequence[TrainState], rewards: Sequence[Model]
) -> tuple[Part, ...]:
    """What a run needs but for what its programs compute with, which the compiler decides.

    Args:
      config: of the run.
      model: that is trained.
      states: of the policy, and of its critic if it has one, as shapes.
      rewards: the reward models.
    """
    state, *critics = states
    free, _ = partition(state.params, config.trained)
    sampled = sampled_model(config, model)
    own = (
        []
        if config.rollout.server
        else [
            Part("weights that sample", SAMPLING, _sampled_bytes(sampled, state)),
            Part("their cache", SAMPLING, cache_bytes(config, sampled)),
        ]
    )
    return (
        Part("policy", ALWAYS, local_bytes(state.params)),
        Part("optimizer", ALWAYS, local_bytes(state.opt_state)),
        *(Part("critic", ALWAYS, local_bytes((c.params, c.opt_state))) for c in critics),
        Part("reference", ALWAYS, local_bytes(reference_shapes(model))),
        *(Part("reward model", ALWAYS, local_bytes(r.abstract(r.options.dtype))) for r in rewards),
        *own,
        Part("gradients", UPDATE, local_bytes(free)),
    )


def cache_bytes(config: AlignConfig, sampled: Model) -> int:
    """Of the largest cache that sampling may need: all prompts and samples as long as they may be.

    Held-out prompts have one sample each, so that more of them are kept at once.
    """
    rollout, data = config.rollout, config.data
    sampler = Sampler(sampled, rollout.rows)
    places = max(1, data.max_length - rollout.max_tokens - 1)
    asked = [(config.batch_size // rollout.n, rollout.n)]
    if data.validation:
        asked.append((rollout.rows + 1, 1))
    sizes = []
    for prompts, samples in asked:
        shape = sampler.cache_shape([places] * prompts, samples)
        shape = dataclasses.replace(shape, slots=sampler.most_slots(rollout.max_tokens))
        sizes.append(local_bytes(cache_shapes(sampled, shape)))
    return max(sizes)


def reward_model(name: str, model: Model) -> Model:
    """The reward model of that name on the policy's mesh; its weights are not read.

    Raises:
      UserError: there is no such model.
    """
    source, options = open_pretrained(name), model.options
    kernel = choose("auto", source.decoder, options.sharding, options.dtype)
    placed = ModelOptions(options.sharding, dtype=options.dtype, attention=kernel)
    return Model(source.decoder, placed, source.head)


def memory_lines(parts: Sequence[Part]) -> list[str]:
    """What to say of a plan."""
    lines = []
    for when in (ALWAYS, SAMPLING, UPDATE):
        found = [part for part in parts if part.when == when]
        listed = ", ".join(f"{part.name} {_said(part.bytes)}" for part in found if part.bytes)
        total = sum(part.bytes for part in found)
        lines.append(f"{_said(total)} a device {when}: {listed or 'nothing'}")
    return lines


def _sampled_bytes(sampled: Model, state: TrainState) -> int:
    """Bytes of the weights that sampling needs in another dtype or elsewhere than they are."""
    wanted = sampled.abstract(sampled.options.dtype)
    own = dict(changes(state.params, wanted))
    if platform(sampled.options.sharding) == "cpu":  # which has each layer by itself, a copy
        own |= {path: leaf for path, leaf in flatten(wanted).items() if TABLE[path].stacked}
    return local_bytes(own)


def _said(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
