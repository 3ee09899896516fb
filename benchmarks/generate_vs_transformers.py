"""Sampling on the CPU: `policy.sample` against transformers' `generate`.

    python benchmarks/generate_vs_transformers.py equal GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/generate_vs_transformers.py speed GGUF hh_harmless_base_test.jsonl.gz

`equal` asks both for the most probable tokens and compares them, one by one, up to an end token or
to `--tokens`. Where they part, transformers' two best logits must be less than 1e-4 apart, which
rounding explains; anything else is an error.

`speed` measures tokens a second, from messages to texts: 16 samples of 128 tokens of each of four
prompts a part, at temperature 1, and no token ends one. Same weights, float32, same cores; the
sides take turns, a part at a time. transformers gets the samples in batches of the best of several
sizes, which is looked for first. On a busy machine, `--cores=1 --clock=cpu` counts the seconds a
process computed, not those it waited.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from material import read_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, Piece, Side, in_turn, load_average, rate, speedup

from rmjax.data.messages import Message

_TOLERANCE = 1e-4
_PROMPTS = 4  # a part, when speed is measured
Prompt = list[Message]


def first_turns(data: Path, count: int) -> list[Prompt]:
    """What people say first, of so many dialogues."""
    turns = dict.fromkeys(pair.prompt[0]["content"] for pair in read_pairs(data))
    return [[{"role": "user", "content": turn}] for turn in list(turns)[:count]]


# ---- the two sides ------------------------------------------------------------------------------


def rmjax_side(clock: str, weights: str, parts: list[list[Prompt]], **asked: Any) -> Any:
    """`rmjax.load_policy` and `sample`; every shape is compiled before."""
    import rmjax

    policy = rmjax.load_policy(weights)
    if asked.pop("endless"):
        policy.end_tokens = ()

    def work(number: int) -> Piece:
        started = CLOCKS[clock]()
        found = policy.sample(parts[number], **asked)
        seconds = CLOCKS[clock]() - started
        return Piece(seconds, [[c.tokens.tolist() for c in samples] for samples in found])

    if policy.end_tokens == ():
        for number in range(len(parts)):
            work(number)
    return work


def torch_side(
    clock: str, weights: str, parts: list[list[Prompt]], size: int, **asked: Any
) -> Callable[[int], Piece]:
    """transformers' `generate` on batches padded on the left, the longest prompts first."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # it may have counted them before
    transformers.utils.logging.disable_progress_bar()
    path = Path(weights)
    source: dict[str, Any] = dict(gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **source
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
    tokenizer.padding_side = "left"
    greedy = asked["temperature"] == 0
    how = dict(do_sample=False) if greedy else dict(do_sample=True, top_k=0, top_p=1.0)
    if asked["endless"]:
        model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def work(number: int) -> Piece:
        started = CLOCKS[clock]()
        texts = tokenizer.apply_chat_template(
            parts[number], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        samples = [(i, n) for i in range(len(ids)) for n in range(asked["n"])]
        samples.sort(key=lambda sample: -len(ids[sample[0]]))
        found: list[list[Any]] = [[None] * asked["n"] for _ in ids]
        for start in range(0, len(samples), size):
            members = samples[start : start + size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i, _ in members]}, return_tensors="pt")
            made = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                **batch, max_new_tokens=asked["max_tokens"], pad_token_id=0, **how
            )[:, batch["input_ids"].shape[1] :]
            for (i, n), tokens in zip(members, made.tolist()):
                found[i][n] = tokens
            if asked["endless"]:
                tokenizer.batch_decode(made)
        return Piece(CLOCKS[clock]() - started, found)

    def gap(request: tuple[int, list[int]]) -> Piece:
        """By how much the best logit exceeds the next, behind the first prompt and tokens."""
        text = tokenizer.apply_chat_template(
            parts[request[0]][0], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + request[1]
        with torch.inference_mode():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
        return Piece(0.0, float(best[0] - best[1]))

    model(torch.ones((1, 128), dtype=torch.long))  # threads and kernels are warm
    return lambda request: work(request) if isinstance(request, int) else gap(request)


# ---- the two tasks ------------------------------------------------------------------------------


def compare(args: argparse.Namespace, cores: set[int], console: Console) -> bool:
    """The most probable tokens of both sides; whether they agree."""
    prompts = first_turns(args.data, args.prompts)
    asked = dict(clock=args.clock, weights=args.weights, endless=False)
    asked |= dict(n=1, temperature=0, max_tokens=args.tokens)
    theirs = Side(torch_side, cores, parts=[[prompt] for prompt in prompts], size=1, **asked)
    expected = [theirs(number).value[0][0] for number in range(len(prompts))]
    ours = Side(rmjax_side, cores, parts=[prompts], **asked)
    found = [samples[0] for samples in ours(0).value]
    ours.close()
    equal, close, wrong = 0, 0, 0
    for number, (a, b) in enumerate(zip(found, expected)):
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        if same == len(a) == len(b):
            equal += 1
        elif same < min(len(a), len(b)) and theirs((number, b[:same])).value < _TOLERANCE:
            close += 1
        else:
            wrong += 1
            console.print(f"prompt {number}: apart from token {same} on: {a[same:]} {b[same:]}")
    theirs.close()
    total = sum(map(len, found))
    console.print(
        f"{len(prompts)} prompts, {total} tokens: {equal} equal, {close} equal up to two logits "
        f"less than {_TOLERANCE:g} apart, {wrong} different"
    )
    return not wrong


def measure(args: argparse.Namespace, cores: set[int], console: Console) -> bool:
    """Looks for transformers' best batch, then measures both and prints a table."""
    prompts = first_turns(args.data, _PROMPTS * args.parts)
    parts = [prompts[i * _PROMPTS : (i + 1) * _PROMPTS] for i in range(args.parts)]
    asked: dict[str, Any] = dict(clock=args.clock, weights=args.weights, parts=parts, endless=True)
    asked |= dict(n=args.samples, temperature=1, max_tokens=args.tokens)
    tokens = _PROMPTS * args.samples * args.tokens
    tried = {}
    for size in map(int, args.sizes.split(",")):
        side = Side(torch_side, cores, size=size, **asked)
        tried[size] = side(0).seconds
        side.close()
        console.print(f"batches of {size}: {tokens / tried[size]:.0f} tokens/s")
    best = min(tried, key=lambda size: tried[size])
    sides = {
        f"transformers, batches of {best}": Side(torch_side, cores, size=best, **asked),
        "rmjax": Side(rmjax_side, cores, **asked),
    }
    pieces = in_turn(sides, range(args.parts))
    for piece in (piece for found in pieces.values() for piece in found):
        assert all(len(sample) == args.tokens for samples in piece.value for sample in samples)
    table = Table("", "tokens/s")
    for name, found in pieces.items():
        table.add_row(name, f"{rate(found, [tokens] * args.parts):.0f}")
    console.print(table)
    console.print(f"rmjax is {speedup(*pieces.values()):.2f} times as fast")
    console.print(f"{args.cores} cores, {args.clock} clock; load average {load_average()}")
    return True


def main() -> None:
    """Does one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=["equal", "speed"])
    parser.add_argument("weights", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", type=Path, help="hh-rlhf's pairs")
    parser.add_argument("--prompts", type=int, default=50, help="to compare")
    parser.add_argument("--parts", type=int, default=3, help="of four prompts, to measure")
    parser.add_argument("--samples", type=int, default=16, help="of each prompt, to measure")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    parser.add_argument("--sizes", default="16,32,64", help="batches of transformers")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    cores, console = set(sorted(os.sched_getaffinity(0))[-args.cores :]), Console(highlight=False)
    task = {"equal": compare, "speed": measure}[args.task]
    sys.exit(not task(args, cores, console))


if __name__ == "__main__":
    main()
