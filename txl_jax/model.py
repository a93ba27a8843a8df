"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): a language model that remembers segments.

Letters: B batch, T segment (tgt_len), M memory (mem_len), S = M + T keys, D d_model, E d_embed,
N heads, H d_head, F d_inner, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from txl_jax import attention
from txl_jax.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from txl_jax.checks import check_model
from txl_jax.config import ModelConfig
from txl_jax.dropout import draw_seeds, dropout, relu_dropout, seeds_of
from txl_jax.layer_norm import LayerNorm
from txl_jax.product import product


class Memory(NamedTuple):
    """What earlier segments left behind."""

    hidden: jax.Array
    """[L, B, M, D]: the newest M inputs of each layer, the newest last."""
    filled: jax.Array
    """int32 scalar: how many of the M slots hold something; the others are not seen."""

    @staticmethod
    def empty(cfg: ModelConfig, batch: int) -> "Memory":
        """Memory of `batch` streams that have not begun; with zero_memory its zeros are seen."""
        shape = (cfg.n_layer, batch, cfg.mem_len, cfg.d_model)
        filled = cfg.mem_len if cfg.zero_memory else 0
        return Memory(jnp.zeros(shape, cfg.dtype), jnp.full((), filled, jnp.int32))

    def restarted(self, cfg: ModelConfig, now: jax.Array) -> "Memory":
        """As it is, or, where the bool `now` says so, as `empty` makes it."""
        if not cfg.mem_len:
            return Memory.empty(cfg, self.hidden.shape[1])
        if not cfg.zero_memory:  # what `filled` does not count is not seen
            return Memory(self.hidden, jnp.where(now, 0, self.filled))
        hidden = jnp.where(now, jnp.zeros_like(self.hidden), self.hidden)
        return Memory(hidden, jnp.where(now, cfg.mem_len, self.filled))


class Recalled(NamedTuple):
    """Memory as a model whose parameters stay the same needs it: `TransformerXL.recall` makes it.

    Keys and values of a token are computed once, when it is read, and not in each segment anew.
    """

    keys_values: jax.Array
    """[L, B, M, 2, N, H]: of the newest M inputs of each layer, the newest last."""
    distances: jax.Array | None
    """[L, S, N, H]: keys of the distances S-1 … 0, with attn_type 0."""
    filled: jax.Array
    """int32 scalar: as in `Memory`."""


def recalls(cfg: ModelConfig) -> bool:
    """Whether `recall` gives a Recalled.

    In attn_type 2 and 3 keys change as tokens grow older, and without memory there are none.
    """
    return cfg.attn_type in (0, 1) and cfg.mem_len > 0


class Layer(nnx.Module):
    """Attention over [memory, segment], then a feed-forward net, each with a residual."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(cfg.init_std * jax.random.normal(rngs.params(), shape))

        heads = (cfg.n_head, cfg.d_head)
        self.cfg = cfg
        self.w_q = normal(cfg.d_model, *heads)
        self.w_kv = normal(cfg.d_model, 2, *heads)
        if cfg.attn_type == 0:
            self.w_r = normal(cfg.d_model, *heads)
        self.w_o = normal(*heads, cfg.d_model)
        self.norm_attention = LayerNorm(cfg.d_model, cfg.init_std, rngs)
        self.w_in = normal(cfg.d_model, cfg.d_inner)
        self.b_in = nnx.Param(jnp.zeros((cfg.d_inner,)))
        self.w_out = normal(cfg.d_inner, cfg.d_model)
        self.b_out = nnx.Param(jnp.zeros((cfg.d_model,)))
        self.norm_feed_forward = LayerNorm(cfg.d_model, cfg.init_std, rngs)
        if cfg.attn_type in (1, 3):
            self.r_emb = normal(cfg.max_klen, *heads)
            """[K, N, H]: the furthest first. With attn_type 3 a row is added to an input [D]."""
        if cfg.attn_type == 1:
            self.r_w_bias = normal(*heads)
            self.r_bias = nnx.Param(jnp.zeros((cfg.max_klen, cfg.n_head)))

    def __call__(
        self,
        x: jax.Array,
        older: jax.Array,
        distances: jax.Array | None,
        biases: tuple[jax.Array, jax.Array] | None,
        seen: attention.Seen,
        seeds: jax.Array | None,
        sequences: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, D], and keys and values [B, T, 2, N, H], of inputs x [B, T, D].

        Args:
          older: [B, M, 2, N, H], what `keys_values` gives for memory.
          distances: [S, N, H], and two biases [N, H]: those of attn_type 0, which alone has them.
          seeds: uint32 [4, 2], for dropout.
        """
        own: Any = (None,) * 4
        if seeds is not None:
            own = [seeds_of(seed, sequences) for seed in seeds]
        x, newer = self._attend(x, older, distances, biases, seen, own[0], own[1])
        return self.feed_forward(x, own[2], own[3]), newer

    def queries(self, x: jax.Array) -> jax.Array:
        """Queries [B, T, N, H] of inputs [B, T, D]."""
        with jax.named_scope("attention"):
            # With pre_lnorm, queries of attn_type 2 and 3 are made of what is not normalised: so
            # does the original.
            normal = self.cfg.pre_lnorm and self.cfg.attn_type not in (2, 3)
            asking = self.norm_attention(x) if normal else x
            return product(asking, self.w_q[...].astype(x.dtype))

    def keys_values(self, x: jax.Array) -> jax.Array:
        """Keys and values [B, S, 2, N, H] of inputs [B, S, D]."""
        with jax.named_scope("attention"):
            x = self.norm_attention(x) if self.cfg.pre_lnorm else x
            return product(x, self.w_kv[...].astype(x.dtype))

    def distances(self, positions: jax.Array) -> jax.Array:
        """Keys [S, N, H] of distances with the embeddings [S, D]."""
        with jax.named_scope("attention"):
            return product(positions, self.w_r[...].astype(positions.dtype))

    def _attend(self, x, older, distances, biases, seen, seeds_weights, seeds_output):
        # Memory has had its own product: nothing goes back through what earlier segments left.
        q, newer = self.queries(x), self.keys_values(x)
        with jax.named_scope("attention"):
            both = jnp.concatenate([older, newer], axis=1)
            k, v = both[:, :, 0], both[:, :, 1]
            mixed = self._mix(q, k, v, distances, biases, seen, self.cfg.dropatt, seeds_weights)
        return self.attended(x, mixed, seeds_output), newer

    def attended(self, x: jax.Array, mixed: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        """Inputs x [B, T, D] with what attention found, values [B, T, N, H], added to them."""
        cfg = self.cfg
        with jax.named_scope("attention"):
            # As one axis: over two, XLA for CPUs would lay out w_o anew for each token.
            heads = mixed.reshape(*mixed.shape[:2], -1)
            w_o = self.w_o[...].astype(x.dtype).reshape(-1, cfg.d_model)
            out = x + dropout(product(heads, w_o), cfg.dropout, seeds)
            return out if cfg.pre_lnorm else self.norm_attention(out)

    def _mix(self, q, k, v, distances, biases, *masks):
        cfg, dtype = self.cfg, q.dtype
        if cfg.attn_type == 0:
            return attention.relative_attention(q, k, v, distances, *biases, *masks)
        if cfg.attn_type == 1:
            r_emb = attention.nearest(self.r_emb[...], k.shape[1], cfg.clamp_len).astype(dtype)
            r_bias = attention.nearest(self.r_bias[...], k.shape[1], cfg.clamp_len)
            r_w_bias = self.r_w_bias[...].astype(dtype)
            return attention.learned_attention(q, k, v, r_emb, r_w_bias, r_bias, *masks)
        return attention.absolute_attention(q, k, v, *masks)

    def feed_forward(
        self,
        x: jax.Array,
        seeds_inner: jax.Array | None = None,
        seeds_output: jax.Array | None = None,
    ) -> jax.Array:
        """Output of the layer [B, T, D] for what attention gave, [B, T, D]."""
        cfg, dtype = self.cfg, x.dtype
        with jax.named_scope("feed_forward"):
            inner = self.norm_feed_forward(x) if cfg.pre_lnorm else x
            inner = product(inner, self.w_in[...].astype(dtype))
            inner = inner + self.b_in[...].astype(dtype)
            inner = relu_dropout(inner, cfg.dropout, seeds_inner)
            out = product(inner, self.w_out[...].astype(dtype))
            out = x + dropout(out + self.b_out[...].astype(dtype), cfg.dropout, seeds_output)
            return out if cfg.pre_lnorm else self.norm_feed_forward(out)


class TransformerXL(nnx.Module):
    """Transformer-XL as a language model, and the models that its paper compares it with.

    Layers are stacked: every parameter of `layers` has a leading axis L, over which the forward
    pass scans. Nothing random or trainable is hidden: memory and keys come in as arguments.

    What `attn_type` changes, all of it as in the original:

    - 0 and 1: scores know distances; memory holds no positions.
    - 2: the sinusoid of its place, counted from the end of the segment, is added to each input of
      the first layer.
    - 3: the row of its place in the layer's own table is added to each input of every layer.

    In 2 and 3 memory keeps inputs with the positions that they had in their own segment; when a
    layer reads them, those of their place before the present segment are added. The original adds
    these in place, so that what stays in memory for several segments (mem_len above tgt_len)
    gathers the positions of all. Here, reading changes no memory; with mem_len up to tgt_len the
    two are the same. Also as in the original, pre_lnorm in 2 and 3 normalises what keys and values
    are made from, and not what queries are made from.

    Args:
      gather: where the layers' parameters are split over devices, makes those of one layer whole
        (a tree of arrays without the axis L); it is called in the scan, also in the backward one.

    Raises:
      UserError: a field of the config cannot work (see `check`).
    """

    def __init__(
        self, cfg: ModelConfig, *, rngs: nnx.Rngs, gather: Callable[[Any], Any] | None = None
    ):
        check_model(cfg)
        self.cfg, self.gather = cfg, gather

        def normal(std: float, *shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        self.embedding = AdaptiveEmbedding(cfg, rngs)
        self.output = AdaptiveSoftmax(cfg, rngs)
        if cfg.attn_type == 0:
            bias_shape = (cfg.n_head, cfg.d_head)
            if cfg.untie_r:
                bias_shape = (cfg.n_layer, *bias_shape)
            self.r_w_bias = normal(cfg.init_std, *bias_shape)
            self.r_r_bias = normal(cfg.init_std, *bias_shape)

        @nnx.split_rngs(splits=cfg.n_layer)
        @nnx.vmap
        def stack(layer_rngs: nnx.Rngs) -> Layer:
            return Layer(cfg, layer_rngs)

        self.layers = stack(rngs)

    def init_memory(self, batch: int) -> Memory:
        """Empty memory for `batch` streams."""
        return Memory.empty(self.cfg, batch)

    def __call__(
        self,
        inputs: jax.Array,
        targets: jax.Array,
        memory: Memory,
        key: jax.Array | None = None,
        sequences: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Loss of each token, and the memory for the next segment.

        Args:
          inputs: int32 [B, T].
          targets: int32 [B, T]; a negative target is ignored, its loss is 0.
          memory: from `init_memory` or from the call before.
          key: random key for dropout; without one there is none.
          sequences: int32 [B], numbers of the sequences in the whole batch, if these are a part of
            it: a sequence's dropout depends on its number. None: they are 0 … B - 1.

        Returns:
          (loss, memory): float32 [B, T] in nats; the memory carries no gradient.
        """
        hidden, memory = self.hidden(inputs, memory, key, sequences)
        return self.loss(hidden, targets), memory

    def hidden(
        self,
        inputs: jax.Array,
        memory: Memory | Recalled,
        key: jax.Array | None = None,
        sequences: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Output of the last layer [B, T, D] for inputs int32 [B, T], and the next memory.

        Args: as a call, but memory may also be what `recall` made of one for segments of this
          length; so is the next memory then.
        """
        cfg = self.cfg
        recalled = isinstance(memory, Recalled)
        slots = memory.keys_values if recalled else memory.hidden
        tgt_len, mem_len = inputs.shape[1], slots.shape[2]
        own = jnp.arange(inputs.shape[0]) if sequences is None else sequences
        seeds_in = seed_positions = seeds_out = seeds_layers = None
        if key is not None:
            key_layers, key_rest = jax.random.split(key)
            seeds_layers = draw_seeds(key_layers, cfg.n_layer, 4)
            # Positions are those of all sequences, and so is their dropout.
            seed_in, seed_positions, seed_out = draw_seeds(key_rest, 3)
            seeds_in, seeds_out = seeds_of(seed_in, own), seeds_of(seed_out, own)
        positions = biases = None
        with jax.named_scope("embedding"):
            x = self.embedding(inputs)
            added = self._added_positions(mem_len + tgt_len)
            if added is not None and cfg.attn_type == 2:
                x = x + added[0, mem_len:]
            x = dropout(x, cfg.dropout, seeds_in)
            if cfg.attn_type == 0:
                positions = self.positions(mem_len + tgt_len)
                positions = dropout(positions, cfg.dropout, seed_positions)
                biases = self.biases()
        seen = attention.visible(tgt_len, mem_len, memory.filled, cfg.same_length)
        graphdef, stacked = nnx.split(self.layers)

        def one_layer(x, scanned):
            weights, old, own_distances, own_added, own_biases, seeds = scanned
            if self.gather:
                weights = self.gather(nnx.to_pure_dict(weights))
            layer = nnx.merge(graphdef, weights)
            older, distances = old, own_distances
            if not recalled:
                older = layer.keys_values(old if own_added is None else old + own_added[:mem_len])
                distances = None if positions is None else layer.distances(positions)
            if own_added is not None and cfg.attn_type == 3:
                x = x + own_added[mem_len:]
            out, newer = layer(x, older, distances, own_biases or biases, seen, seeds, own)
            new = jnp.concatenate([old, newer if recalled else x], axis=1)[:, tgt_len:]
            return out, jax.lax.stop_gradient(new)

        if cfg.remat:
            one_layer = jax.checkpoint(one_layer)
        elif self.gather:
            # Otherwise every layer's whole weights would be kept for the backward pass.
            kept = jax.checkpoint_policies.dots_saveable
            one_layer = jax.checkpoint(one_layer, policy=kept)
        scanned = (
            stacked,
            # Where several GPUs split an argument without elements, XLA's compiler crashes.
            slots if mem_len else jnp.zeros_like(slots),
            memory.distances if recalled else None,
            added,
            biases if cfg.untie_r else None,
            seeds_layers,
        )
        x, slots = jax.lax.scan(one_layer, x, scanned, unroll=self._unroll())
        filled = jnp.minimum(memory.filled + tgt_len, mem_len)
        if recalled:
            return dropout(x, cfg.dropout, seeds_out), Recalled(slots, memory.distances, filled)
        return dropout(x, cfg.dropout, seeds_out), Memory(slots, filled)

    def recall(self, memory: Memory, tgt_len: int) -> Memory | Recalled:
        """What takes the place of `memory` in `hidden` for segments of `tgt_len` tokens.

        It gives the same, faster, as long as the parameters stay the same, and is not for training.
        Memory itself where `recalls` says so.
        """
        if not recalls(self.cfg):
            return memory
        graphdef, stacked = nnx.split(self.layers)
        positions = self.positions(memory.hidden.shape[2] + tgt_len)

        def of_layer(_, scanned):
            weights, hidden = scanned
            layer = nnx.merge(graphdef, weights)
            distances = layer.distances(positions) if self.cfg.attn_type == 0 else None
            return None, (layer.keys_values(hidden), distances)

        _, (keys_values, distances) = jax.lax.scan(of_layer, None, (stacked, memory.hidden))
        return Recalled(keys_values, distances, memory.filled)

    def _unroll(self) -> bool:
        """Whether the layers are compiled one by one, and not as a loop.

        On GPUs a loop copies what each layer keeps and needs out of stacked arrays and into them,
        a quarter of a step. On CPUs it costs less than the time to compile so much. What is meant
        to save memory, layer by layer, stays a loop.
        """
        return jax.devices()[0].platform == "gpu" and not self.cfg.remat and self.gather is None

    def loss(self, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Loss, float32 [B, T], of targets int32 [B, T] that follow hidden [B, T, D]."""
        with jax.named_scope("loss"):
            loss = self.output(hidden, targets, self.embedding)
            return jnp.where(targets < 0, 0.0, loss)

    def ranks(self, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """For each target, how many tokens are likelier after hidden [B, T, D]: int32 [B, T].

        0 is the best; what is given for a negative target is of no use. Equally likely tokens do
        not stand before each other.
        """
        with jax.named_scope("ranks"):
            return self.output.ranks(hidden, targets, self.embedding)

    def biases(self) -> tuple[jax.Array, jax.Array]:
        """The paper's u and v, with attn_type 0: [N, H] each, with untie_r [L, N, H]."""
        dtype = self.cfg.dtype
        return self.r_w_bias[...].astype(dtype), self.r_r_bias[...].astype(dtype)

    def positions(self, n_keys: int) -> jax.Array:
        """Embeddings [S, D] of the distances S-1 … 0, with attn_type 0."""
        cfg = self.cfg
        return attention.sinusoid(n_keys, cfg.d_model, cfg.clamp_len).astype(cfg.dtype)

    def _added_positions(self, n_keys: int) -> jax.Array | None:
        """Position embeddings that belong to the inputs of each layer, [L, S, D].

        None where positions are relative; with attn_type 2 all but the first layer's are zero.
        """
        cfg = self.cfg
        if cfg.attn_type == 2:
            first = attention.sinusoid(n_keys, cfg.d_model, cfg.clamp_len)
            added = jnp.zeros((cfg.n_layer, *first.shape)).at[0].set(first)
        elif cfg.attn_type == 3:
            tables = self.layers.r_emb[...].reshape(cfg.n_layer, -1, cfg.d_model)
            added = jax.vmap(lambda table: attention.nearest(table, n_keys))(tables)
        else:
            return None
        return added.astype(cfg.dtype)

    def log_probs(self, hidden: jax.Array) -> jax.Array:
        """Log-probabilities, float32 [..., V], of the token that follows hidden [..., D]."""
        return self.output.log_probs(hidden, self.embedding)


def stacked(cfg: ModelConfig) -> frozenset[str]:
    """Names of the model's parameters whose leading axis runs over the layers."""
    return frozenset({"layers", *(("r_w_bias", "r_r_bias") if cfg.untie_r else ())})


def abstract(cfg: ModelConfig, gather: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
    """(graphdef, parameters) of a model without its values: a tree of shapes and types.

    `nnx.merge(graphdef, parameters)` gives the model for any parameters of this tree. Tables of
    attn_type 1 and 3 are here as long as tgt_len and mem_len of `cfg` make them; the model takes
    them at whatever length they come, so that evaluation may use other lengths than training.
    """
    xl = nnx.eval_shape(lambda: TransformerXL(cfg, rngs=nnx.Rngs(0), gather=gather))
    graphdef, params = nnx.split(xl)
    return graphdef, nnx.to_pure_dict(params)
