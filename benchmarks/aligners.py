"""Both sides of a comparison of `rmjax.align`: it, and TRL's trainers told to do what it does."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timing import CLOCKS, Piece
from trainers import trainer_arguments

from rmjax.config import AlignConfig
from rmjax.data.messages import Message

_paused: list[Callable[[], None]] = []  # what is called with each step's rewards


def reward(prompts: list[list[Message]], responses: list[str]) -> list[float]:
    """Of each response a tenth of the number of its different words."""
    return [len(set(response.lower().split())) / 10 for response in responses]


class Update(NamedTuple):
    """One of TRL's updates, beside rmjax's.

    Attributes:
      loss: its loss.
      advantage: the mean absolute advantage of its samples.
      clipped: the share of the ratios that the clip cut.
      gradient: how far the gradient is from rmjax's.
    """

    loss: float
    advantage: float
    clipped: float
    gradient: float


class Watch:
    """Seconds and tokens of the parts of a step.

    Attributes:
      seconds: by part.
      tokens: sampled.
    """

    def __init__(self, clock: str):
        self._now, self.seconds, self.tokens = CLOCKS[clock], {"sampling": 0.0, "scoring": 0.0}, 0

    def over(
        self, part: str, function: Callable[..., Any], count: Callable[[Any], int] = lambda _: 0
    ) -> Callable[..., Any]:
        """The same function, its seconds and what `count` says of its result added up."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            found = function(*args, **kwargs)
            self.seconds[part] += self._now() - began
            self.tokens += count(found)
            return found

        return watched

    def taken(self) -> dict[str, Any]:
        """What there is since the last call."""
        found = {"seconds": self.seconds, "tokens": self.tokens}
        self.seconds, self.tokens = dict.fromkeys(self.seconds, 0.0), 0
        return found


# ---- rmjax --------------------------------------------------------------------------------------


def rmjax_updates(config: AlignConfig, gradients: Path) -> Callable[[None], Piece]:
    """`rmjax.align`, whose optimizer steps are looked at: losses, and gradients as files."""
    import optax
    from safetensors.numpy import save_file

    from rmjax.align import align
    from rmjax.alignment import experiment
    from rmjax.training.step import make_program

    losses: list[float] = []

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        program = make_program(model, *args, **kwargs)

        def step(*args: Any) -> Any:
            state, metrics = program.step(*args)
            losses.append(float(metrics.loss))
            moment = optax.tree.get(state.opt_state, "mu")
            save_file(as_hf(moment, model), gradients / f"{len(losses)}.safetensors")
            return state, metrics

        return program._replace(step=step)

    experiment.make_program = watched

    def work(_: None) -> Piece:
        align(config)
        return Piece(0.0, losses)

    return work


def as_hf(params: Any, model: Any) -> dict[str, Any]:
    """A tree of parameters, or of their gradients, as Hugging Face names them."""
    from rmjax.checkpoints.hf_mapping import hf_keys, to_hf
    from rmjax.models.parameters import TABLE, axis_sizes, flatten

    found, sizes = {}, axis_sizes(model.config)
    for path, leaf in flatten(params).items():
        row, array = TABLE[path], np.asarray(leaf)
        for key, part in zip(hf_keys(row, model.config), array if row.stacked else [array]):
            found[key] = to_hf(row, part, sizes)
    return found


def rmjax_loop(clock: str, pause: Callable[..., None], config: AlignConfig) -> None:
    """`rmjax.align`; no token ends a sample."""
    from rmjax.align import align
    from rmjax.alignment import experiment, rewards
    from rmjax.alignment.steps import Sampling
    from rmjax.alignment.updates import Learner

    watch = Watch(clock)

    def tokens(found: Any) -> int:
        return sum(len(sample.tokens) for samples in found for sample in samples)

    class Paused(rewards.FunctionReward):
        def __call__(self, *args: Any) -> Any:
            pause(watch.taken())
            return super().__call__(*args)

    rewards.FunctionReward = Paused
    experiment.end_tokens = lambda *_: ()
    Learner.known = watch.over("scoring", Learner.known)
    Sampling.__call__ = watch.over("sampling", Sampling.__call__, tokens)
    align(config)


# ---- TRL ----------------------------------------------------------------------------------------


def trl_trainer(config: AlignConfig, micro: int, change: Callable[[Any], Any], **told: Any) -> Any:
    """TRL's trainer of the config's method, on the prompts of the run's steps in their order.

    Args:
      config: of the run.
      micro: samples computed at once.
      change: makes another class of the trainer's.
      told: other arguments of its config.
    """
    import datasets
    import torch
    import transformers

    from rmjax.alignment.updates import updates_of

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # it may have counted them before
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    name = config.objective
    trainers = importlib.import_module(f"trl.trainer.{name}_trainer")
    configs = importlib.import_module(f"trl.trainer.{name}_config")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        config.init, dtype=torch.float32, attn_implementation="sdpa"
    )
    gradient = config.policy_gradient
    parts = config.batch_size // gradient.minibatches // micro
    steps = config.steps * updates_of(config)
    arguments = trainer_arguments(config.optimizer, steps, micro, parts)
    if gradient.kl is not None:
        told["beta"] = gradient.kl
    trainer = change(getattr(trainers, f"{name.upper()}Trainer"))(
        network,
        reward_funcs=[trl_reward],
        args=getattr(configs, f"{name.upper()}Config")(
            **arguments,
            num_generations=config.rollout.n,
            num_iterations=gradient.passes,
            steps_per_generation=gradient.minibatches * parts,
            max_completion_length=config.rollout.max_tokens,
            shuffle_dataset=False,
            **told,
        ),
        train_dataset=datasets.Dataset.from_list(prompts_of_steps(config)),
        processing_class=transformers.AutoTokenizer.from_pretrained(config.init),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def prompts_of_steps(config: AlignConfig) -> list[dict[str, Any]]:
    """The prompts of every step of the run, one after the other."""
    from rmjax.alignment.prompts import plan_prompts, read_prompts
    from rmjax.checkpoints.pretrained import open_pretrained
    from rmjax.training.experiment import pick_tokenizer

    source = open_pretrained(config.init)
    tokenizer = pick_tokenizer(config, source, source.decoder.vocab_size)
    prompts = read_prompts(config, tokenizer, config.data.train, "train")
    each = config.batch_size // config.rollout.n
    plan = plan_prompts(len(prompts), each=each, seed=config.seed, steps=config.steps)
    return [{"prompt": prompts.conversations[number].messages} for step in plan for number in step]


def trl_reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """The same reward, of TRL's completions."""
    for pause in _paused:
        pause()
    return reward(prompts, [messages[-1]["content"] for messages in completions])


def trl_updates(config: AlignConfig, gradients: Path) -> Callable[[None], Piece]:
    """TRL's trainer on the samples that `rmjax.align` left, compared with rmjax's gradients.

    Its minibatches are rmjax's, not shuffled, each one micro-batch. `bnpo` is TRL's name of a mean
    over the tokens of a micro-batch. Its default `dapo`, over those of a step, is the same where
    all minibatches have as many tokens. TRL multiplies k3 by the ratio unless it is told not to:
    the same loss where the ratio is 1, another gradient.
    """
    import transformers

    steps = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(Path(config.workdir, "rollouts").glob("step-*.jsonl"))
    ]
    found: list[dict[str, Any]] = []

    def change(trainer: Any) -> Any:
        class Given(trainer):
            def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
                tokens = [ids for row in steps.pop(0) for ids in row["token_ids"]]
                assert len(tokens) == len(prompt_ids)
                return tokens if config.objective == "rloo" else (tokens, None)

            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
                loss = super().compute_loss(model, inputs)
                clipped = self._metrics["train"]["clip_ratio/region_mean"][-1]
                advantage = float(inputs["advantages"].abs().mean())
                found.append(dict(loss=float(loss.detach()), clipped=clipped, advantage=advantage))
                return loss

        return Given

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            path = gradients / f"{len(found)}.safetensors"
            found[-1]["gradient"] = gradient_apart(model, path)

    told = {}
    if config.objective == "grpo":
        told["loss_type"] = "bnpo"
        told["use_bias_correction_kl"] = False
    micro = config.batch_size // config.policy_gradient.minibatches
    trainer = trl_trainer(config, micro, change, **told)
    module: Any = importlib.import_module(f"trl.trainer.{config.objective}_trainer")
    module.shuffle_sequence_dict = lambda parts: parts
    trainer.add_callback(Gradients())

    def work(_: None) -> Piece:
        trainer.train()
        return Piece(0.0, [Update(**update) for update in found])

    return work


def gradient_apart(model: Any, path: Path) -> float:
    """How far a tensor's gradient is from the one in a file at most, relative to its norm."""
    from safetensors.numpy import load_file

    ours = load_file(path)
    theirs = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    differences = {name: float(np.linalg.norm(ours[name] - theirs[name])) for name in ours}
    # Where the clip cuts every sample, both are 0.
    return max(x and x / float(np.linalg.norm(theirs[k])) for k, x in differences.items())


def trl_loop(clock: str, pause: Callable[..., None], config: AlignConfig, micro: int) -> None:
    """TRL's trainer; no token ends a sample."""
    import torch

    watch, how = Watch(clock), config.rollout

    def tokens(found: Any) -> int:
        ids = found if config.objective == "rloo" else found[0]
        return sum(map(len, ids))

    def change(trainer: Any) -> Any:
        class Watched(trainer):
            _generate_single_turn = watch.over("sampling", trainer._generate_single_turn, tokens)

            def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
                compute = super()._get_per_token_logps_and_entropies
                if not torch.is_grad_enabled():
                    compute = watch.over("scoring", compute)
                return compute(*args, **kwargs)

        return Watched

    endless = {"min_new_tokens": how.max_tokens}
    trainer = trl_trainer(config, micro, change, generation_kwargs=endless)
    _paused.append(lambda: pause(watch.taken()))
    trainer.train()
