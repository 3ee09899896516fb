"""What 8 bits cost in the quality of scores, and what they save, against the same model without.

    pip install 'rmjax[quantize,gguf]'
    python benchmarks/quantization.py --model=SmolLM2-135M-Instruct.Q4_1.gguf \
        --data=topical_chat_ratings.jsonl

The model is one without a head. Heads are made here: ridge regression in numpy from the last
tokens' hidden states, computed in float32, to people's ratings. Every fifth of the dialogues gets
the head fitted to the other four, so all scores are of dialogues that their head has not seen. The
same heads score the hidden states of every other side. They are had by scoring with the identity
as the head, which is float32 on every side.
"""

import argparse
import dataclasses
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from rmjax.checkpoints.loading import load_params
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.inference.scorer import Scorer
from rmjax.models.heads import RewardHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.models.quantization import QUANTIZE, check_quantize, has_products, quantize_params
from rmjax.models.rewards.aggregation import scalar_rule
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

_ATTRIBUTES = ("naturalness", "coherence", "engagingness", "groundedness", "understandability")
_FOLDS = 5
_RIDGE = 1.0  # of the sum of squares of a feature


@dataclasses.dataclass(frozen=True)
class Side:
    """What one way of computing gives.

    Attributes:
      hidden: of each conversation, [N, D].
      layers: bytes of the decoder layers' parameters.
      total: bytes of all parameters but the head.
      seconds: of scoring all once more, with all compiled.
    """

    hidden: np.ndarray
    layers: int
    total: int
    seconds: float


def run_side(source: Pretrained, name: str, talks: list[Any]) -> Side:
    """Hidden states by `name`: a dtype, or a kind of products in 8 bits."""
    decoder, kind = source.decoder, name if name in QUANTIZE else ""
    dtype: Any = compute_dtype("auto" if kind else name)
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()))
    check_quantize(kind, sharding)
    model = Model(decoder, ModelOptions(sharding, dtype=dtype), RewardHead(decoder.hidden_size))
    params = load_params(source, model, seed=0, dtype=dtype)
    if kind:
        params = quantize_params(params, sharding, kind)
    params["head"] = jax.device_put(jnp.eye(decoder.hidden_size), params["head"].sharding)
    spec = RewardSpec(tuple(map(str, range(decoder.hidden_size))), {"0": 1.0})
    rule = scalar_rule(spec.scalar, spec.attributes)
    scorer = Scorer(model, params, source.tokenizer(), spec, rule, "error")
    scores = scorer.score_many(talks)
    start = time.perf_counter()
    if jax.default_backend() != "cpu":  # on CPUs 8 bits are emulated: no time worth stating
        scorer.score_many(talks)
    seconds = time.perf_counter() - start
    layers, rest = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (params["layers"], params))
    hidden = np.asarray([list(score.attributes.values()) for score in scores])
    return Side(hidden, layers, rest - params["head"].nbytes, seconds)


def heads(hidden: np.ndarray, labels: np.ndarray, dialogues: np.ndarray) -> list[Any]:
    """For each fold a function, hidden states to ratings [N, A], fitted to the other folds."""

    def fitted(x: np.ndarray, y: np.ndarray) -> Any:
        at, mean = x.mean(0), y.mean(0)
        penalty = np.diag(((x - at) ** 2).sum(0)) * _RIDGE
        head = np.linalg.solve((x - at).T @ (x - at) + penalty, (x - at).T @ (y - mean))
        return lambda hidden: (hidden - at) @ head + mean

    others = [dialogues % _FOLDS != fold for fold in range(_FOLDS)]
    return [fitted(hidden[part], labels[part]) for part in others]


def scores_of(side: Side, found: list[Any], dialogues: np.ndarray) -> np.ndarray:
    """Held-out scores [N, A]: of each fold with its own head."""
    scores = np.empty((len(dialogues), len(_ATTRIBUTES)))
    for fold, head in enumerate(found):
        scores[dialogues % _FOLDS == fold] = head(side.hidden[dialogues % _FOLDS == fold])
    return scores


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--sides", default="bfloat16,int8,fp8")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_bytes().splitlines()]
    number: dict[str, int] = {}
    dialogues = np.asarray([number.setdefault(str(row["prompt"]), len(number)) for row in rows])
    labels = np.asarray([[row[name] for name in _ATTRIBUTES] for row in rows])
    talks = [r["prompt"] + [{"role": "assistant", "content": r["response"]}] for r in rows]
    source, console = open_pretrained(args.model), Console(width=110)
    sides = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quantize = ")  # that 8 bits are emulated is said below
        for name in ("float32", *args.sides.split(",")):
            sides[name] = run_side(source, name, talks)
    fitted = heads(sides["float32"].hidden, labels, dialogues)
    exact = scores_of(sides["float32"], fitted, dialogues)

    quality = Table(title=f"{len(rows)} responses to {len(set(dialogues))} dialogues")
    for title in ("side", "attribute", "Pearson", "mean |diff| / std", "max", "with people", "f32"):
        quality.add_column(title)
    for name, side in sides.items():
        scores = scores_of(side, fitted, dialogues)
        for a, attribute in enumerate(_ATTRIBUTES if name != "float32" else ()):
            gap = np.abs(scores[:, a] - exact[:, a]) / exact[:, a].std()
            pairs = ((scores, exact), (scores, labels), (exact, labels))
            r = [np.corrcoef(x[:, a], y[:, a])[0, 1] for x, y in pairs]
            cells = (f"{r[0]:.5f}", f"{gap.mean():.4f}", f"{gap.max():.4f}", f"{r[1]:.3f}")
            quality.add_row(name, attribute, *cells, f"{r[2]:.3f}")
    console.print(quality)
    for name, side in sides.items():
        took = f"{side.seconds:.2f} s" if jax.default_backend() != "cpu" else "not timed on a CPU"
        weights = f"layers {side.layers / 1e6:.1f} MB, all {side.total / 1e6:.1f} MB"
        console.print(f"{name:10} {weights}, {took}")
    mesh = make_mesh(MeshConfig(), jax.devices())
    emulated = [kind for kind in QUANTIZE[1:] if not has_products(mesh, kind)]
    device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    console.print(f"{device}; emulated there: {', '.join(emulated) or 'none'}")


if __name__ == "__main__":
    main()
