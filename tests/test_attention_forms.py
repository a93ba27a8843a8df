"""Which form of attention a device computes, and that cuDNN's gives what the plain form gives."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax import attention
from txl_jax.attention import absolute_attention, learned_attention, relative_attention, visible

KINDS = ("relative", "learned", "absolute")
GPU = jax.default_backend() == "gpu"


def arguments(kind: str, shape: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    batch, tgt_len, mem_len, n_head, d_head = shape
    n_keys, heads = mem_len + tgt_len, (n_head, d_head)
    shapes = [(batch, tgt_len, *heads), *[(batch, n_keys, *heads)] * 2]
    if kind != "absolute":
        shapes += [(n_keys, *heads), heads, heads if kind == "relative" else (n_keys, n_head)]
    draw = np.random.default_rng(0).standard_normal
    made = [jnp.asarray(draw(shape), dtype) for shape in shapes]
    if kind == "learned":
        made[-1] = made[-1].astype(jnp.float32)
    return made


def both(
    kind: str, a: list[jax.Array], seen: attention.Seen, **options: Any
) -> tuple[jax.Array, ...]:
    """What attention gives, and the gradients of a sum over it with random weights."""
    function = {
        "relative": relative_attention,
        "learned": learned_attention,
        "absolute": absolute_attention,
    }[kind]
    weights = np.random.default_rng(1).standard_normal(a[0].shape).astype(np.float32)

    def total(*a: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*a, seen, **options)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grads, out = jax.jit(jax.grad(total, range(len(a)), has_aux=True))(*a)
    return (out, *grads)


def assert_near(found: tuple[jax.Array, ...], expected: tuple[jax.Array, ...], most: float) -> None:
    """Differences in parts of the largest entry."""
    for number, (got, want) in enumerate(zip(found, expected, strict=True)):
        largest = np.abs(want).max()
        np.testing.assert_allclose(
            np.float32(got) / largest, want / largest, rtol=0, atol=most, err_msg=f"{number}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mem_len", "filled", "same_length"), [(10, 7, False), (10, 10, True)])
def test_cudnn_is_given_what_makes_the_plain_form(kind, mem_len, filled, same_length, monkeypatch):
    """With XLA's own attention in its place, which takes the same arguments."""
    shape = (2, 6, mem_len, 2, 8)
    a = arguments(kind, shape, jnp.float32)
    seen = visible(shape[1], mem_len, jnp.int32(filled), same_length)
    plain = both(kind, a, seen)

    asked = []

    def stand_in(*arguments: Any, implementation: str, xla: Any = jax.nn.dot_product_attention):
        asked.append(implementation)
        return xla(*arguments, implementation="xla")

    monkeypatch.setattr(attention, "_has_cudnn", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    assert_near(both(kind, a, seen), plain, 2e-6)
    assert asked == ["cudnn"]


H100, A100, V100, OTHER = (
    SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    for kind, capability in [
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA A100-SXM4-40GB", "8.0"),
        ("Tesla V100-SXM2-32GB", "7.0"),
        ("AMD Instinct MI300X", "gfx942"),
    ]
)
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize(
    ("device", "changed", "kernel", "cudnn"),
    [
        (H100, {}, True, True),
        (A100, {}, True, True),
        (V100, {}, False, False),
        (OTHER, {}, False, False),
        (CPU, {}, False, False),
        (H100, {"dtype": jnp.float32}, False, False),
        (H100, {"tgt_len": 1}, False, False),  # cached generation
        (H100, {"tgt_len": 33}, True, False),
        (H100, {"mem_len": 33}, True, False),
        (H100, {"d_head": 41}, True, False),
        (H100, {"d_head": 192}, False, True),
        (H100, {"d_head": 264}, False, False),
        (A100, {"d_head": 192}, False, False),
        (H100, {"dropatt": 0.1}, True, False),
        (H100, {"dropatt": 0.1, "seeds": None}, True, True),  # evaluation
    ],
)
def test_the_form_is_chosen_by_device_and_shape(device, changed, kernel, cudnn, monkeypatch):
    given: dict[str, Any] = {"dtype": jnp.bfloat16, "tgt_len": 32, "mem_len": 32, "d_head": 64}
    given |= {"dropatt": 0.0, "seeds": jnp.zeros((2, 2), jnp.uint32)} | changed
    heads = (2, given["d_head"])
    q = jnp.zeros((2, given["tgt_len"], *heads), given["dtype"])
    k = jnp.zeros((2, given["tgt_len"] + given["mem_len"], *heads), given["dtype"])
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert attention._has_kernel(q) is kernel
    assert attention._has_cudnn(q, k, given["dropatt"], given["seeds"]) is cudnn


@pytest.mark.parametrize("form", ["_has_kernel", "_has_cudnn"])
def test_of_several_devices_each_has_to_see_its_own_part(form, monkeypatch):
    q = jnp.zeros((2, 32, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "devices", lambda: [H100])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    rest = () if form == "_has_kernel" else (q, 0.0, None)
    chosen = partial(getattr(attention, form), q, *rest)
    assert chosen() is False
    part = SimpleNamespace(manual_axes=("data",))  # inside jax.shard_map
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: part)
    assert chosen() is True


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU of sm_80 or later")
@pytest.mark.parametrize(("dtype", "most"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
@pytest.mark.parametrize(
    ("kind", "d_head"),
    [("relative", 192), ("relative", 256), ("learned", 64), ("learned", 256), ("absolute", 64)],
)
@pytest.mark.parametrize("filled", [0, 50, 96])
def test_on_a_gpu_cudnn_is_off_by_rounding(kind, d_head, filled, dtype, most, monkeypatch):
    shape = (2, 64, 96, 2, d_head)
    a = arguments(kind, shape, dtype)
    seen = visible(64, 96, jnp.int32(filled), filled == 96)
    with jax.default_matmul_precision("highest"):
        exact = both(kind, [x.astype(jnp.float32) for x in a], seen)
    monkeypatch.delattr(attention, "_mix")  # of the plain form
    assert_near(both(kind, a, seen), exact, most)
