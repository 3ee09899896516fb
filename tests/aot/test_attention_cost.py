"""What the attention kernel is said to cost, against its own plan and sums by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layouts import make_layout, random_rows
from rmjax.aot import costs
from rmjax.aot.attention_cost import Steps, kernel_steps, steps_taken
from rmjax.aot.hardware import CHIPS


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    context=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 64, 100, 200]),
)
def test_steps_are_those_the_kernel_takes(seed, context, window):
    rng = np.random.default_rng(seed)
    (row,) = random_rows(rng, 1, 512, 1)
    _, seen = make_layout([row], 512, 1, window)
    needed = seen.reshape(8, 64, 8, 64).any(axis=(1, 3)) | np.eye(8, dtype=bool)
    expected = max(part.mean() for part in np.split(needed, context))
    groups = [(shared, [shared + n for n in own]) for shared, own in row]
    assert steps_taken(groups, 512, context, window, block=64) == expected


def test_full_rows_and_shares_by_hand():
    assert steps_taken([(0, [4096])], 4096, 1) == 36 / 64  # the lower triangle of 8 x 8
    assert steps_taken([(0, [4096])], 4096, 4) == (7 + 8) / 16  # of its last two rows
    assert steps_taken([(0, [512])] * 8, 4096, 1) == 8 / 64
    # A prompt of one block and two responses of one each: the second skips the first.
    assert steps_taken([(512, [1024, 1024])], 1536, 1) == 5 / 9
    # Of a window of a block, each block but the first sees itself and the one before it.
    assert steps_taken([(0, [4096])], 4096, 1, window=512) == 15 / 64
    chip = CHIPS["v5p"]
    mixed = kernel_steps((0, [4096]), 4096, 4096, 1, chip, (512, 512, None))
    assert mixed.taken == pytest.approx((2 * 15 + 36) / 3 / 64)
    assert kernel_steps((0, [1024]), 1024, 4096, 1, chip) == Steps(4 * 3 / 64, chip.attention)


# Two heads, one of keys, rows of 512 places in blocks of 256, 64 numbers a head.
TEXT = """
HloModule kernel, is_scheduled=true

ENTRY %main (a: s8[1,2,2], b: s8[1,2,2], q: bf16[2,512,64], k: bf16[1,512,64]) -> bf16[2,512,64] {
  %a = s8[1,2,2]{2,1,0} parameter(0)
  %b = s8[1,2,2]{2,1,0} parameter(1)
  %q = bf16[2,512,64]{2,1,0} parameter(2)
  %k = bf16[1,512,64]{2,1,0:S(1)} parameter(3)
  %v = bf16[1,512,64]{2,1,0} parameter(4)
  ROOT %call = bf16[2,512,64]{2,1,0} custom-call(%a, %b, %q, %k, %v), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/splash_mha_PHASE_segmented_residuals/pallas_call"}
}
"""


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3)])
@pytest.mark.parametrize("taken", [1.0, 0.75])
def test_a_call_by_hand(phase, products, taken):
    text = TEXT.replace("PHASE", phase)
    (item,) = costs.work(text, 1, attention=Steps(taken, (1000, 3000, 5000, 7000)))
    steps = 2 * 4 * taken
    assert item.flops == steps * products * 2 * 256 * 256 * 64
    once = 2 * 4 + 2 * 2 * 2 * 512 * 64  # the plan, q and the result
    assert item.bytes == once + steps * 256 * 64 * 2  # v again and again; k is on the chip
    assert item.cycles == steps * {"fwd": 1000, "dq": 3000}[phase] / 4


def test_gradients_by_hand():
    """The call that gives all three: parts of dq, dk, dv."""
    text = (
        TEXT.replace("PHASE", "dkv")
        .replace(
            "ROOT %call = bf16[2,512,64]{2,1,0} custom",
            (
                "ROOT %call = (bf16[2,2,512,64]{3,2,1,0}, bf16[1,512,64]{2,1,0}, "
                "bf16[1,512,64]{2,1,0}) custom"
            ),
        )
        .replace("%q, %k, %v)", "%q, %k, %v, %a, %a, %a, %q)")
    )
    (item,) = costs.work(text, 1, attention=Steps(1.0, (1, 2, 3, 4000)))
    assert item.flops == 8 * 5 * 2 * 256 * 256 * 64
    assert item.cycles == 8 * 4000 / 4
    apart = costs.work(text.replace("bf16[2,2,512,64]{3,2,1,0}, ", ""), 1)
    assert next(apart).flops == 8 * 4 * 2 * 256 * 256 * 64


@pytest.mark.parametrize("causal", [True, False])
def test_cudnns_calls_by_hand(causal):
    text = """
HloModule kernel

ENTRY %main (q: bf16[2,64,4,32], k: bf16[2,128,1,32]) -> bf16[2,4,64,32] {
  %q = bf16[2,64,4,32]{3,2,1,0} parameter(0)
  %k = bf16[2,128,1,32]{3,2,1,0} parameter(1)
  ROOT %call = bf16[2,4,64,32]{3,1,2,0} custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmaxWAY", backend_config={"mask_type": "TYPE"}
}
"""
    text = text.replace("TYPE", "CAUSAL" if causal else "NO_MASK")
    product = 2 * (2 * 4 * 64 * 128) * 32 / (2 if causal else 1)
    (forward,) = costs.work(text.replace("WAY", ""), 1)
    assert forward.flops == 2 * product
    assert forward.bytes == 2 * (2 * 2 * 64 * 4 * 32 + 2 * 2 * 128 * 32)
    (backward,) = costs.work(text.replace("WAY", "Backward"), 1)
    assert backward.flops == 5 * product
