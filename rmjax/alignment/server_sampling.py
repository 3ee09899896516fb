"""A server samples instead of this process, with weights that are sent to it as files."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rmjax.alignment.prompts import Prompts
from rmjax.alignment.steps import HELD_OUT, sampling_settings
from rmjax.checkpoints.exported import export_policy
from rmjax.config import AlignConfig
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.generation.completions import Completion
from rmjax.generation.server import open_policy_server
from rmjax.models.model import Model
from rmjax.models.parameters import Params

DIRECTORY = "sent"


class ServerSampling:
    """A server that samples, which is a `Sampler`.

    It is sent weights when those that it has are `rollout.push_every` steps old, and before
    held-out prompts. What it had when the command began is not known, so it is sent some then.

    Attributes:
      weights: the steps that were done when it was sent those that it has.
    """

    def __init__(
        self,
        config: AlignConfig,
        model: Model,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        workdir: Path,
    ):
        """Asks the server which model it has; see `Sampling` for the arguments.

        Raises:
          UserError: there is no server that can be told to load weights.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"config.rollout.server with {jax.process_count()} processes: weights are sent by "
                "one process so far"
            )
        self._config, self._model, self._tokenizer, self._ends = config, model, tokenizer, ends
        self._directory = workdir.absolute() / DIRECTORY
        self._engine = open_policy_server(config.rollout.server, tokenizer, ends)
        self.weights = -config.rollout.push_every

    def __call__(
        self, params: Params, prompts: Prompts, numbers: Any, n: int, step: int, done: int
    ) -> list[list[Completion]]:
        """See `Sampler`.

        Raises:
          UserError: the server does not load the weights, or does not answer what it is asked.
        """
        old = done - self.weights
        if old >= self._config.rollout.push_every or (old and step == HELD_OUT):
            self._send(params, done)
        settings = sampling_settings(self._config, n, step)
        asked = [prompts.tokens[i] for i in numbers]
        return self._engine(asked, settings, [int(i) for i in numbers])

    def _send(self, params: Params, done: int) -> None:
        """Has the server load these weights; files of earlier ones are removed then."""
        self._directory.mkdir(exist_ok=True)
        new = self._directory / f"step-{done:06d}"  # a new name: nothing was read from it before
        export_policy(new, params, self._model, self._tokenizer, self._ends)
        self._engine.load_weights(new)
        self.weights = done
        for path in self._directory.iterdir():
            if path != new:
                shutil.rmtree(path, ignore_errors=True)
