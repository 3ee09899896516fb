"""What is known of a step's samples: their files, their tokens, and what models say of these."""

import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from helpers.models import one_device, tiny_llama
from rmjax.alignment.learning import Known, credited, described, expected_by_critic, penalised
from rmjax.alignment.prompts import Prompts, plan_prompts
from rmjax.alignment.rollouts import Rollout, read_rollout, write_rollout
from rmjax.alignment.steps import single_rewards, with_rewards
from rmjax.config import AlignConfig, DataConfig, OptimizerConfig, ShapingConfig
from rmjax.data.batch import Rollouts
from rmjax.data.batches import training_batches
from rmjax.data.conversation import Conversation
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenReturns, TokenValues
from rmjax.errors import UserError
from rmjax.generation.completions import Completion
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score, make_token_scores, score_data, score_tokens
from rmjax.models.heads import LanguageModelHead
from rmjax.models.init import random_params
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.training.objectives.rollouts import METHODS


def config_of(shaping: ShapingConfig) -> AlignConfig:
    data = DataConfig("x", attributes=())
    return AlignConfig("w", data, OptimizerConfig(1e-3), 6, shaping=shaping)


MADE_BY = {"step": 3, "seed": 0}


def completion(*tokens, reason: Any = "end"):
    tokens = np.asarray(tokens, np.int32)
    return Completion(tokens, f"text {tokens}\x85\u2028", -tokens.astype(np.float32) / 7, reason)


def prompts(*tokens):
    asked = [Conversation([{"role": "user", "content": f"q{i}"}]) for i in range(len(tokens))]
    return Prompts(asked, [np.asarray(t, np.int32) for t in tokens], {}, "x.jsonl")


PROMPTS = prompts([5, 6, 7], [5, 9], [8, 8, 8, 8])
ROLLOUT = Rollout(
    np.asarray([2, 0]),
    [
        [completion(11, 12, 13), completion(14, reason="length"), completion(11, 15)],
        [completion(16, 17), completion(16, 17, 18, 19), completion(20)],
    ],
    np.asarray([[1.0, np.nan, 2.0], [0.5, 0.25, -1.0]]),
    [[{"help": 1.0}, None, {"help": 2.0}], [{"help": 0.5}, {"help": 0.25}, {"help": -1.0}]],
)


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "rollouts" / "step.jsonl"
    write_rollout(path, ROLLOUT, PROMPTS, MADE_BY)
    found = read_rollout(path, MADE_BY, [2, 0])
    assert found and found.attributes == ROLLOUT.attributes
    np.testing.assert_array_equal(found.rewards, ROLLOUT.rewards)
    both = (itertools.chain.from_iterable(x.completions) for x in (found, ROLLOUT))
    for ours, theirs in zip(*both, strict=True):
        assert (ours.text, ours.reason) == (theirs.text, theirs.reason)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.log_probabilities.tobytes() == theirs.log_probabilities.tobytes()
    assert read_rollout(tmp_path / "other", MADE_BY, [2, 0]) is None
    row = json.loads(path.read_text().split("\n")[0])
    assert row["prompt"] == [{"role": "user", "content": "q2"}]
    assert row["ended"] == [True, False, True] and row["scores"] == [1.0, None, 2.0]


def test_samples_are_written_before_they_are_rewarded(tmp_path):
    path = tmp_path / "step.jsonl"
    unknown = np.full((2, 3), np.nan)
    sampled = Rollout(ROLLOUT.numbers, ROLLOUT.completions, unknown, rewarded=False)
    write_rollout(path, sampled, PROMPTS, MADE_BY)
    found = read_rollout(path, MADE_BY, [2, 0])
    assert found and not found.rewarded and np.isnan(found.rewards).all()
    asked = []

    def reward(prompts, responses):
        asked.append((prompts, responses))
        return ROLLOUT.rewards, ROLLOUT.attributes

    write_rollout(path, with_rewards(found, PROMPTS, reward), PROMPTS, MADE_BY)
    again = read_rollout(path, MADE_BY, [2, 0])
    assert again and again.rewarded and again.attributes == ROLLOUT.attributes
    np.testing.assert_array_equal(again.rewards, ROLLOUT.rewards)
    [(conversations, texts)] = asked
    assert [c.messages[0]["content"] for c in conversations] == ["q2", "q0"]
    assert texts == [[c.text for c in samples] for samples in ROLLOUT.completions]
    assert single_rewards(again) == {"reward/help": pytest.approx((1 + 2 + 0.5 + 0.25 - 1) / 5)}


@pytest.mark.parametrize(
    ("made_by", "numbers", "change"),
    [
        ({"step": 4, "seed": 0}, [2, 0], str),
        (MADE_BY, [2, 1], str),
        (MADE_BY, [2, 0], lambda text: text[:-40]),
        (MADE_BY, [2, 0], lambda text: text.replace("token_ids", "x")),
        (MADE_BY, [2, 0], lambda text: text.replace("[11, 12, 13]", "[11, 12]")),
        (MADE_BY, [2, 0], lambda text: re.sub(r'"scores": \[[^,]*, ', '"scores": [', text)),
        (MADE_BY, [2, 0], lambda text: text.replace('"attributes": [{', '"attributes": [{}, {')),
    ],
)
def test_a_file_of_something_else_or_a_damaged_one_is_named(made_by, numbers, change, tmp_path):
    path = tmp_path / "step.jsonl"
    write_rollout(path, ROLLOUT, PROMPTS, MADE_BY)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=r"step\.jsonl: (not of this step|damaged).*remove it"):
        read_rollout(path, made_by, numbers)


def policy():
    model = Model(tiny_llama(), ModelOptions(one_device()), LanguageModelHead(tied=False))
    return model, random_params(model, 0)


def test_tokens_of_packed_rows_sum_to_what_scoring_says():
    """A token's log-probability lands on that token, whatever row and place it stands in."""
    (model, params), data = policy(), ROLLOUT.data(PROMPTS)
    for share in (True, False):
        batches = evaluation_batches(data, RowShape(2, 16, 4), share=share)
        logs, entropy = score_tokens(make_token_scores(model), params, batches, one_device())
        sums = np.add.reduceat(logs, data.offsets[:-1])
        expected = score_data(make_score(model), params, batches, one_device())[:, 0]
        np.testing.assert_allclose(sums, expected, rtol=1e-5)
        assert data.spoken is not None
        assert (logs[data.spoken] < 0).all() and not logs[~data.spoken].any()
        assert (entropy[data.spoken] > 0).all() and not entropy[~data.spoken].any()


def test_what_a_batch_holds_of_a_token_is_where_it_is_predicted():
    data = ROLLOUT.data(PROMPTS)
    assert data.spoken is not None
    sampled = ROLLOUT.sampled_log_probabilities(data)
    # The fake sampler's log-probability of a token is -token / 7.
    np.testing.assert_allclose(sampled[data.spoken], -data.tokens[data.spoken] / 7, rtol=1e-6)
    spoken = data.spoken.astype(np.float32)
    known = Known(sampled, -sampled, sampled - spoken, sampled + 0.5 * spoken)
    method, numbers = METHODS["rloo"], described(ROLLOUT, data, known)
    learned, _ = credited(ROLLOUT, data, known, known.old, method, config_of(ShapingConfig()))
    batch = training_batches(learned, [np.arange(6)], RowShape(2, 16, 4))[0]
    rows, targets = batch.rows, batch.targets
    assert isinstance(targets, Rollouts)
    tokens = np.roll(np.asarray(rows.tokens), -1, axis=-1)
    there = np.asarray(targets.predicting)
    values = targets.values
    np.testing.assert_allclose(np.asarray(values.old)[there], -tokens[there] / 7, rtol=1e-6)
    assert there.sum() == 13
    gap = np.asarray(values.old) - np.asarray(values.reference)
    np.testing.assert_allclose(gap[there], 1, rtol=1e-5)
    # A sample counts once, one without a reward never.
    assert float(np.asarray(values.shares).sum()) == pytest.approx(5)
    lengths = np.asarray([[3, 1, 2], [2, 4, 1]])
    assert numbers["kl"] == pytest.approx(lengths.mean())  # each token's log ratio is 1
    assert numbers["kl_per_token"] == pytest.approx(1) and numbers["length"] == lengths.mean()
    assert numbers["ended"] == pytest.approx(5 / 6) and numbers["without_reward"] == 1
    assert numbers["sampler_gap"] == pytest.approx(0.5)
    assert numbers["reward"] == pytest.approx((1 + 2 + 0.5 + 0.25 - 1) / 5)


def test_penalties_by_hand_and_what_is_not_learned():
    config = ShapingConfig(unended_penalty=2.0, length_penalty=0.1, learn_unended=False)
    rollout = Rollout(ROLLOUT.numbers, ROLLOUT.completions, np.ones((2, 3)))
    expected = [[1 - 0.3, 1 - 2 - 0.1, 1 - 0.2], [1 - 0.2, 1 - 0.4, 1 - 0.1]]
    np.testing.assert_allclose(penalised(rollout, config), expected)
    data = ROLLOUT.data(PROMPTS)
    zeros = np.zeros(len(data.tokens), np.float32)
    known, method = Known(*[zeros] * 4), METHODS["grpo"]
    learned, numbers = credited(rollout, data, known, zeros, method, config_of(config))
    assert learned.values is not None and learned.values.shares.sum() == 12  # of 13 tokens
    assert numbers["without_advantage"] == 0
    cut = [[dataclasses.replace(c, reason="length") for c in x] for x in ROLLOUT.completions]
    rollout = dataclasses.replace(rollout, completions=cut)
    _, numbers = credited(rollout, data, known, zeros, method, config_of(config))
    assert numbers["without_advantage"] == 2  # rewards differ, and nothing is learned from them


def test_what_a_critic_did_not_expect_by_hand():
    """With lambda 1 a token's advantage is what is still to come, less what was expected."""
    data = ROLLOUT.data(PROMPTS)
    spoken = data.spoken
    assert spoken is not None
    old, reference = (np.where(spoken, x, 0).astype(np.float32) for x in (-1.0, -1.5))
    expected = np.where(spoken, data.tokens / 10, 0).astype(np.float32)
    config = config_of(ShapingConfig())
    config.critic.smoothing = 1.0
    method = dataclasses.replace(METHODS["ppo"], kl=0.2)
    known = Known(old, old, reference, old)
    policy, critic, numbers = expected_by_critic(ROLLOUT, data, known, expected, method, config)
    advantages, returns = [], []
    for sample, reward in enumerate(ROLLOUT.rewards.ravel()):
        if np.isnan(reward):
            continue
        tokens = data.sequence(sample)[data.spoken_in(sample)]
        for place, token in enumerate(tokens):
            # Each of the tokens that come costs .2 x .5.
            returns.append(reward - 0.1 * (len(tokens) - place))
            advantages.append(returns[-1] - token / 10)
    assert policy.values and isinstance(policy.values, TokenValues)
    assert isinstance(critic.values, TokenReturns)
    there = policy.values.shares > 0
    np.testing.assert_allclose(critic.values.returns[there], returns, rtol=1e-5)
    whitened = (np.asarray(advantages) - np.mean(advantages)) / np.std(advantages)
    np.testing.assert_allclose(policy.values.advantages[there], whitened, rtol=1e-4, atol=1e-5)
    assert not policy.values.advantages[~there].any() and not critic.values.shares[~there].any()
    error = np.mean(np.square(np.asarray(returns) - expected[there]))
    assert numbers["value_explained"] == pytest.approx(1 - error / np.var(returns), rel=1e-4)


def test_steps_have_different_prompts_and_an_epoch_all_whole_steps():
    plan = plan_prompts(7, each=3, seed=1, steps=5)
    assert len(plan) == 5 and all(len(set(step.tolist())) == 3 for step in plan)
    assert len(set(np.concatenate(plan[:2]).tolist())) == 6
    again = plan_prompts(7, each=3, seed=1, epochs=1.0)
    assert [step.tolist() for step in again] == [step.tolist() for step in plan[:2]]
    with pytest.raises(UserError, match="2 prompts, and a step has 3"):
        plan_prompts(2, each=3, seed=0, steps=1)
