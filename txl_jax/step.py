"""The train step: a pure function on pytrees, compiled once for the whole mesh.

Letters: A accumulate, b = batch / A sequences at a time, T tgt_len, L layers, M memory, D d_model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from txl_jax import freeze, optim, plateau, precision, sharding
from txl_jax.config import Config
from txl_jax.course import Course
from txl_jax.model import Memory, TransformerXL, abstract
from txl_jax.plateau import Plateau
from txl_jax.precision import LossScale


class Totals(NamedTuple):
    """Sums over the steps since the last log line; they stay on the device until it is due.

    Steps that overflowed (see `LossScale`) are left out.
    """

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
    """int32: steps done, whatever their batch; `Course` says how far in the data that is."""
    params: Any
    opt_state: Any
    memory: Memory
    """hidden [L, A x b, M, D]: sequences in the order of the batch, whatever the parts."""
    key: jax.Array
    """Key from which every step derives its own."""
    totals: Totals
    loss_scale: LossScale | None = None
    """With float16 only."""
    plateau: Plateau | None = None
    """With the schedule dev_perf only."""


def init_state(cfg: Config, mesh: Mesh) -> TrainState:
    """The first state of a run, created where `state_shardings` puts it."""
    return jax.jit(partial(_first_state, cfg), out_shardings=state_shardings(cfg, mesh))()


def abstract_state(cfg: Config, mesh: Mesh) -> Any:
    """As `init_state`, but `jax.ShapeDtypeStruct`s with their shardings, which take no memory."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(partial(_first_state, cfg)),
        state_shardings(cfg, mesh),
    )


def state_shardings(cfg: Config, mesh: Mesh) -> Any:
    """For each leaf of a state, how it lies on the mesh (see `sharding`).

    The memory is split, and so are, if the config says so, parameters and what the optimizer keeps
    for each of them.
    """
    state = jax.eval_shape(partial(_first_state, cfg))
    everywhere, params = sharding.repeated(mesh), sharding.Layout.of(cfg, mesh).shardings
    opt_state = optax.tree.map_params(
        optim.make_optimizer(cfg),
        lambda _, like_param: like_param,
        state.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    memory = Memory(sharding.split(mesh, axis=1), everywhere)  # pyright: ignore[reportArgumentType]
    shardings = jax.tree.map(lambda _: everywhere, state)
    return shardings._replace(params=params, opt_state=opt_state, memory=memory)


def _first_state(cfg: Config) -> TrainState:
    key_params, key_steps = jax.random.split(jax.random.key(cfg.train.seed))
    params = nnx.to_pure_dict(nnx.state(TransformerXL(cfg.model, rngs=nnx.Rngs(key_params))))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optim.make_optimizer(cfg).init(params),
        memory=Memory.empty(cfg.model, cfg.train.batch),
        key=key_steps,
        totals=Totals.zero(),
        loss_scale=precision.begin(cfg.model.dtype),
        plateau=plateau.begin(cfg),
    )


def make_train_step(
    cfg: Config,
    mesh: Mesh,
    segments: int,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
    course: Course | None = None,
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """The compiled step: (state, inputs [A, b, T], targets [A, b, T]) → (state, done).

    The loss is the mean over the batch's targets, whatever the number of devices and parts. The
    state passed in is donated: its buffers are gone afterwards. `done` is the number of steps
    made, to wait for without touching the state.

    In float16, a step whose loss or gradients are not finite changes the loss scale and the count
    of steps, nothing else. Memory too stays as it was: what it would get may be infinite.

    Args:
      segments: steps in an epoch; memory starts empty at the first step of each, as in the
        original.
      learning_rate: rate of a step from the tokens seen before it, float32 both; the config's
        schedule unless it is given.
      course: tokens and segments before a step, where they are not those of its number of steps of
        this batch.
    """
    step_tokens = cfg.train.batch * cfg.model.tgt_len
    course = course or Course(step_tokens)
    learning_rate = learning_rate or optim.make_schedule(cfg.optim, cfg.train, step_tokens)
    optimizer = optim.make_optimizer(cfg)
    gradients_of = _make_gradients(cfg, mesh)

    def train_step(
        state: TrainState, inputs: jax.Array, targets: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        segment = course.segment(state.step)
        begun = state.memory.restarted(cfg.model, segment % segments == 0)
        scale = state.loss_scale.scale if state.loss_scale else jnp.ones(())
        key = jax.random.fold_in(state.key, state.step)
        gradients, loss, n_targets, memory = gradients_of(
            state.params, inputs, targets, begun, key, scale / step_tokens
        )
        with jax.named_scope("optimizer"):
            # The sums were taken as if every token had a target, before the number was known.
            factor = step_tokens / n_targets / scale
            loss = loss * factor
            gradients = freeze.zero_frozen(cfg, gradients)
            # Of the sums themselves: nothing then has to be written but what the optimizer keeps.
            norm = factor * optax.tree.norm(gradients)
            gradients = jax.tree.map(lambda scaled: scaled * factor, gradients)
            gradients = optim.clip(cfg.optim, gradients, norm)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            updates = freeze.zero_frozen(cfg, updates)
            rate = learning_rate(segment.astype(jnp.float32) * step_tokens + course.rest)
            if state.plateau:
                rate = rate * state.plateau.scale
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
        done = state.step + 1
        new = state._replace(
            step=done,
            params=params,
            opt_state=opt_state,
            memory=memory,
            totals=totals,
        )
        if state.loss_scale:
            kept = state._replace(step=done, memory=begun, loss_scale=None)
            new = jax.tree.map(partial(jnp.where, bad), kept, new._replace(loss_scale=None))
            new = new._replace(loss_scale=state.loss_scale.after(bad))
        return new, done

    batch = sharding.split(mesh, axis=1)
    shardings = state_shardings(cfg, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch, batch),
        out_shardings=(shardings, sharding.repeated(mesh)),
        donate_argnums=0,
    )


def _make_gradients(cfg: Config, mesh: Mesh) -> Callable[..., Any]:
    """(params, inputs, targets, memory, key, weight) → (gradients, loss, targets, memory).

    Gradients and loss are those of the sum over all tokens x `weight`, a float32 scalar; `targets`
    is how many tokens have one. Every device goes through its own sequences, all parts of them, and
    then the sums over the devices are taken at once: nothing else crosses the mesh, but for
    parameters that are split and have to be gathered.
    """
    accumulate, parts = cfg.train.accumulate, sharding.split_spec(1)
    layout = sharding.Layout.of(cfg, mesh)
    graphdef, _ = abstract(cfg.model, layout.gather_layer)

    def loss_of_part(params, inputs, targets, memory, key, sequences, weight):
        xl = nnx.merge(graphdef, params)
        loss, memory = xl(inputs, targets, memory, key, sequences)
        return loss.sum() * weight, memory

    def own_gradients(params, inputs, targets, memory, key, weight):
        params = layout.gather(params)
        b = inputs.shape[1]
        rows = jax.lax.axis_index(sharding.DATA) * b + jnp.arange(b)

        def part(sums, part_of_batch):
            inputs, targets, hidden, number = part_of_batch
            (loss, memory), gradients = jax.value_and_grad(loss_of_part, has_aux=True)(
                params,
                inputs,
                targets,
                Memory(hidden, old.filled),
                key,
                rows * accumulate + number,
                weight,
            )
            return jax.tree.map(jnp.add, sums, (gradients, loss)), memory

        old: Memory = memory
        zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        # Sequence s of the batch is row s // A of part s % A.
        n_layer, _, *rest = old.hidden.shape
        hidden = jnp.moveaxis(old.hidden.reshape(n_layer, b, accumulate, *rest), 2, 0)
        (gradients, loss), memory = jax.lax.scan(
            part, zeros, (inputs, targets, hidden, jnp.arange(accumulate))
        )
        hidden = jnp.moveaxis(memory.hidden, 0, 2).reshape(old.hidden.shape)
        n_targets = (targets >= 0).sum().astype(jnp.float32)
        gradients, (loss, n_targets) = layout.sum_gradients(gradients, (loss, n_targets))
        return gradients, loss, n_targets, Memory(hidden, memory.filled[0])

    whole, split_memory = PartitionSpec(), Memory(sharding.split_spec(1), PartitionSpec())  # pyright: ignore[reportArgumentType]
    return jax.shard_map(
        own_gradients,
        mesh=mesh,
        in_specs=(layout.specs, parts, parts, split_memory, whole, whole),
        out_specs=(layout.specs, whole, whole, split_memory),
        # The checker does not see through a loop whose length is known to the device only.
        check_vma=False,
    )


def after_validation(
    cfg: Config, mesh: Mesh, state: TrainState, tokens: int, loss: float
) -> TrainState:
    """The state after a validation with this loss: with dev_perf the learning rate may be lower.

    Validations during warm-up do not count; `tokens` are those seen so far.
    """
    if not state.plateau or tokens < cfg.optim.warmup_tokens:
        return state
    new = plateau.after_validation(cfg, jax.device_get(state.plateau), loss)
    return state._replace(plateau=jax.device_put(new, sharding.repeated(mesh)))


def abstract_batch(cfg: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Inputs of a step, or its targets, as `place_batch` gives them; they take no memory."""
    accumulate, where = cfg.train.accumulate, sharding.split(mesh, axis=1)
    shape = accumulate, cfg.train.batch // accumulate, cfg.model.tgt_len
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=where)


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
