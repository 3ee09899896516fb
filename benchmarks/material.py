"""What the benchmarks measure with: real pairs, real dialogues, real weights.

Data: Anthropic's hh-rlhf `harmless-base/test` (`chosen`, `rejected`, with texts that offend) and
USR's ratings of Topical-Chat replies (six to each of 60 dialogues). Weights: SmolLM2-135M-Instruct.
"""

import contextlib
import gzip
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.messages import Message

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
RATINGS = ("naturalness", "coherence", "engagingness", "groundedness", "understandability")


class Answered(NamedTuple):
    """A prompt and responses to it; of a pair the chosen one is first."""

    prompt: list[Message]
    responses: list[str]


def split_turns(text: str) -> list[Message]:
    """The messages of one of hh-rlhf's dialogues."""
    first, *rest = _TURN.split(text)
    if first.strip():
        raise ValueError(f"a dialogue begins with {first[:50]!r}, not with a turn")
    return [
        {"role": _ROLES[name], "content": content.strip()}
        for name, content in zip(rest[::2], rest[1::2])
    ]


def read_pairs(path: Path, seed: int = 0) -> list[Answered]:
    """The pairs in a fixed shuffled order, less those whose prompts differ or lack a response."""
    pairs = []
    for line in gzip.decompress(path.read_bytes()).splitlines():
        row = json.loads(line)
        chosen, rejected = split_turns(row["chosen"]), split_turns(row["rejected"])
        same = chosen[:-1] == rejected[:-1] and chosen[-1]["role"] == rejected[-1]["role"]
        responses = [chosen[-1]["content"], rejected[-1]["content"]]
        if same and chosen[-1]["role"] == "assistant" and all(responses):
            pairs.append(Answered(chosen[:-1], responses))
    random.Random(seed).shuffle(pairs)
    return pairs


def read_dialogues(path: Path) -> list[Answered]:
    """The dialogues with their replies, in the file's order."""
    dialogues: dict[str, Answered] = {}
    for line in path.read_bytes().splitlines():
        row = json.loads(line)
        key = json.dumps(row["prompt"])
        dialogues.setdefault(key, Answered(row["prompt"], [])).responses.append(row["response"])
    return list(dialogues.values())


def best_of(dialogues: Sequence[Answered], count: int, seed: int = 0) -> list[Answered]:
    """`count` distinct responses to each prompt: its own, and others drawn from all dialogues."""
    everything = sorted({response for d in dialogues for response in d.responses})
    chooser = random.Random(seed)
    made = []
    for prompt, responses in dialogues:
        own = list(dict.fromkeys(responses))[:count]
        others = chooser.sample(sorted(set(everything) - set(own)), count - len(own))
        made.append(Answered(prompt, own + others))
    return made


def judged_pairs(path: Path) -> list[Answered]:
    """Pairs of long answers to long prompts, as JudgeBench has them, of RM-Bench's chat domain.

    A prompt is a question with one of its answers, which is to be improved on. The two responses
    are other answers, each followed by some of a third, so that lengths differ as judges meet them.
    """
    pairs: list[Answered] = []
    for row in json.loads(path.read_bytes()):
        good, bad = row["chosen"], row["rejected"]
        if min(map(len, (*good[1:], *bad[1:]))) < 1800:  # characters, some 400 tokens
            continue
        asked = f"{row['prompt']}\n\nImprove on this answer:\n\n{bad[2]}"
        responses = []
        for number, (first, more) in enumerate(((good[1], good[2]), (bad[1], good[2]))):
            words = more.split(" ")
            share = (2 * len(pairs) + 5 * number) % 9 / 8
            added = " ".join(words[: round(share * len(words))])
            responses.append(f"{first}\n\n{added}".strip())
        pairs.append(Answered([{"role": "user", "content": asked}], responses))
    return pairs


def write_pairs(pairs: Sequence[Answered], path: Path) -> None:
    """The pairs as rmjax reads them."""
    with open(path, "w", encoding="utf-8") as file:
        for prompt, (chosen, rejected) in pairs:
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def made_up_pairs(count: int, seed: int = 0) -> list[Answered]:
    """Pairs of words that say nothing, for a model that is as random."""
    chooser, words = random.Random(seed), ("tea", "snow", "rain", "maps", "bees", "bread", "so")

    def text() -> str:
        return " ".join(chooser.choices(words, k=chooser.randint(1, 12)))

    return [
        Answered([{"role": "user", "content": f"{number}: {text()}?"}], [f"{text()}.", text()])
        for number in range(count)
    ]


def make_language_model(weights: str, directory: Path) -> Path:
    """A `LlamaForCausalLM` of these weights, made once; of none a tiny random one."""
    model = directory / ("language_model" if weights else "tiny_language_model")
    if model.exists():
        return model
    if not weights:
        import torch
        import transformers

        from rmjax.data.tokenizer import byte_tokenizer

        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        decoder = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
        )
        transformers.LlamaForCausalLM(decoder).save_pretrained(model)
        tokenizer.save_pretrained(model)
        return model
    orbax = directory / "language_model_orbax"
    with contextlib.redirect_stdout(None):
        if not orbax.exists():
            hf_to_orbax(weights, str(orbax), language_model=True)
        orbax_to_hf(str(orbax), str(model))
    shutil.rmtree(orbax)
    return model


def make_model(weights: str, attributes: Sequence[str], directory: Path) -> Path:
    """A `LlamaForSequenceClassification` of these weights and a fresh head, made once."""
    model = directory / f"model_{len(attributes)}"
    if not model.exists():
        orbax = directory / f"{model.name}_orbax"
        with contextlib.redirect_stdout(None):
            if not orbax.exists():
                hf_to_orbax(weights, str(orbax), attributes=attributes)
            orbax_to_hf(str(orbax), str(model))
        shutil.rmtree(orbax)
    return model
