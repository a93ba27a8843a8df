"""Adaptive input and adaptive softmax (Grave et al. 2017; Baevski and Auli 2019).

The vocabulary, most frequent words first, is cut at `cutoffs` into clusters. The first cluster, the
head, is scored for every token, together with one logit for each of the other clusters, the tails;
a tail is scored only for the tokens whose target lies in it. No array has the size tokens x
vocabulary, and no tail does work for tokens of another.

Letters: N tokens, n tokens at a time, D d_model, C clusters, V_i and E_i vocabulary and embedding
width of cluster i.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from txl_jax.config import ModelConfig

RANKED_AT_A_TIME = 2**24
"""Log-probabilities that are in memory at once, at most, where tokens are ranked."""


class Cluster(NamedTuple):
    """A part of the vocabulary: the ids start … stop - 1."""

    start: int
    stop: int
    width: int
    """Width E_i of its embeddings."""


def clusters(cfg: ModelConfig) -> list[Cluster]:
    """The head and the tails; only the head where there are no cutoffs.

    Cluster i has embeddings of width d_embed // div_val**i, as in the original.
    """
    edges = [0, *cfg.cutoffs, cfg.n_token]
    d_embed = cfg.d_embed or cfg.d_model
    return [
        Cluster(start, stop, d_embed // cfg.div_val**i)
        for i, (start, stop) in enumerate(itertools.pairwise(edges))
    ]


def tied_projections(cfg: ModelConfig) -> tuple[bool, ...]:
    """For each cluster, whether the output uses the embedding's projection (`tie_projs`)."""
    return cfg.tie_projs or (False, *(True,) * len(cfg.cutoffs))


def is_projected(cfg: ModelConfig) -> bool:
    """Whether there are projections at all: with div_val above 1 always, as in the original."""
    return cfg.div_val > 1 or cfg.d_embed not in (None, cfg.d_model)


class AdaptiveEmbedding(nnx.Module):
    """Embeddings of all clusters, projected to d_model where their widths differ from it."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        parts = clusters(cfg)
        self.tables = nnx.List(
            [_normal(rngs, cfg.init_std, part.stop - part.start, part.width) for part in parts]
        )
        """[V_i, E_i] for each cluster."""
        if is_projected(cfg):
            shared = cfg.div_val == 1
            self.projections = nnx.List(
                [
                    _normal(rngs, cfg.proj_init_std, cfg.d_model, part.width)
                    for part in (parts[:1] if shared else parts)
                ]
            )
            """[D, E_i] for each cluster; one for all of them with div_val 1."""

    def projection(self, i: int) -> nnx.Param | None:
        """Projection [D, E_i] of cluster i; None if there is none."""
        if not is_projected(self.cfg):
            return None
        return self.projections[0 if self.cfg.div_val == 1 else i]

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embeddings [..., D] of ids int32 [...], times sqrt(D), in the config's dtype."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x: Any = 0
        for i, part in enumerate(clusters(cfg)):
            own = self._rows(i, part, ids).astype(dtype)
            if cfg.div_val > 1:
                own = _project_up(own, self.projection(i))
            x = x + own
        if cfg.div_val == 1:
            x = _project_up(x, self.projection(0))
        return x * jnp.asarray(cfg.d_model**0.5, dtype)

    def _rows(self, i: int, part: Cluster, ids: jax.Array) -> jax.Array:
        """Rows of table i for the ids of its cluster, zeros for the others."""
        size = part.stop - part.start
        inside = (ids >= part.start) & (ids < part.stop)
        local = jnp.where(inside, ids - part.start, size)
        return self.tables[i][...].at[local].get(mode="fill", fill_value=0)


class AdaptiveSoftmax(nnx.Module):
    """Loss and log-probabilities of the next token; weights of its own only where untied."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        parts = clusters(cfg)
        d_embed = parts[0].width
        self.biases = nnx.List([nnx.Param(jnp.zeros(part.stop - part.start)) for part in parts])
        """[V_i] for each cluster."""
        if not cfg.tie_weight:
            self.tables = nnx.List(
                [_normal(rngs, cfg.init_std, part.stop - part.start, part.width) for part in parts]
            )
            """[V_i, E_i] for each cluster."""
        if len(parts) > 1:
            self.cluster_weight = _normal(rngs, cfg.init_std, len(parts) - 1, d_embed)
            """[C-1, E]: row k scores tail C-1-k (the original reads its columns from the end)."""
            self.cluster_bias = nnx.Param(jnp.zeros(len(parts) - 1))
            """[C-1], in the same order."""
        if is_projected(cfg):
            own = {
                str(i): _normal(rngs, cfg.proj_init_std, cfg.d_model, part.width)
                for i, (part, tied) in enumerate(zip(parts, tied_projections(cfg), strict=True))
                if not tied
            }
            self.projections = nnx.Dict(own)
            """[D, E_i] for each cluster whose projection is not the embedding's."""

    def __call__(
        self, hidden: jax.Array, targets: jax.Array, embedding: AdaptiveEmbedding
    ) -> jax.Array:
        """Loss of each token in nats, float32 [B, T].

        Args:
          hidden: [B, T, D] in the type to compute in.
          targets: int32 [B, T]; what is given for a negative target is of no use.
          embedding: holds the weights that are tied.
        """
        parts = clusters(self.cfg)
        tails = range(1, len(parts))
        with jax.named_scope("head"):
            slot = jnp.clip(targets, 0, parts[0].stop - 1)
            for i in tails:
                inside = (targets >= parts[i].start) & (targets < parts[i].stop)
                slot = jnp.where(inside, self._head_slot(i), slot)
            down = _project_down(hidden, self._projection(0, embedding))
            loss = cross_entropy(down, *self._head(embedding), slot)
        for i in tails:
            with jax.named_scope(f"tail_{i}"):
                inside = (targets >= parts[i].start) & (targets < parts[i].stop)
                local = jnp.where(inside, targets - parts[i].start, -1)
                loss = loss + self._tail(hidden, local, *self._weights(i, embedding))
        return loss

    def log_probs(self, hidden: jax.Array, embedding: AdaptiveEmbedding) -> jax.Array:
        """Log-probabilities float32 [..., V] after hidden [..., D]: every cluster, every token."""
        down = _project_down(hidden, self._projection(0, embedding))
        head = jax.nn.log_softmax(_logits(down, *self._head(embedding)))
        size = clusters(self.cfg)[0].stop
        found = [head[..., :size]]
        for i in range(1, len(self.biases)):
            projection, table, bias = self._weights(i, embedding)
            tail = jax.nn.log_softmax(_logits(_project_down(hidden, projection), table, bias))
            slot = self._head_slot(i)
            found.append(head[..., slot : slot + 1] + tail)
        return jnp.concatenate(found, axis=-1)

    def ranks(
        self, hidden: jax.Array, targets: jax.Array, embedding: AdaptiveEmbedding
    ) -> jax.Array:
        """How many entries of the vocabulary are likelier than the target, int32 [B, T].

        Equal ones are not counted, so the rank of a tie is the best of its places; a NaN is counted
        as likelier. As many positions of all streams are scored at a time as `RANKED_AT_A_TIME`
        allows, but at least one: there is no array [B, T, V] for a large vocabulary.

        Args: as `__call__`.
        """

        def of_position(hidden_and_targets):
            hidden, targets = hidden_and_targets
            log_probs = self.log_probs(hidden, embedding)
            own = jnp.take_along_axis(log_probs, targets[:, None], axis=-1)
            return (~(log_probs <= own)).sum(-1, dtype=jnp.int32)

        by_position = hidden.swapaxes(0, 1), jnp.maximum(targets, 0).swapaxes(0, 1)
        positions = max(1, RANKED_AT_A_TIME // (targets.shape[0] * self.cfg.n_token))
        ranks = jax.lax.map(of_position, by_position, batch_size=min(positions, targets.shape[1]))
        return ranks.swapaxes(0, 1)

    def _head_slot(self, i: int) -> int:
        """Column of the head's logits that stands for tail i: the last one for the first tail."""
        return clusters(self.cfg)[0].stop + len(self.biases) - 1 - i

    def _projection(self, i: int, embedding: AdaptiveEmbedding) -> jax.Array | None:
        if not is_projected(self.cfg):
            return None
        if tied_projections(self.cfg)[i]:
            projection = embedding.projection(i)
            assert projection is not None
            return projection[...]
        return self.projections[str(i)][...]

    def _weights(self, i: int, embedding: AdaptiveEmbedding) -> tuple[Any, jax.Array, jax.Array]:
        """Projection, table and bias of cluster i."""
        tables = embedding.tables if self.cfg.tie_weight else self.tables
        return self._projection(i, embedding), tables[i][...], self.biases[i][...]

    def _head(self, embedding: AdaptiveEmbedding) -> tuple[jax.Array, jax.Array]:
        """Table and bias of the head: its own words, then a row for each tail."""
        _, table, bias = self._weights(0, embedding)
        if len(self.biases) == 1:
            return table, bias
        table = jnp.concatenate([table, self.cluster_weight[...]])
        return table, jnp.concatenate([bias, self.cluster_bias[...]])

    def _tail(self, hidden, local, projection, table, bias) -> jax.Array:
        """Loss within a tail, [B, T]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return tail_loss(flat, local.reshape(-1), projection, table, bias).reshape(local.shape)


@jax.custom_vjp
def cross_entropy(x: jax.Array, table: jax.Array, bias: jax.Array, slot: jax.Array) -> jax.Array:
    """-log softmax(x tableᵀ + bias)[slot], float32 [...].

    Its gradient is made in one pass over the logits, and the products of the backward pass are in
    the type of x as those of the forward pass are (JAX would make them in float32).

    Args:
      x: [..., E]; its type is that of the matrix products, whose sums are float32.
      table: float32 [V, E].
      bias: float32 [V].
      slot: int32 [...], in 0 … V - 1.
    """
    return _cross_entropy_forward(x, table, bias, slot)[0]


def _cross_entropy_forward(x, table, bias, slot):
    logits = _logits(x, table, bias)
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, slot[..., None], axis=-1)[..., 0]
    return total - picked, (x, table, slot, logits, total)


def _cross_entropy_backward(saved, g):
    x, table, slot, logits, total = saved
    probability = jnp.exp(logits - total[..., None])
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == slot[..., None]
    wide = jnp.where(chosen, probability - 1.0, probability) * g[..., None]
    if x.dtype == wide.dtype:
        # CPUs would compute it anew in each of the products.
        wide = jax.lax.optimization_barrier(wide)
    d = wide.astype(x.dtype)
    d_x = jnp.einsum("...V,VE->...E", d, table.astype(x.dtype))
    rows = (array.reshape(-1, array.shape[-1]) for array in (d, x))
    d_table = jnp.einsum("nV,nE->VE", *rows, preferred_element_type=jnp.float32)
    d_bias = wide.sum(tuple(range(x.ndim - 1)))
    return d_x, d_table, d_bias, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def tail_loss(
    hidden: jax.Array,
    local: jax.Array,
    projection: jax.Array | None,
    table: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """Loss of the tokens of a tail within that tail, float32 [N]; 0 for the other tokens.

    The tokens are gathered and go through n at a time, in as many turns as there are such tokens:
    none for no token, all of them if every target is in this tail. Backward, the logits of a turn
    are computed again; only one turn's are in memory at any time.

    Args:
      hidden: [N, D] in the type to compute in.
      local: int32 [N], the target's place in the tail, 0 … V_i - 1; -1 for a token outside.
      projection: float32 [D, E_i], or None for E_i = D.
      table: float32 [V_i, E_i].
      bias: float32 [V_i].
    """
    return _tail_loss(tokens_at_a_time(hidden.shape[0]), hidden, local, projection, table, bias)


def tokens_at_a_time(n_tokens: int) -> int:
    """How many of a tail's tokens go through at once, if there are N tokens in all.

    More make each turn more efficient, fewer leave less of the last turn empty. In real text a tail
    has two or three percent of the tokens.
    """
    return min(n_tokens, max(32, 32 * round(n_tokens / 32 / 32)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tail_loss(n, hidden, local, projection, table, bias):
    return _tail_loss_forward(n, hidden, local, projection, table, bias)[0]


def _tail_loss_forward(n, hidden, local, projection, table, bias):
    turns, rows_of, slot_of = _turns(n, local)

    def turn(k, loss):
        rows = rows_of(k)
        x = _project_down(_take(hidden, rows), projection)
        own = cross_entropy(x, table, bias, slot_of(rows))
        return loss.at[rows].set(own, mode="drop")

    loss = jax.lax.fori_loop(0, turns, turn, jnp.zeros(local.shape, jnp.float32))
    return loss, (hidden, local, projection, table, bias)


def _tail_loss_backward(n, saved, g):
    hidden, local, *weights = saved
    turns, rows_of, slot_of = _turns(n, local)

    def turn(k, gradients):
        rows = rows_of(k)

        def loss(x, projection, table, bias):
            return cross_entropy(_project_down(x, projection), table, bias, slot_of(rows))

        _, pull = jax.vjp(loss, _take(hidden, rows), *weights)
        d_x, *d_weights = pull(_take(g, rows))
        d_hidden, *sums = gradients
        return d_hidden.at[rows].set(d_x, mode="drop"), *jax.tree.map(jnp.add, sums, d_weights)

    gradients = jax.tree.map(jnp.zeros_like, (hidden, *weights))
    d_hidden, *d_weights = jax.lax.fori_loop(0, turns, turn, gradients)
    return d_hidden, None, *d_weights


_tail_loss.defvjp(_tail_loss_forward, _tail_loss_backward)


def _turns(n: int, local: jax.Array):
    """How many turns, the rows [n] of turn k (N for none), and their places in the tail."""
    inside = local >= 0
    size = -(-local.shape[0] // n) * n
    order = jnp.nonzero(inside, size=size, fill_value=local.shape[0])[0]
    turns = -(-inside.sum() // n)

    def rows_of(k):
        return jax.lax.dynamic_slice(order, (k * n,), (n,))

    def slot_of(rows):
        return _take(local, rows)

    return turns, rows_of, slot_of


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of x; zeros for rows beyond its end."""
    return x.at[rows].get(mode="fill", fill_value=0)


def _logits(x: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
    """x tableᵀ + bias, float32 [..., V], the product in the type of x."""
    product = jnp.einsum(
        "...E,VE->...V", x, table.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return product + bias


def _project_up(x: jax.Array, projection: Any) -> jax.Array:
    if projection is None:
        return x
    return jnp.einsum("...E,DE->...D", x, projection[...].astype(x.dtype))


def _project_down(x: jax.Array, projection: jax.Array | None) -> jax.Array:
    if projection is None:
        return x
    return jnp.einsum("...D,DE->...E", x, projection.astype(x.dtype))


def _normal(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape))
