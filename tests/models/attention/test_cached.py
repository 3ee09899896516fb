"""Attention over kept keys and values against numpy, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.models.attention.cached import Kept, Seen, attend_kept

G, R, K, Q, H = 2, 3, 2, 2, 8


def by_hand(q, keys, values) -> np.ndarray:
    """[N, H] of one row: queries [N, H] over the keys [L, K, H] that it sees."""
    out = np.zeros_like(q, dtype=np.float64)
    for head in range(K * Q):
        logits = keys[:, head // Q].astype(np.float64) @ q[head] / np.sqrt(H)
        weights = np.exp(logits - logits.max())
        out[head] = weights @ values[:, head // Q] / weights.sum()
    return out


@pytest.mark.parametrize("places, slots", [(5, 7), (1, 1), (16, 4)])
@pytest.mark.parametrize("visible", ["some", "none", "all"])
def test_it_is_softmax_attention_over_what_is_seen(places, slots, visible, rng):
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = normal(G * R, 1, K * Q, H), normal(G * R, 1, K, H), normal(G * R, 1, K, H)
    kept = Kept(
        normal(G, K, H, places),
        normal(G, K, places, H),
        normal(G, K, R, H, slots),
        normal(G, K, R, slots, H),
    )
    share = {"some": 0.5, "none": 0.0, "all": 1.0}[visible]
    seen = Seen(rng.random((G, R, places)) < share, rng.random((G, R, slots)) < share)
    found = attend_kept(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Kept(*map(jnp.asarray, kept)), seen
    )
    for row in range(G * R):
        g, r = divmod(row, R)
        prompt, own = seen.prompt[g, r], seen.own[g, r]
        keys = np.concatenate(
            [
                kept.prompt_keys[g].transpose(2, 0, 1)[prompt],
                kept.own_keys[g, :, r].transpose(2, 0, 1)[own],
                k[row],
            ]
        )
        values = np.concatenate(
            [
                kept.prompt_values[g].transpose(1, 0, 2)[prompt],
                kept.own_values[g, :, r].transpose(1, 0, 2)[own],
                v[row],
            ]
        )
        np.testing.assert_allclose(found[row, 0], by_hand(q[row, 0], keys, values), atol=1e-5)


def test_bfloat16_in_bfloat16_out(rng):
    x = jnp.asarray(rng.standard_normal((G * R, 1, K * Q, H)), jnp.bfloat16)
    kept = Kept(
        jnp.ones((G, K, H, 4), jnp.bfloat16),
        jnp.ones((G, K, 4, H), jnp.bfloat16),
        jnp.ones((G, K, R, H, 4), jnp.bfloat16),
        jnp.ones((G, K, R, 4, H), jnp.bfloat16),
    )
    seen = Seen(jnp.ones((G, R, 4), bool), jnp.ones((G, R, 4), bool))
    ones = jnp.ones((G * R, 1, K, H), jnp.bfloat16)
    found = attend_kept(x, ones, ones, kept, seen)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), 1.0, atol=0.02)
