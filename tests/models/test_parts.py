"""What is computed in parts is what is computed whole, and places behind the last part are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import make_model, tiny_llama
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.inference.score_step import make_score
from rmjax.models.init import random_params
from rmjax.models.parts import computed_places, parts_of

FILLED = [1, 31, 32, 33, 255, 256, 257, 500, 512]


def test_a_function_is_called_for_parts_that_hold_tokens(rng):
    """Its results are those of the whole, and zeros where all rows are padding."""
    x = rng.normal(size=(2, 512, 3)).astype(np.float32)
    compiled = jax.jit(lambda ids, x: parts_of(ids).each(lambda x: (jnp.sin(x), x[..., 0] * 2), x))
    for filled in FILLED:
        ids = (np.arange(512) < np.array([[filled], [filled // 2]])).astype(np.int32)
        end = -(-filled // 32) * 32
        sines, first = map(np.asarray, compiled(ids, x))
        np.testing.assert_allclose(sines[:, :end], np.sin(x[:, :end]), atol=1e-6)
        np.testing.assert_array_equal(first[:, :end], 2 * x[:, :end, 0])
        assert not sines[:, end:].any() and not first[:, end:].any()
        assert computed_places(ids, parts=True) == 2 * end
        assert computed_places(ids, parts=False) == 2 * 512
    assert compiled._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("variant", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_scores_are_those_of_whole_rows(variant, rng):
    decoder = tiny_llama(max_position_embeddings=512, **variant)
    whole, parts = (
        make_score(make_model(decoder, attention="cpu_flash", parts=parts))
        for parts in (False, True)
    )
    params = random_params(make_model(decoder), seed=1)
    for filled in FILLED:
        sample = rng.integers(1, 262, filled).astype(np.int32)
        rows = make_rows([[Segment([sample])]], 1, RowShape(1, 512, 2))
        found, expected = (np.asarray(score(params, rows))[0, 0] for score in (parts, whole))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert parts._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
