"""Which rows of which files are a split, and how each kind of file reads."""

import csv
import gzip
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time

import datasets
import pandas
import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter
from pyarrow import parquet

from helpers.paths import ROOT
from rmjax.data.readers import open_source
from rmjax.errors import UserError

# What the command-line tool zstd makes of '{"a": 1}\n{"a": 2}\n', with its checksum.
ZSTD = bytes.fromhex("28b52ffd04589100007b2261223a20317d0a7b2261223a20327d0a3f862e8f")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def as_csv(rows):
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def packed(content, name):
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pa.compress(content, codec="zstd", asbytes=True) if name.endswith(".zst") else content


def write_stream(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def write(path, rows):
    """The same rows in whichever format the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        write_stream(path, pa.Table.from_pylist(rows))
    elif ".csv" in path.name:
        path.write_bytes(packed(as_csv(rows), path.name))
    else:
        text = json.dumps(rows).encode() if ".json." in f"{path.name}." else lines(*rows)
        path.write_bytes(packed(text, path.name))
    return path


def read(source, split="train", pairs=None):
    return [row.fields for row in open_source(str(source), split, pairs)]


def texts(source, split="train", pairs=None):
    return [fields["response"] for fields in read(source, split, pairs)]


def refused(said, source, split="train", pairs=None):
    """The message of the error, which must match."""
    with pytest.raises(UserError, match=said) as caught:
        read(source, split, pairs)
    return str(caught.value)


def of(split, *responses, column="split"):
    return [{"response": text, column: split} for text in responses]


# ---- kinds of files ------------------------------------------------------------------------------

SUFFIXES = [f".{kind}{end}" for kind in ("jsonl", "json", "csv") for end in ("", ".gz", ".zst")]
SUFFIXES += [".parquet", ".arrow"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_reads_the_same(suffix, tmp_path):
    rows = [
        {"prompt": "p", "response": 'é\u2028 "x",\n y', "score": 1},
        {"prompt": "2020-01-01", "response": "12", "score": 2.5},
        {"prompt": None, "response": "r", "score": None},
    ]
    path = write(tmp_path / f"data{suffix}", rows)
    found = list(open_source(str(path), "train"))
    assert [row.fields for row in found] == rows
    assert [row.where for row in found] == [f"{path} row {number}" for number in (1, 2, 3)]
    assert [row.number for row in found] == [1, 2, 3]


def test_the_formats_as_datasets_writes_them(tmp_path):
    rows = [{"prompt": "p", "response": f"r{i}", "score": i / 2} for i in range(20)]
    data = datasets.Dataset.from_list(rows)
    data.to_json(tmp_path / "a.jsonl")
    data.to_json(tmp_path / "b.json")  # JSON lines, by another name
    data.to_json(tmp_path / "c.json", lines=False)
    data.to_json(tmp_path / "d.jsonl.gz", compression="gzip")
    data.to_csv(tmp_path / "e.csv")
    data.to_parquet(tmp_path / "f.parquet")
    with ArrowWriter(path=str(tmp_path / "g.arrow")) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == rows, path


def test_arrows_file_format(tmp_path):
    table = pa.table({"response": ["a", "b", "c"]})
    path = tmp_path / "x.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=2):
            stream.write_batch(batch)
    assert texts(path) == ["a", "b", "c"]


def test_zstandard_of_its_own_program_and_in_several_frames(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(ZSTD + ZSTD)
    assert read(path) == [{"a": 1}, {"a": 2}] * 2


def test_a_json_file_is_known_by_what_is_in_it(tmp_path):
    rows = [{"response": "a"}, {"response": "b"}]
    path = tmp_path / "x.json"
    for content in (
        json.dumps(rows, indent=2).encode(),
        b"\xef\xbb\xbf\n \n" + json.dumps(rows).encode(),
        lines(*rows),
        b"\n" + lines(*rows).replace(b"\n", b"\r\n\r\n"),
    ):
        path.write_bytes(content)
        assert read(path) == rows


def test_json_lines_are_not_read_at_once(tmp_path):
    """A list has to be."""
    for name in ("x.json", "x.jsonl"):
        path = tmp_path / name
        path.write_bytes(lines(*[{"response": "x" * 1000}] * 30_000))
        program = (
            "import resource, sys; from rmjax.data.readers import open_source\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "assert sum(1 for _ in open_source(sys.argv[1], 'train')) == 30_000\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 10_000, name  # KB, of 30 MB


def test_a_missing_key_stays_missing_inside_a_row_of_arrow_data(tmp_path):
    """Arrow gives every struct all keys: a tool call would have the arguments of all others."""
    calls = [{"name": "add", "arguments": {"x": 1}}, {"name": "say", "arguments": {"text": "hi"}}]
    rows = [{"prompt": [{"role": "user", "calls": [call]}], "note": None} for call in calls]
    rows[1]["note"] = "n"
    rows.append({"prompt": None, "note": "of no prompt"})
    table = pa.Table.from_pylist(rows)
    assert table.to_pylist() != rows
    for suffix in (".parquet", ".arrow"):
        assert read(write(tmp_path / f"x{suffix}", rows)) == rows
    nulls = [{"prompt": [{"role": "user", "name": None}]}]  # written by someone
    assert read(write(tmp_path / "x.jsonl", nulls)) == nulls


def test_values_of_several_types_as_datasets_keeps_them(tmp_path):
    rows = [{"call": {"arguments": {"x": [1, None]}}}, {"call": {"arguments": {"x": "text"}}}]
    path = write(tmp_path / "x.jsonl", rows)
    data = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "x.parquet") == rows
    assert read(tmp_path / "saved") == rows


@pytest.mark.parametrize("kind", ["list_", "large_list", "list_view", "large_list_view"])
def test_every_kind_of_list_is_read_the_same(kind, tmp_path):
    rows = [{"prompt": [{"role": "user", "x": 1}]}, {"prompt": [{"role": "user", "y": "t"}, None]}]
    inner = pa.struct({"role": pa.string(), "x": pa.int64(), "y": pa.string()})
    values = pa.array([row["prompt"] for row in rows], getattr(pa, kind)(inner))
    write_stream(tmp_path / "x.arrow", pa.table({"prompt": values}))
    assert read(tmp_path / "x.arrow") == rows


# ---- names that are there twice ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize(
    "row", ['{"chosen": 1, "a": 2, "chosen": 3}', '{"a": [{"b": {"chosen": 1, "chosen": 1}}]}']
)
def test_a_key_that_is_there_twice_is_named(row, suffix, tmp_path):
    """Python's reader takes the last one."""
    path = tmp_path / f"x{suffix}"
    for text in (f'{{"a": 1}}\n{row}\n', f'[{{"a": 1}}, {row}]'):
        if text[0] == "{" or suffix == ".json":
            path.write_bytes(packed(text.encode(), path.name))
            assert refused("the key 'chosen' is there twice", path).startswith(f"{path} row 2: ")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_column_that_is_there_twice_is_named(inside, suffix, tmp_path):
    columns, names = [pa.array(["a"]), pa.array(["b"])], ["chosen", "chosen"]
    if inside:
        columns, names = [pa.StructArray.from_arrays(columns, names)], ["messages"]
    table = pa.Table.from_arrays(columns, names)
    path = tmp_path / f"x{suffix}"
    if suffix == ".arrow":
        write_stream(path, table)
    else:
        parquet.write_table(table, path)
    assert refused("the key 'chosen' is there twice", path).startswith(f"{path}: ")


def test_a_column_of_the_hub_that_is_there_twice_is_named(monkeypatch):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["chosen", "chosen"])
    split = type("Split", (), {"data": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split})
    assert refused("the key 'chosen' is there twice", "o/n").startswith("o/n train: ")


# ---- CSV -----------------------------------------------------------------------------------------


def test_a_csv_column_is_numbers_if_most_of_it_is(tmp_path):
    """Wherever the first cell stands that is none; and nothing becomes a date or a truth."""
    first = {"reply": "12", "score": "", "day": "2020-01-01", "good": "true"}
    most = {"reply": "r", "score": 1, "day": "2020-01-02", "good": "false"}
    last = {"reply": "13", "score": 2.5, "day": "1", "good": "1"}
    path = write(tmp_path / "x.csv", [first, *[most] * 5000, last, first | {"score": "n/a"}])
    found = read(path)
    assert found == [first | {"score": None}, *[most] * 5000, last, first | {"score": "n/a"}]
    assert isinstance(found[1]["score"], int)


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["-1", "2.50", "1e3"], [-1, 2.5, 1000.0]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "NaN", "nan"], [1, math.nan, math.nan]),
        (["", "", ""], [None] * 3),
        (["1", "1_000", "2"], [1, "1_000", 2]),
        (["1", "٣", "2"], [1, "٣", 2]),
        (["1", "x", ""], ["1", "x", None]),
        (["1" + "0" * 400, "-1", "10000000000000000001"], [math.inf, -1, 1e19]),
        (["1", "inf", "-inf"], ["1", "inf", "-inf"]),
        (["1", " 2", "03"], ["1", " 2", "03"]),
        ([".5", "-.25", "1."], [0.5, -0.25, 1.0]),
        (["+1", "+0.5", "-2"], [1, 0.5, -2]),
        (["1", ".", "+"], ["1", ".", "+"]),
    ],
)
def test_what_a_number_is_in_csv(cells, numbers, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "\ufeffscore,other\n" + "".join(f"{cell},x\n" for cell in cells), encoding="utf-8"
    )
    assert repr([fields["score"] for fields in read(path)]) == repr(numbers)


def test_texts_are_texts_even_where_all_are_digits(tmp_path):
    row = {"prompt": "1", "response": "2", "response_1": "3", "response_A": "4", "chosen": "5"}
    row |= {"Rejected": "6", "id": "7"}
    (found,) = read(write(tmp_path / "x.csv", [row | {"chosen_score": "8"}]))
    assert found == row | {"chosen_score": 8}


def test_csv_as_pandas_writes_it(tmp_path):
    rows = [{"prompt": "a\nb", "response": 'say "x", ok', "score": 1.5}, {"prompt": "c"}]
    pandas.DataFrame(rows).to_csv(tmp_path / "x.csv")  # its row numbers come first, without a name
    rows[1] |= {"response": None, "score": None}
    assert read(tmp_path / "x.csv") == rows
    pandas.DataFrame(rows[:1], index=[5]).to_parquet(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == rows[:1]


def test_a_long_cell_of_many_lines(tmp_path):
    row = {"prompt": "p", "response": "line\r\n" * 50_000}
    assert read(write(tmp_path / "x.csv", [row, row])) == [row, row]


CSV_ERRORS = {
    "a,b\n1,2\n3\n": "row 2: 1 cells, but the header has 2",
    "a,b\n1,2\n3,4,5\n": "row 2: 3 cells, but the header has 2",
    'a,b\n1,"2\n': "row 1: broken CSV",
    'a,b\n1,"2"x\n': "row 1: broken CSV",
    "a,a\n1,2\n": "two columns of the header have the same name",
    "a,b\n": "there is no row in it",
    "": "there is no row in it",
}


@pytest.mark.parametrize("content", CSV_ERRORS)
def test_a_broken_csv_file_is_named(content, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(content)
    assert refused(CSV_ERRORS[content], path).startswith(str(path))


def test_csv_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,2\n3,\xff\n")
    refused(r"x\.csv line 3: not UTF-8 \(byte 2 of the line\)", path)


# ---- broken and missing files --------------------------------------------------------------------


def test_a_value_far_down_the_file_may_be_the_first_of_its_kind(tmp_path):
    """Whole numbers or no ratings for 10 MB, then a fraction; and a column nobody asked for."""
    many = [{"response": "z" * 1000, "score": 1, "other": None}] * 11000
    last = {"response": "z", "score": 2.5, "other": "text", "more": 1}
    assert read(write(tmp_path / "x.jsonl", [*many, last]))[-1] == last


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    dates = ["2020-01-01", "2020-01-01 10:00:00", "2020-01-01T10:00:00Z"]
    assert texts(write(tmp_path / "x.jsonl", [{"response": d} for d in dates])) == dates


def test_a_byte_order_mark_blank_lines_and_windows_ends_do_no_harm(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {"response": "r"}
    path.write_bytes(b"\xef\xbb\xbf" + lines(row).replace(b"\n", b"\r\n\r\n") * 2)
    assert read(path) == [row, row]


LINE_ERRORS = {
    "cut off": (b'{"prompt": ', "broken JSON"),
    "two on a line": (lines({"a": 1}).strip() * 2, "broken JSON"),
    "not UTF-8": (b'{"prompt": "\xff", "response": "r"}', r"not UTF-8 \(byte 12"),
    "a list": (b"[1, 2]", "expected a JSON object, found list"),
    "a number": (b"3", "expected a JSON object, found int"),
    "too deep": (b"[" * 100_000, "broken JSON"),
    "too many digits": (b'{"helpful": ' + b"1" * 5000 + b"}", "broken JSON"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json"])
@pytest.mark.parametrize("case", LINE_ERRORS)
def test_a_line_that_is_no_row_is_named(case, suffix, tmp_path):
    bad, said = LINE_ERRORS[case]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(packed(lines({"response": "r"}) + bad + b"\n", path.name))
    assert refused(said, path).startswith(f"{path} row 2: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, 3]', " row 2: expected a JSON object, found int"),
        ('[{"a": 1}, {"a": ]', " row 2: broken JSON"),
        ('[{"a": 1},]', " row 2: broken JSON"),
        ("[", " row 1: broken JSON"),
        ("[] []", " row 1: broken JSON"),
        ("[" * 100_000, " row 1: broken JSON"),
        ('[{"a": 1} {"a": 1}]', ": broken JSON after row 1"),
        ('[{"a": 1}', ": broken JSON after row 1"),
        ('[{"a": 1}] []', ": broken JSON after row 1"),
    ],
)
def test_an_entry_of_a_list_that_is_no_row_is_named(text, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert refused(".", path).startswith(f"{path}{said}")


WHOLE = lines(*[{"response": str(i)} for i in range(2000)])
GZIP, ZST = gzip.compress(WHOLE), pa.compress(WHOLE, codec="zstd", asbytes=True)
FILE_ERRORS = {
    "empty.jsonl": (b"", "there is no row in it"),
    "empty.jsonl.gz": (b"", "there is no row in it"),
    "empty.jsonl.zst": (b"", "there is no row in it"),
    "nothing_in_it.jsonl.gz": (gzip.compress(b""), "there is no row in it"),
    "blank.jsonl": (b"\n \n", "there is no row in it"),
    "truncated.jsonl.gz": (GZIP[:-30], "cannot be read"),
    "damaged.jsonl.gz": (GZIP[:200] + bytes(50) + GZIP[250:], "cannot be read"),
    "not_gzip.jsonl.gz": (WHOLE, "cannot be read"),
    "truncated.jsonl.zst": (ZST[:-30], "cannot be read"),
    "not_zst.jsonl.zst": (WHOLE, "cannot be read"),
    "empty.parquet": (b"", "cannot be read"),
    "text.parquet": (WHOLE, "cannot be read"),
    "empty.arrow": (b"", "cannot be read"),
    "text.arrow": (WHOLE, "cannot be read"),
    "data.txt": (b"prompt,response\n", "unknown kind of file; supported: .jsonl"),
    "object.json": (b'{\n  "data": [{"a": 1}]\n}', "expected a list of JSON objects, or one obj"),
    "bytes.json": (b'["\xff"]', r"not UTF-8 \(byte 2\)"),
    "empty.json": (b"[]", "there is no row in it"),
    "nothing.json": (b"", "there is no row in it"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_a_bad_file_is_named(name, tmp_path):
    content, said = FILE_ERRORS[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(said, path).startswith(f"{path}: ")


def test_bad_arrow_data_is_named(tmp_path):
    broken = pa.Array.from_buffers(pa.utf8(), 2, pa.array([b"r", b"\xff"]).buffers())
    for suffix in (".parquet", ".arrow"):
        content = write(tmp_path / f"x{suffix}", [{"response": "r" * 100}] * 500).read_bytes()
        empty, cut, text = (tmp_path / f"{n}{suffix}" for n in ("empty", "cut", "text"))
        for path, table in (
            (empty, pa.table({"response": pa.array([], pa.utf8())})),
            (text, pa.table({"response": broken})),
        ):
            if suffix == ".parquet":
                parquet.write_table(table, path)
            else:
                write_stream(path, table)
        cut.write_bytes(content[: len(content) // 2])
        for path, said in ((empty, "no row"), (cut, "cannot be read"), (text, "UTF8")):
            assert refused(said, path).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name",
    [
        *("./x", "x.jsonl", "a/b/c/d", "~/none.parquet", "a/x.jsonl.gz", "x", "x:y", "./a:b", ":y"),
        *("~nobody-has-this-name/x", "C:\\data\\x.jsonl", "a/b:c/x.jsonl", "x.jsonl:test"),
        *("hf://datasets/o/n", "x\0.jsonl", "x" * 5000, "/" + "x" * 5000 + ":train"),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(name):
    assert refused("no such file or directory", name).startswith(f"{name}: ")


def test_no_source_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [{"response": "a"}])
    refused("the source of data is empty", "")
    assert texts(".") == ["a"]


def test_what_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    refused("neither a file nor a directory", tmp_path / "x.jsonl")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    """`--config.data.train=~/x.jsonl` reaches us with its tilde: the shell leaves it alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", of("test", "t") + of("train", "r"))
    assert texts("~/x.jsonl") == ["r"]
    assert texts("~/x.jsonl:test") == ["t"]


# ---- directories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_directory_has_a_file_for_each_split(suffix, tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}{suffix}", [{"response": f"{split} {i}"} for i in range(3)])
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "dataset_infos.json").write_text("{}")
    source = open_source(str(tmp_path), "validation")
    assert [row.fields["response"] for row in source] == [f"validation {i}" for i in range(3)]
    assert source.name == str(tmp_path / f"validation{suffix}")
    assert [row.where for row in source][2] == f"{tmp_path / f'validation{suffix}'} row 3"
    message = refused(f"{tmp_path}: there is no split 'test'; there are train ", tmp_path, "test")
    assert f"validation (validation{suffix})" in message and f"as {tmp_path}:train" in message


@pytest.mark.parametrize(
    ("stem", "split"),
    [("val", "validation"), ("dev", "validation"), ("Valid", "validation"), ("testing", "test")],
)
def test_a_split_has_several_names(stem, split, tmp_path):
    write(tmp_path / f"{stem}.jsonl", [{"response": "it"}])
    write(tmp_path / "training.jsonl", [{"response": "train"}])
    assert texts(tmp_path, split) == ["it"]
    assert texts(tmp_path, "train") == ["train"]


def test_an_exact_name_wins_over_an_alias(tmp_path):
    for stem in ("dev", "val"):
        write(tmp_path / f"{stem}.jsonl", [{"response": stem}])
    refused(
        r"dev \(dev.jsonl\) and val \(val.jsonl\) both mean 'validation'", tmp_path, "validation"
    )
    assert texts(f"{tmp_path}:dev", "validation") == ["dev"]
    write(tmp_path / "validation.jsonl", [{"response": "validation"}])
    assert texts(tmp_path, "validation") == ["validation"]


def test_two_files_of_one_split_are_named(tmp_path):
    write(tmp_path / "train.jsonl", [{"response": "a"}])
    write(tmp_path / "train.parquet", [{"response": "b"}])
    refused(r"train \(train.jsonl\) and train \(train.parquet\) are both there", tmp_path)
    (tmp_path / "train.jsonl").unlink()
    write(tmp_path / "data" / "train-00000-of-00001.parquet", [{"response": "c"}])
    refused(r"train.parquet\) and train \(data/train-00000-of-00001.parquet\)", tmp_path)
    write(tmp_path / "dev.jsonl", [{"response": "a"}])
    write(tmp_path / "data" / "dev.jsonl", [{"response": "b"}])
    refused(r"dev \(dev.jsonl\) and dev \(data/dev.jsonl\) are both there", tmp_path, "dev")


def test_a_directory_without_data_says_what_is_there(tmp_path):
    refused("there is no file of data in it .*; there is nothing$", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    write(tmp_path / "raw" / "train.jsonl", [{"response": "a"}])
    refused("there is no file of data in it .*; there is notes.txt, raw/$", tmp_path)
    for i in range(100):
        (tmp_path / f"train-{i:03}.jsonl.bz2").write_text("x")
    refused("train-005.jsonl.bz2 and 94 more$", tmp_path)


@pytest.mark.parametrize("name", ["val.jsonl.bz2", "validation-0-of-2.jsonl.xz", "Dev.tsv"])
@pytest.mark.parametrize("folder", ["", "data"])
def test_a_file_of_the_split_that_is_not_read_is_named(folder, name, tmp_path):
    """Else only the file of train would be there, or a split be missing that is not."""
    write(tmp_path / "train.jsonl", [{"response": "a"}])
    write(tmp_path / folder / name, [{"response": "b"}])
    (tmp_path / "eval.py").write_text("reads it")
    path = f"{folder}/{name}".lstrip("/")
    refused(
        f"there is no split 'validation' in the kinds .*; there is {path}$", tmp_path, "validation"
    )
    assert texts(tmp_path) == ["a"]


def test_capitals_of_a_suffix_do_not_matter(tmp_path):
    write(tmp_path / "x.jsonl.gz", [{"response": "a"}]).rename(tmp_path / "train.JSONL.GZ")
    assert texts(tmp_path) == texts(tmp_path / "train.JSONL.GZ") == ["a"]
    write(tmp_path / "train.jsonl.gz", [{"response": "b"}])
    refused("are both there", tmp_path)


def test_other_files_are_listed_and_can_be_named(tmp_path):
    write(tmp_path / "mine.jsonl", [{"response": "m"}])
    write(tmp_path / "._mine.jsonl", [{"response": "of a Mac"}])
    message = refused("no split", tmp_path)
    assert f"there are mine (mine.jsonl); name one as {tmp_path}:mine" in message
    assert texts(f"{tmp_path}:mine") == texts(tmp_path, "") == ["m"]


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".arrow"])
def test_shards_are_read_in_order(suffix, folder, tmp_path):
    for number in (2, 0, 1):
        name = f"train-{number:05}-of-00003{suffix}"
        write(tmp_path / folder / name, [{"response": f"{number} {i}"} for i in range(2)])
    write(tmp_path / folder / f"test-00000-of-00001{suffix}", [{"response": "t"}])
    source = open_source(str(tmp_path), "train")
    assert source.name == f"{tmp_path} train"
    rows = list(source)
    assert [row.fields["response"] for row in rows] == ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[3].where == f"{tmp_path / folder / f'train-00001-of-00003{suffix}'} row 2"
    assert texts(tmp_path, "test") == ["t"]
    (tmp_path / folder / f"train-00001-of-00003{suffix}").unlink()
    refused("of 00003 shards there are 2; missing: train-00001-of-00003$", tmp_path)


def test_more_ways_to_number_shards(tmp_path):
    for number in range(1, 13):  # from one, without zeros in front
        write(tmp_path / f"train-{number}-of-12.jsonl", [{"response": str(number)}])
    write(tmp_path / "test-00000-of-00001-6ef7d3c8a3b0aa11.jsonl", [{"response": "hash"}])
    assert texts(tmp_path) == [str(number) for number in range(1, 13)]
    assert texts(tmp_path, "test") == ["hash"]
    write(tmp_path / "test-00000-of-00001-0000000000000000.jsonl", [{"response": "other"}])
    refused("are the same shard; keep one", tmp_path, "test")


def test_a_directory_that_save_to_disk_wrote(tmp_path):
    data = datasets.DatasetDict()
    data |= {
        split: datasets.Dataset.from_list([{"response": f"{split} {i}"} for i in range(5)])
        for split in ("train", "dev")
    }
    data.save_to_disk(tmp_path / "all", num_shards={"train": 3, "dev": 1})
    source = open_source(str(tmp_path / "all"), "train")
    assert [row.fields for row in source] == data["train"].to_list()
    assert [row.number for row in source] == [1, 2, 3, 4, 5]
    assert texts(tmp_path / "all", "validation") == data["dev"]["response"][:]
    refused("no split 'test'; there are train .*, dev ", tmp_path / "all", "test")
    (tmp_path / "all" / "train" / "data-00001-of-00003.arrow").unlink()
    refused("state.json: lists data-00001-of-00003.arrow, which is not there", tmp_path / "all")


def test_a_single_dataset_names_no_split(tmp_path):
    """Also where it says "train": so does the test half that train_test_split makes of it."""
    rows = [{"response": str(i)} for i in range(6)]
    loaded = datasets.Dataset.from_list(rows, split=datasets.Split.TRAIN)
    loaded.train_test_split(2, shuffle=False)["test"].save_to_disk(tmp_path / "held", num_shards=2)
    source = open_source(str(tmp_path / "held"), "validation")
    assert [row.fields["response"] for row in source] == ["4", "5"]
    loaded.add_column("split", ["train", "val"] * 3).save_to_disk(tmp_path / "named")
    assert texts(tmp_path / "named", "validation") == ["1", "3", "5"]
    shutil.copy(tmp_path / "held" / "data-00000-of-00002.arrow", tmp_path / "named")
    assert len(texts(tmp_path / "named")) == 3  # only what state.json lists


@pytest.mark.parametrize("content", ["", "[]", '{"_data_files": [3]}', "{}"])
def test_a_broken_state_is_named(content, tmp_path):
    (tmp_path / "state.json").write_text(content)
    refused("state.json: cannot be read", tmp_path)


# ---- HelpSteer2's directories --------------------------------------------------------------------

PAIRS = of("train", "pair 1") + of("validation", "pair 2")


@pytest.fixture
def helpsteer2(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl.gz", [{"response": split}])
    return tmp_path


@pytest.mark.parametrize("name", ["preference.jsonl.gz", "preference/preference.jsonl.gz"])
def test_ratings_and_pairs_in_one_directory(name, helpsteer2):
    """As in a clone of the hub's repository, and flattened."""
    write(helpsteer2 / name, PAIRS)
    for number, split in enumerate(("train", "validation"), start=1):
        assert texts(helpsteer2, split, pairs=False) == [split]
        assert texts(helpsteer2, split, pairs=True) == [f"pair {number}"]
    said = rf"train \(train.jsonl.gz\) and preference \({name}\) are both there"
    refused(said, helpsteer2, pairs=None)
    assert texts(f"{helpsteer2}:preference") == ["pair 1", "pair 2"]


def test_a_directory_of_preferences(tmp_path):
    write(tmp_path / "preference.jsonl.gz", PAIRS)
    for pairs in (True, None):
        source = open_source(str(tmp_path), "validation", pairs)
        assert [(row.fields["response"], row.number) for row in source] == [("pair 2", 2)]
        assert source.skipped == {"of another split (train)": 1}
    refused("there are no ratings, only preference", tmp_path, pairs=False)
    # As datasets reads it from the hub, where it is a directory of a repository.
    loaded = datasets.load_dataset(
        str(tmp_path.parent), data_dir=tmp_path.name, cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded["train"]) == PAIRS


def test_a_file_that_the_source_names_comes_before_preferences(tmp_path):
    write(tmp_path / "preference.jsonl", PAIRS)
    write(tmp_path / "train_prefs.jsonl", [{"response": "named"}])
    assert texts(f"{tmp_path}:train_prefs", pairs=True) == ["named"]
    assert texts(f"{tmp_path}:train", pairs=True) == ["pair 1"]


def test_ratings_beside_preferences_are_of_train_alone(tmp_path):
    write(tmp_path / "preference.jsonl", PAIRS)
    write(tmp_path / "train.jsonl", [{"response": "a"}])
    refused("no split 'validation': only 'train' is there", tmp_path, "validation", pairs=False)


def test_pairs_may_be_in_the_files_of_the_splits(helpsteer2):
    assert texts(helpsteer2, "validation", pairs=True) == ["validation"]


def test_preferences_without_a_split_are_of_every_split(tmp_path):
    write(tmp_path / "preference.jsonl", [{"response": "a"}])
    assert texts(tmp_path, "validation", pairs=True) == texts(tmp_path, pairs=True) == ["a"]


# ---- a column that names the split ---------------------------------------------------------------

LAYOUTS = {
    "file": lambda path, rows: write(path / "x.jsonl", rows),
    "shards": lambda path, rows: (
        write(path / "preference-0-of-2.jsonl", rows[:1]).parent
        if write(path / "preference-1-of-2.jsonl", rows[1:])
        else None
    ),
    "train file": lambda path, rows: write(path / "train.parquet", rows).parent,
    "dataset": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path) or path,
}


@pytest.mark.parametrize("column", ["split", "data_split", "dataset_split", "partition", "fold"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_column_is_obeyed_in_every_layout(layout, column, tmp_path):
    rows = of("train", "a", column=column) + of("val", "b", column=column)
    rows += of("TRAIN ", "c", column=column) + of("test", "d", column=column)
    source = LAYOUTS[layout](tmp_path, rows)
    for split, found in (("train", ["a", "c"]), ("validation", ["b"]), ("test", ["d"])):
        assert texts(source, split) == found
    found = open_source(str(source), "train")
    assert found.split_columns == (column,) and not found.skipped
    assert [row.number for row in found] == [1, 3] == [row.number for row in found]
    assert found.skipped == {"of another split (val)": 1, "of another split (test)": 1}
    assert texts(source, "") == ["a", "b", "c", "d"]


def test_a_file_without_a_column_is_of_every_split(tmp_path):
    rows = [{"response": "a", "subset": "chat", "fold": 3}, {"response": "b", "set": None}]
    path = write(tmp_path / "x.jsonl", rows)
    for split in ("train", "validation", "filtered", ""):
        source = open_source(str(path), split)
        assert [row.fields for row in source] == rows and not source.skipped
        assert source.split_columns == ()
    refused("no split 'test': no column says that a row is of it", f"{path}:test")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            "held",
            r"row 3: field 'split' is 'held', which is none of .* as .*x.jsonl:held, or rename",
        ),
        (7, "row 3: field 'split' is '7', which is none of"),
        (None, "row 3: field 'split' says nothing; name .*:train, or rename the column"),
        ("", "row 3: field 'split' says nothing"),
    ],
)
def test_a_split_that_nobody_knows_is_an_error(bad, said, tmp_path):
    path = write(tmp_path / "x.jsonl", of("train", "a", "b") + of(bad, "c", "d"))
    assert refused(said, path).startswith(f"{path} row 3: ")
    # Named, the others are merely others.
    assert texts(f"{path}:train") == ["a", "b"]
    if bad:
        assert texts(f"{path}:{bad}") == ["c", "d"]


def test_what_a_message_advises_works(tmp_path):
    """Once `FILE:validation` was advised where no row says so, and then was an error."""
    path = write(tmp_path / "x.jsonl", of(None, "a", "b"))
    said = refused("row 1: field 'split' says nothing; rename the column", path, "validation")
    assert ":validation" not in said
    for name in ("a:b", "a/b", "x.jsonl", "C:\\x", "../x", "o/n:a"):
        write(path, of(None, "none") + of(name, "a"))
        said = refused("row 1: field 'split' says nothing; name .* as", path)
        assert f"as {path}:{name}, or rename" in said
        assert texts(f"{path}:{name}") == ["a"]
    write(path, of("x" * 5000, "a"))
    said = refused("rename the column", path)
    assert "name the split" not in said and len(said) < 400 + len(str(path))
    # A directory's split is of that name, so that only its own name can be asked for.
    for name in ("train", "validation"):
        write(tmp_path / "d" / f"{name}.jsonl", of("test", name))
    said = refused("no row is of the split 'train'", tmp_path / "d")
    assert said.endswith("there are test (1 rows); rename it if it is not the split")
    write(tmp_path / "d" / "train.jsonl", of("test", "a") + of("other", "b"))
    said = refused("row 2: field 'split' is 'other'", tmp_path / "d")
    assert "name the split" not in said


def test_a_thousand_splits_are_not_all_listed(tmp_path):
    rows = [row for i in range(3000) for row in of(f"s{i}", "r")]
    path = write(tmp_path / "x.jsonl", [*rows, *of("train", "a"), *of("s7", "b")])
    said = refused("no row is of the split 'no'", f"{path}:no")
    assert "s4 (1 rows) and 2,996 more; name one as" in said and len(said) < 300 + len(str(path))
    source = open_source(f"{path}:train", "")
    assert [row.fields["response"] for row in source] == ["a"]
    assert sum(source.skipped.values()) == 3001 and len(source.skipped) == 8
    assert source.skipped["of another split (s7)"] == 2
    assert source.skipped["of 2,993 more splits"] == 2993


def test_a_row_that_lacks_the_split_of_the_others_is_an_error(tmp_path):
    path = write(tmp_path / "x.jsonl", [*of("train", "a"), {"response": "b"}])
    refused("row 2: field 'split' says nothing", path)


def test_another_column_holds_splits_or_something_else(tmp_path):
    """Half of it taken for splits, rows of "math" would be in train and in validation."""
    path = write(
        tmp_path / "x.jsonl", of("test", "a", column="set") + of("math", "b", column="set")
    )
    refused("row 2: field 'set' is 'math'", path, "test")
    # The part of a benchmark, as evaluation reads it: it may be called like a split.
    path = write(tmp_path / "s.jsonl", of("test", "a", column="subset"))
    assert texts(path, "train") == texts(path, "test") == ["a"]
    path = write(tmp_path / "y.jsonl", [{"response": "a", "set": "train", "fold": "test"}])
    refused("the columns 'fold' and 'set' both look like the split; call the right one", path)
    path = write(tmp_path / "z.jsonl", [{"response": "a", "split": "test", "set": "train"}])
    assert texts(path, "test") == ["a"]
    path = write(
        tmp_path / "held.jsonl", of("Dev", "a", column="set") + of("held", "b", column="set")
    )
    assert texts(f"{path}:held") == ["b"]
    assert texts(f"{path}:validation") == ["a"]


def test_no_row_of_the_split_lists_what_there_is(tmp_path):
    path = write(tmp_path / "x.jsonl", of("test", "a", "b") + of("train", "c"))
    message = refused("no row is of the split 'validation'", path, "validation")
    assert message.startswith(f"{path}: ")
    assert f"'split' there are test (2 rows), train (1 rows); name one as {path}:test" in message
    assert texts(f"{path}:test", "validation") == ["a", "b"]


def test_two_names_of_the_wanted_split_in_a_column(tmp_path):
    path = write(tmp_path / "x.jsonl", of("dev", "a") + of("val", "b"))
    refused("'dev' and 'val' both mean 'validation'", path, "validation")
    assert texts(f"{path}:val", "validation") == ["b"]
    write(path, of("dev", "a") + of("validation", "b") + of("Validation", "c"))
    assert texts(path, "validation") == ["b", "c"]


def test_a_split_of_a_benchmark(tmp_path):
    """Its name is none of train, validation and test."""
    path = write(tmp_path / "x.jsonl", of("filtered", "a") + of("raw", "b"))
    assert texts(path, "filtered") == ["a"]
    subjects = of("test", "a", column="set") + of("math", "b", column="set")
    assert texts(write(tmp_path / "y.jsonl", subjects), "filtered") == ["a", "b"]
    path = write(tmp_path / "d" / "filtered.jsonl", of("test", "a"))
    assert texts(path.parent, "filtered") == ["a"]  # the column is about something else


def test_a_split_named_by_the_source(tmp_path):
    for name in ("train_prefs", "test_prefs"):
        write(tmp_path / f"{name}-00000-of-00001.parquet", of("prefs", name))
    message = refused("no split 'train'; there are test_prefs", tmp_path)
    assert f"name one as {tmp_path}:test_prefs" in message
    source = open_source(f"{tmp_path}:train_prefs", "validation")
    assert [row.fields["response"] for row in source] == ["train_prefs"]


def test_a_train_file_is_never_validation(tmp_path):
    write(tmp_path / "train.jsonl", [{"response": "a"}])
    refused("no split 'validation': only 'train' is there.*:train$", tmp_path, "validation")
    assert texts(f"{tmp_path}:train", "validation") == ["a"]  # if the user insists
    write(tmp_path / "train.jsonl", of("train", "a"))
    refused("no row is of the split 'validation'", tmp_path, "validation")


def test_a_column_of_something_else_in_the_file_of_a_split(tmp_path):
    write(tmp_path / "train.jsonl", of("main", "a"))
    assert f"as {tmp_path}:train, or rename" in refused("row 1: field 'split' is 'main'", tmp_path)
    assert texts(f"{tmp_path}:train") == ["a"]


def test_a_path_with_a_colon_is_that_path(tmp_path):
    path = write(tmp_path / "a:test.jsonl", of("train", "a") + of("test", "b"))
    write(tmp_path / "a", of("train", "c"))
    assert texts(path) == ["a"]
    assert texts(f"{path}:test") == ["b"]


# ---- fingerprints --------------------------------------------------------------------------------


def test_a_fingerprint_has_all_that_decides_which_rows_there_are(tmp_path):
    """Tokens are kept by it: with the same one, an error would become another split's rows."""
    write(tmp_path / "d" / "train.jsonl", [{"response": "a"}])
    path = write(tmp_path / "x.jsonl", of("train", "a") + of(None, "b") + of("held", "c"))
    plain = write(tmp_path / "y.jsonl", [{"response": "a"}])
    for ways in (
        (f"{tmp_path / 'd'}", f"{tmp_path / 'd'}:validation", f"{tmp_path / 'd'}:train"),
        (f"{tmp_path / 'd'}", f"{tmp_path / 'd' / 'train.jsonl'}"),
        (f"{path}", f"{path}:validation", f"{path}:train"),
        (f"{plain}", f"{plain}:validation"),
    ):
        found = [open_source(way, "validation").fingerprint() for way in ways]
        assert len(set(found)) == len(ways), ways
    # The same bytes are other rows, or none, by the name of their file.
    other = shutil.copy(plain, tmp_path / "y.csv")
    assert (
        open_source(str(other), "train").fingerprint()
        != open_source(str(plain), "train").fingerprint()
    )


def test_a_fingerprint_follows_the_bytes(tmp_path):
    path = write(tmp_path / "x.jsonl", of("train", "a") + of("test", "b"))
    first = open_source(str(path), "train").fingerprint()
    assert first != open_source(str(path), "test").fingerprint()  # other rows
    write(tmp_path / "z.jsonl", of("val", "a") + of("validation", "b"))
    named = [open_source(f"{tmp_path / 'z.jsonl'}:{x}", "") for x in ("val", "validation")]
    assert named[0].fingerprint() != named[1].fingerprint()
    moved = shutil.copy(path, tmp_path / "y.jsonl")
    assert open_source(str(moved), "train").fingerprint() == first
    before = path.stat()
    write(path, of("train", "c") + of("test", "b"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_source(str(path), "train").fingerprint() != first
    assert texts(path) == ["c"]


def test_a_file_that_went_away_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"response": "a"}])
    source = open_source(str(path), "train")
    path.unlink()
    for use in (source.fingerprint, lambda: list(source)):
        with pytest.raises(UserError, match=r"x\.jsonl: cannot be read"):
            use()


def test_a_fingerprint_has_every_shard(tmp_path):
    paths = [write(tmp_path / f"train-{i}-of-2.jsonl", [{"response": str(i)}]) for i in (0, 1)]
    first = open_source(str(tmp_path), "train").fingerprint()
    write(paths[1], [{"response": "2"}])
    assert open_source(str(tmp_path), "train").fingerprint() != first


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory from which hub ids are read, by datasets itself."""
    load = datasets.load_dataset

    def load_dataset(name, data_dir=None):
        path = tmp_path / "hub" / name
        if not path.exists():
            raise FileNotFoundError(f"no {name}")
        return load(str(path), data_dir=data_dir, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path / "hub"


def test_a_hub_id_is_read_by_split(hub):
    for split in ("train", "test"):
        write(hub / "o/n" / f"{split}.jsonl", [{"response": split, "score": None}, {"score": 2}])
    source = open_source("o/n", "test")
    rows = list(source)
    assert [row.fields for row in rows] == [
        {"response": "test", "score": None},
        {"response": None, "score": 2},
    ]
    assert source.name == "o/n test" and rows[1].where == "o/n test row 2"
    refused("o/n: there is no split 'validation'; there are train, test; name", "o/n", "validation")
    assert texts("o/n:test", "validation")[0] == "test"
    refused("o/x: not a local path, and the hub does not give it", "o/x")


def test_a_hub_id_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("o/x: not a local path, and the hub's are read by `pip install datasets`", "o/x")


@pytest.mark.parametrize("address", ["o/n", "o/n/preference"])
def test_a_hub_data_set_of_one_split(address, hub):
    """The hub calls it train, whatever is in it: it is validation only where a column says so."""
    write(hub / address / "preference.jsonl", PAIRS)
    assert texts(address, "train") == ["pair 1"]
    assert texts(address, "validation") == ["pair 2"]
    refused(f"{address}: no row is of the split 'test'; in the column 'split'", address, "test")


@pytest.mark.parametrize("address", ["o/n", "o/n/inner"])
def test_a_hub_data_set_of_one_split_is_not_validation(address, hub):
    write(hub / address / "all.jsonl", [{"response": "a"}])
    assert texts(address, "train") == ["a"]
    refused(f"{address}: there is no split 'validation': only 'train' is", address, "validation")
    refused("no split 'dev': only 'train' is there", f"{address}:dev", "train")


def test_a_directory_of_a_hub_repository_has_its_splits(hub):
    """Its validation was once the rows of train."""
    for split in ("train", "validation"):
        write(hub / "o/n/preference" / f"{split}.jsonl", [{"response": split}])
    assert texts("o/n/preference", "validation") == ["validation"]
    assert texts("o/n/preference", "train") == ["train"]


def test_splits_of_other_names_on_the_hub(hub):
    for name in ("train_prefs", "test_prefs"):
        write(hub / "o/n/data" / f"{name}-00000-of-00001.parquet", [{"response": name}])
    refused("there are .*train_prefs.*; name one as o/n:", "o/n")
    assert texts("o/n:train_prefs", "validation") == ["train_prefs"]
    assert texts("o/n", "test_prefs") == ["test_prefs"]  # as benchmarks ask


def test_a_hub_data_set_is_known_by_its_contents(hub):
    for split in ("train", "validation"):
        write(hub / "o/n" / f"{split}.jsonl", [{"response": "same"}])
    first = open_source("o/n", "train").fingerprint()
    assert first == open_source("o/n", "train").fingerprint()
    assert first != open_source("o/n", "validation").fingerprint()
    write(hub / "o/n" / "train.jsonl", [{"response": "other"}])
    assert first != open_source("o/n", "train").fingerprint()


@pytest.mark.parametrize("change", ["names", "metadata"])
def test_a_hub_data_set_is_known_by_its_columns(change, monkeypatch):
    """A revision may give the same values other names, or another meaning."""

    def fingerprint(table):
        data = datasets.DatasetDict({"train": datasets.Dataset(table)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        return open_source("o/n", "train").fingerprint()

    table = pa.table({"chosen": ["a"], "rejected": ["b"]})
    first = fingerprint(table)
    assert first == fingerprint(table)
    if change == "names":
        table = table.rename_columns(["rejected", "chosen"])
    else:
        json_text = pa.field("chosen", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
        table = table.cast(pa.schema([json_text, table.schema.field("rejected")]))
    assert first != fingerprint(table)


def test_a_hub_id_without_a_network_fails_fast_and_clearly():
    began = time.monotonic()
    message = refused("not a local path, and the hub does not give it", "nvidia/HelpSteer2")
    assert message.startswith("nvidia/HelpSteer2: ")
    assert time.monotonic() - began < 5


# ---- generated rows ------------------------------------------------------------------------------


def test_generated_rows_are_always_the_same():
    source = open_source("generated:30", "train")
    rows = [row.fields for row in source]
    assert len(rows) == 30 and rows == [row.fields for row in source]
    assert rows != read("generated:30", "validation")
    assert source.fingerprint() != open_source("generated:30", "validation").fingerprint()
    assert source.fingerprint() != open_source("generated:32", "train").fingerprint()
    assert read("generated:30:val") == read("generated:30", "validation")  # the split by its name


@pytest.mark.parametrize("count", ["", "1", "0", "-4", "x", "3.5", "²", "x:test"])
def test_generated_needs_a_count(count):
    refused("expected generated:COUNT", f"generated:{count}")


def test_reading_json_imports_nothing_heavy(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"response": "r"}])
    program = (
        "import sys; from rmjax.data.readers import open_source\n"
        "assert list(open_source(sys.argv[1], 'train'))\n"
        "assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=True)
