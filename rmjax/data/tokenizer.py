"""Conversations to tokens: one path for training, scoring and export.

The reward is read at the last token of the templated conversation. The template is the tokenizer's
own, except that today's date is taken out of it, and there is exactly one BOS.

transformers takes seconds to import, so it is imported when a tokenizer is made.
"""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.data.conversation import Conversation
from rmjax.data.template_check import check_template
from rmjax.errors import UserError
from rmjax.runtime.files import check_readable, read_json

Tokenizer = Any  # transformers has no public type for "a tokenizer, fast or slow"

_MOST_BYTES = 512 << 20  # of a file of a tokenizer; those of 256,000 tokens have 35 MB
# Llama 3.1's template falls back to this very day when nobody tells it the date.
FROZEN_DATE = datetime.date(2024, 7, 26)
# A `tokenizer.json` without code of a model's own, in transformers 4 and 5; and in 5 alone.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
_STRFTIME = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
_STRFTIME_LEFT = re.compile(r"\bstrftime_now\b(?!\s+is\s+(not\s+)?defined\b)")

BYTES_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load_tokenizer(path: Path, vocab_size: int | None = None, chat_template: str = "") -> Tokenizer:
    """Loads the tokenizer of a directory or a GGUF file, with one template, its date frozen.

    Args:
      path: a directory with `tokenizer.json` or `tokenizer.model`, or a `.gguf` file.
      vocab_size: rows of the embedding that must hold every token.
      chat_template: name of the template to use; empty for the one called `default`, or the only
        one.

    Raises:
      UserError: no tokenizer, no chat template or several to choose from, or a token that has no
        embedding.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        beside = path.parent
        if (beside / "tokenizer.json").exists():
            source["pretrained_model_name_or_path"] = str(beside)
        else:
            source = {"pretrained_model_name_or_path": str(beside), "gguf_file": path.name}
    elif not any(map(_has_bytes, (path / "tokenizer.json", path / "tokenizer.model"))):
        raise UserError(f"{path}: no tokenizer here (tokenizer.json or tokenizer.model)")
    directory = Path(source["pretrained_model_name_or_path"])
    for pattern in ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*"):
        for file in directory.glob(pattern):
            with contextlib.suppress(OSError):  # a link to nothing, or to itself
                check_readable(file, _MOST_BYTES)
    try:
        kind = getattr(_transformers(), _class_name(directory))
        tokenizer = kind.from_pretrained(**source, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"{path}: transformers needs torch to read a tokenizer out of a GGUF file: "
            "`pip install 'rmjax[gguf]'`, or put tokenizer.json beside the file"
        ) from error
    except Exception as error:  # whatever a broken file makes transformers raise
        raise UserError(f"{path}: the tokenizer cannot be read ({error})") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template. A reward is defined on a templated "
            "conversation: add chat_template.jinja to the directory, or use an Instruct model's"
        )
    chosen = _pick_template(tokenizer.chat_template, chat_template, path)
    tokenizer.chat_template = freeze_date(chosen)
    check_template(tokenizer, str(path))
    # Ids may have gaps, so it is not their number that counts.
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if vocab_size is not None and needed > vocab_size:
        raise UserError(
            f"{path}: the tokenizer's ids need {needed} rows but the model's embedding has only "
            f"{vocab_size}; they do not belong together"
        )
    return tokenizer


def _pick_template(templates: str | dict[str, str], name: str, path: Path) -> str:
    """The template of a name; without a name the default. A tokenizer has one, or several named."""
    named = {"default": templates} if isinstance(templates, str) else templates
    if not name and len(named) == 1:
        return next(iter(named.values()))
    if (name or "default") in named:
        return named[name or "default"]
    there = ", ".join(sorted(named))
    if name:
        raise UserError(f"{path}: there is no chat template {name!r}; there are: {there}")
    raise UserError(
        f"{path}: several chat templates, and none is called 'default': {there}. Say which, with "
        "config.chat_template for training, chat_template of rmjax.load and rmjax.load_policy, or "
        "--chat-template of a command such as rmjax.evaluate or rmjax.convert hf-to-orbax"
    )


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, with roles as special tokens and a template.

    It needs no file and no hub; a model trained from nothing on generated text uses it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[3:],
        chat_template=BYTES_TEMPLATE,
    )


def freeze_date(template: str) -> str:
    """The template with every `strftime_now("...")` replaced by that format of a fixed day.

    A score must not depend on the day it was computed (templates of Llama 3.1 and later print
    the date). The exported template is this one, so that servers see the same tokens.
    """

    def fixed(match: re.Match[str]) -> str:
        quote, layout = match.groups()
        return quote + FROZEN_DATE.strftime(layout) + quote

    frozen = _STRFTIME.sub(fixed, template)
    if _STRFTIME_LEFT.search(frozen):
        raise UserError("the chat template computes a date in a way that cannot be frozen")
    return frozen


def encode(tokenizer: Tokenizer, conversation: Conversation, asking: bool = False) -> np.ndarray:
    """Token ids [length] int32 of a conversation; the reward is read at the last one.

    Args:
      tokenizer: with a chat template.
      conversation: the messages.
      asking: whether the tokens go on to where the assistant's next turn begins.

    Raises:
      UserError: the template refuses the conversation, or the text is not valid Unicode.
    """
    return next(encode_texts(tokenizer, [unicode_text(tokenizer, conversation, asking)]))


def unicode_text(tokenizer: Tokenizer, conversation: Conversation, asking: bool = False) -> str:
    """The text that `encode` makes tokens of, by the chat template.

    Raises:
      UserError: see `encode`.
    """
    text = render(tokenizer, conversation, asking)
    check_text(text, "the conversation")
    return text


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """The token ids [length] int32 of each text of `unicode_text`.

    Raises:
      UserError: there are two BOS; when that text's turn comes.
    """
    if not texts:
        return
    found = tokenizer([*texts], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    bos, more = tokenizer.bos_token_id, None
    for ids in found:
        if bos is not None:
            if ids[:1] != [bos]:
                more = writes_bos(tokenizer) if more is None else more
                ids = [bos, *ids] if more else ids
            if ids[:2] == [bos, bos]:
                raise UserError(
                    "the conversation starts with two BOS tokens: the chat template writes one "
                    "more than it should"
                )
        yield np.asarray(ids, np.int32)


def check_text(text: str, what: str) -> None:
    """Raises a `UserError` unless a text is Unicode: JSON can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode ({error})") from error


def render(tokenizer: Tokenizer, conversation: Conversation, asking: bool = False) -> str:
    """The text of a conversation by the chat template; see `encode`.

    Raises:
      UserError: the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools or None,
            tokenize=False,
            add_generation_prompt=asking,
        )
    except Exception as error:  # jinja's and the template's own complaints
        raise UserError(f"the chat template refuses this conversation ({error})") from error


def truncate_left(tokens: np.ndarray, max_length: int, bos: int | None) -> np.ndarray:
    """The last `max_length` tokens, with the BOS that stood in front kept in front.

    The end stays whole, since the reward is read there.
    """
    if len(tokens) <= max_length:
        return tokens
    if bos is not None and tokens[0] == bos and max_length > 1:
        return np.concatenate([tokens[:1], tokens[-(max_length - 1) :]])
    return tokens[-max_length:]


def pad_token_id(tokenizer: Tokenizer) -> int:
    """A pad id for the exported config that no conversation ends with.

    transformers and vLLM find the last real token by comparing with this id, so it must be neither
    eos nor bos. Llama 3 reserves `<|finetune_right_pad_id|>`; else the tokenizer's own pad, its
    unk, or any special token that is free.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id} | _template_ids(tokenizer)
    vocab = tokenizer.get_vocab()
    names = ["<|finetune_right_pad_id|>", "<pad>", "[PAD]"]
    candidates = [vocab.get(name) for name in names]
    candidates += [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    candidates.append(vocab.get("<|reserved_special_token_0|>"))  # Llama 3.0 has nothing else
    for candidate in candidates:
        if candidate is not None and candidate not in taken:
            return int(candidate)
    raise UserError(
        "the tokenizer has no special token free to serve as padding (not eos, not bos, not in the "
        "chat template): add one, for example <pad>"
    )


def differences(one: Tokenizer, other: Tokenizer) -> list[str]:
    """The differences between two tokenizers that may give a conversation other tokens.

    Padding is none of them: an exported model has a pad token of its own, see `pad_token_id`.
    """
    first, second = _made_of(one), _made_of(other)
    return [name for name in first if first[name] != second[name]]


def _transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _class_name(directory: Path) -> str:
    """The class of transformers that reads a directory's tokenizer.

    `AutoTokenizer` knows them all. To choose it reads the model's config, for which transformers
    imports torch where that is installed, and that takes seconds. So what most Llamas say, and what
    it then chooses, is found here.
    """
    if not _has_bytes(directory / "tokenizer.json"):
        return "AutoTokenizer"
    tokenizer, model = (
        read_json(file) if file.exists() else {}
        for file in (directory / "tokenizer_config.json", directory / "config.json")
    )
    plain = tokenizer.get("tokenizer_class") in _PLAIN and "auto_map" not in tokenizer
    return _PLAIN[0] if plain and model.get("model_type", "llama") == "llama" else "AutoTokenizer"


def _has_bytes(file: Path) -> bool:
    """Of an empty `tokenizer.model`, transformers makes a tokenizer that knows no word."""
    return file.is_file() and file.stat().st_size > 0


def writes_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a BOS before any text."""
    return tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids in conversations with every role, as far as the template accepts them."""
    system, user, assistant = (
        {"role": role, "content": "x"} for role in ("system", "user", "assistant")
    )
    ids: set[int] = set()
    turn = [user, assistant]
    for messages in (turn, [*turn, *turn], [system, *turn]):
        with contextlib.suppress(UserError):
            ids.update(encode(tokenizer, Conversation(messages)).tolist())
    return ids


def _made_of(tokenizer: Tokenizer) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    steps = ("normalizer", "pre_tokenizer", "post_processor")
    return {
        "vocabulary": (tokenizer.get_vocab(), parts.get("model")),
        "added tokens": parts.get("added_tokens"),
        "splitting": ([parts.get(step) for step in steps], tokenizer.split_special_tokens),
        "BOS or EOS": (tokenizer.bos_token, tokenizer.eos_token),
        "chat template": tokenizer.chat_template,
    }
