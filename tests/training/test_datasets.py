import json

import pytest

from helpers.runs import tiny_config
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.training.datasets import load_data


def test_one_file_is_not_train_and_validation_unless_its_rows_say_which(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("a", "b", "c")]
    config = tiny_config(tmp_path / "run", objective="bradley_terry", data__attributes=("good",))
    config.data.train = config.data.validation = str(path)

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(pairs)
    with pytest.raises(UserError, match=r"pairs\.jsonl: it is there for training and for validat"):
        load_data(config, byte_tokenizer(), share=True)
    write(pair | {"split": split} for pair, split in zip(pairs, ("train", "train", "val")))
    data, held = load_data(config, byte_tokenizer(), share=True)
    assert held is not None and (len(data), len(held)) == (4, 2)
    config.data.validation, config.data.hold_out = "", 0.5
    write(pairs)
    assert len(load_data(config, byte_tokenizer(), share=True)[0]) < 6
