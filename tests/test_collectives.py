"""Collectives that are known from the function are found in the program that XLA makes of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txl_jax.collectives import Collective, collectives

N = 4
X = jax.ShapeDtypeStruct((N * 6, 5), jnp.float32)
"""6 x 5 numbers on each device: 120 bytes."""
SPLIT = P("data")


def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:N]), ("data",))


def compiled(jitted: Any, *args: Any) -> list[Collective]:
    return collectives(jitted.lower(*args).compile().as_text())


def found(function: Callable[[Any], Any], *args: Any, out: Any = SPLIT) -> list[Collective]:
    """What runs when every device applies `function` to its part of `args`."""
    # As in the train step: with the check, the sum of a tree is one collective for each array.
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=SPLIT, out_specs=out, check_vma=False)
    return compiled(jax.jit(mapped), *args)


def one(function: Callable[[Any], Any], *args: Any, out: Any = SPLIT) -> Collective:
    (collective,) = found(function, *args, out=out)
    return collective


def expect(collective: Collective, kind: str, size: int, runs: int | None = 1) -> None:
    """Fails unless it is of one array of float32 with `size` numbers and `runs` so often."""
    assert collective.op_name
    assert collective == Collective(kind, 4 * size, 1, ("f32",), runs, N, collective.op_name)


def test_the_sum_of_a_tree_is_one_all_reduce_of_all_its_arrays():
    tree = {"a": X, "b": [jax.ShapeDtypeStruct((N,), jnp.float32)]}
    got = one(partial(jax.lax.psum, axis_name="data"), tree, out=P())
    assert got == Collective("all-reduce", 4 * 31, 2, ("f32",), 1, N, got.op_name)
    assert got.op_name.endswith("psum")


def test_each_kind_and_its_bytes():
    def scatter(x):
        return jax.lax.psum_scatter(x[:4], "data", scatter_dimension=0, tiled=True)

    def gather(x):
        return jax.lax.all_gather(x, "data", axis=1, tiled=True)

    def to_all(x):
        return jax.lax.all_to_all(x[:4], "data", 0, 1, tiled=True)

    def permute(x):
        return jax.lax.ppermute(x, "data", [(i, (i + 1) % N) for i in range(N)])

    expect(one(scatter, X), "reduce-scatter", 4 * 5)
    expect(one(gather, X), "all-gather", N * 6 * 5)
    expect(one(permute, X), "collective-permute", 6 * 5)
    exchanged = one(to_all, X)
    assert (exchanged.kind, exchanged.bytes, exchanged.group) == ("all-to-all", 4 * 4 * 5, N)


def test_kinds_that_the_cpu_does_not_have():
    text = """HloModule jit_f, num_partitions=4
ENTRY %main (x: f32[6,5]) -> f32[6,5] {
  %x = f32[6,5]{1,0} parameter(0)
  %cb = f32[6,5]{1,0} collective-broadcast(%x), channel_id=1, replica_groups={{0,1,2,3}}
  %r = f32[8,5]{1,0} ragged-all-to-all(%x, %cb), channel_id=2, replica_groups={{0,1},{2,3}}
  %t = token[] after-all()
  %s = (f32[6,5]{1,0}, u32[], token[]) send(%x, %t), channel_id=3
  %sd = token[] send-done(%s), channel_id=3
  %v = (f32[6,5]{1,0}, u32[], token[]) recv(%t), channel_id=3
  ROOT %vd = (f32[6,5]{1,0}, token[]) recv-done(%v), channel_id=3
}
"""
    assert [(one.kind, one.bytes, one.arrays, one.group) for one in collectives(text)] == [
        ("collective-broadcast", 120, 1, 4),
        ("ragged-all-to-all", 160, 1, 2),
        ("send", 120, 1, 4),
        ("recv", 120, 1, 4),
    ]


def test_16_bits_are_2_bytes_and_a_group_may_be_part_of_the_devices():
    half = one(
        partial(jax.lax.all_gather, axis_name="data", tiled=True),
        jax.ShapeDtypeStruct((N * 6, 5), jnp.float16),
    )
    assert (half.types, half.bytes) == (("f16",), 2 * N * 30)
    pairs = one(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), X)
    assert pairs.group == 2
    square = Mesh(mesh().devices.reshape(2, 2), ("x", "y"))
    sum_over_y = partial(jax.lax.psum, axis_name="y")
    mapped = jax.shard_map(sum_over_y, mesh=square, in_specs=P("y"), out_specs=P())
    (over_y,) = compiled(jax.jit(mapped), X)
    assert over_y.group == 2


def repeatedly(times: int, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def function(x):
        return jax.lax.scan(lambda c, _: (inner(c), None), x, length=times)[0]

    return function


def shared(x):
    """A sum over the devices that cannot be moved out of a loop."""
    return jnp.sin(x) + jax.lax.psum(x * 0.3, "data") * 0.1


def test_loops_count():
    expect(one(repeatedly(16, shared), X), "all-reduce", 30, runs=16)
    expect(one(repeatedly(16, repeatedly(3, shared)), X), "all-reduce", 30, runs=48)

    def twice(x):
        return repeatedly(5, shared)(jnp.cos(repeatedly(16, shared)(x)))

    assert sorted(collective.runs or 0 for collective in found(twice, X)) == [5, 16]


def test_what_only_the_devices_know_is_not_known():
    def until_small(x):
        return jax.lax.while_loop(lambda x: jax.lax.pmax(x.max(), "data") > 1, lambda x: x / 2, x)

    def within(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, shared, x)

    def either(x):
        return jax.lax.cond(jax.lax.psum(x[0, 0], "data") > 0, shared, jnp.cos, x)

    expect(one(until_small, X), "all-reduce", 1, runs=None)
    expect(one(repeatedly(16, within), X), "all-reduce", 30, runs=None)
    before, branch = sorted(found(either, X), key=lambda collective: collective.bytes)
    expect(before, "all-reduce", 1)
    expect(branch, "all-reduce", 30, runs=None)


def test_what_the_partitioner_puts_in_is_found():
    rows, columns = (NamedSharding(mesh(), spec) for spec in (P(None, "data"), P("data")))
    product = jax.jit(
        jnp.matmul, in_shardings=(rows, columns), out_shardings=NamedSharding(mesh(), P())
    )
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 64), (64, 7)))
    (got,) = compiled(product, a, b)
    expect(got, "all-reduce", 21)


def test_no_collective_is_found_where_there_is_none():
    assert found(lambda x: jnp.sin(x) @ x.T @ x, X) == []


# The forms that XLA writes for GPUs: pairs of -start and -done, and computations that run beside.
ASYNC = """\
HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%scattered (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%body (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %part = bf16[8,16]{1,0} constant({...})
  %ags = ((bf16[8,16]{1,0}, s8[4]{0}), (bf16[8,128]{1,0:T(8,128)(2,1)}, s8[32]{0})) \
all-gather-start(%part, %t), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %agd = (bf16[8,128]{1,0}, s8[32]{0}) all-gather-done(%ags)
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%i, %g)
}

%condition (s: (s32[], bf16[8,128])) -> pred[] {
  %s = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT, \
metadata={op_name="body=%unused, calls=%add all-reduce(x)"}
}

%unused (p: f32[4]) -> f32[4] {
  ROOT %ar = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

ENTRY %main (a: f32[64]) -> f32[16] {
  %a = f32[64]{0} parameter(0)
  %ars = (f32[64]{0}, /*index=1*/pred[3]{0}) all-reduce-start(%a, %b), replica_groups={}, \
to_apply=%add, metadata={op_name="jit(step)/psum"}
  %ard = (f32[64]{0}, pred[3]{0}) all-reduce-done(%ars)
  %rss = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%a), calls=%scattered
  %rsd = f32[16]{0} async-done(%rss), calls=%scattered
  %rs2 = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%a), replica_groups=[2,4]<=[4,2]T(1,0), \
dimensions={0}, to_apply=%add
  %cps = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%a), \
source_target_pairs={{0,1},{1,2},{2,0}}
  %cpd = f32[64]{0} collective-permute-done(%cps)
  %own = ((f32[64]{0}, f32[3]{0}), f32[64]{0}, f32[3]{0}) all-reduce-start(%a, %d), \
replica_groups=mesh['data'=8] {'data'}, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, \
to_apply=%add
  %named = f32[2]{0} all-reduce(%c), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %w = (s32[], bf16[8,128]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"16"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %out = f32[16]{0} call(%rsd), to_apply=%scattered
}
"""


def test_pairs_of_start_and_done_are_one_collective():
    f32 = ("f32",)
    assert collectives(ASYNC) == [
        # Started beside the rest, and called: twice in all.
        Collective("reduce-scatter", 4 * 64, 1, f32, 2, 4, ""),
        Collective("all-gather", 2 * 8 * 128 + 32, 2, ("bf16", "s8"), 16, 8, ""),
        Collective("all-reduce", 4 * 64 + 3, 2, ("f32", "pred"), 1, 8, "jit(step)/psum"),
        Collective("reduce-scatter", 4 * 64, 1, f32, 1, 4, ""),
        Collective("collective-permute", 4 * 64, 1, f32, 1, 3, ""),
        Collective("all-reduce", 4 * 67, 2, f32, 1, 8, ""),
        Collective("all-reduce", 8, 1, f32, 1, 4, ""),
    ]


def test_a_text_that_is_none_of_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("HloModule nothing")
    with pytest.raises(ValueError, match="replica groups of an unknown form: other"):
        collectives(ASYNC.replace("replica_groups=mesh", "replica_groups=other"))
