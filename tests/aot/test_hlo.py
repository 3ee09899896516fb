"""Counts of a program's text against what the program was written to do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from helpers.checks import known
from rmjax.aot import costs, hlo
from rmjax.runtime.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.optimized
M, K, N = 8, 16, 24


def text_of(function, *arguments, **options) -> str:
    return known(jax.jit(function, **options).lower(*arguments).compile().as_text())


def flops(text: str, devices: int = 1, **trips: int) -> float:
    return sum(item.times * item.flops for item in costs.work(text, devices, trips))


def test_a_product_is_two_flops_a_term():
    text = text_of(jnp.matmul, jnp.ones((M, K)), jnp.ones((K, N)))
    assert flops(text) == 2 * M * K * N


def test_batched_products_count_every_batch():
    text = text_of(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, M, K)), jnp.ones((3, K, N))
    )
    assert flops(text) == 3 * 2 * M * K * N


def test_loops_multiply_where_xla_counts_once():
    def layers(x, weights):
        def layer(x, w):
            def twice(_, y):
                return jnp.tanh(y @ w)

            return jax.lax.fori_loop(0, 3, twice, x), None

        return jax.lax.scan(layer, x, weights)[0]

    compiled = jax.jit(layers).lower(jnp.ones((M, K)), jnp.ones((5, K, K))).compile()
    assert flops(known(compiled.as_text())) == 5 * 3 * 2 * M * K * K
    assert known(compiled.cost_analysis())["flops"] < 5 * 3 * 2 * M * K * K / 2


def test_a_loop_over_data_runs_as_often_as_its_scope_is_told():
    def repeated(x, w, times):
        def pieces(_, y):
            with jax.named_scope("pieces"):
                return jax.lax.fori_loop(0, times, lambda _, z: jnp.tanh(z @ w), y)

        with jax.named_scope("steps"):
            return jax.lax.fori_loop(0, times, pieces, x)

    text = text_of(repeated, jnp.ones((M, K)), jnp.ones((K, K)), 7)
    for steps, pieces in ((1, 1), (3, 1), (2, 5)):
        assert flops(text, steps=steps, pieces=pieces) == steps * pieces * 2 * M * K * K
    with pytest.raises(ValueError, match="in scope 'pieces'"):
        flops(text, steps=3)


@pytest.mark.parametrize(
    ("first", "bound", "step", "trips"), [(0, 80, 1, 80), (3, 80, 1, 77), (0, 15, 2, 8)]
)
def test_trips_of_a_counted_loop(first, bound, step, trips):
    text = f"""
%body (p: (s32[], f32[])) -> (s32[], f32[]) {{
  %p = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[] get-tuple-element(%p), index=1
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[]) tuple(%next, %x)
}}

%condition (p: (s32[], f32[])) -> pred[] {{
  %p.1 = (s32[], f32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant({bound})
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}}

ENTRY %main (x: f32[]) -> (s32[], f32[]) {{
  %x.1 = f32[] parameter(0)
  %start = s32[] constant({first})
  %init = (s32[], f32[]) tuple(%start, %x.1)
  ROOT %loop = (s32[], f32[]) while(%init), condition=%condition, body=%body
}}
"""
    module = hlo.parse(text)
    assert hlo.executions(module, {})["%body"] == trips


def brute_force(size, kernel, out, stride, low, base, spread) -> int:
    """Pairs of places that meet a number of the input, one by one."""
    inside = {base * i for i in range(size)}
    return sum(o * stride - low + k * spread in inside for o in range(out) for k in range(kernel))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 6),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    low=st.integers(0, 4),
    base=st.integers(1, 3),
    spread=st.integers(1, 3),
    out=st.integers(1, 7),
)
def test_products_written_as_convolutions(size, kernel, stride, low, base, spread, out):
    text = f"""
ENTRY %main (a: f32[4,{size},3], b: f32[{kernel},3,5]) -> f32[4,{out},5] {{
  %a = f32[4,{size},3]{{2,1,0}} parameter(0)
  %b = f32[{kernel},3,5]{{2,1,0}} parameter(1)
  ROOT %c = f32[4,{out},5]{{2,1,0}} convolution(%a, %b), window={{size={kernel} stride={stride} pad={low}_9 lhs_dilate={base} rhs_dilate={spread}}}, dim_labels=b0f_0io->b0f
}}
"""  # noqa: E501
    met = brute_force(size, kernel, out, stride, low, base, spread)
    assert flops(text) == 2 * 4 * 5 * 3 * met


def test_convolutions_agree_with_xla():
    a, b = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 8))

    def convolve(a, b):
        return jax.lax.conv_general_dilated(
            a, b, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    lowered = jax.jit(convolve).lower(a, b)
    text = known(lowered.compile().as_text())
    if "convolution(" in text:
        assert flops(text) == known(lowered.cost_analysis())["flops"]


# ---- collectives -------------------------------------------------------------------------------


def moved(function, arguments, out, devices=8):
    text = text_of(function, *arguments, out_shardings=out)
    found = {}
    for item in costs.work(text, devices):
        for part in item.collectives:
            size, count = found.get(part.kind, (0, 0))
            found[part.kind] = (size + item.times * part.bytes, count + item.times)
    return found


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=4, tensor=2))


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def test_an_all_gather_sends_all_but_what_is_there(mesh):
    x = put(mesh, np.ones((16, 32), np.float32), "fsdp")
    found = moved(lambda x: x * 2, [x], NamedSharding(mesh, PartitionSpec()))
    assert found == {"all-gather": (3 / 4 * 16 * 32 * 4, 1)}


def test_an_all_reduce_sends_everything_twice_but_for_one_part(mesh):
    a, b = (
        put(mesh, np.ones((16, 32), np.float32), None, "fsdp"),
        put(mesh, np.ones((32, 8), np.float32), "fsdp"),
    )
    found = moved(jnp.matmul, [a, b], NamedSharding(mesh, PartitionSpec()))
    assert found == {"all-reduce": (2 * 3 / 4 * 16 * 8 * 4, 1)}


def test_collectives_in_loops_count_every_time(mesh):
    x = put(mesh, np.ones((16, 32), np.float32), "fsdp")
    w = put(mesh, np.ones((5, 32, 32), np.float32), None, "fsdp")

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = moved(layers, [x, w], NamedSharding(mesh, PartitionSpec("fsdp")))
    size, count = found["all-gather"]
    assert count % 5 == 0
    assert size == 5 * 3 / 4 * 32 * 32 * 4


FORMS = [
    ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
    ("[2,4]<=[8]", (0, 1, 2, 3)),
    ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
    ("mesh['fsdp'=4,'tensor'=2] {'fsdp'}", (0, 2, 4, 6)),
    ("mesh['fsdp'=4,'tensor'=2] {'tensor'}", (0, 1)),
    ("mesh['fsdp'=4,'tensor'=2] {'fsdp','tensor'}", tuple(range(8))),
    ("{}", tuple(range(8))),
]


@pytest.mark.parametrize(("form", "group"), FORMS, ids=[form for form, _ in FORMS])
def test_replica_groups(form, group):
    text = f"""
ENTRY %main (a: f32[10]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
  ROOT %r = f32[10]{{0}} all-reduce(%a), channel_id=1, replica_groups={form}, use_global_device_ids=true, to_apply=%add
}}
"""  # noqa: E501
    (item,) = (item for item in costs.work(text, 8) if item.collectives)
    (part,) = item.collectives
    assert part.group == group
    assert part.bytes == pytest.approx(2 * (len(group) - 1) / len(group) * 40)


def test_a_permutation_sends_what_it_has_and_runs_beside_computation():
    text = """
ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,2},{2,0}}
  ROOT %d = bf16[4,8]{1,0} collective-permute-done(%s)
}
"""  # noqa: E501
    parts = [part for item in costs.work(text, 4) for part in item.collectives]
    assert parts == [costs.Collective("permute", 64.0, (0, 2), True, "1", ends="%d")]


def test_a_collective_spread_over_operations_counts_once():
    """As TPUs' compiler has it run beside computation: begun, carried on and ended by fusions."""
    gather = (
        "all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, "
        "use_global_device_ids=true"
    )
    part = """
%part.{0} (p: f32[16]) -> f32[64] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %g = f32[64]{{0}} {1}
}}
"""
    text = part.format(1, gather) + part.format(2, gather)
    text += """
ENTRY %main (a: f32[16]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  %f.1 = f32[64]{0} fusion(%a), kind=kCustom, calls=%part.1
  ROOT %f.2 = f32[64]{0} fusion(%a), kind=kCustom, calls=%part.2
}
"""
    (found,) = (part for item in costs.work(text, 8) for part in item.collectives)
    assert (found.bytes, found.asynchronous, found.ends) == (3 * 16 * 4, True, "%f.2")


def test_what_a_sparse_core_gathers_runs_beside_computation():
    """Begun, given its operand and awaited; what does it is in a computation that it calls."""
    ring = '{"phase_rings":[{"core_count":"4"},{"core_count":"2"}]}'
    text = f"""
%gather (p: bf16[4,8]) -> bf16[32,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  ROOT %g = bf16[32,8]{{1,0}} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={{0}}, use_global_device_ids=true, backend_config={{"colors":[{ring},{ring},{ring}]}}
}}, execution_thread="sparsecore"

%beside (q: bf16[4,8]) -> bf16[32,8] {{
  %q = bf16[4,8]{{1,0}} parameter(0)
  ROOT %c = bf16[32,8]{{1,0}} custom-call(%q), custom_call_target="TODO", called_computations={{%gather}}
}}, execution_thread="sparsecore"

ENTRY %main (a: bf16[4,8]) -> bf16[32,8] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  %s = ((), (), (s32[8]{{0}})) async-start(), async_execution_thread="sparsecore", calls=%beside
  %u = ((bf16[4,8]{{1,0}}), bf16[32,8]{{1,0}}, (s32[8]{{0}})) async-update(%s, %a)
  %w = bf16[4,8]{{1,0}} negate(%a)
  ROOT %d = bf16[32,8]{{1,0}} async-done(%u)
}}
"""  # noqa: E501
    work = list(costs.work(text, 8))
    (found,) = (part for item in work for part in item.collectives)
    assert found == costs.Collective(
        "all-gather", 7 * 64.0, tuple(range(8)), True, "7", links=3, ends="%d"
    )
    # It begins when it is given what it gathers.
    assert [item.name for item in work if item.collectives] == ["%u"]
    assert work[-1].name == "%d"


@pytest.mark.parametrize(
    ("plan", "links"),
    [
        ('"emitter":"1DAllGatherNonMajorDim"', 2),
        ('"emitter":"2DAllGather","debug":"group_size = 16"', 4),
        ('"debug":"\\nUniDirectionNDRingStrategy{colors:6 phases:3 cores:{4 4 4}}"', 6),
        ('"emitter":"RotatedPincerEmitter"', 0),
    ],
)
def test_the_links_that_the_compiler_plans_to_use(plan, links):
    text = f"""
ENTRY %main (a: f32[10]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
  ROOT %r = f32[10]{{0}} all-reduce(%a), channel_id=1, replica_groups={{}}, to_apply=%add, backend_config={{{plan}}}
}}
"""  # noqa: E501
    (part,) = (part for item in costs.work(text, 8) for part in item.collectives)
    assert part.links == links


def test_collectives_of_one_number_are_not_parts_of_each_other():
    """As those of a `shard_map`, which all have the number 1."""
    text = """
%scatter (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %r = f32[16]{0} reduce-scatter(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: f32[16], b: f32[64]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %f = f32[16]{0} fusion(%b), kind=kCustom, calls=%scatter
  %g.1 = f32[64]{0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %g.2 = f32[64]{0} all-gather(%f), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}
"""
    found = [part for item in costs.work(text, 8) for part in item.collectives]
    assert sorted((part.kind, part.bytes) for part in found) == [
        ("all-gather", 3 * 16 * 4),
        ("all-gather", 3 * 16 * 4),
        ("reduce-scatter", 64 * 4 * 3 / 4),
    ]
    assert not any(part.asynchronous for part in found)


def test_what_leaves_a_slice_is_counted():
    text = """
ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[16]{0}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %d = token[] send-done(%s), channel_id=2
}
"""  # noqa: E501
    (found,) = (part for item in costs.work(text, 8) for part in item.collectives)
    assert (found.kind, found.bytes, found.between_slices) == ("all-reduce", 64.0, True)


def test_an_unknown_form_is_an_error():
    text = "ENTRY %m (a: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  ROOT %r = f32[] all-reduce(%a), replica_groups=new:form\n}"  # noqa: E501
    with pytest.raises(ValueError, match="new:form"):
        list(costs.work(text, 2))


# ---- memory --------------------------------------------------------------------------------------


def size_of(text: str) -> float:
    return sum(item.times * item.bytes for item in costs.work(text, 1))


def test_an_operation_reads_its_operands_and_writes_its_result():
    text = """
ENTRY %main (a: f32[8,16], b: bf16[16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[16]{0:T(128)S(1)} parameter(1)
  ROOT %f = f32[8,16]{1,0} fusion(%a, %b), kind=kLoop, calls=%c
}
"""
    assert size_of(text) == 2 * 8 * 16 * 4  # `b` is in scratch memory


def test_of_stacked_layers_only_the_slice_counts():
    text = """
%c (p: f32[80,8,16], i: s32[]) -> f32[8,16] {
  %p = f32[80,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[80,8,16]{2,1,0} bitcast(%p)
  ROOT %d = f32[1,8,16]{2,1,0} dynamic-slice(%b, %i), dynamic_slice_sizes={1,8,16}
}

ENTRY %main (a: f32[80,8,16], n: s32[]) -> f32[8,16] {
  %a = f32[80,8,16]{2,1,0} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  ROOT %f = f32[8,16]{1,0} fusion(%a, %n), kind=kLoop, calls=%c
}
"""
    assert size_of(text) == 2 * 8 * 16 * 4 + 4


def test_a_slice_written_in_place_is_all_that_is_written():
    text = """
ENTRY %main (a: f32[80,8], u: f32[1,8], n: s32[]) -> f32[80,8] {
  %a = f32[80,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %d = f32[80,8]{1,0} dynamic-update-slice(%a, %u, %n, %n)
}
"""
    assert size_of(text) == 2 * 8 * 4 + 2 * 4


def test_a_real_program_moves_about_what_it_must():
    """A sum of two large arrays: read twice, written once."""
    text = text_of(jnp.add, jnp.ones((256, 256)), jnp.ones((256, 256)))
    assert size_of(text) == 3 * 256 * 256 * 4


def test_shapes_of_tuples_and_layouts():
    line = (
        "  ROOT %x.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[], (s4[8]{0}, pred[5]))"
        ' custom-call(%a, /*i=1*/%b.2), custom_call_target="f", backend_config={"a":[1,2]}'
    )
    found = hlo._instruction(line)
    assert found.root and found.opcode == "custom-call" and found.operands == ("%a", "%b.2")
    assert [array.bytes for array in found.arrays] == [12, 4, 4, 5]
    assert [array.fast for array in found.arrays] == [True, False, False, False]
    assert found.attribute("custom_call_target") == '"f"'


def test_what_describes_a_kernel_may_span_lines():
    text = """HloModule m

ENTRY %main (a: f32[2,3]) -> f32[2,3] {
  %a = f32[2,3]{1,0} parameter(0)
  %kernel = f32[2,3]{1,0} custom-call(%a), frontend_attributes={kernel_metadata={
"name": "attend"
}}, custom_call_target="tpu_custom_call", backend_config={"x":"1"}
  ROOT %b = f32[2,3]{1,0} negate(%kernel)
}
"""
    module = hlo.parse(text)
    found = module.computations[module.entry]
    assert list(found) == ["%a", "%kernel", "%b"]
    assert found["%kernel"].operands == ("%a",) and found["%b"].operands == ("%kernel",)
    assert found["%kernel"].attribute("custom_call_target") == '"tpu_custom_call"'


def test_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing")


def test_every_loop_of_products_is_found_in_any_order():
    sizes = list(itertools.product((1, 3), (2, 5)))
    for outer, inner in sizes:

        def nested(x, w, outer=outer, inner=inner):
            def body(_, x):
                return jax.lax.fori_loop(0, inner, lambda _, y: jnp.sin(y @ w), x)

            return jax.lax.fori_loop(0, outer, body, x)

        assert flops(text_of(nested, jnp.ones((4, 4)), jnp.ones((4, 4)))) == (
            outer * inner * 2 * 4**3
        )


def test_a_fusion_in_a_fusion_takes_its_slice():
    text = """
%inner (p: f32[80,8,16], i: s32[]) -> f32[8,16] {
  %p = f32[80,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,8,16]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,16}
}

%outer (x: f32[4,8], q: f32[80,8,16], j: s32[]) -> f32[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %q = f32[80,8,16]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %w = f32[8,16]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner
  ROOT %c = f32[4,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

ENTRY %main (a: f32[4,8], b: f32[80,8,16], n: s32[]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[80,8,16]{2,1,0} parameter(1)
  %n = s32[]{:S(1)} parameter(2)
  ROOT %f = f32[4,16]{1,0} fusion(%a, %b, %n), kind=kOutput, calls=%outer
}
"""
    assert size_of(text) == 4 * (4 * 8 + 8 * 16 + 4 * 16)


def test_an_element_of_a_tuple_may_be_named_in_place():
    """JAX 0.12 writes `%x#1` where 0.10 has an instruction of its own."""
    text = """HloModule m

ENTRY %main (x: (f32[], f32[8,16])) -> f32[8,24] {
  %x = (f32[], f32[8,16]{1,0}) parameter(0)
  %w = f32[16,24]{1,0} constant({...})
  ROOT %dot = f32[8,24]{1,0} dot(%x#1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert flops(text) == 2 * 8 * 16 * 24
    element = hlo.parse(text).computations["%main"]["%x#1"]
    assert (element.opcode, element.attribute("index")) == ("get-tuple-element", "1")
