"""Every endpoint, as its clients ask and read it, against `rm.score_many`."""

import asyncio
import base64
import dataclasses
import json
import random
import re

import httpx
import numpy as np
import openai
import pytest

import rmjax
from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from helpers.serving import make_service, one_device, running, variant
from rmjax.alignment.reward_servers import ServerReward
from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer, encode, render
from rmjax.errors import UserError
from rmjax.models.rewards.general_preference import GeneralPreference

NAMES = ("helpfulness", "correctness", "coherence", "verbosity")
CONTEXT = 256
PROMPT = "Why is the sky blue, and not green?"
ANSWERS = ["Rayleigh.", "It is not.", "Because of how air scatters light: short waves more."]
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TURNS = [
    {"role": "system", "content": "Be brief."},
    *({"role": role, "content": role[:3]} for role in ("user", "assistant", "user")),
]


def talk(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def text(answer, prompt=PROMPT):
    return CHATML.format(prompt) + answer + "<|im_end|>\n"


def own(messages):
    return render(byte_tokenizer(), Conversation(messages))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    llama = tiny_llama(max_position_embeddings=CONTEXT)
    return save_hf(tmp_path_factory.mktemp("hf"), llama, names=NAMES)


@pytest.fixture(scope="module")
def scorer(directory):
    """Asked directly, beside the server."""
    return one_device(directory)


@pytest.fixture(scope="module")
def service(directory):
    return make_service(one_device(directory))


@pytest.fixture(scope="module")
def url(service):
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(scorer):
    """Of ANSWERS: every attribute, the first of which is the value."""
    found = scorer.score_many([talk(PROMPT, answer) for answer in ANSWERS])
    return np.asarray([list(score.attributes.values()) for score in found])


def ok(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()


# ---- by client --------------------------------------------------------------------------------


async def openrlhf_reward(session, urls, query, prompt, label):
    """As `SingleTurnAgentExecutor` of OpenRLHF 0.11 asks: queries are divided among the servers,
    each is tried five times, and the first server's reply is what counts."""

    async def post(url, body):
        for _ in range(5):
            reply = await session.post(url + "/get_reward", json=body, timeout=180)
            if reply.status_code < 400:
                return reply.json()
        raise RuntimeError("no reward")

    queries, share = [query], -(-1 // len(urls))
    bodies = [
        {
            "query": queries[i * share : (i + 1) * share],
            "prompts": [prompt][i * share : (i + 1) * share],
            "labels": [label][i * share : (i + 1) * share],
        }
        for i in range(len(urls))
    ]
    replies = await asyncio.gather(*map(post, urls, bodies))
    first = replies[0]
    return first["rewards"], first["scores"], first["extra_logs"], replies


@pytest.mark.parametrize("servers", [1, 2])
def test_openrlhf(servers, url, service, scorer):
    """Two dozen samples at once, each a request of its own."""
    answers = [f"{answer} {i}" for i, answer in enumerate(ANSWERS * 8)]
    expected = scorer.score_many([talk(PROMPT, answer) for answer in answers])
    before = service.metrics.batch_sizes._counts.copy()

    async def main():
        async with httpx.AsyncClient() as session:
            prompt = CHATML.format(PROMPT)
            asked = [
                openrlhf_reward(session, [url] * servers, text(answer), prompt, "")
                for answer in answers
            ]
            return await asyncio.gather(*asked)

    for (rewards, scores, logs, replies), score in zip(asyncio.run(main()), expected):
        np.testing.assert_allclose(rewards, [score.value], atol=1e-5)
        assert scores == rewards and logs["cut_tokens"] == logs["empty"] == [0.0]
        said = [logs[name][0] for name in NAMES]
        np.testing.assert_allclose(said, list(score.attributes.values()), atol=1e-5)
        assert all(reply["rewards"] == [] for reply in replies[1:])
    batches = sum(service.metrics.batch_sizes._counts) - sum(before)
    assert batches < len(answers) / 2  # requests that come together are computed together


def test_openrlhf_loses_no_sample(client, scorer):
    """What is too long is cut on the left, what is empty is scored, and both are counted."""
    long = "so " * CONTEXT
    found = ok(client.post("/get_reward", json={"query": [text(long), text(""), text("Yes.")]}))
    tokens = len(encode(byte_tokenizer(), Conversation(talk(PROMPT, long))))
    assert found["extra_logs"]["cut_tokens"] == [tokens - CONTEXT, 0, 0]
    assert found["extra_logs"]["tokens"][0] == CONTEXT
    assert found["extra_logs"]["empty"] == [0, 1, 0]
    cutting = variant(scorer, over_long="truncate_left")
    assert abs(found["rewards"][0] - cutting.score(talk(PROMPT, long)).value) < 1e-5
    empty = cutting.encode(Conversation(talk(PROMPT, "")), "empty")
    assert abs(found["rewards"][1] - cutting.score_encoded([empty])[0].value) < 1e-5


@pytest.mark.parametrize("path", ["get_reward", "classify", "pooling"])
def test_rmjax_aligns_by_it(path, url, expected):
    reward = ServerReward(f"{url}/{path}", "", 60, byte_tokenizer(), "config.rewards.x.server")
    prompts = [Conversation([{"role": "user", "content": PROMPT}])]
    np.testing.assert_allclose(reward(prompts, [ANSWERS])[0], expected[None, :, 0], atol=1e-5)


def test_verl_takes_the_last_of_probs(client, expected):
    for answer, numbers in zip(ANSWERS, expected):
        body = {"model": "judge", "input": text(answer), "use_activation": False}
        found = ok(client.post("/classify", json=body))
        assert abs(found["data"][-1]["probs"][-1] - numbers[0]) < 1e-5


def test_vllm_in_all_forms_of_input(client, expected):
    ids = [encode(byte_tokenizer(), Conversation(talk(PROMPT, a))).tolist() for a in ANSWERS]
    bodies = [
        {"input": [text(answer) for answer in ANSWERS]},
        {"input": ids},
        {"input": [own(talk(PROMPT, answer)) for answer in ANSWERS]},
        {"input": [i[1:] for i in ids]},  # without BOS, and with one too many
        {"input": [i[:1] + i for i in ids]},
    ]
    for body in bodies:
        found = ok(client.post("/classify", json=body | {"attributes": True}))
        probs = [item["probs"] for item in found["data"]]
        np.testing.assert_allclose(probs, expected, atol=1e-5)
        assert found["data"][0]["labels"] == list(NAMES)
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    for answer, numbers, i in zip(ANSWERS, expected, ids):
        for said in ({"messages": talk(PROMPT, answer)}, {"input": i}):
            found = ok(client.post("/classify", json=said))
            assert found["object"] == "list" and found["model"] == "judge"
            (item,) = found["data"]
            assert (item["index"], item["num_classes"]) == (0, 1)
            assert item["label"] == "helpfulness"
            np.testing.assert_allclose(item["probs"], numbers[:1], atol=1e-5)


def test_pooling(client, expected):
    body = {"input": [text(answer) for answer in ANSWERS], "encoding_format": "base64"}
    found = ok(client.post("/pooling", json=body))
    numbers = [np.frombuffer(base64.b64decode(x["data"]), np.float32) for x in found["data"]]
    np.testing.assert_allclose(numbers, expected[:, :1], atol=1e-5)
    body = {"messages": talk(PROMPT, ANSWERS[0]), "attributes": True, "task": "classify"}
    found = ok(client.post("/pooling", json=body))
    np.testing.assert_allclose(found["data"][0]["data"], expected[0], atol=1e-5)


def test_sglang(client, expected):
    found = ok(client.post("/classify", json={"model": "any", "text": [*map(text, ANSWERS)]}))
    np.testing.assert_allclose([x["embedding"][0] for x in found], expected[:, 0], atol=1e-5)
    found = ok(client.post("/encode", json={"text": text(ANSWERS[0])}))
    np.testing.assert_allclose(found["embedding"], expected[0, :1], atol=1e-5)
    assert found["meta_info"]["prompt_tokens"] > 0


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score_and_rerank(path, client, expected):
    values = expected[:, 0]
    for names in (("queries", "documents"), ("text_1", "text_2")):
        found = ok(client.post(path, json=dict(zip(names, (PROMPT, ANSWERS)))))
        np.testing.assert_allclose([x["score"] for x in found["data"]], values, atol=1e-5)
    found = ok(client.post(path, json={"queries": [CHATML.format(PROMPT)], "documents": ANSWERS}))
    np.testing.assert_allclose([x["score"] for x in found["data"]], values, atol=1e-5)
    rerank = path.replace("score", "rerank")
    found = ok(client.post(rerank, json={"query": PROMPT, "documents": ANSWERS, "top_n": 2}))
    order = np.argsort(-values)[:2].tolist()
    assert [x["index"] for x in found["results"]] == order
    assert [x["document"]["text"] for x in found["results"]] == [ANSWERS[i] for i in order]
    relevance = [x["relevance_score"] for x in found["results"]]
    np.testing.assert_allclose(relevance, values[order], atol=1e-5)


def test_nim_by_the_openai_client(url, expected):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["judge"]
    messages = talk(PROMPT, ANSWERS[0])
    reply = client.chat.completions.create(model="judge", messages=messages, stream=False)  # type: ignore[call-overload]
    said = dict(part.split(":") for part in reply.choices[0].message.content.split(","))
    np.testing.assert_allclose([float(said[name]) for name in NAMES], expected[0], atol=1e-5)
    tokens = {x.token: x.logprob for x in reply.choices[0].logprobs.content}
    np.testing.assert_allclose([tokens[name] for name in NAMES], expected[0], atol=1e-5)
    assert reply.usage.prompt_tokens > 0
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        client.chat.completions.create(model="other", messages=messages)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="does not end with a turn of 'assistant'"):
        client.chat.completions.create(model="judge", messages=messages[:1])  # type: ignore[arg-type]


def test_rewards_name_everything(client, scorer, expected):
    found = ok(client.post("/v1/rewards", json={"prompt": PROMPT, "responses": ANSWERS}))
    assert found["rule"] == "helpfulness" and found["notes"] == []
    for item, numbers in zip(found["data"], expected):
        assert list(item["attributes"]) == list(NAMES) and item["cut_tokens"] == 0
        np.testing.assert_allclose(list(item["attributes"].values()), numbers, atol=1e-5)
        np.testing.assert_allclose(item["value"], numbers[0], atol=1e-5)
    several = [*TURNS, {"role": "assistant", "content": "last"}]
    named = [several[1] | {"nickname": "Al"}, *several[2:]]
    conversations = [several, {"messages": named, "system": "Be brief."}, own(several)]
    found = ok(client.post("/v1/rewards", json={"conversations": conversations}))
    value = scorer.score(several).value
    np.testing.assert_allclose([item["value"] for item in found["data"]], [value] * 3, atol=1e-5)
    assert found["notes"] == [
        "the chat template does not show 'nickname' of 'user', which 1 conversations have"
    ]
    body = {"prompt": TURNS, "responses": ["last", {"role": "assistant", "content": "last"}]}
    found = ok(client.post("/v1/rewards", json=body))
    np.testing.assert_allclose([item["value"] for item in found["data"]], [value] * 2, atol=1e-5)


# ---- whatever the load ------------------------------------------------------------------------


def test_many_clients_get_what_score_many_says(url, service, scorer):
    """Several hundred requests of all sizes at once, and no program is compiled for them."""
    rng = random.Random(0)
    prompts = ["a" * rng.randint(1, 150) for _ in range(12)]
    groups = [
        (rng.choice(prompts), ["b" * rng.randint(1, 60) for _ in range(rng.choice([1, 1, 2, 9]))])
        for _ in range(300)
    ]
    conversations = [talk(prompt, answer) for prompt, answers in groups for answer in answers]
    programs = service.served.scorer._score_rows._cache_size()

    async def main():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as session:
            bodies = [{"queries": prompt, "documents": answers} for prompt, answers in groups]
            return await asyncio.gather(*(session.post("/score", json=body) for body in bodies))

    found = [item["score"] for reply in asyncio.run(main()) for item in ok(reply)["data"]]
    expected = [score.value for score in scorer.score_many(conversations)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert service.served.scorer._score_rows._cache_size() == programs


# ---- what is refused --------------------------------------------------------------------------

LONG = talk("p", "so " * CONTEXT)
BAD = {
    "no JSON": ("/classify", b"{", "the body is no JSON"),
    "not a number": ("/classify", b'{"input": NaN}', "NaN is not JSON"),
    "too large a number": ("/classify", b'{"user": 1e999}', "1e999 is larger than numbers are"),
    "a field twice": (
        "/classify",
        b'{"user": "a", "user": "b"}',
        "the key 'user' is there tw",
    ),
    "deep": ("/classify", b"[" * 100_000, "the body is no JSON"),
    "no text": ("/classify", b"\xff", "the body is no JSON"),
    "empty": ("/classify", b"", "the body is empty"),
    "a list": ("/classify", b"[]", "the body is list, expected an object"),
    "nothing asked": ("/classify", {}, "expected one of 'input', 'messages'"),
    "asked twice": ("/classify", {"input": "x", "messages": LONG}, "'input' and 'messages'"),
    "two forms": ("/classify", {"text": "x", "input": "y"}, "found all of them"),
    "a wrong type": ("/classify", {"input": 3}, "field 'input': expected a text or a list"),
    "half a list": ("/classify", {"input": [1, "a"]}, r"field 'input\["),
    "no user": ("/classify", {"messages": LONG[1:]}, "has no user turn"),
    "an image": (
        "/classify",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, LONG[1]]},
        "'image_url': a text is all that is read",
    ),
    "plain text": ("/classify", {"input": "hello"}, "is in no chat template"),
    "another template": ("/classify", {"input": "[INST] a [/INST] b"}, "Mistral's or Llama 2's"),
    "half a character": (
        "/classify",
        json.dumps({"messages": talk("p", "\ud800")}).encode(),
        "not valid Unicode",
    ),
    "a token too many": ("/classify", {"input": [1, 262]}, "token ids from 0 to 261"),
    "too long": ("/classify", {"messages": LONG}, r"tokens, the model was trained with up to 256"),
    "cut on the right": (
        "/classify",
        {"input": "x", "truncate_prompt_tokens": 9, "truncation_side": "right"},
        "'truncation_side' cannot be 'right'",
    ),
    "cut to more": ("/classify", {"input": "x", "truncate_prompt_tokens": 999}, "reads up to 256"),
    "an open end": (
        "/pooling",
        {"input": "x", "add_generation_prompt": True},
        "where the response",
    ),
    "another task": ("/pooling", {"input": "x", "task": "embed"}, "whose task is 'classify'"),
    "an empty response": ("/rerank", {"query": "q", "documents": [" "]}, "the response is empty"),
    "unequal lists": ("/score", {"queries": ["a", "b"], "documents": ["c"] * 3}, "expected one or"),
    "no documents": ("/rerank", {"query": "q"}, "the field 'documents' is missing"),
    "a stream": (
        "/v1/chat/completions",
        {"messages": LONG, "stream": True},
        "field 'stream': expected false or null",
    ),
    "neither": ("/v1/rewards", {}, "expected either 'conversations' or 'prompt'"),
    "no responses": ("/v1/rewards", {"prompt": "p", "responses": []}, "is an empty list"),
    "only a prompt": ("/v1/rewards", {"prompt": "p"}, "'prompt' needs 'responses'"),
    "too many": ("/get_reward", {"query": [text("a")] * 1025}, "1,025 conversations, and 1,024"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name, client):
    path, body, message = BAD[name]
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    reply = client.post(path, headers={"Content-Type": "application/json"}, **sent)
    assert reply.status_code == (413 if name == "too many" else 400), reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == reply.status_code
    assert re.search(message, error["message"]), error["message"]


def test_half_a_character_comes_back_as_it_was(client):
    headers = {"Content-Type": "application/json"}
    for said, status in ({"request_id": "\ud800"}, 200), ({"model": "\ud800"}, 404):
        body = json.dumps({"messages": talk("p", "a"), **said}).encode()
        reply = client.post("/classify", content=body, headers=headers)
        assert reply.status_code == status
        answer = json.loads(reply.content)
        assert "\ud800" in (answer["id"] if status == 200 else answer["error"]["message"])


def test_whole_numbers_may_be_written_with_a_point(client):
    """They are whole to JSON Schema, and to vLLM."""
    for path, body, name, value in (
        ("/rerank", {"query": PROMPT, "documents": ANSWERS}, "top_n", 2),
        ("/classify", {"messages": LONG}, "truncate_prompt_tokens", 100),
        ("/classify", {"messages": LONG}, "truncate_prompt_tokens", -1),
        ("/classify", {}, "input", [5, 6, 7]),
        ("/classify", {}, "input_ids", [5, 6, 7]),
        ("/v1/chat/completions", {"messages": talk("p", "a")}, "n", 1),
    ):
        point = [float(x) for x in value] if isinstance(value, list) else float(value)
        found = [ok(client.post(path, json={**body, name: x})) for x in (value, point)]
        for one in found:
            for field in ("id", "created", "meta_info"):
                one.pop(field, None)
        assert found[0] == found[1], path


def test_a_model_without_a_name_is_this_one(client):
    for path in ("/classify", "/v1/chat/completions"):
        ok(client.post(path, json={"model": "", "messages": talk("p", "a")}))


def test_a_prompt_is_cut_where_asked(client, scorer):
    for most, length in ((-1, CONTEXT), (100, 100)):
        body = {"messages": LONG, "truncate_prompt_tokens": most}
        found = ok(client.post("/classify", json=body))
        assert found["usage"]["prompt_tokens"] == length
        tokens = len(encode(byte_tokenizer(), Conversation(LONG)))
        assert found["usage"]["cut_tokens"] == tokens - length
        cutting = variant(scorer, over_long="truncate_left", max_length=length)
        assert abs(found["data"][0]["probs"][0] - cutting.score(LONG).value) < 1e-5


# ---- other kinds of models --------------------------------------------------------------------


def test_a_model_that_compares(scorer):
    """It has no number for one response; of several, each is against the others."""
    rule = GeneralPreference()
    spec = dataclasses.replace(scorer.spec, general_preference=rule)
    numbers = [
        list(s.attributes.values()) for s in scorer.score_many([talk(PROMPT, a) for a in ANSWERS])
    ]
    expected = rule.values(np.asarray(numbers))
    with (
        running(make_service(variant(scorer, spec=spec, rule=rule))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        found = ok(client.post("/rerank", json={"query": PROMPT, "documents": ANSWERS}))
        assert [x["index"] for x in found["results"]] == np.argsort(-expected).tolist()
        found = ok(client.post("/score", json={"queries": PROMPT, "documents": ANSWERS}))
        np.testing.assert_allclose([x["score"] for x in found["data"]], expected, atol=1e-4)
        for body in ({"messages": talk(PROMPT, "a")}, {"text": text("a")}):
            reply = client.post("/classify", json=body)
            assert reply.status_code == 400 and "compares responses" in reply.text
        body = {"conversations": [talk(PROMPT, ANSWERS[0])]}
        (item,) = ok(client.post("/v1/rewards", json=body))["data"]
        assert item["value"] is None
        np.testing.assert_allclose(list(item["attributes"].values()), numbers[0], atol=1e-5)


@pytest.mark.slow
def test_a_language_model_is_served(tmp_path):
    """The log-probability of the response, whichever endpoint is asked."""
    save_hf(tmp_path, tiny_llama(max_position_embeddings=CONTEXT), causal=True)
    rm = rmjax.load(str(tmp_path), value="log_probability")
    expected = [s.value for s in rm.score_many([talk(PROMPT, answer) for answer in ANSWERS])]
    service = make_service(rmjax.load(str(tmp_path), value="log_probability"))
    with running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        found = ok(client.post("/get_reward", json={"query": [text(a) for a in ANSWERS]}))
        np.testing.assert_allclose(found["rewards"], expected, atol=1e-5 * 100)
        reply = client.post("/classify", json={"input": [1, 2, 3]})
        assert reply.status_code == 400 and "send messages" in reply.text


def test_token_ids_of_a_model_that_asks_something_after_the_response(scorer):
    asking = variant(scorer, encoder=ChatEncoder(scorer.tokenizer, "Is it good?"))
    with pytest.raises(UserError, match=r"asks 'Is it good\?' after the response.*send messages"):
        asking.encode_tokens([1, 2], "input")
