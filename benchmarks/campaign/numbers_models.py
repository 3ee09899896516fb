"""Models whose numbers are at their edges: scored, converted, extrapolated and sampled from.

A score must be float64's, as far as its dtype says, or be refused.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from campaign import good, reference
from campaign.hostile_models import edit
from campaign.numbers_case import Case, strict
from safetensors.numpy import load_file, save_file

from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import parse_response
from rmjax.data.tokenizer import byte_tokenizer

Change = Callable[[dict[str, np.ndarray]], object]

# How far a score may be from float64's, as a share of the sum of what it is a sum of.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.05, "fp8": 0.1}
_SUBNORMAL = 1e-37  # what is smaller may be 0
_LAYER = "model.layers.1."
_WEIGHTS = (
    *("model.embed_tokens", f"{_LAYER}input_layernorm", f"{_LAYER}self_attn.q_proj"),
    *(f"{_LAYER}self_attn.k_proj", f"{_LAYER}self_attn.v_proj", f"{_LAYER}self_attn.o_proj"),
    *(f"{_LAYER}post_attention_layernorm", f"{_LAYER}mlp.gate_proj", f"{_LAYER}mlp.up_proj"),
    *(f"{_LAYER}mlp.down_proj", "model.norm", "score"),
)
_SCORE = ["score", "model", "pairs.jsonl", "out.jsonl"]
_REFUSED = r"scores are|are not finite"


def changed(change: Change | None = None, **fields: Any) -> Callable[[Path], None]:
    """Makes `model`, its tensors changed and fields of its rmjax.json, and pairs to score."""

    def make(directory: Path) -> None:
        model = good.write_huggingface(directory / "model")
        good.write_rows(directory / "pairs.jsonl", good.pair_rows(2))
        edit(model / "rmjax.json", **fields)
        if change:
            tensors = load_file(model / "model.safetensors")
            change(tensors)
            save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return make


def write_policy(directory: Path, change: Change | None = None) -> Path:
    """A `LlamaForCausalLM` of the sizes of `good.DECODER`."""
    model = good.write_huggingface(directory)
    (model / "rmjax.json").unlink()
    edit(model / "config.json", architectures=["LlamaForCausalLM"])
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    del tensors["score.weight"]
    if change:
        change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def times(key: str, factor: float) -> Change:
    """Multiplies all tensors whose name ends so."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith(f"{key}.weight"):
                tensors[name] = (tensors[name].astype(np.float64) * factor).astype(np.float32)

    return change


def put(key: str, place: Any, value: float) -> Change:
    """Puts a number into a tensor."""
    return lambda tensors: tensors[f"{key}.weight"].__setitem__(place, value)


def as_float64(precision: str) -> Callable[[Path], str]:
    """Checks what `rmjax.score` has written against the reference."""

    def found(directory: Path) -> str:
        tensors = load_file(directory / "model" / "model.safetensors")
        encoder = ChatEncoder(byte_tokenizer())
        for line in (directory / "out.jsonl").read_text().splitlines():
            row = strict(line)
            for text, own in zip((row["chosen"], row["rejected"]), row["attributes"]):
                said = parse_response(row["prompt"], text)
                wanted = reference.scores(tensors, encoder.encode(said, "a row").tolist())
                head = tensors["score.weight"].astype(np.float64)
                norm = np.abs(tensors["model.norm.weight"].astype(np.float64))
                most = np.linalg.norm(head * norm, axis=1) * math.sqrt(head.shape[1])
                error = np.abs(np.asarray([*own.values()]) - wanted)
                if not (error <= _TOLERANCES[precision] * most + _SUBNORMAL).all():
                    return f"scores {own}, and float64 has {wanted}"
        return ""

    return found


def weight_cases() -> Iterator[Case]:
    """A weight that is no number, or very large or small, in each kind of tensor."""
    for number, key in enumerate(_WEIGHTS):
        for value in (math.nan, math.inf):
            if key == "model.embed_tokens":
                make = changed(put(key, ..., value))
            else:
                make = changed(put(key, (0,) * (1 if "norm" in key else 2), value))
            # Infinity in a gate or a key may come to 0 or 1 in float64, too.
            found = as_float64("float32") if value == math.inf else None
            yield Case(f"score: {key} has {value}", make, _SCORE, _REFUSED, found=found)
        value = (math.nan, -math.inf)[number % 2]
        make = changed(put(key, (-1,) * (1 if "norm" in key else 2), value))
        convert = ["convert", "hf-to-orbax", "model", "out"]
        yield Case(f"convert: {key} has {value}", make, convert, rf"{key}\.weight.*not finite")
    unused = changed(put("model.embed_tokens", (7, 3), math.nan))  # a byte that no text has
    yield Case("score: NaN that is not read", unused, _SCORE, found=as_float64("float32"))
    for key, factors in {
        "embed_tokens": (1e-30, 1e10, 1e17, 1e20, 1e37),
        "q_proj": (0, 1e12, 1e20, 1e35), "k_proj": (1e35,), "v_proj": (1e15, 1e20, 1e37),
        "o_proj": (0, 1e20, 1e37), "gate_proj": (1e20, 1e37), "up_proj": (1e18, 1e37),
        "down_proj": (0, 1e17, 1e21, 1e37), "layernorm": (1e20, 1e37),
        "model.norm": (0, 1e30, 1e37), "score": (0, 1e-44, 1e-30, 1e4, 1e30, 1e37),
    }.items():  # fmt: skip
        for factor in factors:
            make = changed(times(key, factor))
            name = f"score: {key} times {factor:g}"
            yield Case(name, make, _SCORE, _REFUSED, found=as_float64("float32"))


def precision_cases() -> Iterator[Case]:
    """bfloat16 and 8 bits: channels of zeros, of 1e30, and scores up to 1e37."""
    for precision in ("bfloat16", "int8", "fp8"):
        option = "dtype" if precision == "bfloat16" else "quantize"
        arguments = [*_SCORE, f"--{option}={precision}"]
        found = as_float64(precision)
        for factor in (1e4, 1e19, 1e30, 1e37):
            make = changed(times("score", factor))
            yield Case(f"{precision}: scores of {factor:g}", make, arguments, found=found)
        changes: dict[str, Change] = {
            f"a channel of zeros in {name}": put(f"{_LAYER}{name}", 0, 0.0)
            for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
        }
        changes["a matrix of zeros"] = times("down_proj", 0)
        changes["a channel of 1e15"] = put(f"{_LAYER}mlp.down_proj", 0, 1e15)
        changes["a channel of 1e30"] = put(f"{_LAYER}mlp.down_proj", 0, 1e30)
        changes["a channel of NaN"] = put(f"{_LAYER}mlp.down_proj", 0, math.nan)
        changes["a channel of infinity"] = put(f"{_LAYER}self_attn.v_proj", 0, math.inf)
        for what, change in changes.items():
            stops = _REFUSED if "zeros" not in what and "1e15" not in what else ""
            yield Case(f"{precision}: {what}", changed(change), arguments, stops, found=found)


def rule_cases() -> Iterator[Case]:
    """How numbers become a value: rules, offsets, thresholds, temperatures, beta."""
    for text in ("NaN", "Infinity", "-Infinity", "1e400", "1e31", "true", '"1"', "null", "1e-60"):
        arguments = [*_SCORE, f'--value={{"wit": {text}}}']
        yield Case(f"--value: a weight of {text}", changed(), arguments, "scalar rule")
        fitted = {"format": "rmjax.weights/1", "source": "", "pairs": 1, "prompts": []}

        def make(directory: Path, text: str = text, fitted: dict[str, Any] = fitted) -> None:
            changed()(directory)
            whole = json.dumps(fitted)[:-1] + f', "weights": {{"wit": {text}}}}}'
            (directory / "w.json").write_text(whole)

        yield Case(
            f"weights.json: {text}", make, [*_SCORE, "--value=w.json"], "w.json|scalar rule",
            found=None if text not in ("true", '"1"') else lambda d: "",
        )  # fmt: skip

    def pairs(directory: Path) -> None:
        changed()(directory)
        text = '{"format": "rmjax.weights/1", "weights": {"wit": 1}, "pairs": Infinity,'
        (directory / "w.json").write_text(text + ' "source": "", "prompts": []}')

    yield Case("weights.json: infinite pairs", pairs, [*_SCORE, "--value=w.json"], r"w\.json")
    scale = {"lowest": 0, "highest": 2, "attributes": ["wit"]}
    for what, fields in {
        "scalar NaN": {"scalar": {"wit": math.nan}},
        "offset infinite": {"offset": {"wit": math.inf}},
        "offset 1e31": {"offset": {"wit": 1e31}},
        "thresholds NaN": {"ordinal": scale | {"thresholds": [[math.nan, 1.0]]}},
        "thresholds infinite": {"ordinal": scale | {"thresholds": [[0.0, math.inf]]}},
        "thresholds that fall": {"ordinal": scale | {"thresholds": [[1.0, 0.0]]}},
        "levels that are none": {"ordinal": scale | {"highest": math.nan, "thresholds": [[]]}},
        "beta 0": {"general_preference": {"beta": 0}},
        "beta NaN": {"general_preference": {"beta": math.nan}},
        "beta below 0": {"general_preference": {"beta": -1.0}},
        "temperature 0": {"temperature": {"value": 0, "rule": "wit", "pairs": 1}},
        "temperature NaN": {"temperature": {"value": math.nan, "rule": "wit", "pairs": 1}},
        "temperature below 0": {"temperature": {"value": -1.0, "rule": "wit", "pairs": 1}},
    }.items():
        yield Case(f"rmjax.json: {what}", changed(**fields), _SCORE, r"rmjax\.json")
    edges: dict[str, Any] = {"ordinal": scale | {"thresholds": [[-1e30, 1e30]]}}
    yield Case("rmjax.json: thresholds of 1e30", changed(**edges), _SCORE)


def conversion_cases() -> Iterator[Case]:
    """Dtypes too small, heads folded to infinity, and lines that lead beyond float32."""
    from campaign import forks

    def orbax(make: Callable[[Path], None]) -> Callable[[Path], None]:
        def both(directory: Path) -> None:
            make(directory)
            ended = forks.run(["convert", "hf-to-orbax", "model", "orbax"], directory)
            if ended.code:
                raise SystemExit(ended.text)

        return both

    def export(*more: str) -> list[str]:
        return ["convert", "orbax-to-hf", "orbax", "out", *more]

    for dtype, value, stops in (
        ("float16", 1e5, "float16"), ("float16", 65504.0, ""), ("bfloat16", 3.4e38, "bfloat16"),
        ("bfloat16", 3.3e38, ""), ("float32", 3.4e38, ""),
    ):  # fmt: skip
        make = orbax(changed(put(f"{_LAYER}mlp.up_proj", (0, 0), value)))
        yield Case(f"export to {dtype}: a weight of {value:g}", make, export(f"--dtype={dtype}"),
                   stops and rf"up_proj\.weight.*not finite in {stops}")  # fmt: skip
    fold = '--value={"wit": 1e29, "care": 1e29}'
    large = changed(times("score", 1e20))
    yield Case("export: a fold to infinity", orbax(large), export(fold), r"score\.weight")
    offset = changed(offset={"wit": 1e29})
    yield Case("export: an offset folded", orbax(offset), export(fold), "offset")
    for alpha, stops in {"nan": "alpha", "inf": "alpha", "1e39": "alpha", "1e38": "not finite",
                         "-1e38": "not finite", "0": "", "1": "", "1.5": ""}.items():  # fmt: skip
        arguments = ["extrapolate", "model", "strong", "out", f"--alpha={alpha}"]
        yield Case(f"extrapolate: alpha {alpha}", _two(times("proj", 1e4)), arguments, stops)
    arguments = ["extrapolate", "model", "strong", "out", "--alpha=0.5"]
    opposite = put("model.norm", 0, -3.4e38)
    yield Case("extrapolate: 3.4e38 to -3.4e38", _two(opposite, put("model.norm", 0, 3.4e38)),
               arguments, r"model\.norm.*not finite")  # fmt: skip
    arguments = ["extrapolate", "model", "strong", "out", "--alpha=100"]
    yield Case("extrapolate: an offset beyond", _two(times("proj", 2), offset={"wit": 9e29}),
               arguments, "offset")  # fmt: skip


def _two(strong: Change, weak: Change | None = None, **fields: Any) -> Callable[[Path], None]:
    """Makes `model` and `strong`."""

    def make(directory: Path) -> None:
        changed(strong, **fields)(directory)
        (directory / "model").rename(directory / "strong")
        changed(weak)(directory)

    return make


def sampling_cases() -> Iterator[Case]:
    """Language models whose logits are no numbers, or very large; rules at their edges."""

    def policy(change: Change | None = None) -> Callable[[Path], None]:
        def make(directory: Path) -> None:
            write_policy(directory / "model", change)
            good.write_rows(directory / "prompts.jsonl", [{"prompt": "Say it."}] * 2)

        return make

    sample = ["sample", "model", "prompts.jsonl", "out.jsonl", "--max-tokens=4"]
    sample += ["--log-probabilities"]
    for key, value in (("lm_head", math.nan), ("model.norm", math.inf)):
        make = policy(put(key, 0, value))
        yield Case(f"sample: {key} has {value}", make, sample, "not finite")
    for factor in (0, 1e10, 1e30, 1e37):
        make = policy(times("lm_head", factor))
        yield Case(f"sample: lm_head times {factor:g}", make, sample, "not finite",
                   found=lambda d: "")  # fmt: skip
    for option in ("temperature=1e-40", "temperature=1e-300", "temperature=1e30", "top-p=1e-300"):
        yield Case(f"sample: --{option}", policy(), [*sample, f"--{option}"], option[:3],
                   found=lambda d: "")  # fmt: skip
    for option in ("temperature=nan", "temperature=inf", "top-p=nan"):
        yield Case(f"sample: --{option}", policy(), [*sample, f"--{option}"], option[:3])
