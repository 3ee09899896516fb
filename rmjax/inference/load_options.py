"""Options of `rmjax.load` on a command line, the same for every command that scores.

A command adds them before it imports what it runs, so nothing that computes is imported at the top.
"""

import argparse
from typing import Any


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_options` reads."""
    add = parser.add_argument
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--quantize", default="", help="int8 or fp8; see docs/score.md")
    add("--chat-template", default="", metavar="NAME", help="which of MODEL's, if it has several")
    add("--head", help="where a causal model's reward is; see docs/convert.md")
    add("--suffix-turn", default="", metavar="QUESTION", help="what is asked after a response")
    add("--mesh", default="fsdp:-1", metavar="AXIS:SIZE,...", help="of this host's devices")


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keywords of `rmjax.load`.

    Raises:
      UserError: a head or a mesh is none.
    """
    from rmjax.checkpoints.causal_heads import parse_head
    from rmjax.runtime.sharding import parse_mesh

    return {
        "dtype": args.dtype,
        "quantize": args.quantize,
        "chat_template": args.chat_template,
        "head": None if args.head is None else parse_head(args.head),
        "suffix_turn": args.suffix_turn,
        "mesh": parse_mesh(args.mesh),
    }
