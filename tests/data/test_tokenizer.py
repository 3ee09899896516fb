import datetime
import io
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import (
    BYTES_TEMPLATE,
    byte_tokenizer,
    encode,
    freeze_date,
    load_tokenizer,
    pad_token_id,
)
from rmjax.errors import UserError

MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is  tea?\n"},
    {"role": "assistant", "content": "a drink"},
    {"role": "user", "content": "why 42 é 雪?"},
    {"role": "assistant", "content": "because\n\n"},
]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The opening of Llama 3.2's own template, and its turns.
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|system|>Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n" }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
{%- endfor %}"""


def reference_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def saved(path, *, template=None, config=(), backend=None):
    """The byte tokenizer on disk, changed as asked."""
    byte_tokenizer().save_pretrained(path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    settings_file = path / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | dict(config)))
    if backend:
        raw = json.loads((path / "tokenizer.json").read_text())
        backend(raw)
        (path / "tokenizer.json").write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="module")
def sentencepiece_model():
    """Settings of Llama 2's own tokenizer.model, and a small vocabulary."""
    words = ["the", "cat", "sat", "on", "a", "mat", "dogs", "run", "far", "away", "with", "tea"]
    pick = random.Random(0)
    corpus = [" ".join(pick.choices(words, k=8)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def llama2(tmp_path, sentencepiece_model):
    """Writes a directory with tokenizer.model alone; returns the tokenizer loaded from it."""

    def write(template=LLAMA2, model=sentencepiece_model, **config):
        (tmp_path / "tokenizer.model").write_bytes(model)
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "LlamaTokenizer", "chat_template": template, **tokens, **config}
            )
        )
        return load_tokenizer(tmp_path)

    return write


_BYTES = byte_tokenizer()
# Text that spells a special token is that token; the next test has it.
TEXT = st.text(max_size=40).filter(
    lambda text: not any(token in text for token in _BYTES.all_special_tokens)
)


@settings(max_examples=50, deadline=None)
@given(prompt=TEXT, response=TEXT)
def test_byte_tokenizer_has_a_token_a_byte_and_three_a_turn_less_one(prompt, response):
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]
    ids = encode(_BYTES, Conversation(messages))
    assert len(ids) == 1 + sum(2 + len(m["content"].encode()) for m in messages)
    assert _BYTES.decode(ids) == f"<|bos|><|user|>{prompt}<|end|><|assistant|>{response}<|end|>"
    assert ids.tolist() == reference_ids(_BYTES, messages)


def test_text_that_spells_a_special_token_is_that_token_as_in_transformers():
    messages = [MESSAGES[1], {"role": "assistant", "content": "a<|end|><|bos|>b"}]
    ids = encode(_BYTES, Conversation(messages)).tolist()
    assert ids == reference_ids(_BYTES, messages)
    assert len(ids) == 1 + (2 + len("what is  tea?\n")) + (2 + len("a") + 2 + len("b"))


def test_byte_tokenizer_survives_the_disk(tmp_path):
    loaded = load_tokenizer(saved(tmp_path), vocab_size=262)
    assert (
        encode(loaded, Conversation(MESSAGES)).tolist()
        == encode(_BYTES, Conversation(MESSAGES)).tolist()
    )
    assert loaded.get_vocab() == _BYTES.get_vocab()
    assert len(loaded) == 262


def test_sentencepiece_alone_gives_sentencepieces_own_ids(llama2, sentencepiece_model):
    tokenizer = llama2(legacy=True)  # as Llama 2 was trained
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    expected = []
    for question, answer in (MESSAGES[1:3], MESSAGES[3:]):
        text = f"[INST] {question['content']} [/INST] {answer['content']} "
        expected += [1, *reference.encode(text), 2]
    ids = encode(tokenizer, Conversation(MESSAGES[1:])).tolist()
    assert ids == expected
    assert ids == reference_ids(tokenizer, MESSAGES[1:])


@pytest.mark.parametrize(
    "config", [{}, {"legacy": False}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str
)
def test_one_bos_where_the_template_writes_it(config, llama2):
    tokenizer = llama2(**config)
    ids = encode(tokenizer, Conversation(MESSAGES[1:3])).tolist()
    assert ids == reference_ids(tokenizer, MESSAGES[1:3])
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_one_bos_where_only_the_tokenizer_writes_it(llama2):
    tokenizer = llama2(LLAMA2.replace("bos_token + ", ""), add_bos_token=True)
    ids = encode(tokenizer, Conversation(MESSAGES[1:3])).tolist()
    assert ids == [tokenizer.bos_token_id, *reference_ids(tokenizer, MESSAGES[1:3])]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_where_nobody_writes_it(llama2):
    tokenizer = llama2(LLAMA2.replace("bos_token + ", ""), add_bos_token=False)
    ids = encode(tokenizer, Conversation(MESSAGES[1:3])).tolist()
    assert ids == reference_ids(tokenizer, MESSAGES[1:3])
    assert tokenizer.bos_token_id not in ids


def test_a_template_that_writes_two_bos_is_an_error(llama2):
    tokenizer = llama2("{{ bos_token }}" + LLAMA2)
    with pytest.raises(UserError, match="two BOS"):
        encode(tokenizer, Conversation(MESSAGES[1:3]))


def test_sentencepiece_survives_our_export(llama2, tmp_path):
    tokenizer = llama2()
    tokenizer.save_pretrained(tmp_path / "export")
    again = load_tokenizer(tmp_path / "export")
    assert (
        encode(again, Conversation(MESSAGES[1:])).tolist()
        == encode(tokenizer, Conversation(MESSAGES[1:])).tolist()
    )


def test_a_hidden_length_or_padding_in_tokenizer_json_is_not_obeyed(tmp_path):
    def edit(raw):
        raw["truncation"] = {
            "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        raw["padding"] = {
            "strategy": {"Fixed": 600}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>",
        }  # fmt: skip

    tokenizer = load_tokenizer(saved(tmp_path, backend=edit, config={"model_max_length": 8}))
    assert (
        encode(tokenizer, Conversation(MESSAGES)).tolist()
        == encode(_BYTES, Conversation(MESSAGES)).tolist()
    )


@pytest.mark.parametrize("model", [{}, {"model_type": "llama"}, {"model_type": "qwen2"}])
@pytest.mark.parametrize(
    "kind",
    ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", None],
)
def test_the_tokenizer_is_the_one_that_transformers_chooses(kind, model, tmp_path):
    path = saved(tmp_path, template=BYTES_TEMPLATE, config={"tokenizer_class": kind})
    if model:
        (path / "config.json").write_text(json.dumps(model))
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


def test_the_date_is_frozen(tmp_path):
    path = saved(tmp_path, template=LLAMA32)
    raw, frozen = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    today = datetime.date.today().strftime("%d %b %Y")
    assert f"Today Date: {today}\n" in raw.apply_chat_template(MESSAGES, tokenize=False)
    text = frozen.apply_chat_template(MESSAGES, tokenize=False)
    assert text == raw.apply_chat_template(MESSAGES, tokenize=False, date_string="26 Jul 2024")
    assert "Today Date: 26 Jul 2024\n" in text
    assert encode(frozen, Conversation(MESSAGES)).tolist() == raw.encode(
        text, add_special_tokens=False
    )


def test_the_exported_template_keeps_the_frozen_date(tmp_path):
    load_tokenizer(saved(tmp_path, template=LLAMA32)).save_pretrained(tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert "Date: 26 Jul 2024\n" in exported.apply_chat_template(MESSAGES, tokenize=False)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('{{ strftime_now("%d %b %Y") }}', "26 Jul 2024"),
        ("{{strftime_now ( '%Y' )}}-{{ strftime_now('%m') }}", "2024-07"),
        ("{{ strftime_now('%d\\n%b') }}", "26\nJul"),
        ("{% if strftime_now is defined %}{{ strftime_now('%A') }}{% endif %}", "Friday"),
        ("{% if strftime_now is not defined %}x{% endif %}y", "y"),
        ("no date at all", "no date at all"),
    ],
)
def test_every_plain_use_of_the_date_is_frozen(template, text, tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, template=template))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == text


@pytest.mark.parametrize(
    "template",
    [
        "{% set f = '%d' %}{{ strftime_now(f) }}",
        "{{ strftime_now(format='%d') }}",
        "{% set now = strftime_now %}{{ now('%d') }}",
        "{% set d = {'f': strftime_now} %}{{ d.f('%d') }}",
    ],
)
def test_a_date_that_cannot_be_frozen_is_an_error(template):
    with pytest.raises(UserError, match="cannot be frozen"):
        freeze_date(template)


def test_no_chat_template_is_an_error(tmp_path):
    (saved(tmp_path) / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


NAMED = {
    "default": "{% for m in messages %}{{ 'd' + m['content'] }}{% endfor %}",
    "rag": "{% for m in messages %}{{ 'r' + m['content'] + strftime_now('%Y') }}{% endfor %}",
    "tool_use": "{% for m in messages %}{{ 't' + m['content'] }}{% endfor %}",
}


def save_named(path, form, names=tuple(NAMED)):
    """Several templates as transformers 4 (a list) or 5 (files) saves them."""
    (saved(path) / "chat_template.jinja").unlink()
    if form == "list":
        named = [{"name": name, "template": NAMED[name]} for name in names]
        return saved_config(path, chat_template=named)
    (path / "additional_chat_templates").mkdir()
    for name in names:
        file = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        (path / f"{file}.jinja").write_text(NAMED[name])
    return path


def saved_config(path, **changes):
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize("form", ["list", "files"])
def test_of_several_templates_one_is_used(form, tmp_path):
    """transformers renders them by name."""
    theirs = AutoTokenizer.from_pretrained(save_named(tmp_path, form))
    for name in ("", "default", "tool_use"):
        ours = load_tokenizer(tmp_path, 262, name)
        expected = theirs.apply_chat_template(
            MESSAGES, tokenize=True, return_dict=False, chat_template=name or None
        )
        assert encode(ours, Conversation(MESSAGES)).tolist() == expected
    # The one that is used is saved alone, without its date.
    load_tokenizer(tmp_path, 262, "rag").save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.chat_template == NAMED["rag"].replace("strftime_now('%Y')", "'2024'")


@pytest.mark.parametrize("form", ["list", "files"])
def test_a_template_must_be_named_where_there_is_no_default(form, tmp_path):
    path = save_named(tmp_path, form, ("tool_use", "rag"))
    with pytest.raises(UserError, match=r"none is called 'default': rag, tool_use\. Say which, w"):
        load_tokenizer(path)
    assert load_tokenizer(path, chat_template="tool_use").chat_template == NAMED["tool_use"]
    with pytest.raises(UserError, match=r"no chat template 'default'; there are: rag, tool_use"):
        load_tokenizer(path, chat_template="default")


def test_a_single_template_is_the_default_whatever_it_is_called(tmp_path):
    one = save_named(tmp_path / "one", "files", ("tool_use",))
    assert load_tokenizer(one).chat_template == NAMED["tool_use"]
    plain = saved(tmp_path / "plain")
    assert load_tokenizer(plain, chat_template="default").chat_template == _BYTES.chat_template
    with pytest.raises(UserError, match="no chat template 'rag'; there are: default"):
        load_tokenizer(plain, chat_template="rag")


def test_more_tokens_than_embedding_rows_is_an_error(tmp_path):
    saved(tmp_path)
    assert len(load_tokenizer(tmp_path, vocab_size=262)) == 262
    assert len(load_tokenizer(tmp_path, vocab_size=300)) == 262
    with pytest.raises(UserError, match="262 rows but the model's embedding has only 261"):
        load_tokenizer(tmp_path, vocab_size=261)


def test_an_id_beyond_the_embedding_is_an_error_also_where_ids_have_gaps(tmp_path):
    def edit(raw):
        raw["model"]["vocab"]["ÿ"] = 999

    with pytest.raises(UserError, match="1000 rows but the model's embedding has only 262"):
        load_tokenizer(saved(tmp_path, backend=edit), vocab_size=262)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_tokenizer_is_an_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": LLAMA2})
    )
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_no_tokenizer_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no tokenizer here"):
            load_tokenizer(path)


def test_a_template_that_refuses_a_conversation_is_an_error(tmp_path):
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    tokenizer = load_tokenizer(saved(tmp_path, template=template))
    with pytest.raises(UserError, match=r"refuses this conversation .*must alternate"):
        encode(tokenizer, Conversation(MESSAGES))


def test_half_a_surrogate_pair_is_an_error():
    message = json.loads(r'{"role": "user", "content": "a\ud800b"}')
    with pytest.raises(UserError, match="not valid Unicode"):
        encode(_BYTES, Conversation([message]))


def test_pad_is_the_tokenizers_own_where_that_is_free():
    assert pad_token_id(_BYTES) == _BYTES.convert_tokens_to_ids("<|pad|>")


def test_pad_is_unk_where_a_sentencepiece_model_has_nothing_else(llama2):
    assert pad_token_id(llama2()) == 0


@pytest.mark.parametrize("pad", ["<|end|>", "<|bos|>", "<|user|>", "<|system|>", None])
def test_pad_is_never_what_ends_begins_or_shapes_a_conversation(pad, tmp_path):
    """Declared pad or not: eos, bos and the template's own tokens are not free."""
    tokenizer = load_tokenizer(saved(tmp_path, config={"pad_token": pad}))
    with pytest.raises(UserError, match="add one, for example <pad>"):
        pad_token_id(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<pad>")


LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
)


@pytest.mark.parametrize("pad", ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"])
def test_llama3s_pad_is_one_of_its_reserved_tokens(pad):
    """Llama 3.0 has no pad of any kind, 3.1 the one for finetuning; neither declares it."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", pad, "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>"]
    backend = Backend(models.BPE(vocab={}, merges=[]))
    backend.add_special_tokens(special)
    # Llama 3's own tokenizer adds BOS in its post-processor, and its template writes one too.
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3,
    )
    assert encode(tokenizer, Conversation(MESSAGES)).tolist().count(0) == 1
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(pad)
