"""What reports are made of."""

import gzip
import json

import numpy as np

from rmjax.reports import plots
from rmjax.reports.document import (
    Collapsible,
    Document,
    Example,
    Facts,
    Figure,
    Heading,
    Headline,
    Paragraph,
    Table,
    Text,
    Warning,
)

RATED = [
    {"prompt": "p1", "response": "aa", "good": 4, "long": 0, "note": "x"},
    {"prompt": "p1", "response": "bbbb", "good": 2, "long": 2, "note": "y"},
    {"prompt": "p1", "response": "c" * 6, "good": 2, "long": 4, "note": "y"},
    {"prompt": "p2", "response": "d", "good": 1, "long": None, "note": "z"},
    {"prompt": "p2", "response": "e" * 9, "good": 3, "long": 4, "note": "z"},
    {
        "prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc",
        "response": "f" * 3,
        "good": 0,
        "long": 1,
        "note": "<script>",
    },
]


def pair(first, second, strength, prompt="p1", split="train"):
    return {
        "prompt": prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": strength,
        "split": split,
    }


PAIRS = [
    pair("aa", "bbbb", -2),  # 4 over 2: agrees
    pair("bbbb", "c" * 6, 1),  # 2 and 2: equal
    pair("d", "e" * 9, 3, prompt="p2"),  # 3 over 1: agrees
    pair("e" * 9, "d", 3, prompt="p2"),  # 1 over 3: opposite, and contradicts the row above
    pair("aa", "c" * 6, 0),  # a tie, 2 apart
    pair("x", "yy", -1),  # not rated
    pair("same", "same", 1, prompt="p3"),
    pair("aa", "zz", -1, split="validation"),
]


def write_lines(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


HOSTILE = (
    "<script>alert(1)</script> \"' & | `code` **bold** _it_ [a](http://evil.example) ![b](c.png) "
    "$x^2$ # @someone \x1b[31mred\x00 \ud800 \u202etxet\n\n- item\n```\nfence\n~~~ </div></svg>"
)


def everything(text: str = HOSTILE) -> Document:
    """A document with every block and every plot, `text` in every place."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0.5, 1, 200)
    right = (margins > 0).astype(float)
    drawings = {
        "histograms": plots.histograms({text: margins, "b": margins + 1}, text),
        "distributions": plots.distributions({text: margins, "b": margins + 1}, text),
        "margins": plots.margin_histogram(margins, text),
        "columns": plots.columns([text, "b"], {text: [0.5, 0.5], "c": [0.1, 0.9]}, text, text),
        "boxes": plots.boxes({text: margins, "b": []}, text),
        "reliability": plots.reliability(1 / (1 + np.exp(-abs(margins))), right),
        "matrix": plots.correlation_matrix([text, "b"], np.array([[1, -0.5], [np.nan, 1]])),
        "length": plots.accuracy_by_length(margins * 100, right, text),
        "bars": plots.bars([text, "b"], [0.5, np.nan], text, [0.4, 0.1], [0.6, 0.2], 0.5),
        "curves": plots.curves([plots.Curve(text, range(200), margins, rough=True)], text, text),
        "best": plots.best_of_n([plots.Curve(text, [1, 2, 4], [1, 2, 3])], text),
    }
    figures = tuple(Figure(d, name, text, text) for name, d in drawings.items())
    example = Example(
        text,
        (Text(text, text, "prompt"), Text(text, text, "chosen", ((text, text),))),
        ((text, text),),
    )
    table = Table((text, text), ((text, text), ("x", "y")), text, text, strong=(1,))
    blocks = (
        Heading(text),
        Heading(text, 3),
        Heading("two"),
        Heading("three"),
        Heading("four"),
        Paragraph(text),
        Warning(text),
        Headline(((text, text, text),)),
        Facts(((text, text),)),
        table,
        *figures,
        example,
        Collapsible(text, (Paragraph(text), table, Figure(figures[0].drawing, "in", text, text))),
    )
    return Document(text, text, ((text, text),), blocks)


def prompt_rows(rewards, texts=(), lengths=(), ended=(), attributes=None, start=0):
    """Rows of a file of samples, one answer to each prompt."""
    rows = []
    for number, reward in enumerate(rewards):
        length = lengths[number] if lengths else 4
        row = {
            "prompt": [{"role": "user", "content": f"question {start + number}"}],
            "responses": [texts[number] if texts else f"answer {number}"],
            "ended": [ended[number] if ended else True],
            "scores": [reward],
            "token_ids": [[*range(length)]],
            "log_probabilities": [[-1.0] * length],
        }
        rows.append(row | ({"attributes": [attributes[number]]} if attributes else {}))
    return rows


def write_alignment(directory, logged, held_out, **config):
    """The records of a run of `rmjax.align` that never was.

    Args:
      directory: is made.
      logged: the metrics of each step, from 1; what is left out is as in a quiet run.
      held_out: by step, rows of answers to held-out prompts.
      config: other values of it.
    """
    (directory / "rollouts").mkdir(parents=True)
    fields = {
        "objective": "reinforce",
        "init": "policy",
        "rewards.teacher.model": "reward",
        "rewards.teacher.weight": 1.0,
        "rollout.n": 2,
        "batch_size": 4,
        "steps": 6,
        "seed": 0,
        "data.train": "prompts.jsonl",
        "data.validation": "held.jsonl",
    }
    record = {"format": "rmjax-run", "config": fields | config, "devices": "1 x"}
    (directory / "config.json").write_text(json.dumps(record | {"versions": {"jax": "0"}}))
    quiet = {
        "reward": 1.0, "kl": 0.5, "entropy": 0.7, "length": 4.0, "ended": 1.0, "loss": 0.1,
        "grad_norm": 1.0, "without_reward": 0.0, "without_advantage": 0.0, "sampler_gap": 1e-7,
        "tokens": 16, "seconds_sampling": 2.0, "seconds_scoring": 1.0, "seconds_updating": 1.0,
    }  # fmt: skip
    for number in range(1 + len(logged)):
        if number:
            add_line(directory, {"step": number} | quiet | logged[number - 1])
            rows = prompt_rows([1.0, -1.0], ["the best of all", "the worst of all"])
            write_lines(directory / "rollouts" / f"step-{number:06d}.jsonl", rows)
        if number in held_out:
            add_evaluation(directory, number, held_out[number])
    return directory


def add_line(directory, line):
    with open(directory / "metrics.jsonl", "a") as file:
        print(json.dumps(line), file=file)


def add_evaluation(directory, step, rows):
    """Held-out answers and what is logged of them."""
    write_lines(directory / "rollouts" / f"held-out-{step:06d}.jsonl", rows)
    scores = [row["scores"][0] for row in rows if row["scores"][0] is not None]
    line = {
        "step": step,
        "held_out/reward": float(np.mean(scores)) if scores else None,
        "held_out/length": float(np.mean([len(row["token_ids"][0]) for row in rows])),
        "held_out/ended": float(np.mean([row["ended"][0] for row in rows])),
    }
    add_line(directory, line)
