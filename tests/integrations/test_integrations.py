"""Reward functions as TRL, Tunix and verl call them, by a model and by a server."""

import asyncio

import numpy as np
import pytest

import rmjax
from helpers.checks import known
from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from helpers.serving import make_service, one_device, running
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer, render
from rmjax.errors import UserError
from rmjax.integrations import trl, tunix, verl

NAMES = ("helpfulness", "verbosity")
PROMPTS = ["Why?", "Why?", "Who?", "Who?"]
ANSWERS = ["So.", "Because.", " ", "x" * 300]


def talk(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    llama = tiny_llama(max_position_embeddings=128, num_hidden_layers=1)
    return str(save_hf(tmp_path_factory.mktemp("hf"), llama, names=NAMES))


@pytest.fixture(scope="module")
def url(model):
    with running(make_service(one_device(model))) as url:
        yield url


@pytest.fixture(scope="module", params=["model", "server"])
def judge(request, model, url):
    return model if request.param == "model" else url


@pytest.fixture(scope="module")
def expected(model):
    rm = rmjax.load(model, over_long="truncate_left")
    scores = [rm.score(talk(p, a)) if a.strip() else None for p, a in zip(PROMPTS, ANSWERS)]
    assert known(scores[3]).cut
    return scores


def test_trl(judge, expected):
    """Texts, or conversations, and whatever columns the data have."""
    reward = trl.reward_function(judge, name="judge")
    assert reward.__name__ == "judge"
    messages = dict(
        prompts=[[{"role": "user", "content": prompt}] for prompt in PROMPTS],
        completions=[[{"role": "assistant", "content": answer}] for answer in ANSWERS],
    )
    for asked in ({"prompts": PROMPTS, "completions": ANSWERS}, messages):
        found = reward(**asked, completion_ids=[[1]] * 4, answer=["?"] * 4, trainer_state=None)
        assert found[2] is None
        values = [score.value for score in expected if score]
        np.testing.assert_allclose([x for x in found if x is not None], values, atol=1e-5)


def test_tunix(judge, expected):
    """Its prompts are texts that the policy's template wrote."""
    reward = tunix.reward_function(judge, empty=-7.0)
    user = [Conversation([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    chatml = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in PROMPTS]
    for prompts in (chatml, [render(byte_tokenizer(), each, asking=True) for each in user]):
        found = reward(prompts=np.asarray(prompts), completions=ANSWERS, question=PROMPTS)
        values = [score.value if score else -7.0 for score in expected]
        np.testing.assert_allclose(found, values, atol=1e-5)


def test_verl(url, expected):
    async def main(**options):
        asked = [
            verl.compute_score("set", answer, None, {"question": prompt}, url=url, **options)
            for prompt, answer in zip(PROMPTS, ANSWERS)
        ]
        return await asyncio.gather(*asked)

    found = asyncio.run(main(prompt_field="question", reward_model_tokenizer=None))
    assert found[2] == {"score": 0.0}
    for judged, score in zip(found, expected):
        if score:
            assert set(judged) == {"score", *NAMES}
            np.testing.assert_allclose(judged["score"], score.value, atol=1e-5)
    with pytest.raises(UserError, match="extra_info has no 'prompt', but question"):
        asyncio.run(main())


def test_what_cannot_be_judged(url, model):
    with pytest.raises(UserError, match="'value' is said where the server"):
        trl.reward_function(url, value="verbosity")
    for judge in (url, model):
        with pytest.raises(UserError, match="ends with an empty user turn"):
            trl.reward_function(judge)(
                prompts=[[{"role": "user", "content": ""}]], completions=["a"]
            )
    assert trl.reward_function(model, value="verbosity")(prompts=["a"], completions=["b"])
