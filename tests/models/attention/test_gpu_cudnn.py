"""Attention's kernel on a real GPU; skipped where there is none.

`JAX_PLATFORMS=cuda pytest tests/models/attention/test_gpu_cudnn.py` runs it.

In bfloat16 against the definition in float64, from inputs that are exact in bfloat16. A result is
rounded to 2^-9 of itself, weights and gradients of logits likewise before they are summed, so 1 %
of the norm is several times what an exact kernel may lose, and less than one wrong key costs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.layouts import dense, dense_gradients, make_layout, random_rows
from helpers.models import one_device, tiny_llama
from rmjax.models.attention import dispatch
from rmjax.models.attention.dispatch import attention

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
    pytest.mark.optimized,
]
TOLERANCE = 0.01


@pytest.mark.parametrize("name", ["xla", "cudnn"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 2, 128), (4, 4, 64)])
def test_forward_and_backward_are_the_definition(name, heads, kv_heads, head_dim, rng):
    rows = [*random_rows(rng, 2, 1024, 1), [(180, [60, 375]), (0, [300])], []]
    layout, seen = make_layout(rows, 1024, 1)
    shapes = [(4, 1024, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(jnp.bfloat16) for shape in shapes)
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent = np.where(real, cotangent, 0).astype(jnp.bfloat16)

    def both(q, k, v, layout):
        plan = dispatch.prepare(name, layout, one_device())
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, plan), q, k, v)
        return out, pull(cotangent)

    out, gradients = jax.jit(both)(q, k, v, layout)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    expected = (dense(q, k, v, seen), *dense_gradients(q, k, v, seen, cotangent))
    for ours, theirs in zip((np.where(real, out, 0), *gradients), expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < TOLERANCE


def test_the_kernel_is_what_a_gpu_gets():
    chosen = dispatch.choose("auto", tiny_llama(head_dim=64), one_device(), jnp.bfloat16, 1024)
    assert chosen == "cudnn"
