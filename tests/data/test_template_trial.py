import resource

import pytest

from rmjax.data import template_check, template_trial
from rmjax.data.template_check import check_template
from rmjax.data.tokenizer import BYTES_TEMPLATE, byte_tokenizer
from rmjax.errors import UserError

GENERATION = (
    "{{ bos_token }}{%- for m in messages %}\n{% if m.role == 'assistant' %}\n"
    "{% generation %}{{ m['content'] | trim }}{% endgeneration %}\n"
    "{% elif m.role == 'system' %}{{ raise_exception('no') }}{% else %}{{ m | tojson }}"
    "{% endif %}{% break %}{% endfor %}"
)


@pytest.mark.parametrize("template", (BYTES_TEMPLATE, GENERATION))
@pytest.mark.parametrize("asking", (False, True))
def test_a_trial_writes_what_transformers_does(template, asking):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    talk = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": " x "}]
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=asking)
    special = {"bos_token": tokenizer.bos_token}
    assert template_trial.render(template, special, talk, asking) == expected


def test_the_same_template_is_tried_once_and_limits_are_not_ours(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'a'.center(99999999999) }}"
    for _ in range(2):
        with pytest.raises(UserError, match="here: the chat template asks for more than 1 GiB"):
            check_template(tokenizer, "here")
        monkeypatch.setattr(template_check.subprocess, "run", None)
    assert before == (
        resource.getrlimit(resource.RLIMIT_AS),
        resource.getrlimit(resource.RLIMIT_CPU),
    )


def test_a_template_of_a_megabyte_is_not_run():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "x" * (1 << 21)
    with pytest.raises(UserError, match=r"2,097,152 characters"):
        check_template(tokenizer, "here")
