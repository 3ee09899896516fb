"""Model-FLOP utilisation of a training step and of scoring, on whatever device is there.

    python benchmarks/roofline.py                                  # SmolLM2-135M's shape, CPU
    python benchmarks/roofline.py --shape=llama8b --layers=8 --length=4096 --rows=4    # one GPU

The peak is not a data sheet's: it is the best rate of plain matrix products, in the model's dtype,
measured in the same process. The work is the model's definition (`rmjax/models/flops.py`): real
tokens only, a shared prompt once, attention as it is masked, nothing that is computed twice. Rows
are filled with prompts of two responses, of HelpSteer2's mean lengths unless told otherwise;
weights and tokens are random. The step is the real one: forward, backward and AdamW, over several
micro-batches. Medians of several runs; the peak is measured before and after.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from rmjax.config import OptimizerConfig, PreferenceConfig
from rmjax.data.batch import BATCH_AXES
from rmjax.data.batches import training_batches
from rmjax.data.planning import row_shape
from rmjax.data.tokenized import in_memory
from rmjax.inference.score_step import make_score
from rmjax.models.attention.dispatch import alignment, choose
from rmjax.models.decoder import REMAT
from rmjax.models.decoder_config import DecoderConfig, Rope
from rmjax.models.flops import model_flops
from rmjax.models.heads import RewardHead
from rmjax.models.init import random_params
from rmjax.models.inputs import ROWS_AXES
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model, compute_dtype
from rmjax.runtime.memory import keep_freed_memory
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh, put
from rmjax.training.objectives.objective import make_objective
from rmjax.training.optimizer import make_optimizer, make_schedule
from rmjax.training.step import abstract_state, init_state, make_train_step

# vocabulary, embed, mlp, layers, heads, kv heads, head_dim
SHAPES = {
    "tiny": (300, 64, 128, 2, 4, 2, 16),
    "smollm2": (49152, 576, 1536, 30, 9, 3, 64),
    "llama1b": (128256, 2048, 8192, 16, 32, 8, 64),
    "llama3b": (128256, 3072, 8192, 28, 24, 8, 128),
    "llama8b": (128256, 4096, 14336, 32, 32, 8, 128),
}


def make_llama(shape: str, layers: int) -> DecoderConfig:
    """The architecture of a shape, perhaps with fewer layers."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    sizes: Any = dict(zip(names, SHAPES[shape]))
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    return DecoderConfig(
        **sizes, max_position_embeddings=8192, rms_norm_eps=1e-5, rope=Rope(theta=500000.0)
    )


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of `work`, which was compiled before."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak(dtype: Any, repeats: int = 5) -> float:
    """The best rate of square matrix products of several sizes, FLOP/s."""
    sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192, 16384)
    best = 0.0
    for size in sizes:
        # Random numbers: a GPU draws less power on constant ones, and runs faster than it can.
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        multiply = jax.jit(lambda a: (a @ a).astype(a.dtype))
        jax.block_until_ready(multiply(a))
        best = max(best, 2 * size**3 / median_seconds(lambda m=multiply, a=a: m(a), repeats))
    return best


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has")
    parser.add_argument("--length", type=int, default=1024, help="token positions of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows computed at once")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=180, help="tokens")
    parser.add_argument("--response", type=int, default=375, help="tokens")
    parser.add_argument("--remat", choices=REMAT, default="dots")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """The benchmark."""
    keep_freed_memory()
    decoder, dtype = make_llama(args.shape, args.layers), compute_dtype("auto")
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    kernel = choose(args.attention, decoder, sharding, dtype, args.length)
    options = ModelOptions(sharding, dtype=dtype, remat=args.remat, attention=kernel)
    model = Model(decoder, options, RewardHead(1))
    data, batches = make_batches(args, alignment(kernel, args.length, decoder), decoder.vocab_size)
    groups = [(args.prompt, [args.prompt + args.response] * 2)] * (len(data) // 2)
    work = model_flops(decoder, 1, groups, training=True)

    config = OptimizerConfig(learning_rate=1e-6)
    schedule = make_schedule(config, 100)
    optimizer = make_optimizer(config, schedule)
    abstract = abstract_state(model, optimizer, (".*",))
    params = random_params(model, 0)
    state = init_state(params, optimizer, (".*",), abstract)
    objective = make_objective("bradley_terry", ("reward",), PreferenceConfig())
    step = make_train_step(model, objective, optimizer, schedule, (".*",), abstract)
    batch = put(batches[0], BATCH_AXES, sharding)

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    before = peak(dtype)
    jax.block_until_ready(train())
    training = median_seconds(train, args.repeats)
    micro = [
        put(jax.tree.map(lambda x, m=m: x[m], batches[0].rows), ROWS_AXES, sharding)
        for m in range(batches.microbatches)
    ]
    score = make_score(model)

    def scoring_pass() -> Any:
        return [score(state.params, rows) for rows in micro]

    jax.block_until_ready(scoring_pass())
    scoring = median_seconds(scoring_pass, args.repeats)
    best = max(before, peak(dtype))

    device = jax.devices()[0]
    table = Table("", "seconds", "model TFLOP", "TFLOP/s", "of the peak", box=box.MARKDOWN)
    for name, seconds, flops in (("training step", training, work), ("scoring", scoring, work / 3)):
        rate = flops / seconds
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{flops / 1e12:.2f}",
            f"{rate / 1e12:.3f}",
            f"{rate / best:.1%}",
        )
    console = Console(highlight=False)
    console.print(
        f"{args.shape}, {decoder.num_hidden_layers} layers, {batches.microbatches} x {args.rows} "
        f"rows of {args.length}, {batches.tokens(0) / batches.padded_tokens(0):.1%} of the "
        f"positions real; {dtype.name}, remat {args.remat}, attention by {kernel}"
    )
    console.print(
        f"{device.device_kind}, JAX {jax.__version__}: matrix products reach "
        f"{best / 1e12:.3f} TFLOP/s"
    )
    console.print(table)


def make_batches(args: argparse.Namespace, align: int, vocabulary: int) -> tuple[Any, Any]:
    """Pairs of random tokens that fill the rows as well as such pairs can."""
    rng = np.random.default_rng(0)
    places = args.prompt + 2 * args.response + 3 * (align - 1)
    count = args.microbatches * args.rows * (args.length // places)
    tokens, prompts = [], []
    for number in range(count):
        prompt = rng.integers(1, vocabulary, args.prompt)
        for response in rng.integers(1, vocabulary, (2, args.response)):
            tokens.append(np.concatenate([prompt, response]).astype(np.int32))
            prompts.append(str(number))
    data, _ = in_memory(tokens, prompts)
    data = dataclasses.replace(data, chosen=np.arange(len(data)) % 2 == 0)
    shape = row_shape(data, rows=args.rows, length=args.length, align=align)
    return data, training_batches(data, [np.arange(len(data))], shape)


if __name__ == "__main__":
    main()
