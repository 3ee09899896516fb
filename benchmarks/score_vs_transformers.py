"""Scoring on the CPU: `rm.score_many` against transformers, pairs, best of 16 and long pairs.

    python benchmarks/score_vs_transformers.py pairs GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/score_vs_transformers.py best-of-16 GGUF topical_chat_ratings.jsonl
    python benchmarks/score_vs_transformers.py judge GGUF rm_bench_chat.json --sizes=1

Measures conversations a second from messages to scores, tokenizing included: both responses of
pairs, or 16 distinct responses to each prompt, or both answers of pairs about as long as
JudgeBench's. rmjax also scores one conversation at a time, to see what a set gains. Same weights,
float32, same cores; the sides take turns, a part of the data at a time. transformers gets each part
sorted by length, in batches of the best of several sizes, which is looked for first. rmjax has
compiled its shapes before: how many they are is printed, and how much of what is computed is
padding. Scores are compared: more than 1e-4 apart is an error. On a busy machine, `--cores=1
--clock=cpu` counts the seconds a process computed, not those it waited.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from material import Answered, best_of, judged_pairs, make_model, read_dialogues, read_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, Piece, Side, in_turn, load_average, rate, speedup

from rmjax.data.messages import Message

_TOLERANCE = 1e-4
Conversation = list[Message]


def conversations(groups: list[Answered]) -> list[Conversation]:
    """Each response with its prompt before it."""
    return [
        [*prompt, {"role": "assistant", "content": response}]
        for prompt, responses in groups
        for response in responses
    ]


class Scored(NamedTuple):
    """What a side says of a part: its scores, and of rmjax what was computed.

    Attributes:
      scores: one a conversation.
      padding: share of the token positions computed.
      saved: share of the tokens that were not computed, since prompts are shared.
      shapes: compiled so far.
    """

    scores: list[float]
    padding: float = 0.0
    saved: float = 0.0
    shapes: int = 0


def rmjax_side(
    clock: str, model: str, parts: list[list[Conversation]], alone: bool
) -> Callable[[int], Piece]:
    """`rmjax.load` and `score_many`, or `score` of each; every shape is compiled before."""
    import rmjax
    from rmjax.inference.scores import Work

    rm = rmjax.load(model)

    def work(number: int) -> Piece:
        rm.work = Work()
        started = CLOCKS[clock]()
        found = [rm.score(c) for c in parts[number]] if alone else rm.score_many(parts[number])
        seconds, done = CLOCKS[clock]() - started, rm.work
        scored = Scored(
            [score.value for score in found],
            1 - done.computed / done.padded_tokens,
            1 - done.computed / done.tokens,
            rm._score_rows._cache_size(),
        )
        return Piece(seconds, scored)

    for number in range(len(parts)):
        work(number)
    return work


def torch_side(
    clock: str, model: str, parts: list[list[Conversation]], size: int
) -> Callable[[int], Piece]:
    """transformers' model on batches of similar length, dynamically padded."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # it may have counted them before
    transformers.utils.logging.disable_progress_bar()
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    @torch.inference_mode()
    def work(number: int) -> Piece:
        started = CLOCKS[clock]()
        texts = tokenizer.apply_chat_template(parts[number], tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = np.empty(len(ids))
        for start in range(0, len(order), size):
            members = order[start : start + size]
            batch = tokenizer.pad(
                {"input_ids": [ids[i] for i in members]}, padding_side="right", return_tensors="pt"
            )
            scores[members] = network(**batch, use_cache=False).logits[:, 0].numpy()
        return Piece(CLOCKS[clock]() - started, Scored(scores.tolist()))

    network(torch.ones((1, 128), dtype=torch.long))  # threads and kernels are warm
    return work


# How the groups of a task are read, and how many are a part.
TASKS: dict[str, tuple[Callable[[Path], list[Answered]], int]] = {
    "pairs": (read_pairs, 32),
    "best-of-16": (lambda path: best_of(read_dialogues(path), 16), 4),
    "judge": (judged_pairs, 8),
}


def main() -> None:
    """Looks for transformers' best batch, then measures both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("weights", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", type=Path, help="the pairs, the dialogues, or RM-Bench's chat")
    parser.add_argument("--parts", type=int, default=3, help="of the data, to measure")
    parser.add_argument("--groups", type=int, default=0, help="pairs or prompts a part")
    parser.add_argument("--sizes", default="1,4,8,16,32", help="batches of transformers")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    sys.exit(not run(args))


def run(args: argparse.Namespace) -> bool:
    """The benchmark; whether the scores agree."""
    read, count = TASKS[args.task]
    groups, count = read(args.data), args.groups or count
    parts = [conversations(groups[i * count : (i + 1) * count]) for i in range(args.parts)]
    model = make_model(args.weights, ["reward"], args.workdir)
    told: dict[str, Any] = dict(clock=args.clock, model=str(model), parts=parts)
    cores, console = set(sorted(os.sched_getaffinity(0))[-args.cores :]), Console(highlight=False)
    tried = {}
    for size in map(int, args.sizes.split(",")):
        side = Side(torch_side, cores, size=size, **told)
        tried[size] = side(0).seconds
        side.close()
        console.print(f"batches of {size}: {len(parts[0]) / tried[size]:.2f} conversations/s")
    best = min(tried, key=lambda size: tried[size])
    sides = {
        f"transformers, batches of {best}": Side(torch_side, cores, size=best, **told),
        "rmjax": Side(rmjax_side, cores, alone=False, **told),
        "rmjax, one at a time": Side(rmjax_side, cores, alone=True, **told),
    }
    pieces = in_turn(sides, range(args.parts))
    print({n: [round(p.seconds, 2) for p in v] for n, v in pieces.items()}, tried)
    table = Table("", "conversations/s")
    for name, found in pieces.items():
        table.add_row(name, f"{rate(found, [len(part) for part in parts]):.2f}")
    console.print(table)
    theirs, ours, alone = pieces.values()
    console.print(f"rmjax is {speedup(theirs, ours):.2f} times as fast as transformers")
    console.print(f"and {speedup(alone, ours):.2f} times as fast as by itself, one at a time")
    for name, found in (("rmjax", ours), ("one at a time", alone)):
        padding, saved = (np.mean([p.value[i] for p in found]) for i in (1, 2))
        computed = f"{padding:.1%} padding, {saved:.1%} of the tokens saved by sharing prompts"
        console.print(f"{name}: {computed}, {found[-1].value.shapes} shapes")
    apart = max(
        float(np.abs(np.subtract(a.value.scores, b.value.scores)).max())
        for found in (ours, alone)
        for a, b in zip(theirs, found, strict=True)
    )
    console.print(f"scores at most {apart:.1e} apart")
    console.print(f"{args.cores} cores, {args.clock} clock; load average {load_average()}")
    return apart < _TOLERANCE


if __name__ == "__main__":
    main()
