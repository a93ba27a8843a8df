"""The train step: a pure function on pytrees, compiled once for the whole mesh.

Letters: A accumulate, b = batch / A sequences at a time, T tgt_len, L layers, M memory, D d_model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from txl_jax import optim, sharding
from txl_jax.config import Config
from txl_jax.model import Memory, TransformerXL, abstract


class Totals(NamedTuple):
    """Sums over the steps since the last log line; they stay on the device until it is due."""

    loss: jax.Array
    """float32: nats, summed over the tokens that have a target."""
    tokens: jax.Array
    """float32: number of these tokens."""
    grad_norm: jax.Array
    """float32: sum of the gradient norms before clipping."""
    steps: jax.Array
    """int32: number of steps."""
    non_finite_step: jax.Array
    """int32: first step of the run whose loss or gradient was not finite; -1 if none was."""

    learning_rate: jax.Array
    """float32: the rate of the last step."""

    @staticmethod
    def zero() -> Any:
        """Totals of no steps, as NumPy scalars: nothing has to be compiled to reset the sums."""
        zero = np.float32(0)
        return Totals(zero, zero, zero, np.int32(0), np.int32(-1), zero)  # pyright: ignore[reportArgumentType]


class TrainState(NamedTuple):
    """Everything that the next step depends on, and so everything that a checkpoint holds."""

    step: jax.Array
    """int32: steps done; it also says which segment of the data comes next."""
    params: Any
    opt_state: Any
    memory: Memory
    """hidden [A, L, b, M, D]: the memory of each part of the batch."""
    key: jax.Array
    """Key from which every step derives its own."""
    totals: Totals


def init_state(cfg: Config, mesh: Mesh) -> TrainState:
    """The first state of a run, created where `state_shardings` puts it."""

    def build() -> TrainState:
        key_params, key_steps = jax.random.split(jax.random.key(cfg.train.seed))
        params = nnx.to_pure_dict(nnx.state(TransformerXL(cfg.model, rngs=nnx.Rngs(key_params))))
        memory = Memory.empty(cfg.model, cfg.train.batch // cfg.train.accumulate)
        hidden = jnp.broadcast_to(memory.hidden, (cfg.train.accumulate, *memory.hidden.shape))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optim.make_optimizer(cfg.optim).init(params),
            memory=Memory(hidden, memory.filled),
            key=key_steps,
            totals=Totals.zero(),
        )

    return jax.jit(build, out_shardings=state_shardings(jax.eval_shape(build), mesh))()


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """For each leaf of a state, how it lies on the mesh: memory split, everything else repeated."""
    everywhere = sharding.repeated(mesh)
    shardings = jax.tree.map(lambda _: everywhere, state)
    memory = Memory(sharding.split(mesh, axis=2), everywhere)  # pyright: ignore[reportArgumentType]
    return shardings._replace(memory=memory)


def make_train_step(
    cfg: Config, mesh: Mesh, segments: int
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """The compiled step: (state, inputs [A, b, T], targets [A, b, T]) → (state, done).

    The loss is the mean over the batch's targets, whatever the number of devices and parts. The
    state passed in is donated: its buffers are gone afterwards. `done` is the number of steps
    made, to wait for without touching the state.

    Args:
      segments: steps in an epoch; memory starts empty at the first step of each, as in the
        original.
    """
    graphdef, _ = abstract(cfg.model, mesh)
    step_tokens = cfg.train.batch * cfg.model.tgt_len
    learning_rate = optim.make_schedule(cfg.optim, cfg.train, step_tokens)
    optimizer = optim.make_optimizer(cfg.optim)

    def loss_of_part(params, inputs, targets, memory, key, n_targets):
        xl = nnx.merge(graphdef, params)
        loss, memory = xl(inputs, targets, memory, key)
        return loss.sum() / n_targets, memory

    def train_step(
        state: TrainState, inputs: jax.Array, targets: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        n_targets = (targets >= 0).sum().astype(jnp.float32)
        begun = state.memory.restarted(cfg.model, state.step % segments == 0)

        def part(carry, part_of_batch):
            loss_so_far, gradients_so_far = carry
            inputs, targets, hidden, key = part_of_batch
            (loss, memory), gradients = jax.value_and_grad(loss_of_part, has_aux=True)(
                state.params, inputs, targets, Memory(hidden, begun.filled), key, n_targets
            )
            gradients = jax.tree.map(jnp.add, gradients_so_far, gradients)
            return (loss_so_far + loss, gradients), memory

        dropout_keys = jax.random.split(
            jax.random.fold_in(state.key, state.step), cfg.train.accumulate
        )
        (loss, gradients), memory = jax.lax.scan(
            part,
            (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params)),
            (inputs, targets, begun.hidden, dropout_keys),
        )
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            gradients = optim.clip_by_norm(gradients, norm, cfg.optim.clip)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            rate = learning_rate(state.step.astype(jnp.float32) * step_tokens)
            params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        old = state.totals
        totals = Totals(
            loss=old.loss + loss * n_targets,
            tokens=old.tokens + n_targets,
            grad_norm=old.grad_norm + norm,
            steps=old.steps + 1,
            non_finite_step=jnp.where(
                bad & (old.non_finite_step < 0), state.step + 1, old.non_finite_step
            ),
            learning_rate=rate,
        )
        memory = Memory(memory.hidden, memory.filled[0])
        done = state.step + 1
        return TrainState(done, params, opt_state, memory, state.key, totals), done

    batch = sharding.split(mesh, axis=1)
    shardings = state_shardings(jax.eval_shape(lambda: init_state(cfg, mesh)), mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch, batch),
        out_shardings=(shardings, sharding.repeated(mesh)),
        donate_argnums=0,
    )


def place_batch(
    cfg: Config, mesh: Mesh, rows: tuple[np.ndarray, np.ndarray]
) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets of a step as global arrays [A, b, T], from this process's rows [·, T].

    Sequence s of the batch is row s // A of part s % A, so that a process's rows are contiguous.
    """
    accumulate, tgt_len = cfg.train.accumulate, cfg.model.tgt_len
    where = sharding.split(mesh, axis=1)

    def place(values: np.ndarray) -> jax.Array:
        parts = values.reshape(-1, accumulate, tgt_len).swapaxes(0, 1)
        return jax.make_array_from_process_local_data(where, parts)

    inputs, targets = rows
    return place(inputs), place(targets)
