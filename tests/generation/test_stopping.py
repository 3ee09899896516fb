import numpy as np
import pytest

from rmjax.data.tokenizer import byte_tokenizer
from rmjax.generation.stopping import find_stop, make_completion


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_first_text_that_is_complete_ends(tokenizer):
    tokens = ids(tokenizer, "one END two STOP")
    assert find_stop(tokenizer, tokens, 0, ("STOP", "END")) == (7, "END")
    assert find_stop(tokenizer, tokens, 0, ("STOP",)) == (16, "STOP")
    assert find_stop(tokenizer, tokens, 0, ("nothing",)) is None
    assert find_stop(tokenizer, tokens, 0, ()) is None


def test_a_text_may_reach_over_what_was_looked_at_before(tokenizer):
    tokens = ids(tokenizer, "one END two")
    assert find_stop(tokenizer, tokens, 5, ("END",)) == (7, "END")


def test_of_texts_complete_at_once_the_one_that_begins_first(tokenizer):
    assert find_stop(tokenizer, ids(tokenizer, "a\n\nb"), 0, ("\n", "\n\n")) == (2, "\n")
    assert find_stop(tokenizer, ids(tokenizer, "xyz"), 0, ("z", "yz")) == (3, "yz")


def test_letters_of_several_tokens(tokenizer):
    """A byte-level token may be half a letter, which is no text yet."""
    tokens = ids(tokenizer, "aé!")
    assert len(tokens) == 4
    assert find_stop(tokenizer, tokens, 0, ("é",)) == (3, "é")


def test_completions(tokenizer):
    end = tokenizer.eos_token_id
    tokens = [*ids(tokenizer, "  so , it\n"), end]
    logs = np.arange(len(tokens)) * -1.0
    whole = make_completion(tokenizer, tokens, logs.tolist(), (end,), None)
    assert (whole.text, whole.reason, whole.stop, whole.ended) == ("  so , it\n", "end", "", True)
    assert whole.tokens.tolist() == tokens and whole.log_probabilities.tolist() == logs.tolist()
    cut = make_completion(tokenizer, tokens, logs.tolist(), (end,), (6, ","))
    assert (cut.text, cut.reason, cut.stop, cut.ended) == ("  so ", "stop", ",", True)
    assert len(cut.tokens) == len(cut.log_probabilities) == 6
    long = make_completion(tokenizer, tokens[:-1], logs[:-1].tolist(), (end,), None)
    assert (long.text, long.reason, long.ended) == ("  so , it\n", "length", False)


def test_special_tokens_inside_a_sample_stay_in_its_text(tokenizer):
    tokens = [
        *ids(tokenizer, "a"),
        tokenizer.convert_tokens_to_ids("<|user|>"),
        *ids(tokenizer, "b"),
    ]
    found = make_completion(tokenizer, tokens, [0.0] * 3, (1,), None)
    assert found.text == "a<|user|>b"
