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

_FUSED_TGT_LEN = 16
"""From which on a segment fills enough of a tile."""
_KERNEL_D_HEAD = 128
_FUSED_CAPABILITY = 8.0
"""sm_80, from which on Pallas makes kernels and cuDNN has attention with a bias."""


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
    own hash of places. Where it cannot, and in the other kinds of attention, cuDNN does, with
    position scores as a bias of that type, if there is no dropout of the weights.

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

    def content(q, r, r_w_bias, r_r_bias):
        return q + r_w_bias

    def position(q, r, r_w_bias, r_r_bias):
        return shift(_position(q + r_r_bias, r))

    operands = (q, r, r_w_bias, r_r_bias)
    return _attend(content, position, operands, k, v, seen, dropatt, seeds)


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

    def content(q, r_emb, r_w_bias, r_bias):
        return q + r_w_bias

    def position(q, r_emb, r_w_bias, r_bias):
        return shift(_position(q, r_emb) + r_bias.T[:, None, :])

    operands = (q, r_emb, r_w_bias, r_bias)
    return _attend(content, position, operands, k, v, seen, dropatt, seeds)


def absolute_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    dropatt: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """`relative_attention` without distances: score = q·k / sqrt(H) (Vaswani et al. 2017)."""
    return _attend(lambda q: q, None, (q,), k, v, seen, dropatt, seeds)


def _position(q: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.einsum("BTNH,SNH->BNTS", q, r, preferred_element_type=jnp.float32)


def _attend(
    content: Callable[..., jax.Array],
    position: Callable[..., jax.Array] | None,
    operands: tuple[jax.Array, ...],
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    dropatt: float,
    seeds: jax.Array | None,
) -> jax.Array:
    """Values [B, T, N, H] weighted by the scores of `content(*operands)`, [B, T, N, H], and k.

    `position(*operands)`, float32 [B, N, T, S], is added to the scores before they are divided by
    sqrt(H).
    """
    if _has_cudnn(operands[0], k, dropatt, seeds):
        bias = None
        if position is not None:
            bias = (position(*operands) * (v.shape[-1] ** -0.5)).astype(v.dtype)
        mask = seen.mask[None, None]
        return jax.nn.dot_product_attention(
            content(*operands), k, v, bias, mask, implementation="cudnn"
        )

    def attend(operands, k, v, mask, seeds):
        with jax.named_scope("scores"):
            q = content(*operands)
            score = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
            if position is not None:
                score += position(*operands)
        return _mix(dropatt, score, v, mask, seeds)

    # The backward pass has the weights in 16 bits kept for it. In float32 it computes them again:
    # CPUs do that in less time than it takes to write them into memory and read them back.
    if v.dtype.itemsize > 2:
        # Layers are a loop: the compiler cannot find that both passes compute the same.
        attend = jax.checkpoint(attend, prevent_cse=False)
    return attend(operands, k, v, seen.mask, seeds)


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
    """Whether attention of queries like q [B, T, N, H] is left to `attention_kernel`."""
    return _is_for_fused(q) and q.shape[-1] <= _KERNEL_D_HEAD


def _has_cudnn(q: jax.Array, k: jax.Array, dropatt: float, seeds: jax.Array | None) -> bool:
    """Whether attention of queries like q and keys like k is left to cuDNN.

    Its dropout is random in an order of its own, which `seeds` of sequences cannot express.
    """
    (_, tgt_len, _, d_head), n_keys = q.shape, k.shape[1]
    even = tgt_len % 2 == 0 and n_keys % 2 == 0 and d_head % 8 == 0
    dropped = dropatt > 0 and seeds is not None
    if not (_is_for_fused(q) and even) or dropped:
        return False
    hopper = float(jax.devices()[0].compute_capability) >= 9.0
    return d_head <= (256 if hopper else 128)


def _is_for_fused(q: jax.Array) -> bool:
    """Whether queries like q are of a type and number that a GPU here has fused attention for.

    XLA cannot split it: where there are several devices it has to see only its own part, as in the
    train step.
    """
    device = jax.devices()[0]
    whole = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes
    return bool(
        device.platform == "gpu"
        and device.device_kind.startswith("NVIDIA")
        and float(device.compute_capability) >= _FUSED_CAPABILITY
        and whole
        and q.dtype.itemsize == 2
        and q.shape[1] >= _FUSED_TGT_LEN
    )
