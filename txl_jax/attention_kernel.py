"""Relative attention as one kernel for GPUs: no array of all scores, forward or backward.

The arithmetic is that of `attention.relative_attention`. A program has a tile of t queries of one
head and goes over tiles of t keys with a running softmax (Milakov and Gimelshein 2018; Dao et al.
2022). What is new is the position term. Query i and key j need row T-1-i+j of r, so that a tile of
scores needs a band of 2t-1 rows, another one for every query. The program multiplies its queries
with the band as it lies, keeps the product in a ring of its own (of 4t columns, which stays in the
cache), and reads it back askew: row a from column t-1-a on. As the next tile of keys needs the
second half of the band again, each tile costs one product of t x t.

Letters: B batch, T segment, M memory, S = M + T keys, N heads, H d_head, t rows of a tile; i and j
number tiles of queries and of keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from txl_jax.dropout import LEVELS, keeps, kept_scale

_LOWEST = -1e30
"""Of scores that are not seen; finite, so that the difference of two is a number."""


@dataclass(frozen=True)
class _Span:
    """What is fixed of a call."""

    tgt_len: int
    mem_len: int
    same_length: bool
    dropped: int
    """Of 2**16 weights, how many become zero."""
    tile: int
    interpret: bool

    @property
    def query_tiles(self) -> int:
        return pl.cdiv(self.tgt_len, self.tile)

    @property
    def key_tiles(self) -> int:
        # Queries that pad the segment need a key too, or their softmax would divide by zero.
        return pl.cdiv(self.mem_len + self.query_tiles * self.tile, self.tile)


def fused_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    r: jax.Array,
    r_w_bias: jax.Array,
    r_r_bias: jax.Array,
    filled: jax.Array,
    same_length: bool,
    dropatt: float = 0.0,
    seeds: jax.Array | None = None,
    *,
    tile: int = 64,
    interpret: bool = False,
) -> jax.Array:
    """`attention.relative_attention`, with what makes up its `seen`.

    Position scores and weights are rounded to the type of q.

    Args:
      filled, same_length: int32 scalar and bool, as `attention.visible` takes them.
      tile: rows of a tile, a power of two from 16 on. On an H200 64 is faster than 32 or 128.
      interpret: run as ordinary operations, on any device; slow.

    Returns:
      [B, T, N, H] in the type of q.
    """
    dropped = 0 if seeds is None else round(dropatt * LEVELS)
    if seeds is None:
        seeds = jnp.zeros((q.shape[0], 2), jnp.uint32)
    tgt_len, n_keys = q.shape[1], k.shape[1]
    span = _Span(tgt_len, n_keys - tgt_len, same_length, dropped, tile, interpret)
    d_head = q.shape[-1]
    rows, keys = span.query_tiles * tile, span.key_tiles * tile
    # Scores are divided by the root of the true d_head; zeros that fill it up change nothing.
    scale = d_head**-0.5
    wide = max(16, pl.next_power_of_2(d_head)) - d_head
    q = jnp.pad(q, [(0, 0), (0, rows - tgt_len), (0, 0), (0, wide)])
    k, v = (jnp.pad(x, [(0, 0), (0, keys - n_keys), (0, 0), (0, wide)]) for x in (k, v))
    r = jnp.pad(r, [(rows - tgt_len, keys + tgt_len - n_keys), (0, 0), (0, wide)])
    r_w_bias, r_r_bias = (jnp.pad(x, [(0, 0), (0, wide)]) for x in (r_w_bias, r_r_bias))
    filled = jnp.reshape(filled, 1).astype(jnp.int32)
    out: Any = _attend(span, scale, q, k, v, r, r_w_bias, r_r_bias, filled, seeds)
    return out[:, :tgt_len, :, :d_head]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(span, scale, q, k, v, r, r_w_bias, r_r_bias, filled, seeds):
    return _forward(span, scale, q, k, v, r, r_w_bias, r_r_bias, filled, seeds)[0]


def _attend_forward(span, scale, *arguments):
    out, log_sum = _forward(span, scale, *arguments)
    return out, (arguments, out, log_sum)


def _attend_backward(span, scale, residuals, d_out):
    arguments, out, log_sum = residuals
    return _backward(span, scale, arguments, out, log_sum, d_out)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(span, scale, q, k, v, r, r_w_bias, r_r_bias, filled, seeds):
    batch, rows, n_head, _ = q.shape
    return _call(
        partial(_forward_kernel, span, scale),
        span,
        grid=(span.query_tiles, batch * n_head),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, n_head, rows), jnp.float32),
            _ring(span, span.query_tiles * batch * n_head, q.dtype),
        ),
        name="relative_attention",
    )(q, k, v, r, r_w_bias, r_r_bias, filled, seeds)[:2]


def _backward(span, scale, arguments, out, log_sum, d_out):
    q, k, v, r, r_w_bias, r_r_bias, *_ = arguments
    batch, _, n_head, width = q.shape
    t, n_queries, n_keys = span.tile, span.query_tiles, span.key_tiles
    delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32)
    saved = (*arguments, d_out, log_sum, delta)
    d_q, d_w, d_b, d_band, _ = _call(
        partial(_query_kernel, span, scale),
        span,
        grid=(n_queries, batch * n_head),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, n_queries, n_head, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, n_queries, n_head, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, n_queries, n_head, (n_keys + 1) * t, width), r.dtype),
            _ring(span, n_queries * batch * n_head, q.dtype),
        ),
        name="relative_attention_queries",
    )(*saved)
    d_k, d_v, _ = _call(
        partial(_key_kernel, span, scale),
        span,
        grid=(n_keys, batch * n_head),
        out_shape=(
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            _ring(span, n_keys * batch * n_head, q.dtype),
        ),
        name="relative_attention_keys",
    )(*saved)
    # Tile i of the queries has the rows of r from tile query_tiles - 1 - I on.
    d_band = jnp.sum(d_band, axis=0, dtype=jnp.float32)
    d_r = jnp.zeros((n_head, (n_queries + n_keys) * t, width), jnp.float32)
    for i in range(n_queries):
        start = (n_queries - 1 - i) * t
        d_r = d_r.at[:, start : start + (n_keys + 1) * t].add(d_band[i])
    return (
        d_q,
        d_k,
        d_v,
        jnp.swapaxes(d_r, 0, 1).astype(r.dtype),
        jnp.sum(d_w, axis=(0, 1)).astype(r_w_bias.dtype),
        jnp.sum(d_b, axis=(0, 1)).astype(r_r_bias.dtype),
        None,
        None,
    )


def _call(kernel: Callable[..., None], span: _Span, **options: Any) -> Callable[..., Any]:
    # Loads that are moved ahead of a barrier would read the ring before it is written.
    params = triton.CompilerParams(num_warps=4, num_stages=1)
    return pl.pallas_call(kernel, interpret=span.interpret, compiler_params=params, **options)


def _ring(span: _Span, programs: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((programs, span.tile, 8 * span.tile), dtype)


class _Program:
    """What the programs of the three kernels have in common."""

    def __init__(self, span: _Span, scale: float, refs: Any, ring: Any, number: Any, head: Any):
        self.span, self.scale = span, scale
        self.q, self.k, self.v, self.r, r_w_bias, r_r_bias, filled, seeds = refs
        n_head = self.q.shape[2]
        self.batch, self.head = head // n_head, head % n_head
        self.r_w_bias = r_w_bias[self.head, :][None, :]
        self.r_r_bias = r_r_bias[self.head, :][None, :]
        self.oldest = span.mem_len - filled[0]
        self.seed = seeds[self.batch, 0], seeds[self.batch, 1]
        self._ring, self._number = ring, number
        t = span.tile
        self.rows = jax.lax.broadcasted_iota(jnp.int32, (t, t), 0)
        self.columns = jax.lax.broadcasted_iota(jnp.int32, (t, t), 1)

    def tile(self, ref: Any, number: Any) -> jax.Array:
        """Tile `number` of this head's rows of [B, rows, N, H]."""
        t = self.span.tile
        return ref[self.batch, pl.ds(number * t, t), self.head, :]

    def names(self, number: Any) -> jax.Array:
        """Tile `number` of r."""
        t = self.span.tile
        return self.r[pl.ds(number * t, t), self.head, :]

    def keep(self, content: jax.Array, slot: Any) -> None:
        """Puts a tile into one of the four slots of the ring.

        With one barrier for each tile of keys no thread writes where another one still reads.
        """
        t = self.span.tile
        self._ring[self._number, :, pl.ds((slot % 4) * t, t)] = content.astype(self._ring.dtype)

    def barrier(self) -> None:
        """Until all threads of the program have come here."""
        if not self.span.interpret:
            triton.debug_barrier()

    def askew(self, slot: Any) -> jax.Array:
        """Of the two slots from `slot` on, row a from column t-1-a on, float32 [t, t]."""
        t = self.span.tile
        columns = (slot * t + t - 1 - self.rows + self.columns) % (4 * t)
        return self._load(columns).astype(jnp.float32)

    def keep_back(self, content: jax.Array, slot: Any) -> None:
        """As `keep`, into slots of another ring."""
        t = self.span.tile
        self._ring[self._number, :, pl.ds((4 + slot % 4) * t, t)] = content

    def straight(self, slot: Any) -> jax.Array:
        """The reverse of `askew`: row a of two slots of the other ring, the second of them `slot`,
        from its column a+1 on, [t, t].
        """
        t = self.span.tile
        columns = ((slot + 3) * t + 1 + self.rows + self.columns) % (4 * t)
        return self._load(4 * t + columns)

    def _load(self, columns: jax.Array) -> jax.Array:
        return triton.load(self._ring.at[self._number, self.rows, columns])

    def seen(self, i: Any, j: Any) -> jax.Array:
        """`attention.visible` for tile i of queries and tile j of keys, bool [t, t]."""
        t, mem_len = self.span.tile, self.span.mem_len
        query, key = i * t + self.rows + mem_len, j * t + self.columns
        found = (query >= key) & (key >= self.oldest)
        return found & (query - key < mem_len) if self.span.same_length else found

    def first_key_tile(self, i: Any) -> Any:
        """The first tile of keys that a tile of queries sees anything of."""
        first = self.oldest // self.span.tile
        if self.span.same_length:
            first = jnp.maximum(first, (i * self.span.tile + 1) // self.span.tile)
        return first

    def end_of_key_tiles(self, i: Any) -> Any:
        """One more than the last."""
        t = self.span.tile
        return (self.span.mem_len + (i + 1) * t - 1) // t + 1

    def dropped(self, weight: jax.Array, i: Any, j: Any) -> jax.Array:
        """Weights after dropout, or what comes back to them through it."""
        if not self.span.dropped:
            return weight
        t = self.span.tile
        row = self.head * (self.span.query_tiles * t) + i * t + self.rows
        place = row * (self.span.key_tiles * t) + j * t + self.columns
        kept = keeps(self.seed, place.astype(jnp.uint32), self.span.dropped)
        return jnp.where(kept, weight * kept_scale(self.span.dropped), 0.0)


def _forward_kernel(span, scale, *refs):
    *inputs, out_ref, log_sum_ref, ring_ref = refs
    i, head = pl.program_id(0), pl.program_id(1)
    p = _Program(span, scale, inputs, ring_ref, head * span.query_tiles + i, head)
    q = p.tile(p.q, i)
    content, position = q + p.r_w_bias, q + p.r_r_bias
    band = span.query_tiles - 1 - i

    def step(j, carry):
        highest, total, mixed = carry
        p.keep(_dot(position, p.names(band + j + 1), trans_b=True), j + 1)
        p.barrier()
        score = (_dot(content, p.tile(p.k, j), trans_b=True) + p.askew(j)) * scale
        score = jnp.where(p.seen(i, j), score, _LOWEST)
        higher = jnp.maximum(highest, jnp.max(score, axis=1))
        weight = jnp.exp(score - higher[:, None])
        shrink = jnp.exp(highest - higher)
        total = total * shrink + jnp.sum(weight, axis=1)
        weight = p.dropped(weight, i, j).astype(q.dtype)
        mixed = mixed * shrink[:, None] + _dot(weight, p.tile(p.v, j))
        return higher, total, mixed

    first = p.first_key_tile(i)
    p.keep(_dot(position, p.names(band + first), trans_b=True), first)
    t = span.tile
    begin = (
        jnp.full(t, _LOWEST, jnp.float32),
        jnp.zeros(t, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    highest, total, mixed = jax.lax.fori_loop(first, p.end_of_key_tiles(i), step, begin)
    where = pl.ds(i * t, t)
    out_ref[p.batch, where, p.head, :] = (mixed / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[p.batch, p.head, where] = highest + jnp.log(total)


def _query_kernel(span, scale, *refs):
    *inputs, d_out_ref, log_sum_ref, delta_ref, d_q_ref, d_w_ref, d_b_ref, d_band_ref, ring = refs
    i, head = pl.program_id(0), pl.program_id(1)
    p = _Program(span, scale, inputs, ring, head * span.query_tiles + i, head)
    t = span.tile
    where = pl.ds(i * t, t)
    q, d_out = p.tile(p.q, i), p.tile(d_out_ref, i)
    log_sum, delta = (ref[p.batch, p.head, where][:, None] for ref in (log_sum_ref, delta_ref))
    content, position = q + p.r_w_bias, q + p.r_r_bias
    band = span.query_tiles - 1 - i

    def names(j, carry):
        """What scores of the tiles of keys before j and at j give back through tile j of the band.

        Both have the same rows of r in it, so that one product serves them.
        """
        d_position = p.straight(j)
        d_band_ref[p.batch, i, p.head, pl.ds(j * t, t), :] = _dot(
            d_position, position, trans_a=True
        ).astype(d_band_ref.dtype)
        return carry + _dot(d_position, p.names(band + j))

    def step(j, carry):
        d_content, d_position = carry
        k = p.tile(p.k, j)
        p.keep(_dot(position, p.names(band + j + 1), trans_b=True), j + 1)
        p.barrier()
        score = (_dot(content, k, trans_b=True) + p.askew(j)) * scale
        weight = jnp.where(p.seen(i, j), jnp.exp(score - log_sum), 0.0)
        d_weight = p.dropped(_dot(d_out, p.tile(p.v, j), trans_b=True), i, j)
        d_score = (weight * (d_weight - delta) * scale).astype(q.dtype)
        p.keep_back(d_score, j)
        p.barrier()
        return d_content + _dot(d_score, k), names(j, d_position)

    zeros = jnp.zeros(q.shape, jnp.float32)
    nothing = jnp.zeros((t, t), q.dtype)
    first, end = p.first_key_tile(i), p.end_of_key_tiles(i)

    def clear(j, carry):
        d_band_ref[p.batch, i, p.head, pl.ds(j * t, t), :] = zeros.astype(d_band_ref.dtype)
        return carry

    p.keep(_dot(position, p.names(band + first), trans_b=True), first)
    p.keep_back(nothing, first - 1)
    d_content, d_position = jax.lax.fori_loop(first, end, step, (zeros, zeros))
    p.keep_back(nothing, end)
    p.barrier()
    d_position = names(end, d_position)
    jax.lax.fori_loop(0, first, clear, 0)
    jax.lax.fori_loop(end + 1, span.key_tiles + 1, clear, 0)
    d_q_ref[p.batch, where, p.head, :] = (d_content + d_position).astype(d_q_ref.dtype)
    d_w_ref[p.batch, i, p.head, :] = jnp.sum(d_content, axis=0)
    d_b_ref[p.batch, i, p.head, :] = jnp.sum(d_position, axis=0)


def _key_kernel(span, scale, *refs):
    *inputs, d_out_ref, log_sum_ref, delta_ref, d_k_ref, d_v_ref, ring = refs
    j, head = pl.program_id(0), pl.program_id(1)
    p = _Program(span, scale, inputs, ring, head * span.key_tiles + j, head)
    t = span.tile
    k, v = p.tile(p.k, j), p.tile(p.v, j)

    def step(i, carry):
        d_k, d_v = carry
        q, d_out = p.tile(p.q, i), p.tile(d_out_ref, i)
        where = pl.ds(i * t, t)
        log_sum, delta = (ref[p.batch, p.head, where][:, None] for ref in (log_sum_ref, delta_ref))
        content, position = q + p.r_w_bias, q + p.r_r_bias
        band = span.query_tiles - 1 - i + j
        slot = 2 * (i % 2)
        p.keep(_dot(position, p.names(band), trans_b=True), slot)
        p.keep(_dot(position, p.names(band + 1), trans_b=True), slot + 1)
        p.barrier()
        score = (_dot(content, k, trans_b=True) + p.askew(slot)) * scale
        weight = jnp.where(p.seen(i, j), jnp.exp(score - log_sum), 0.0)
        kept = p.dropped(weight, i, j).astype(q.dtype)
        d_v = d_v + _dot(kept, d_out, trans_a=True)
        d_weight = p.dropped(_dot(d_out, v, trans_b=True), i, j)
        d_score = (weight * (d_weight - delta) * scale).astype(q.dtype)
        return d_k + _dot(d_score, content, trans_a=True), d_v

    # The first queries that reach as far as the first key of this tile.
    first = jnp.maximum(j * t - span.mem_len, 0) // t
    last = jnp.where((j + 1) * t > p.oldest, span.query_tiles, first)
    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(first, last, step, (zeros, zeros))
    where = pl.ds(j * t, t)
    d_k_ref[p.batch, where, p.head, :] = d_k.astype(d_k_ref.dtype)
    d_v_ref[p.batch, where, p.head, :] = d_v.astype(d_v_ref.dtype)


def _dot(a: jax.Array, b: jax.Array, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    dimensions = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
