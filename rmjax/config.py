"""An experiment as plain typed dataclasses, in the order of the flow.

A config file defines `get_config(arg=None) -> Config`. Any field can be overridden on the command
line: `--config.optimizer.learning_rate=1e-6`. Importing this is quick: it loads no library but JAX.
"""

import dataclasses
import math
from typing import Any

from rmjax.models.decoder_config import ADAPTED, DecoderConfig, LoraConfig
from rmjax.runtime.sharding import MeshConfig

EVERYTHING = (".*",)
HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TIES = ("drop", "half", "zero_weight")
SCHEDULES = ("constant", "cosine", "linear")
MOMENTS = ("float32", "bfloat16")


@dataclasses.dataclass
class DataConfig:
    """Where ratings or preference pairs come from and what becomes a sample.

    Attributes:
      train: a hub id, a directory, a file, or `generated:COUNT`; see `data/records.py`.
      validation: likewise; empty if `hold_out` is set, or for no validation.
      pairs: where pairs come from, for an objective that learns from ratings, in `train`, and from
        pairs. With pairs alone they are in `train`.
      validation_pairs: likewise, beside `validation`.
      compare: a rating whose differences make pairs of the responses to a prompt; empty if the
        sources of pairs hold pairs.
      hold_out: share of the training prompts held out for validation.
      attributes: rating columns. The first is the headline: a model's scalar reward unless told
        otherwise, and what preference pairs train. A policy has none and takes no notice of it.
      label_range: the lowest and highest rating; anything else is an error.
      max_length: most tokens of a sample.
      over_long: what happens to a longer one: `drop`, `truncate_left` or `error`.
      turns: of a conversation that a policy learns by `sft`, which turns of the assistant's: the
        `last`, or `all`.
      row_length: token positions of a row, at least `max_length`; 0 chooses them, and how many rows
        are computed at once, from the data, so that few places are computed; see
        `rows_per_device`.
      packing: several prompts a row, or one.
      share_prompts: whether the tokens that all responses to a prompt begin with are computed once,
        in one row, instead of once a response. The numbers are the same.
    """

    train: str
    validation: str = ""
    pairs: str = ""
    validation_pairs: str = ""
    compare: str = ""
    hold_out: float = 0.0
    attributes: tuple[str, ...] = HELPSTEER2
    label_range: tuple[float, float] = (0.0, 4.0)
    max_length: int = 4096
    over_long: str = "drop"
    turns: str = "last"
    row_length: int = 0
    packing: bool = True
    share_prompts: bool = True


@dataclasses.dataclass
class PreferenceConfig:
    """How preference pairs are learned from; regression takes no notice of it.

    Attributes:
      attribute: the column of the head that pairs train; empty for the first. It may be one that
        nobody rated.
      label_smoothing: the probability that a pair's label is wrong, less than .5.
      center_rewards_coefficient: of the mean of (reward of chosen + reward of rejected) squared,
        which keeps rewards near 0; 0 for none.
      beta: of a policy, how closely it is held to the reference, which is what it was before the
        first step; .1 is TRL's default and the DPO paper's.
      gamma: of `simpo`, the margin that is asked for; .5 is TRL's default.
      strength_scale: of the `rpo` losses, what a strength is multiplied by to be a difference of
        rewards; 1 is NeMo-Aligner's default.
      ties: what becomes of pairs without a preference: `drop` leaves them out of the data, `half`
        takes them as preferred one half each way, `zero_weight` computes them but learns nothing
        from them.
    """

    attribute: str = ""
    label_smoothing: float = 0.0
    center_rewards_coefficient: float = 0.0
    beta: float = 0.1
    gamma: float = 0.5
    strength_scale: float = 1.0
    ties: str = "drop"


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its learning rate.

    The rate rises linearly over `warmup_steps`, reaching its value at the last of them, then
    follows the schedule; `cosine` and `linear` end at `final_fraction` of it. `moments` is the
    dtype in which AdamW's two moments are kept: `float32` or, in half the bytes, `bfloat16`.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 10
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: str = "float32"


@dataclasses.dataclass
class RolloutConfig:
    """What a policy samples in a step of `rmjax.align`; see `completions.SamplingSettings`.

    Attributes:
      n: samples of each prompt.
      temperature: what logits are divided by. Log-probabilities are those at temperature 1, so
        another one makes the samples those of another policy than is trained.
      top_p: of the probability, the share that the most probable tokens must have.
      top_k: so many of the most probable tokens are left; 0 for all.
      max_tokens: of a sample.
      stop: texts that end a sample.
      rows: samples that are made at once.
      mesh: how weights lie while they sample, on the same devices. None for as they are trained; a
        mesh with `fsdp` gathers them for every token, one of `data` and `tensor` does not. The
        samples are the same.
      server: the URL of a vLLM or SGLang server that samples instead of this process, with weights
        that are sent to it. It must see the run's directory.
      push_every: steps that the server samples with the same weights, before it is sent new ones.
    """

    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    rows: int = 64
    mesh: MeshConfig | None = None
    server: str = ""
    push_every: int = 1


@dataclasses.dataclass
class RewardConfig:
    """One of the things that reward a policy's samples: a model, a function or a server.

    Attributes:
      model: a reward model, whatever `rmjax.load` takes; or
      function: `FILE.py:NAME`, a function from prompts (lists of messages) and as many responses
        (texts) to their rewards, None for a response that has none; or
      server: the URL of a reward server, whose path says what it speaks: `/get_reward`, `/classify`
        or `/pooling`; see `alignment.reward_servers.KINDS`.
      value: how a model's attributes become one number, as `--value` of `rmjax.score` says it: a
        name, or weights as JSON. Empty for its own rule. Of a server's several numbers, which one,
        from 0.
      weight: what the reward is multiplied by in the sum of all; 0 to record it and no more.
      standardize: a data source; the reward of a sample is then (reward - mean) / deviation, of
        this reward over the responses in the source. Empty for the reward as it is.
      timeout: seconds that a function may take for a step's samples, or a server.
    """

    model: str = ""
    function: str = ""
    server: str = ""
    value: str = ""
    weight: float = 1.0
    standardize: str = ""
    timeout: float = 600.0


@dataclasses.dataclass
class ShapingConfig:
    """What becomes of the sum of the rewards before it is learned from.

    Attributes:
      unended_penalty: taken from a sample that ran out of room.
      length_penalty: taken for each token of the sample.
      learn_unended: whether samples that ran out of room are learned from.
    """

    unended_penalty: float = 0.0
    length_penalty: float = 0.0
    learn_unended: bool = True


@dataclasses.dataclass
class PolicyGradientConfig:
    """Settings of a method of `objectives.rollouts.METHODS`; None takes the method's own.

    Attributes:
      kl: how closely the policy is held to the reference, which is what it was before the first
        step.
      clip_below: how far below 1 the ratio of the policy to the sampling one counts.
      clip_above: likewise above.
      minibatches: optimizer steps that a step's samples are divided into.
      passes: how often a step's samples are gone through.
      ratings: that answers shall have, `helpfulness:4,verbosity:2`, of the reward's attributes;
        for `steerlm2`.
    """

    kl: float | None = None
    clip_below: float | None = None
    clip_above: float | None = None
    minibatches: int = 1
    passes: int = 1
    ratings: str = ""


@dataclasses.dataclass
class CriticConfig:
    """The critic of `ppo`, which says what is to be expected of a sample so far.

    Attributes:
      init: a reward model to start from, with the policy's tokens; empty for the one that rewards.
      value: how its attributes become one number, likewise.
      optimizer: its own; NeMo-Aligner's learning rate.
      discount: of what comes a token later.
      smoothing: lambda of generalized advantages (arXiv 1506.02438): 1 believes what came of a
        sample, 0 the critic.
      clip: how far a step may move its values.
    """

    init: str = ""
    value: str = ""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=9e-6)
    )
    discount: float = 1.0
    smoothing: float = 0.95
    clip: float = 0.2


@dataclasses.dataclass
class Config:
    """One run.

    Attributes:
      workdir: where the run lives; running the same command again continues it.
      data: see `DataConfig`.
      init: weights to start from: a Hugging Face directory or hub id, a GGUF file, an Orbax model
        or a run; empty for random weights.
      model: the architecture. Needed without `init`; with it, a statement that is checked.
      tokenizer: a directory, or `bytes`; empty takes the one of `init`.
      chat_template: which of the tokenizer's templates to use where it has several with names;
        empty takes the one called `default`, or the only one.
      objective: a name in `objectives.OBJECTIVES`, or a sum of several with coefficients, such as
        `regression + 0.5 * bradley_terry`; or in `POLICY_OBJECTIVES`: then the model is a policy,
        a language model that learns what to say.
      preference: how pairs are learned from.
      trainable: patterns that must match a parameter's whole path for it to be trained.
      lora: adapters to train instead of the weights, with a reward model's head; see
        `lora.LoraConfig`.
      batch_size: responses a step.
      steps: how many, or
      epochs: how often to see the training data; one of the two is set, the other 0.
      rows_per_device: rows computed at once on each row shard of the mesh; a step accumulates
        over as many micro-batches as its samples need. Where the data choose the rows, their
        places at once are at most those of so many rows of `max_length`, with pairs of twice that.
      dtype: of the computation; `auto` is bfloat16 on accelerators and float32 on CPUs.
      remat: what is computed again in the backward pass; see `layers.ModelOptions`.
      attention: what computes it: `auto`, or one of `dispatch.KERNELS`.
      eval_every: steps between evaluations of the held-out data; the last step has one too.
      checkpoint_every: likewise, between checkpoints.
      seed: of the head or all weights, and of the data's order.
      wandb: project to report to; empty for none.
    """

    workdir: str
    data: DataConfig
    optimizer: OptimizerConfig
    batch_size: int
    init: str = ""
    model: DecoderConfig | None = None
    tokenizer: str = ""
    chat_template: str = ""
    objective: str = "regression"
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    trainable: tuple[str, ...] = EVERYTHING
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    steps: int = 0
    epochs: float = 0.0
    rows_per_device: int = 1
    dtype: str = "auto"
    remat: str = "full"
    attention: str = "auto"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0
    wandb: str = ""

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns of what is trained: with LoRA adapters and a reward head, else `trainable`."""
        return ADAPTED if self.lora.rank else self.trainable


@dataclasses.dataclass
class AlignConfig(Config):
    """A run of `rmjax.align`: a policy learns from its own samples.

    `data.train` is where its prompts come from, and `data.validation` those that show what was
    learned. `objective` is one of `objectives.rollouts.METHODS`. A step samples `batch_size`
    responses, `rollout.n` of each prompt.

    Attributes:
      rollout: what is sampled.
      rewards: what it is worth: the weighted sum of these, by names of one's own.
      shaping: what becomes of that sum.
      policy_gradient: how it is learned from.
      critic: of `ppo`; other methods take no notice of it.
    """

    objective: str = "reinforce"
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: dict[str, RewardConfig] = dataclasses.field(default_factory=dict)
    shaping: ShapingConfig = dataclasses.field(default_factory=ShapingConfig)
    policy_gradient: PolicyGradientConfig = dataclasses.field(default_factory=PolicyGradientConfig)
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)

    @property
    def only_model(self) -> RewardConfig | None:
        """The reward that is a model and has a weight, if one and no more is."""
        models = [reward for reward in self.rewards.values() if reward.model and reward.weight]
        return models[0] if len(models) == 1 else None


def as_flat_dict(config: Config) -> dict[str, Any]:
    """`{"optimizer.learning_rate": 1e-6, ...}` in JSON's types, for files and comparisons."""

    def flat(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {
                k: v
                for name, item in value.items()
                for k, v in flat(item, f"{path}.{name}").items()
            }
        if path == ".data.label_range" and isinstance(value, tuple):
            # Ratings may have no limit, and JSON has no infinity.
            return {path[1:]: [str(x) if x in (math.inf, -math.inf) else x for x in value]}
        return {path[1:]: list(value) if isinstance(value, tuple) else value}

    return flat(dataclasses.asdict(config), "")
