"""Hostile and broken data: JSON lines, JSON, CSV, parquet, Arrow, and what is compressed."""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from campaign.good import pair_rows
from campaign.hostile_models import nested

Case = tuple[str, str, Callable[[Path], object]]

GOOD = json.dumps(pair_rows(1)[0])
LINES: dict[str, bytes] = {
    "empty": b"",
    "blank lines": b"\n\n\n",
    "deep lists": (nested(100_000) + "\n").encode(),
    "deep objects": b'{"prompt":' * 100_000 + b"\n",
    "a deep prompt": ('{"prompt": ' + nested(900) + ', "chosen": "a", "rejected": "b"}').encode(),
    "null bytes": b"\0" * 1000,
    "a huge integer": b'{"prompt": "a", "chosen": "b", "rejected": "c", "strength": '
    + b"9" * 100_000
    + b"}\n",
    "an integer for a text": b'{"prompt": "a", "chosen": 1, "rejected": "c"}\n',
    "a key twice": b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n',
    "not UTF-8": b'{"prompt": "\xff\xfe"}\n',
    "half a surrogate pair": b'{"prompt": "\\ud800", "chosen": "b", "rejected": 5}\n',
    "a list": b"[1, 2]\n",
    "a text": b'"x"\n',
    "NaN": b"NaN\n",
    "a torn last line": (GOOD + "\n" + GOOD[:30]).encode(),
    "two rows in a line": (GOOD + GOOD + "\n").encode(),
    "terminal codes": b'{"\\u001b]0;owned\\u0007\\u202e": 1}\n',
    "terminal codes, raw": b'{"\x1b[2J": \x1b}\n',
    "markup": b'{"[red]x[/red]": "[/nothing]"}\n',
    "no conversation": b'{"prompt": [{"role": "\\u001b[31m", "content": 5}], "chosen": 1}\n',
    "roles": b'{"prompt": [{"role": ["x"], "content": {}}], "chosen": "b", "rejected": "c"}\n',
    "a reply that is nothing": b'{"prompt": "a", "chosen": null, "rejected": "c"}\n',
    "messages of nulls": b'{"chosen": [null, null], "rejected": [null]}\n',
    "a line of 100 MB": b'{"prompt": "' + b"a" * (100 << 20) + b"\n",
    "100 MB of brackets": b"[" * (100 << 20),
}


def case(name: str, file: str, data: bytes) -> Case:
    """A file of these bytes."""
    return name, file, lambda d: (d / file).write_bytes(data)


def text_cases() -> Iterator[Case]:
    """JSON lines, and the same as the other kinds of text, compressed too."""
    for what, data in LINES.items():
        yield case(f"jsonl: {what}", "pairs.jsonl", data)
        if len(data) < 1 << 20:
            yield case(f"json: {what}", "pairs.json", data)
            yield case(f"jsonl.gz: {what}", "pairs.jsonl.gz", gzip.compress(data) if data else data)
            yield case(f"csv: {what}", "pairs.csv", data)
    for what, data in {
        "a quote without end": b'prompt,chosen,rejected\n"a,b,c\n' + b"x" * 10_000,
        "a column twice": b"prompt,prompt,chosen,rejected\na,b,c,d\n",
        "cells missing": b"prompt,chosen,rejected\na\n",
        "a null byte": b"prompt,chosen,rejected\na,\0,b\n",
        "100,000 columns": b",".join(b"c%d" % n for n in range(100_000)) + b"\n",
    }.items():
        yield case(f"csv: {what}", "pairs.csv", data)
    for what, data in {
        "no end of a list": b"[" + GOOD.encode(),
        "no comma": b"[" + GOOD.encode() * 2 + b"]",
        "more behind it": b"[" + GOOD.encode() + b"] x",
    }.items():
        yield case(f"json: {what}", "pairs.json", data)


def binary_cases(seed: int) -> Iterator[Case]:
    """Parquet and Arrow files: cut, a byte changed, of other types; bombs."""
    import pyarrow as pa
    from pyarrow import feather, parquet

    def write_parquet(path: Path) -> None:
        parquet.write_table(pa.Table.from_pylist(pair_rows()), path)

    def write_arrow(path: Path) -> None:
        feather.write_feather(
            pa.Table.from_pylist(pair_rows()), str(path), compression="uncompressed"
        )

    rng = random.Random(seed)
    for kind, write in (("parquet", write_parquet), ("arrow", write_arrow)):
        for data in (b"", b"PAR1", b"ARROW1\0\0", b"\0" * 1000, b"PAR1" * 100,
                     b"PAR1" + b"\xff" * 8 + b"PAR1", b"ARROW1\0\0" + b"\xff" * 64):  # fmt: skip
            yield case(f"{kind}: {data[:12]!r} of {len(data)}", f"pairs.{kind}", data)
        for number in range(25):
            place, cut = rng.random(), number < 10

            def spoil(d: Path, kind=kind, write=write, place=place, cut=cut) -> None:
                write(d / f"pairs.{kind}")
                data = bytearray((d / f"pairs.{kind}").read_bytes())
                at = int(place * (len(data) - 1))
                if cut:
                    data = data[:at]
                else:
                    data[at] ^= 0xFF
                (d / f"pairs.{kind}").write_bytes(data)

            name = f"{kind}: {'cut' if cut else 'a byte changed'} {number}"
            yield name if cut else f"{name} (may be read)", f"pairs.{kind}", spoil

    def wrong_types(d: Path) -> None:
        table = pa.table({"prompt": [b"\xff"], "chosen": [1.5], "rejected": [[1]]})
        parquet.write_table(table, d / "pairs.parquet")

    def twice(d: Path) -> None:
        table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "chosen", "chosen"])
        parquet.write_table(table, d / "pairs.parquet")

    def json_extension(d: Path) -> None:
        field = pa.field("prompt", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
        table = pa.Table.from_arrays([pa.array([nested(100_000)])], schema=pa.schema([field]))
        parquet.write_table(table, d / "pairs.parquet")

    def parquet_bomb(d: Path) -> None:
        text = pa.array(["a" * (1 << 20)]).dictionary_encode()
        many = pa.DictionaryArray.from_arrays(
            pa.array([0] * 4000, pa.int32()), text.dictionary
        )  # 4 GB of text in a file of a few KB
        table = pa.table({"prompt": many, "chosen": many, "rejected": many})
        parquet.write_table(table, d / "pairs.parquet", compression="zstd")

    yield "parquet: types that are none of a conversation", "pairs.parquet", wrong_types
    yield "parquet: a column twice", "pairs.parquet", twice
    yield "parquet: deep JSON in a column", "pairs.parquet", json_extension
    yield "parquet: 12 GB of text from a few KB", "pairs.parquet", parquet_bomb


def bomb_cases() -> Iterator[Case]:
    """What is small on the disk and large in memory; compressed files that are none."""

    def gzipped(d: Path) -> None:
        with gzip.open(d / "pairs.jsonl.gz", "wb", 1) as file:
            for _ in range(3000):
                file.write(b"a" * (1 << 20))

    def zipped(d: Path) -> None:
        import pyarrow as pa

        with pa.CompressedOutputStream(str(d / "pairs.jsonl.zst"), "zstd") as file:
            for _ in range(3000):
                file.write(b"a" * (1 << 20))

    def gzipped_list(d: Path) -> None:
        with gzip.open(d / "pairs.json.gz", "wb", 1) as file:
            file.write(b"[")
            for _ in range(3000):
                file.write(b" " * (1 << 20))

    yield "a line of 3 GB in 13 MB of gzip", "pairs.jsonl.gz", gzipped
    yield "a list of 3 GB of blanks in gzip", "pairs.json.gz", gzipped_list
    yield "a line of 3 GB in zstd", "pairs.jsonl.zst", zipped
    for suffix in ("gz", "zst"):
        yield case(f"no {suffix} at all", f"pairs.jsonl.{suffix}", GOOD.encode())
        yield case(f"an empty {suffix}", f"pairs.jsonl.{suffix}", b"")
    data = gzip.compress(GOOD.encode() * 100)
    yield case("a gzip that is cut", "pairs.jsonl.gz", data[: len(data) // 2])
    yield case("a gzip with a wrong sum", "pairs.jsonl.gz", data[:-8] + b"\0" * 8)


def data_cases(seed: int) -> Iterator[Case]:
    """All of them."""
    yield from text_cases()
    yield from binary_cases(seed)
    yield from bomb_cases()
