"""Relative multi-head attention over [memory, segment] (Dai et al. 2019, section 3.3).

Letters: B batch, T segment, M memory, S = M + T keys, N heads, H d_head, D d_model.
"""

import jax
import jax.numpy as jnp

from txl_jax.dropout import dropout


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


def visible(tgt_len: int, mem_len: int, filled: jax.Array, same_length: bool) -> jax.Array:
    """Which of the S keys each of the T queries may see, bool [T, S].

    A query sees itself, what came before it in the segment, and the `filled` newest of the M slots
    of memory (int32 scalar). With same_length it sees the nearest mem_len of these, itself
    included.
    """
    query = jnp.arange(tgt_len)[:, None] + mem_len
    key = jnp.arange(mem_len + tgt_len)[None, :]
    distance = query - key
    seen = (distance >= 0) & (key >= mem_len - filled)
    return seen & (distance < mem_len) if same_length else seen


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
    seen: jax.Array,
    dropatt: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attention whose scores know content and distance.

    score = ((q + r_w_bias)·k + shift((q + r_r_bias)·r)) / sqrt(H), softmax over the keys that are
    seen (in float32), dropout of the weights, weighted sum of v.

    Args:
      q: [B, T, N, H] queries of the segment.
      k, v: [B, S, N, H] keys and values of memory and segment.
      r: [S, N, H] keys of the distances S-1 … 0.
      r_w_bias, r_r_bias: [N, H], the paper's u and v.
      seen: bool [T, S]; every row has a True.
      dropatt, key: dropout rate of the attention weights; none without a key.

    Returns:
      [B, T, N, H] in the type of q.
    """
    with jax.named_scope("scores"):
        content = jnp.einsum("BTNH,BSNH->BNTS", q + r_w_bias, k, preferred_element_type=jnp.float32)
        position = jnp.einsum("BTNH,SNH->BNTS", q + r_r_bias, r, preferred_element_type=jnp.float32)
        score = (content + shift(position)) * (q.shape[-1] ** -0.5)
        score = jnp.where(seen, score, jnp.finfo(jnp.float32).min)
    with jax.named_scope("softmax"):
        weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
        weight = dropout(weight, dropatt, key)
    with jax.named_scope("values"):
        return jnp.einsum("BNTS,BSNH->BTNH", weight, v)
