"""Training and scoring on one GPU: rmjax against transformers' model in a plain loop of torch.

    python benchmarks/gpu_vs_transformers.py [--workdir=DIR]

A Llama of 1B with random weights and a head, which both sides read from one directory; pairs of
random text of HelpSteer2's mean lengths, in tokens that are bytes. Each side has the GPU to itself,
one after the other, and does what it does best: rmjax packs pairs into rows and shares prompts;
transformers gets every step and every part sorted by length, dynamically padded, in batches of the
best of several sizes, with torch's fused attention.

- training: whole steps of a Bradley-Terry loss (forward, backward, clipping, AdamW). Weights and
  moments are float32 and products bfloat16 on both sides. Pairs a second; losses are printed.
- scoring: messages to scores, tokenizing included, all in bfloat16. Conversations a second.

Medians, after a first round that is not counted. Without a GPU the model is tiny and all is
float32: that proves the program, not the speed. Without torch there is nothing to compare with.
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from material import Answered, write_pairs
from roofline import SHAPES
from score_vs_transformers import conversations
from score_vs_transformers import rmjax_side as scoring_side
from timing import Piece, Side
from trainers import make_batches, torch_steps
from trainers import rmjax_side as training_side

from rmjax.config import Config, DataConfig, OptimizerConfig

ATTRIBUTE = "reward"


def made_up_pairs(count: int, tiny: bool, seed: int = 0) -> list[Answered]:
    """Pairs of random letters: prompts of 180 and responses of 375 in the mean."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)

    def text(mean: int) -> str:
        size = int(mean * rng.uniform(0.5, 1.5)) // (8 if tiny else 1)
        return bytes(rng.choice(letters, size)).decode().strip() or "a"

    return [
        Answered([{"role": "user", "content": text(180)}], [text(375), text(375)])
        for _ in range(count)
    ]


def make_random_model(shape: tuple[int, ...], directory: Path, device: str) -> None:
    """A `LlamaForSequenceClassification` of one number, in bfloat16, and its tokenizer."""
    import torch
    import transformers

    from rmjax.data.tokenizer import byte_tokenizer

    vocabulary, embed, mlp, layers, heads, kv_heads, head_dim = shape
    tokenizer = byte_tokenizer()
    decoder = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=embed,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: ATTRIBUTE},  # by this name rmjax knows the head
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        network = transformers.LlamaForSequenceClassification(decoder)
        network.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def model_side(shape: tuple[int, ...], directory: Path, device: str) -> Callable[[Any], Piece]:
    """`make_random_model` in a process of its own, so that this one does not hold the GPU."""
    make_random_model(shape, directory, device)
    return lambda _: Piece(0.0, None)


def training_loop(
    model: str,
    steps: list[list[dict[str, Any]]],
    optimizer: OptimizerConfig,
    device: str,
) -> Callable[[tuple[int, int]], Piece]:
    """A step of so many pairs at once; asked for the number of a step and for these."""
    import torch
    import transformers

    network = _load(model, torch.float32, device).train()
    adamw = torch.optim.AdamW(
        network.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.b1, optimizer.b2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    pad = transformers.AutoTokenizer.from_pretrained(model).pad_token_id

    def loss_of(pairs: list[dict[str, Any]]) -> Any:
        tokens = [pair[name] for name in ("chosen_ids", "rejected_ids") for pair in pairs]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = network(**_padded(tokens, pad, device), use_cache=False).logits
        chosen, rejected = logits[:, 0].float().chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).sum()

    def work(request: tuple[int, int]) -> Piece:
        number, size = request
        step = steps[number]
        _synchronize(device)
        started = time.perf_counter()
        try:
            losses = []
            for start in range(0, len(step), size):
                loss = loss_of(step[start : start + size]) / len(step)
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(network.parameters(), optimizer.clip_norm)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            total = float(sum(losses))
        except torch.cuda.OutOfMemoryError:
            adamw.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return Piece(float("inf"), float("nan"))
        _synchronize(device)
        return Piece(time.perf_counter() - started, total)

    return work


def scoring_loop(
    model: str, parts: list[list[Any]], device: str
) -> Callable[[tuple[int, int]], Piece]:
    """The scores of a part, in batches of a size; asked for its number and for the size."""
    import torch
    import transformers

    network = _load(model, torch.bfloat16 if device == "cuda" else torch.float32, device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    @torch.inference_mode()
    def work(request: tuple[int, int]) -> Piece:
        number, size = request
        started = time.perf_counter()
        texts = tokenizer.apply_chat_template(parts[number], tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        try:
            # Nothing is waited for before the last batch is queued.
            found = [
                network(
                    **_padded([ids[i] for i in members], tokenizer.pad_token_id, device),
                    use_cache=False,
                ).logits[:, 0]
                for members in batches
            ]
            values = torch.cat(found).float().cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Piece(float("inf"), [])
        scores = np.empty(len(ids))
        scores[np.concatenate(batches)] = values
        return Piece(time.perf_counter() - started, scores.tolist())

    return work


def _load(model: str, dtype: Any, device: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)) if device == "cuda" else 1)
    transformers.utils.logging.disable_progress_bar()
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, attn_implementation="sdpa"
    )
    return network.to(device)


def _padded(tokens: list[list[int]], pad: int, device: str) -> dict[str, Any]:
    """A batch, padded on the right to its longest."""
    import torch

    most = max(map(len, tokens))
    ids, mask = np.full((len(tokens), most), pad), np.zeros((len(tokens), most), np.int64)
    for row, one in enumerate(tokens):
        ids[row, : len(one)], mask[row, : len(one)] = one, 1
    arrays = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


# ---- both ----------------------------------------------------------------------------------------


def alone(make: Callable[..., Any], requests: list[Any], **told: Any) -> list[Piece]:
    """The pieces of a side that has the GPU to itself; its memory is free afterwards."""
    side = Side(make, os.sched_getaffinity(0), **told)
    pieces = [side(request) for request in requests]
    side.close()
    return pieces


def best_of(pieces: list[Piece], sizes: list[int], rounds: int) -> tuple[int, list[Piece]]:
    """The size with the best median, and its pieces; `pieces` are of one size after the other."""
    by_size = {size: pieces[i * rounds : (i + 1) * rounds] for i, size in enumerate(sizes)}
    best = min(sizes, key=lambda size: statistics.median(p.seconds for p in by_size[size]))
    return best, by_size[best]


def row(task: str, side: str, amount: int, pieces: list[Piece], theirs: list[Piece]) -> str:
    """A line of the table."""
    seconds, other = (statistics.median(p.seconds for p in found) for found in (pieces, theirs))
    return f"| {task} | {side} | {amount / seconds:.2f} | {other / seconds:.2f} |"


def main() -> None:
    """Measures both sides of both tasks and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=3, help="to measure, after the first")
    args = parser.parse_args()
    if missing := [x for x in ("torch", "transformers") if not importlib.util.find_spec(x)]:
        print(f"absent: {' and '.join(missing)}, so there is nothing to compare with")
        return
    with tempfile.TemporaryDirectory(dir=args.workdir) as directory:
        run(Path(directory), args.rounds)


def run(directory: Path, rounds: int) -> None:
    """The benchmark."""
    # This process makes batches and must not take the GPU's memory; its sides' processes do.
    jax.config.update("jax_platforms", "cpu")
    device, model = find_device(), directory / "model"
    tiny = device == "cpu"
    pairs_a_step, sizes = (8, [4, 8]) if tiny else (64, [4, 8, 16])
    pairs = made_up_pairs(pairs_a_step * (rounds + 1), tiny)
    write_pairs(pairs, directory / "pairs.jsonl")
    shape = SHAPES["tiny" if tiny else "llama1b"]
    alone(model_side, [], shape=shape, directory=model, device=device)
    length = 256 if tiny else 4096
    config = Config(
        workdir=str(directory),
        data=DataConfig(
            train=str(directory / "pairs.jsonl"), attributes=(ATTRIBUTE,), max_length=length
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=0),
        batch_size=2 * pairs_a_step,
        init=str(model),
        objective="bradley_terry",
        steps=rounds + 1,
        rows_per_device=2 if tiny else 4,
        remat="dots",
    )
    batches, plan, _, _ = make_batches(config)
    steps = torch_steps("pairs", batches.data, plan)
    requests = list(range(rounds + 1))
    ours = alone(training_side, requests, clock="wall", config=config)
    asked = [(number, size) for size in sizes for number in requests]
    told: dict[str, Any] = dict(model=str(model), device=device)
    theirs = alone(training_loop, asked, steps=steps, optimizer=config.optimizer, **told)
    size, best = best_of(theirs, sizes, rounds + 1)
    print("| task | side | pairs or conversations a second | times as fast |")
    print("|---|---|---|---|")
    name = f"transformers, {size} pairs at once"
    print(row("training", name, pairs_a_step, best[1:], best[1:]))
    print(row("training", "rmjax", pairs_a_step, ours[1:], best[1:]), flush=True)
    losses = (ours[0].value, theirs[0].value)

    parts = [conversations(pairs[i * pairs_a_step : (i + 1) * pairs_a_step]) for i in range(rounds)]
    requests, sizes = list(range(rounds)), [4, 8] if tiny else [16, 64]
    scored = alone(
        scoring_side, [0, *requests], clock="wall", model=str(model), parts=parts, alone=False
    )
    asked = [(number, size) for size in sizes for number in (0, *requests)]
    size, best = best_of(alone(scoring_loop, asked, parts=parts, **told), sizes, rounds + 1)
    name = f"transformers, batches of {size}"
    print(row("scoring", name, 2 * pairs_a_step, best[1:], best[1:]))
    print(row("scoring", "rmjax", 2 * pairs_a_step, scored[1:], best[1:]), flush=True)
    values, others = ([p.value for p in found[1:]] for found in (scored, best))
    values, others = np.concatenate([v.scores for v in values]), np.concatenate(others)
    tokens = [sum(len(ids) for pair in step for ids in pair.values()) for step in steps]
    print(f"\nloss of the first step: rmjax {losses[0]:.6f}, transformers {losses[1]:.6f}")
    print(f"scores at most {np.abs(values - others).max():.1e} apart, of std {others.std():.1e}")
    print(f"{pairs_a_step} pairs a step, {statistics.mean(tokens):,.0f} tokens, prompts twice")


def find_device() -> str:
    """`cuda` or `cpu`, as JAX has it in the processes of its sides; asked in one of these."""
    return alone(device_side, [None])[0].value


def device_side() -> Callable[[Any], Piece]:
    """Says which."""
    found = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return lambda _: Piece(0.0, found)


if __name__ == "__main__":
    main()
