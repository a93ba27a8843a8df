"""A model whose parameters stay as they are, read one token at a time: what generation does.

Letters: B streams, M memory (mem_len), S = M + 1 keys, A room, D d_model, N heads, H d_head, L
layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from txl_jax import attention
from txl_jax.config import ModelConfig
from txl_jax.model import Memory, Recalled, TransformerXL, recalls


class Cache(NamedTuple):
    """Keys and values of tokens that were read. There is room for more, so that none has to move.

    The M of memory end where slot `end` begins. Heads of all streams are one axis: with an axis of
    one stream, XLA for CPUs would copy an array four times to change one slot of it.
    """

    keys: list[jax.Array]
    """For each layer [B x N, M + A, H]."""
    values: list[jax.Array]
    """For each layer [B x N, M + A, H]."""
    filled: jax.Array
    """int32 scalar: as in `Memory`."""
    end: jax.Array
    """int32 scalar, M … M + A: the slot of the next token."""


class FixedLayer(NamedTuple):
    """What a layer needs for each token, made once from its parameters."""

    weights: Any
    """Its parameters, in the type of the model but for those of layer norms.

    An array of their own each: a loop over layers would spend more time on their copies than on
    products.
    """
    biases: tuple[jax.Array, jax.Array]
    """[N, H] each: what queries of content and of distance have added to them."""
    distances: jax.Array
    """[N, S, H]: keys of the distances M … 0."""
    distance_bias: jax.Array
    """float32 [N, S]: what a distance adds to a score, besides."""


class Decoder:
    """Reads tokens; what came before is in a cache, with room for `room` of them at a time.

    Where keys change as tokens grow older (attn_type 2 and 3), or nothing is remembered, Memory
    takes the cache's place.
    """

    def __init__(self, cfg: ModelConfig, room: int):
        self.cfg, self.room, self._caches = cfg, room, recalls(cfg)

    def fix(self, xl: TransformerXL) -> list[FixedLayer]:
        """The layers' parameters as `read` wants them."""
        cfg = self.cfg
        if not self._caches:
            return []
        graphdef, stacked = nnx.split(xl.layers)
        n_keys, fixed = cfg.mem_len + 1, []
        for i in range(cfg.n_layer):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            layer = nnx.merge(graphdef, weights)
            if cfg.attn_type == 0:
                u, v = xl.biases()
                biases = (u[i], v[i]) if cfg.untie_r else (u, v)
                distances = layer.distances(xl.positions(n_keys))
                distance_bias = jnp.zeros((n_keys, cfg.n_head))
            else:
                u = layer.r_w_bias[...].astype(cfg.dtype)
                biases = (u, jnp.zeros_like(u))
                table = attention.nearest(layer.r_emb[...], n_keys, cfg.clamp_len)
                distances = table.astype(cfg.dtype)
                distance_bias = attention.nearest(layer.r_bias[...], n_keys, cfg.clamp_len)
            weights = self._narrowed(weights)
            fixed.append(FixedLayer(weights, biases, distances.swapaxes(0, 1), distance_bias.T))
        return fixed

    def _narrowed(self, weights: Any) -> Any:
        def narrow(path: Any, leaf: jax.Array) -> jax.Array:
            return leaf if path[0].key.startswith("norm") else leaf.astype(self.cfg.dtype)

        return jax.tree_util.tree_map_with_path(narrow, weights)

    def begin(self, xl: TransformerXL, memory: Memory) -> Cache | Memory:
        """The cache of what is in memory; there is no room in it yet."""
        if not self._caches:
            return memory
        recalled = xl.recall(memory, 1)
        assert isinstance(recalled, Recalled)
        full = jnp.pad(recalled.keys_values, [(0, 0), (0, 0), (self.room, 0)] + [(0, 0)] * 3)
        by_head = full.transpose(3, 0, 1, 4, 2, 5)
        slots = by_head.reshape(2, self.cfg.n_layer, -1, *by_head.shape[4:])
        keys, values = (list(layers) for layers in slots)
        return Cache(keys, values, memory.filled, jnp.asarray(self.cfg.mem_len + self.room))

    def make_room(self, cache: Cache | Memory) -> Cache | Memory:
        """The cache with room for `room` tokens, whatever it has."""
        if isinstance(cache, Memory):
            return cache
        mem_len = self.cfg.mem_len

        def moved(slots: jax.Array) -> jax.Array:
            newest = jax.lax.dynamic_slice_in_dim(slots, cache.end - mem_len, mem_len, 1)
            return jnp.pad(newest, [(0, 0), (0, self.room), (0, 0)])

        keys, values = jax.tree.map(moved, (cache.keys, cache.values))
        return Cache(keys, values, cache.filled, jnp.asarray(mem_len))

    def take_streams(self, cache: Cache | Memory, rows: jax.Array) -> Any:
        """The cache, or Memory, whose stream i is what stream rows[i] of `cache` was."""
        if isinstance(cache, Memory):
            return cache._replace(hidden=cache.hidden[:, rows])
        heads = self.cfg.n_head * rows[:, None] + jnp.arange(self.cfg.n_head)
        keys, values = jax.tree.map(
            lambda slots: slots[heads.reshape(-1)], (cache.keys, cache.values)
        )
        return cache._replace(keys=keys, values=values)

    def read(
        self, xl: TransformerXL, layers: list[FixedLayer], cache: Cache | Memory, token: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Output of the last layer [B, D] for the token int32 [B] of each stream, and the cache.

        There has to be room in it.
        """
        if isinstance(cache, Memory):
            hidden, memory = xl.hidden(token[:, None], cache)
            return hidden[:, 0], memory
        mem_len = self.cfg.mem_len
        x = xl.embedding(token[:, None])
        mask = attention.visible(1, mem_len, cache.filled, self.cfg.same_length).mask[0]
        graphdef, _ = nnx.split(xl.layers)
        keys, values = list(cache.keys), list(cache.values)
        for i, fixed in enumerate(layers):
            layer = nnx.merge(graphdef, fixed.weights)
            q, newer = layer.queries(x)[:, 0], layer.keys_values(x)[:, 0]
            newer = newer.swapaxes(0, 1).reshape(2, -1, 1, newer.shape[-1])
            for slots, new in zip((keys, values), newer, strict=True):
                slots[i] = jax.lax.dynamic_update_slice_in_dim(slots[i], new, cache.end, 1)
            mixed = _mix(fixed, q, keys[i], values[i], mask, cache.end - mem_len)
            x = layer.feed_forward(layer.attended(x, mixed[:, None]))
        filled = jnp.minimum(cache.filled + 1, mem_len)
        return x[:, 0], Cache(keys, values, filled, cache.end + 1)


def _mix(
    fixed: FixedLayer,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    first: jax.Array,
) -> jax.Array:
    """`attention.relative_attention` of one query [B, N, H], whose keys are the S from `first` on.

    Scores of all M + A slots are computed, and those of S used: no part of the cache is copied.
    """
    batch, n_head, d_head = q.shape
    for_content, for_distance = (q + bias for bias in fixed.biases)
    wide: Any = {"preferred_element_type": jnp.float32}
    # X: heads of all streams.
    with jax.named_scope("scores"):
        content = jnp.einsum("XH,XSH->XS", for_content.reshape(-1, d_head), keys, **wide)
        content = jax.lax.dynamic_slice_in_dim(content, first, mask.shape[0], 1)
        position = jnp.einsum("BNH,NSH->BNS", for_distance, fixed.distances, **wide)
        score = content.reshape(position.shape) + position + fixed.distance_bias
    with jax.named_scope("softmax"):
        score = jnp.where(mask, score * (d_head**-0.5), jnp.finfo(jnp.float32).min)
        weight = jax.nn.softmax(score, axis=-1).astype(values.dtype)
        none = jnp.zeros(keys.shape[:2], values.dtype)
        weight = weight.reshape(batch * n_head, -1)
        weight = jax.lax.dynamic_update_slice_in_dim(none, weight, first, 1)
    with jax.named_scope("values"):
        return jnp.einsum("XS,XSH->XH", weight, values).reshape(q.shape)
