"""The search for alpha: preference pairs scored by the models along ExPO's line."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jaxtyping import Float64
from rich import box
from rich.table import Table

from rmjax.checkpoints.conversion.extrapolation import Parents, extrapolated
from rmjax.checkpoints.hf_mapping import hf_keys
from rmjax.checkpoints.hf_weights import common_dtype
from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.orbax_weights import named_weights
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.data.tokenize import load_tokenized
from rmjax.errors import UserError
from rmjax.evaluation.metrics import wilson_interval
from rmjax.inference.batching import pair_batches
from rmjax.inference.score_step import make_score, score_data
from rmjax.models.attention.dispatch import choose
from rmjax.models.heads import RewardHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.models.parameters import HEAD, Params, decoder_parameters, flatten, nest
from rmjax.models.rewards.aggregation import model_rule
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh


@dataclasses.dataclass(frozen=True)
class Trial:
    """How the model at one alpha does on preference pairs.

    Attributes:
      alpha: the point on the line: 0 is the weak model, 1 the strong one.
      accuracy: share of the pairs whose chosen response has the higher value; equal ones count
        one half.
      interval: 95 % (Wilson), of this alpha by itself.
      margin: mean value of the chosen response minus that of the rejected one.
      loss: mean of -log sigmoid(margin).
    """

    alpha: float
    accuracy: float
    interval: tuple[float, float]
    margin: float
    loss: float


class AlphaSearch:
    """Both parents on the devices, and the pairs packed into rows.

    The devices hold three models: the parents as they are stored, and the one that is tried.

    Attributes:
      data: the pairs, tokenised.
      rule: how attributes become the value that is compared: the strong model's own.
      differ: whether any number of the parents does.
    """

    def __init__(self, parents: Parents, pairs: str, max_length: int = 0):
        """Reads the pairs, then the parents.

        Args:
          parents: the two models.
          pairs: a file, a directory whose `validation` file holds them, or a hub id.
          max_length: most tokens of a response with its prompt; 0 for what the strong model was
            trained with. Pairs with a longer one are dropped, and counted in `data.counts`.

        Raises:
          UserError: bad data, or nothing is left; an incomplete model.
        """
        spec, decoder = parents.spec, parents.strong.decoder
        if spec.suffix_turn:
            raise UserError(
                f"{parents.strong.name}: answers the question {spec.suffix_turn!r}, which a search "
                "does not ask; give --alpha, and compare models with `rmjax.evaluate`"
            )
        self.data = load_tokenized(
            pairs,
            "validation",
            parents.tokenizer,
            attributes=spec.attributes,
            label_range=(0.0, 4.0),  # of ratings, which pairs do not have
            max_length=_max_length(max_length, parents),
            over_long="drop",
            pairs=True,
        )
        self.rule = model_rule(spec)
        self._sharding = Sharding(make_mesh(MeshConfig()))
        dtype = compute_dtype("auto")
        kernel = choose("auto", decoder, self._sharding, dtype)
        options = ModelOptions(self._sharding, dtype=dtype, attention=kernel)
        model = Model(decoder, options, RewardHead(len(spec.attributes)))
        self._batches = pair_batches(self.data, model)
        self._score = make_score(model)
        self._stored = stored_dtypes(parents.strong)
        self._weak, self._strong = (
            flatten(load_params(source, model, seed=0, dtype=_widest(stored_dtypes(source))))
            for source in (parents.weak, parents.strong)
        )
        self.differ = any(_differs(self._weak[path], self._strong[path]) for path in self._weak)

    def trials(self, alphas: Sequence[float]) -> Iterator[Trial]:
        """A trial of each alpha, in their order.

        Raises:
          UserError: a score is not finite; it names alpha and the sample.
        """
        for alpha in alphas:
            margins = self._margins(alpha)
            right, count = float(((1 + np.sign(margins)) / 2).sum()), len(margins)
            yield Trial(
                alpha,
                right / count,
                wilson_interval(right, count),
                float(margins.mean()),
                float(np.logaddexp(0.0, -margins).mean()),
            )

    def params(self, alpha: float) -> Params:
        """The weights at `alpha`, rounded as `extrapolate` stores them."""
        return nest(
            {
                path: _combine(self._weak[path], strong, alpha, self._stored[path])
                for path, strong in self._strong.items()
            }
        )

    def _margins(self, alpha: float) -> Float64[np.ndarray, "P"]:
        scores = score_data(self._score, self.params(alpha), self._batches, self._sharding)
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(bad):
            raise UserError(
                f"alpha = {alpha!r}: the scores of {len(bad)} samples are not finite, the first of "
                f"them {self.data.where(int(bad[0]))}; leave that alpha out"
            )
        values = self.rule.values(scores.reshape(-1, 2, scores.shape[1]))
        return values[:, 0] - values[:, 1]


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest accuracy; of equal ones that whose alpha is nearest to 1."""
    return max(trials, key=lambda trial: (trial.accuracy, -abs(trial.alpha - 1)))


def trial_table(trials: Sequence[Trial], title: str) -> Table:
    """The table of a search."""
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("alpha", "pair acc.", "95 %", "mean margin", "loss", ""):
        view.add_column(name, justify="left" if not name else "right", no_wrap=True)
    best, names = best_trial(trials), {0.0: "WEAK", 1.0: "STRONG"}
    for trial in trials:
        low, high = trial.interval
        remarks = [names.get(trial.alpha, ""), "best" if trial is best else ""]
        view.add_row(
            f"{trial.alpha:g}",
            f"{trial.accuracy:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{trial.margin:+.4f}",
            f"{trial.loss:.4f}",
            ", ".join(filter(None, remarks)),
        )
    return view


def stored_dtypes(source: Pretrained) -> dict[str, np.dtype]:
    """The dtype that each parameter of a model is stored in."""
    weights = named_weights(source)
    return {  # float64 is float32 on devices
        row.path: dtypes.canonicalize_dtype(common_dtype(weights, hf_keys(row, source.decoder)))
        for row in (*decoder_parameters(source.decoder), HEAD)
    }


def _widest(stored: dict[str, np.dtype]) -> Any:
    """One that holds all weights; norms and the head are always read as float32."""
    layers = {dtype for path, dtype in stored.items() if path != "head" and "norm" not in path}
    return jnp.dtype(layers.pop() if len(layers) == 1 else np.float32)


def _max_length(wanted: int, parents: Parents) -> int:
    decoder = parents.strong.decoder
    most = decoder.max_position_embeddings
    if wanted < 0 or wanted > most:
        raise UserError(f"--max-length={wanted}: expected 1 to {most}, what the model was made for")
    return wanted or parents.spec.max_length or most


@jax.jit
def _differs(weak: jax.Array, strong: jax.Array) -> jax.Array:
    return jnp.any(weak.astype(jnp.float32) != strong.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _combine(weak: jax.Array, strong: jax.Array, alpha: float, dtype: Any) -> jax.Array:
    return extrapolated(weak, strong, alpha).astype(dtype)
