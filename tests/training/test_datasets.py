import gzip
import json

import pytest

from helpers.runs import tiny_config
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.training.datasets import load_data

PAIRS = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("a", "b", "c")]
SPLITS = ("train", "train", "val")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs_config(workdir, train, validation):
    config = tiny_config(workdir, objective="bradley_terry", data__attributes=("good",))
    config.data.train, config.data.validation = str(train), str(validation)
    return config


def test_one_file_is_not_train_and_validation_unless_its_rows_say_which(tmp_path):
    path = tmp_path / "pairs.jsonl"
    config = pairs_config(tmp_path / "run", path, path)
    path.write_text(lines(PAIRS))
    with pytest.raises(
        UserError, match=r"pairs\.jsonl: the same rows are there for training and f"
    ):
        load_data(config, byte_tokenizer(), share=True)
    path.write_text(lines(pair | {"split": split} for pair, split in zip(PAIRS, SPLITS)))
    data, held = load_data(config, byte_tokenizer(), share=True)
    assert held is not None and (len(data), len(held)) == (4, 2)
    config.data.validation, config.data.hold_out = "", 0.5
    path.write_text(lines(PAIRS))
    assert len(load_data(config, byte_tokenizer(), share=True)[0]) < 6


def test_rows_are_the_same_by_whatever_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    path = data / "train.jsonl"
    path.write_text(lines(PAIRS))
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    (tmp_path / "copy.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "copy.json").write_text(json.dumps(PAIRS))
    for other in (
        *("data/train.jsonl", "data/../data/train.jsonl", "link.jsonl", "copy.jsonl"),
        *("copy.jsonl.gz", "copy.json", "data:train", f"{data}:train"),
    ):
        for train in (path, data):
            config = pairs_config(tmp_path / "run", train, other)
            with pytest.raises(UserError, match=r"the same rows are there for training .*and"):
                load_data(config, byte_tokenizer(), share=True)


def test_equal_rows_of_two_splits_are_not_the_same_rows(tmp_path):
    """Such as the pairs of a game: the file says that they are trained on and held out."""
    path = tmp_path / "x.jsonl"
    path.write_text(lines(pair | {"split": s} for s in ("train", "val") for pair in PAIRS))
    data, held = load_data(pairs_config(tmp_path / "run", path, path), byte_tokenizer(), True)
    assert held is not None and len(data) == len(held) == 6
    assert data.notes == held.notes == ()  # the column is used


def test_kept_tokens_of_one_question_do_not_answer_another(tmp_path, monkeypatch):
    """Asked for validation where only train is, the tokens of `:train` were once the answer."""
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(lines(PAIRS))
    mixed = tmp_path / "mixed.jsonl"
    names = ("train", None, "validation")
    mixed.write_text(lines(pair | {"split": name} for pair, name in zip(PAIRS, names)))
    plain = tmp_path / "plain.jsonl"
    plain.write_text(lines(PAIRS))

    def load(source):
        return load_tokenized(
            str(source),
            "validation",
            byte_tokenizer(),
            attributes=("good",),
            label_range=(0, 1),
            max_length=99,
            over_long="drop",
            pairs=True,
        )

    for asked, other in (
        (data, f"{data}:train"),
        (data, data / "train.jsonl"),
        (mixed, f"{mixed}:validation"),
        (f"{plain}:validation", plain),
    ):
        assert len(load(other)) in (2, 6)
        with pytest.raises(UserError, match=r"no split 'validation'|says nothing"):
            load(asked)
