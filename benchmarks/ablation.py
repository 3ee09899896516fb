"""What packing and sharing prompts save: padded tokens, and time on the CPU.

    python benchmarks/ablation.py GGUF hh_harmless_base_test.jsonl.gz

Counts the padded tokens, that is token positions with or without a token, that four ways of laying
out the same pairs compute: every sample padded to the maximum; batches of samples of similar
length, padded to their longest; samples packed into rows; rows in which the responses to a prompt
share it. For real pairs, tokenized for SmolLM2, also the time: forward and backward of
SmolLM2-135M's shape (random weights, float32) are timed for each shape of rows, as a median, and
multiplied by how many there are. A row is taken to need the same time whatever it holds. For
HelpSteer2 the data are not needed: lengths are drawn at random and only counted.
"""

import argparse
import dataclasses
import runpy
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from material import Answered, read_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, load_average

from rmjax.data.packing import pack
from rmjax.data.planning import slots_for

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_135m_regression.py"
_UNIT = 64  # lengths of rows that are not all the same are multiples of this


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of each response to it, of which `prompt + response` is a sample."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def samples(self) -> list[int]:
        """Tokens of each sample alone."""
        return [self.prompt + response for response in self.responses]

    @property
    def shared(self) -> int:
        """Tokens of all of them where the prompt is computed once."""
        return self.prompt + sum(self.responses)


def layouts(
    groups: Sequence[Lengths], *, most: int, row: int, batch: int
) -> dict[str, Counter[tuple[int, int]]]:
    """How many micro-batches of which (rows, length) each way needs.

    Args:
      groups: prompts with their responses.
      most: tokens of the longest sample allowed.
      row: token positions of a packed row.
      batch: samples computed at once where they are not packed.
    """
    lengths = [length for group in groups for length in group.samples]
    batches = -(-len(lengths) // batch)
    longest = sorted(lengths, reverse=True)[::batch]
    grouped = Counter((batch, -(-length // _UNIT) * _UNIT) for length in longest)
    shared = [group.shared for group in groups if group.shared <= row]
    # A prompt whose responses do not fit in a row is taken apart, one sample each.
    shared += [n for group in groups if group.shared > row for n in group.samples]

    def rows(items: list[int]) -> Counter[tuple[int, int]]:
        slots = slots_for(row, float(np.mean(items)))
        return Counter({(1, row): len(pack(items, row, slots))})

    return {
        "padded to the maximum": Counter({(batch, most): batches}),
        "grouped by length": grouped,
        "packed": rows(lengths),
        "packed, prompt shared": rows(shared),
    }


def places(counts: Counter[tuple[int, int]]) -> int:
    """Padded tokens computed."""
    return sum(rows * length * count for (rows, length), count in counts.items())


def simulated(prompts: int, seed: int = 0, most: int = 4096) -> list[Lengths]:
    """Log-normal lengths like HelpSteer2's, two responses a prompt.

    Prompts have a mean of 347 tokens and a median of 181, responses a mean of 381; how much these
    spread is an assumption, a median of 280. A pair with a sample of more than `most` is left out.
    """
    rng = np.random.default_rng(seed)

    def draw(mean: float, median: float, count: int) -> np.ndarray:
        # A log-normal's median is exp(mu), its mean exp(mu + sigma^2 / 2).
        sigma = np.sqrt(2 * np.log(mean / median))
        return np.maximum(1, np.rint(rng.lognormal(np.log(median), sigma, count))).astype(int)

    drawn = zip(draw(347, 181, prompts), draw(381, 280, prompts), draw(381, 280, prompts))
    groups = [Lengths(int(p), (int(a), int(b))) for p, a, b in drawn]
    return [group for group in groups if max(group.samples) <= most]


def tokenised(pairs: Sequence[Answered], tokenizer: Any, most: int) -> list[Lengths]:
    """Lengths of real pairs, less those with a sample of more than `most`."""
    from rmjax.data.conversation import Conversation
    from rmjax.data.tokenizer import encode

    groups = []
    for prompt, responses in pairs:
        whole = [
            len(encode(tokenizer, Conversation([*prompt, {"role": "assistant", "content": text}])))
            for text in responses
        ]
        start = len(encode(tokenizer, Conversation(prompt)))
        groups.append(Lengths(start, tuple(length - start for length in whole)))
    return [group for group in groups if max(group.samples) <= most]


def seconds_of(shapes: Sequence[tuple[int, int]], repeats: int, clock: str) -> dict[Any, float]:
    """Forward and backward of SmolLM2-135M on full rows of each shape, medians."""
    import jax

    from rmjax.data.row_layout import RowShape, Segment, make_rows
    from rmjax.models.attention.dispatch import choose
    from rmjax.models.heads import RewardHead
    from rmjax.models.init import random_params
    from rmjax.models.layers import ModelOptions
    from rmjax.models.model import Model
    from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

    decoder = runpy.run_path(str(CONFIG))["get_config"]().model
    sharding = Sharding(make_mesh(MeshConfig()))
    kernel = choose("auto", decoder, sharding, np.float32)
    model = Model(decoder, ModelOptions(sharding, remat="dots", attention=kernel), RewardHead(1))
    params = random_params(model, 0)
    gradient = jax.jit(jax.grad(lambda params, rows: model(params, rows).sum()))
    found: dict[Any, list[float]] = {shape: [] for shape in shapes}
    rows = {
        (count, length): make_rows(
            [[Segment([np.ones(length, np.int32)])]] * count, count, RowShape(count, length, 1)
        )
        for count, length in shapes
    }
    for repeat in range(repeats + 1):  # the shapes take turns; the first turn compiles
        for shape in shapes:
            started = CLOCKS[clock]()
            jax.block_until_ready(gradient(params, rows[shape]))
            if repeat:
                found[shape].append(CLOCKS[clock]() - started)
    return {shape: statistics.median(times) for shape, times in found.items()}


def report(groups: Sequence[Lengths], ways: dict[str, Any], seconds: dict[Any, float]) -> Table:
    """The table: per sample, and against padding to the maximum."""
    samples = sum(len(group.responses) for group in groups)
    tokens = sum(sum(group.samples) for group in groups)
    table = Table("", "padded tokens a sample", "tokens a padded token", "of padded", "ms a sample")
    for name, counts in ways.items():
        computed, padded = places(counts), places(ways["padded to the maximum"])
        took = sum(seconds[shape] * count for shape, count in counts.items()) if seconds else None
        table.add_row(
            name,
            f"{computed / samples:.0f}",
            f"{tokens / computed:.3f}",
            f"{computed / padded:.3f}",
            "" if took is None else f"{1000 * took / samples:.0f}",
        )
    return table


def main() -> None:
    """Counts, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("weights", type=Path, help="SmolLM2-135M-Instruct, for its tokenizer")
    parser.add_argument("data", type=Path, help="the pairs")
    parser.add_argument("--count", type=int, default=1000, help="pairs")
    parser.add_argument("--most", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--row", type=int, default=1024, help="token positions of a packed row")
    parser.add_argument("--repeats", type=int, default=3, help="0: count only")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    from rmjax.data.tokenizer import load_tokenizer

    console, started = Console(highlight=False, width=100), time.monotonic()
    groups = tokenised(read_pairs(args.data)[: args.count], load_tokenizer(args.weights), args.most)
    ways = layouts(groups, most=args.most, row=args.row, batch=4)
    shapes = sorted({shape for counts in ways.values() for shape in counts})
    seconds = seconds_of(shapes, args.repeats, args.clock) if args.repeats else {}
    console.print(f"{len(groups)} real pairs, at most {args.most} tokens, rows of {args.row}")
    console.print(report(groups, ways, seconds))
    drawn = simulated(10_000)
    console.print(f"{len(drawn)} simulated HelpSteer2 pairs, rows of 4096")
    console.print(report(drawn, layouts(drawn, most=4096, row=4096, batch=8), {}))
    console.print(f"{time.monotonic() - started:.0f} s; load average {load_average()}")


if __name__ == "__main__":
    main()
