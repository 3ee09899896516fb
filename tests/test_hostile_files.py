"""Files made to do harm: a fast one of each kind that `benchmarks/reliability.py` found."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from helpers.hf_models import edit_json, save_hf
from helpers.paths import ROOT
from rmjax.checkpoints.orbax_arrays import open_array
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.checkpoints.safetensors_file import SafetensorsFile
from rmjax.data import file_formats, template_check
from rmjax.data.file_formats import read_file
from rmjax.data.tokenizer import load_tokenizer
from rmjax.errors import UserError, shown
from rmjax.runtime.files import read_json

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def model(good, tmp_path):
    subprocess.run(["cp", "-r", good, tmp_path / "model"], check=True)
    return tmp_path / "model"


def test_a_message_shows_a_terminal_nothing_to_obey():
    assert shown("a\x1b[2Jb\u202ec\nd") == "a\\x1b[2Jb\\u202ec\nd"
    long = shown("x" * 10_000)
    assert len(long) < 2100 and "[8,000 characters left out]" in long


@pytest.mark.parametrize("arguments", (["-m", "rmjax.choose", "--help"], ["-m", "rmjax"]))
def test_a_closed_pipe_ends_a_command_without_a_word(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.stderr == ""


@pytest.mark.parametrize("name", ("../other/model.safetensors", "/dev/zero", "a.bin", "x\0"))
def test_an_index_names_files_of_its_directory(model, name):
    (model / "model.safetensors").unlink()
    index = json.dumps({"weight_map": {"model.norm.weight": name}})
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"no \.safetensors file of this directory"):
        open_pretrained(str(model))


def test_a_header_has_each_key_once(tmp_path):
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{one},{one}}}".encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(UserError, match=r"twice|duplicate|truncated or damaged"):
        SafetensorsFile(file)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    (
        ("num_hidden_layers", 10**9, "at most 10,000"),
        ("num_hidden_layers", 9999, "fewer than the 9,999 layers"),
        ("rms_norm_eps", float("nan"), "positive number"),
        ("rms_norm_eps", 10**400, "positive number"),
        ("architectures", 5, "no list"),
        ("tie_word_embeddings", 1, "expected a boolean"),
        ("num_labels", 10**9, "from 1 to"),
        ("rope_scaling", 0, "expected a mapping"),
    ),
)
def test_fields_of_a_config_are_checked(model, field, value, said):
    edit_json(model / "config.json", **{field: value})
    with pytest.raises(UserError, match=said):
        open_pretrained(str(model))


@pytest.mark.parametrize(
    "fields", ({"attributes": 5}, {"scalar": {"zeal": float("nan")}}, {"max_length": "x"})
)
def test_fields_of_a_spec_are_checked(model, fields):
    labels = json.loads((model / "config.json").read_text())["id2label"]
    spec = {"format": "rmjax", "format_version": "0.1", "attributes": [*labels.values()]}
    (model / "rmjax.json").write_text(json.dumps({**spec, "scalar": {}, **fields}))
    with pytest.raises(UserError, match=f"rmjax.json: field '{next(iter(fields))}'"):
        open_pretrained(str(model))


def test_what_is_no_file_is_not_read(model):
    os.mkfifo(model / "pipe.json")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        read_json(model / "pipe.json")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("template", "said"),
    (
        ("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "done"),
        ("{{ 'a' * 99999999999 }}", "memory"),
        ("{% if false %}{{ 9 ** 9 ** 9 }}{% endif %}", "power"),
    ),
)
def test_a_template_has_limits(model, template, said, monkeypatch):
    monkeypatch.setattr(template_check, "_SECONDS", 1)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said):
        load_tokenizer(model)


def test_deep_json_beside_an_array_is_no_crash(tmp_path):
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed" / "zarr.json").write_text(DEEP)
    with pytest.raises(UserError, match="'embed' is missing or damaged"):
        open_array(tmp_path, "embed")


def test_lines_and_compressed_files_have_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "_LONGEST_LINE", 1 << 10)
    monkeypatch.setattr(file_formats, "_LEAST_BOMB", 1 << 16)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "' + b"x" * 2000 + b'"}\n')
    with pytest.raises(UserError, match="line 1: longer than"):
        list(read_file(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_bytes(b'[{"a": "' + b"x" * 2000 + b'"}]\n')
    assert len(list(read_file(tmp_path / "a.json"))) == 1  # a list may stand in one line
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": "x"}\n' * 100_000))
    with pytest.raises(UserError, match="200 times its size"):
        list(read_file(tmp_path / "a.jsonl.gz"))


def test_a_dictionary_is_as_large_as_its_rows(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    same = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), ["a" * (1 << 20)])
    parquet.write_table(pa.table({"a": same}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(UserError, match="200 times its size"):
        list(read_file(tmp_path / "a.parquet"))


def test_arrow_offsets_that_lie_are_not_followed(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    # The first text ends at 2^31 - 1, and only the last at a byte that is there.
    offsets = pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x7f\1\0\0\0")
    text = pa.Array.from_buffers(pa.utf8(), 2, [None, offsets, pa.py_buffer(b"x")])
    with pytest.raises(UserError, match="x: cannot be read"):
        list(file_formats.arrow_rows([pa.record_batch([text], ["a"])], "x"))
    field = pa.field("a", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
    table = pa.Table.from_arrays([pa.array([DEEP])], schema=pa.schema([field]))
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_file(tmp_path / "a.parquet"))
