"""Multi-head attention over [memory, segment]: relative (Dai et al. 2019, section 3.3), and others.

Letters: B batch, T segment, M memory, S = M + T keys, N heads, H d_head, D d_model, K rows of a
learned table.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from txl_jax.dropout import dropout

_KERNEL_TGT_LEN = 16
"""From which on a segment fills enough of a tile."""
_KERNEL_D_HEAD = 128
_KERNEL_CAPABILITY = 8.0
"""sm_80, from which on Pallas makes kernels."""


class Seen(NamedTuple):
    """Which keys the queries may see."""

    mask: jax.Array
    """bool [T, S]; every row has a True."""
    filled: jax.Array
    """int32 scalar: of the M slots of memory, how many newest ones are seen."""
    same_length: bool
    """Whether a query sees the nearest M keys only, itself included."""


def sinusoid(n_keys: int, d_model: int, clamp_len: int) -> jax.Array:
    """Embeddings of the distances S-1 … 0, float32 [S, D]: all sines, then all cosines.

    Distances beyond clamp_len count as clamp_len; a negative clamp_len sets no limit.
    """
    distance = jnp.arange(n_keys - 1, -1, -1, dtype=jnp.float32)
    if clamp_len >= 0:
        distance = jnp.minimum(distance, float(clamp_len))
    frequency = 10000.0 ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
    angle = distance[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def nearest(table: jax.Array, n_keys: int, clamp_len: int = -1) -> jax.Array:
    """Rows [S, ...] of the distances S-1 … 0, from a learned table [K, ...] of the nearest K.

    Distances beyond the table count as its furthest. A clamp_len above 0 leaves the table its last
    clamp_len rows, so that distances count as clamp_len - 1 at most, one less than in `sinusoid`:
    both are the original's.
    """
    rows = table[-clamp_len:] if clamp_len > 0 else table
    rows = rows[-n_keys:]
    missing = (n_keys - rows.shape[0], 0)
    return jnp.pad(rows, [missing] + [(0, 0)] * (table.ndim - 1), mode="edge")


def visible(tgt_len: int, mem_len: int, filled: jax.Array, same_length: bool) -> Seen:
    """Which of the S keys each of the T queries may see.

    A query sees itself, what came before it in the segment, and the `filled` newest of the M slots
    of memory (int32 scalar). With same_length it sees the nearest mem_len of these, itself
    included.
    """
    query = jnp.arange(tgt_len)[:, None] + mem_len
    key = jnp.arange(mem_len + tgt_len)[None, :]
    distance = query - key
    mask = (distance >= 0) & (key >= mem_len - filled)
    if same_length:
        mask &= distance < mem_len
    return Seen(mask, filled, same_length)


def shift(scores: jax.Array) -> jax.Array:
    """Moves row i of [..., T, S] left by T-1-i: from "r of this row" to "distance to this key".

    Entries right of a query's own key are left overs of other rows; `visible` hides them.
    """
    *lead, tgt_len, n_keys = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(1, 0)])
    turned = padded.reshape(*lead, n_keys + 1, tgt_len)[..., 1:, :]
    return turned.reshape(*lead, tgt_len, n_keys)


def relative_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    r: jax.Array,
    r_w_bias: jax.Array,
    r_r_bias: jax.Array,
    seen: Seen,
    dropatt: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """Attention whose scores know content and distance.

    score = ((q + r_w_bias)·k + shift((q + r_r_bias)·r)) / sqrt(H), softmax over the keys that are
    seen (in float32), dropout of the weights, weighted sum of v. On GPUs that can, and in 16-bit
    types, `attention_kernel` computes it, with position scores rounded to that type and with its
    own hash of places.

    Args:
      q: [B, T, N, H] queries of the segment.
      k, v: [B, S, N, H] keys and values of memory and segment.
      r: [S, N, H] keys of the distances S-1 … 0.
      r_w_bias, r_r_bias: [N, H], the paper's u and v.
      seen: as `visible` gives it.
      dropatt, seeds: dropout rate of the attention weights, and uint32 [B, 2] for it; none without.

    Returns:
      [B, T, N, H] in the type of q.
    """
    if _has_kernel(q):
        # Pallas takes long to import, and only this needs it.
        from txl_jax.attention_kernel import fused_attention

        _, filled, same_length = seen
        return fused_attention(q, k, v, r, r_w_bias, r_r_bias, filled, same_length, dropatt, seeds)

    def scores(q, k, r, r_w_bias, r_r_bias):
        return _content(q + r_w_bias, k) + shift(_position(q + r_r_bias, r))

    return _attend(scores, (q, k, r, r_w_bias, r_r_bias), v, seen, dropatt, seeds)


def learned_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    r_emb: jax.Array,
    r_w_bias: jax.Array,
    r_bias: jax.Array,
    seen: Seen,
    dropatt: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """`relative_attention` with learned embeddings of the distances (Shaw et al. 2018, keys only).

    score = ((q + r_w_bias)·k + shift(q·r_emb + r_bias)) / sqrt(H)

    Args:
      r_emb: [S, N, H] embeddings of the distances S-1 … 0.
      r_w_bias: [N, H].
      r_bias: float32 [S, N], what a distance adds to the score of any two tokens.
    """

    def scores(q, k, r_emb, r_w_bias, r_bias):
        position = _position(q, r_emb) + r_bias.T[:, None, :]
        return _content(q + r_w_bias, k) + shift(position)

    return _attend(scores, (q, k, r_emb, r_w_bias, r_bias), v, seen, dropatt, seeds)


def absolute_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    dropatt: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """`relative_attention` without distances: score = q·k / sqrt(H) (Vaswani et al. 2017)."""
    return _attend(_content, (q, k), v, seen, dropatt, seeds)


def _content(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)


def _position(q: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.einsum("BTNH,SNH->BNTS", q, r, preferred_element_type=jnp.float32)


def _attend(
    scores: Callable[..., jax.Array],
    operands: tuple[jax.Array, ...],
    v: jax.Array,
    seen: Seen,
    dropatt: float,
    seeds: jax.Array | None,
) -> jax.Array:
    """Values [B, T, N, H] weighted by `scores(*operands)`, float32 [B, N, T, S], over sqrt(H).

    The backward pass has the weights in 16 bits kept for it. In float32 it computes them again:
    CPUs do that in less time than it takes to write them into memory and read them back.
    """

    def attend(operands, v, mask, seeds):
        with jax.named_scope("scores"):
            score = scores(*operands)
        return _mix(dropatt, score, v, mask, seeds)

    if v.dtype.itemsize > 2:
        # Layers are a loop: the compiler cannot find that both passes compute the same.
        attend = jax.checkpoint(attend, prevent_cse=False)
    return attend(operands, v, seen.mask, seeds)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
    dropatt: float, score: jax.Array, v: jax.Array, mask: jax.Array, seeds: jax.Array | None
) -> jax.Array:
    """Values [B, T, N, H] weighted by scores, float32 [B, N, T, S], not yet divided by sqrt(H)."""
    return _mix_forward(dropatt, score, v, mask, seeds)[0]


def _mix_forward(dropatt, score, v, mask, seeds):
    with jax.named_scope("softmax"):
        score = jnp.where(mask, score * (v.shape[-1] ** -0.5), jnp.finfo(jnp.float32).min)
        weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
    with jax.named_scope("values"):
        mixed = jnp.einsum("BNTS,BSNH->BTNH", dropout(weight, dropatt, seeds), v)
    return mixed, (weight, v, seeds)


def _mix_backward(dropatt, kept, d_mixed):
    weight, v, seeds = kept
    with jax.named_scope("values"):
        d_v = jnp.einsum("BNTS,BTNH->BSNH", dropout(weight, dropatt, seeds), d_mixed)
        d_weight = jnp.einsum("BTNH,BSNH->BNTS", d_mixed, v)
    with jax.named_scope("softmax"):
        # Dropout is linear, and its own transpose. A weight of what is not seen is 0.
        d_weight = dropout(d_weight, dropatt, seeds).astype(jnp.float32)
        wide = weight.astype(jnp.float32)
        mean = (wide * d_weight).sum(-1, keepdims=True)
        d_score = wide * (d_weight - mean) * (v.shape[-1] ** -0.5)
    return d_score, d_v, None, None


_mix.defvjp(_mix_forward, _mix_backward)


def _has_kernel(q: jax.Array) -> bool:
    """Whether attention of queries like q [B, T, N, H] is left to `attention_kernel`.

    XLA cannot split the kernel: where there are several devices it has to see only its own part,
    as in the train step.
    """
    device = jax.devices()[0]
    whole = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes
    return bool(
        device.platform == "gpu"
        and device.device_kind.startswith("NVIDIA")
        and float(device.compute_capability) >= _KERNEL_CAPABILITY
        and whole
        and q.dtype.itemsize == 2
        and q.shape[1] >= _KERNEL_TGT_LEN
        and q.shape[-1] <= _KERNEL_D_HEAD
    )
