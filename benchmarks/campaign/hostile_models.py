"""Hostile and broken files of models: what becomes of a good directory, by kind of file.

A case is a name and a function that spoils a directory. The functions are made by hand, or by a
generator from a seed; each command that reads such a directory must refuse it.
"""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], None]
Case = tuple[str, Spoil]

HUGE = 10**9
VALUES: tuple[Any, ...] = (
    None, True, "", "x", "\x1b[31m\u202e", -1, 0, 0.5, 10**9, 10**30, 10**400,
    float("nan"), float("inf"), [], [1], [[]], {}, {"a": {}}, ["LlamaForCausalLM"] * 3,
)  # fmt: skip


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def nested(depth: int, inner: str = "1") -> str:
    """JSON of so many lists, one in the other."""
    return "[" * depth + inner + "]" * depth


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and the bytes behind it."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(file: Path, header: str | bytes, body: bytes, length: int | None = None) -> None:
    """Writes a safetensors file of any header, and of any length that it claims."""
    text = header.encode() if isinstance(header, str) else header
    count = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", count % 2**64) + text + body)


def safetensors_cases(seed: int) -> Iterator[Case]:
    """Headers that lie, tensors that overlap, dtypes, shapes, keys and numbers."""
    name, key = "model.safetensors", "model.norm.weight"

    def header_case(change: Callable[[dict[str, Any]], str | None]) -> Spoil:
        def spoil(d: Path) -> None:
            header, body = header_of(d / name)
            text = change(header)
            put_header(d / name, json.dumps(header) if text is None else text, body)

        return spoil

    def field_case(field: str, value: Any) -> Spoil:
        return header_case(lambda header: header[key].__setitem__(field, value))

    for length in (0, 1, 7, 100, 10**6, 2**31, 2**32 + 8, 10**9, 2**62, 2**63, 2**64 - 1):

        def claims(d: Path, length: int = length) -> None:
            header, body = header_of(d / name)
            put_header(d / name, json.dumps(header), body, length)

        yield f"header length {length}", claims
    for text in ("", "{", "null", "[]", "1", '"x"', "\0" * 8, "{}", nested(100), nested(100_000),
                 '{"a":' * 10_000, '{"__metadata__": 5}', "\ufeff{}"):  # fmt: skip

        def replaced(d: Path, text: str = text) -> None:
            put_header(d / name, text, b"")

        yield f"header {text[:20]!r} of {len(text)}", replaced
    for value in ([0, 10**18], [-4, 124], [128, 0], [0, 0], [4, 132], [1, 129], [0], [], "x", None,
                  [0, 2**64], [0.5, 128.5], [[0], [128]]):  # fmt: skip
        yield f"offsets {value}", field_case("data_offsets", value)
    for value in ([], [32, 1], [-32], [16], [10**18], [2**63, 2], [0], "x", None, [[32]], [32.0]):
        yield f"shape {value}", field_case("shape", value)
    for value in ("F64", "I8", "BOOL", "F8_E4M3", "F4", "U64", "C64", "float32", "", None, 5,
                  "\x1b[2J", "O"):  # fmt: skip
        yield f"dtype {value!r}", field_case("dtype", value)
    yield (
        "a key twice",
        header_case(
            lambda h: json.dumps(h)[:-1] + f', "{key}": {json.dumps(h["score.weight"])}' + "}"
        ),
    )
    yield (
        "a key of terminal codes",
        header_case(lambda h: h.__setitem__("\x1b]0;owned\x07\u202e", h.pop(key))),
    )
    yield "a key of 10 MB", header_case(lambda h: h.__setitem__("k" * 10**7, h.pop(key)))
    yield "200,000 empty tensors", header_case(
        lambda h: h.update({
            f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            for n in range(200_000)
        })
    )  # fmt: skip
    for what in (float("nan"), float("inf"), -float("inf")):

        def poisoned(d: Path, what: float = what) -> None:
            data = bytearray((d / name).read_bytes())
            data[-4:] = struct.pack("<f", what)
            (d / name).write_bytes(data)

        yield f"weights with {what}", poisoned
    rng = random.Random(seed)
    for number in range(30):
        share = rng.random()

        def cut(d: Path, share: float = share) -> None:
            data = (d / name).read_bytes()
            (d / name).write_bytes(data[: int(share * (len(data) - 1))])

        yield f"cut {number} at {share:.3f}", cut
    for number in range(30):
        place, value = rng.random(), rng.randrange(256)

        def flipped(d: Path, place: float = place, value: int = value) -> None:
            data = bytearray((d / name).read_bytes())
            size = int.from_bytes(data[:8], "little")
            data[int(place * (8 + size))] ^= value or 1
            (d / name).write_bytes(data)

        yield f"a byte of the header {number}", flipped


def config_cases(seed: int) -> Iterator[Case]:
    """`config.json`: each field missing, of another type, huge; files that are no JSON."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
              "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
              "architectures", "id2label", "num_labels", "layer_types", "model_type",
              "tie_word_embeddings", "hidden_act")  # fmt: skip
    rng = random.Random(seed)
    for field in needed:
        for value in rng.sample(VALUES, 6):

            def changed(d: Path, field: str = field, value: Any = value) -> None:
                edit(d / "config.json", **{field: value})

            yield f"{field} {str(value)[:20]!r}", changed
    for field in needed[:6]:

        def large(d: Path, field: str = field) -> None:
            edit(d / "config.json", **{field: HUGE})

        yield f"{field} of 10^9", large

    def many_labels(d: Path) -> None:
        edit(d / "config.json", id2label=None, num_labels=HUGE)

    yield "10^9 labels", many_labels
    yield from text_cases("config.json")


def edit(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON object."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def text_cases(name: str) -> Iterator[Case]:
    """A JSON file that is none."""
    texts: dict[str, bytes] = {
        "empty": b"", "null": b"null", "a list": b"[1]", "cut": b'{"a": ',
        "not UTF-8": b"\xff\xfe{", "null bytes": b"\0" * 100,
        "deep lists": nested(100_000).encode(),
        "deep objects": b'{"a":' * 100_000, "a huge integer": b'{"a": ' + b"9" * 10**6 + b"}",
        "terminal codes": b'{"model_type": "\\u001b[31mred\\u202e"}', "50 MB": b" " * (50 << 20),
        "a nested object": b'{"a": ' + nested(900).encode() + b"}",
    }  # fmt: skip
    for what, text in texts.items():

        def written(d: Path, text: bytes = text) -> None:
            (d / name).write_bytes(text)

        yield f"{name}: {what}", written

    def directory(d: Path) -> None:
        (d / name).unlink()
        (d / name).mkdir()

    def loop(d: Path) -> None:
        (d / name).unlink()
        (d / name).symlink_to(name)

    def device(d: Path) -> None:
        (d / name).unlink()
        (d / name).symlink_to("/dev/zero")

    def pipe(d: Path) -> None:
        (d / name).unlink()
        os.mkfifo(d / name)

    yield f"{name}: a directory", directory
    yield f"{name}: a link to itself", loop
    yield f"{name}: a device without end", device
    yield f"{name}: a pipe that nobody writes to", pipe


def index_cases(outside: Path) -> Iterator[Case]:
    """Index files that name what is outside, and pickles."""
    names = ("../outside/model.safetensors", str(outside / "model.safetensors"), "..", ".", "", "/",
             "a/../../outside/model.safetensors", "model.safetensors\0", "x" * 5000, "\x1b[31mx",
             "pytorch_model.bin", "/dev/zero", "//etc/passwd")  # fmt: skip
    for name in names:

        def named(d: Path, name: str = name) -> None:
            header, _ = header_of(d / "model.safetensors")
            (d / "model.safetensors").unlink()
            index = {"weight_map": dict.fromkeys(header, name)}
            (d / "model.safetensors.index.json").write_text(json.dumps(index))

        yield f"an index that names {name[:40]!r}", named
    for value in (None, [], 5, {"a": 5}, {"a": None}, {}, {"a": ["b"]}):

        def mapped(d: Path, value: Any = value) -> None:
            (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))

        yield f"an index of {value}", mapped

    def pickled(name: str) -> Spoil:
        def spoil(d: Path) -> None:
            (d / "model.safetensors").unlink()
            (d / name).write_bytes(pickle.dumps(Bomb()))

        return spoil

    for name in ("pytorch_model.bin", "model.pth", "model.safetensors", "consolidated.00.pth"):
        yield f"a pickle called {name}", pickled(name)


def spec_cases(seed: int) -> Iterator[Case]:
    """`rmjax.json`."""
    rng = random.Random(seed)
    for field in ("attributes", "scalar", "max_length", "lora", "ordinal", "general_preference",
                  "temperature", "suffix_turn", "folded", "offset"):  # fmt: skip
        for value in rng.sample([v for v in VALUES if v is not None], 6):

            def changed(d: Path, field: str = field, value: Any = value) -> None:
                edit(d / "rmjax.json", **{field: value})

            yield f"rmjax.json: {field} {str(value)[:20]!r}", changed
    yield from text_cases("rmjax.json")


def tokenizer_cases() -> Iterator[Case]:
    """`tokenizer.json` and what stands beside it."""
    yield from text_cases("tokenizer.json")
    for what, value in {
        "no model": {"model": None}, "another model": {"model": {"type": "Evil"}},
        "a pattern without end": {"pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
            "invert": False}},
        "added tokens": {"added_tokens": [{"id": -1, "content": "x"}]},
        "a vocabulary of words": {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
        "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
        "ids of 10^9": {"model": {"type": "BPE", "vocab": {"a": HUGE}, "merges": []}},
    }.items():  # fmt: skip

        def changed(d: Path, value: dict[str, Any] = value) -> None:
            edit(d / "tokenizer.json", **value)

        yield f"tokenizer.json: {what}", changed

    def remote(d: Path) -> None:
        code = "import os\nos.system('touch ran')\nclass T: pass\n"
        (d / "evil.py").write_text(code)
        edit(d / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]},
             tokenizer_class="T")  # fmt: skip

    yield "a tokenizer of its own code", remote
    yield from text_cases("tokenizer_config.json")


TEMPLATES = {
    "a loop without end": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}x",
    "memory": "{{ 'a' * 10000000000 }}",
    "memory by doubling": "{% set ns = namespace(x='a' * 1000) %}{% for i in range(40) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "memory by a filter": "{{ 'a' | center(9999999999) }}",
    "memory by a method": "{{ 'a'.ljust(9999999999) }}",
    "memory by a format": "{{ '%9999999999d' % 1 }}",
    "memory by a list": "{{ ([1] * 1000000000) | length }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a range": "{{ range(1000000000) | list }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch ran').read() }}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attributes by a filter": "{{ messages | attr('__class__') | attr('__mro__') }}",
    "an include": "{% include '../outside/secret.txt' %}",
    "an import": "{% import '/etc/passwd' as x %}",
    "an extension": "{% extends 'secret.txt' %}",
    "messages that it changes": "{{ messages.append(messages) }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a syntax error": "{% for %}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a refusal": "{{ raise_exception('\x1b[31mno\u202e') }}",
    "nothing": "",
    "no response": "{{ bos_token }}x",
}


def template_cases() -> Iterator[Case]:
    """Chat templates."""
    for what, text in TEMPLATES.items():

        def written(d: Path, text: str = text) -> None:
            (d / "chat_template.jinja").write_text(text)

        yield f"a template with {what}", written


def orbax_cases(seed: int) -> Iterator[Case]:
    """Every file of a converted model: cut, emptied, a bit flipped, replaced by nonsense."""
    rng = random.Random(seed)

    def of_file(change: Callable[[bytes, random.Random], bytes], number: int) -> Spoil:
        def spoil(d: Path) -> None:
            files = sorted(p for p in (d / "checkpoint").rglob("*") if p.is_file())
            chosen = files[number % len(files)]
            chosen.write_bytes(change(chosen.read_bytes(), random.Random(number)))

        return spoil

    def flip(data: bytes, chooser: random.Random) -> bytes:
        changed = bytearray(data or b"\0")
        changed[chooser.randrange(len(changed))] ^= 1 << chooser.randrange(8)
        return bytes(changed)

    ways: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "cut": lambda data, _: data[: len(data) // 2],
        "emptied": lambda data, _: b"",
        "flipped": flip,
        "deep": lambda data, _: nested(100_000).encode(),
        "nonsense": lambda data, _: b'{"a": {"b": 1e999}, "zarr_format": 9}',
    }
    for what, change in ways.items():
        for number in rng.sample(range(1000), 6):
            yield f"orbax: file {number} {what}", of_file(change, number)
