"""LAMB against the fork's trajectory, and on whole models against one in NumPy."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from txl_jax import lamb, optim
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.lamb import Tensor
from txl_jax.model import Memory, abstract
from txl_jax.original_tensors import sources
from txl_jax.step import Totals, TrainState, make_train_step, place_batch, state_shardings

QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options: these tests compile for much longer than they compute."""

TRAJECTORY = Path(__file__).parent / "reference" / "lamb_trajectory.npz"

UNTIED_R = ModelConfig(
    n_token=40,
    n_layer=3,
    n_head=2,
    d_model=8,
    d_head=4,
    d_inner=12,
    tgt_len=4,
    mem_len=4,
    cutoffs=(10, 25),
    untie_r=True,
)
DIV_4 = dataclasses.replace(UNTIED_R, untie_r=False, div_val=4, d_embed=16, tie_weight=False)
PROJECTED = dataclasses.replace(UNTIED_R, untie_r=False, d_embed=6, cutoffs=())
MODELS = {"untied_r": UNTIED_R, "div_val_4": DIV_4, "projected": PROJECTED}


def optimizer(model: ModelConfig, name: Any = "lamb", decay: float = 0.0):
    return optim.make_optimizer(
        Config(model=model, optim=OptimConfig(optim=name, weight_decay=decay))
    )


def each_its_own(tree: Any) -> dict[lamb.Path, Tensor]:
    return {(name,): Tensor(name, stacked=False) for name in tree}


@pytest.mark.parametrize("run, decay", [("wd0", 0.0), ("wd01", 0.01)])
def test_the_forks_trajectory(run, decay):
    with np.load(TRAJECTORY) as arrays:
        stored = dict(arrays)
    settings = json.loads(str(stored["config"]))
    names = [key.removeprefix("init/") for key in stored if key.startswith("init/")]
    assert len(names) == 7
    params: dict[str, Any] = {name: jnp.asarray(stored[f"init/{name}"]) for name in names}
    beta1, beta2 = settings["betas"]
    chain = optax.chain(
        optim.adam(beta1, beta2, settings["eps"], unbiased=False),
        optax.add_decayed_weights(-decay),
        lamb.scale_by_trust_ratio(each_its_own(names), lamb.forks_ratio),
    )
    state: Any = chain.init(params)
    for step in range(1, settings["steps"] + 1):
        gradient = {name: jnp.asarray(stored[f"grad{step - 1}/{name}"]) for name in names}
        updates: Any
        updates, state = chain.update(gradient, state, params)
        params = {name: params[name] + settings["lr"] * updates[name] for name in names}
        for name in names:
            expected = stored[f"{run}/step{step}/{name}"]
            if name == "zero_grad" and not decay:
                assert np.isnan(expected).all()
                expected = stored[f"init/{name}"]
            np.testing.assert_allclose(params[name], expected, rtol=2e-6, atol=1e-8, err_msg=name)
    np.testing.assert_array_equal(params["zero_bias"], 0.0)


def test_optax_lamb_is_the_librarys_where_every_leaf_is_a_tensor():
    rng = np.random.default_rng(0)
    params = {
        "matrix": jnp.asarray(9 * rng.standard_normal((5, 7)), jnp.float32),
        "zero": jnp.zeros(4),
        "no_gradient": jnp.ones(3),
    }
    mine = optax.chain(
        optim.adam(0.8, 0.95, 1e-4),
        optax.add_decayed_weights(-0.1),
        lamb.scale_by_trust_ratio(each_its_own(params), lamb.librarys_ratio),
    )
    library = optax.lamb(1.0, 0.8, 0.95, 1e-4, weight_decay=0.1)
    states = [mine.init(params), library.init(params)]
    for _ in range(3):
        gradient = {
            name: jnp.asarray(rng.standard_normal(leaf.shape) * (name != "no_gradient"), "float32")
            for name, leaf in params.items()
        }
        new, states[0] = jax.jit(mine.update)(gradient, states[0], params)
        with jax.numpy_dtype_promotion("standard"):
            expected, states[1] = jax.jit(library.update)(gradient, states[1], params)
        # The library corrects the means' bias with less precision.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5), new, expected)
        params = jax.tree.map(lambda p, u: p + jnp.float32(0.1) * u, params, new)


def original_tensors(cfg: ModelConfig, seed: int, size: float) -> dict[str, np.ndarray]:
    """Random tensors in the original's layout, of very different norms, some beyond 10."""
    rng = np.random.default_rng(seed)
    shapes = {name: source.shape for _, source in sources(cfg) for name in source.names}
    return {
        name: size * 10.0 ** rng.uniform(-2, 1) * rng.standard_normal(shape)
        for name, shape in shapes.items()
    }


def as_ours(cfg: ModelConfig, tensors: dict[str, np.ndarray]) -> Any:
    params: Any = {}
    for path, source in sources(cfg):
        parts = [source.convert(tensors[name]).astype(np.float32) for name in source.names]
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(np.stack(parts) if source.stacked else parts[0])
    _, shapes = abstract(cfg)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    return params


class SlowLamb:
    """LAMB over the original's tensors, one after another, in float64."""

    def __init__(self, name: str, decay: float):
        self.library, self.decay, self.count = name == "optax_lamb", decay, 0
        self.means: dict[str, Any] = {}

    def update(self, gradients, weights):
        self.count += 1
        updates = {}
        for name, g in gradients.items():
            m, v = self.means.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.means[name] = m, v
            if self.library:
                m, v = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
            step = m / (np.sqrt(v) + 1e-6) + self.decay * weights[name]
            norm, own = (math.sqrt((x**2).sum()) for x in (weights[name], step))
            if self.library:
                ratio = norm / own if norm and own else 1.0
            else:
                ratio = min(norm, 10.0) / own if own else 0.0
            updates[name] = -ratio * step
        return updates


@pytest.mark.parametrize("name, decay", [("lamb", 0.0), ("lamb", 0.05), ("optax_lamb", 0.05)])
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_norms_are_those_of_the_originals_tensors(cfg, name, decay):
    theirs = original_tensors(cfg, 0, 1.0)
    norms = [np.linalg.norm(tensor) for tensor in theirs.values()]
    assert min(norms) < 1 < 10 < max(norms)
    slow, ours = SlowLamb(name, decay), optimizer(cfg, name, decay)
    params = as_ours(cfg, theirs)
    state, update = ours.init(params), jax.jit(ours.update, compiler_options=QUICKLY)
    for step in range(3):
        gradients = original_tensors(cfg, 1 + step, 1e-3)
        updates, state = update(as_ours(cfg, gradients), state, params)
        expected = slow.update(gradients, theirs)

        def close(path, got, right):
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-6, err_msg=str(path))

        jax.tree_util.tree_map_with_path(close, updates, as_ours(cfg, expected))
        params = jax.tree.map(lambda p, u: p + 0.1 * u, params, updates)
        theirs = {key: theirs[key] + 0.1 * expected[key] for key in theirs}


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_every_tensor_has_one_name(cfg):
    """Leaves that share a tensor share all of them: a norm is never of half a tensor."""
    names: set[Any] = {tensor.name for tensor in lamb.tensors(cfg).values()}
    single = [name for group in names for name in group]
    assert len(single) == len(set(single))
    assert sum(tensor.stacked for tensor in lamb.tensors(cfg).values()) >= 12


def test_a_layer_without_a_gradient_stays_and_the_others_do_not_mind():
    cfg = dataclasses.replace(UNTIED_R, cutoffs=())
    params = as_ours(cfg, original_tensors(cfg, 0, 1.0))
    gradient = as_ours(cfg, original_tensors(cfg, 1, 1.0))
    layers = jax.tree.map(lambda leaf: leaf.at[1].set(0.0), gradient["layers"])
    ours = optimizer(cfg)
    update = jax.jit(lambda g: ours.update(g, ours.init(params), params)[0])
    whole: Any = update(gradient)
    part: Any = update(gradient | {"layers": layers})
    for left, right in zip(*map(jax.tree.leaves, (part["layers"], whole["layers"])), strict=True):
        np.testing.assert_array_equal(left[1], 0.0)
        np.testing.assert_array_equal(left[0], right[0])
        assert np.abs(right[1]).max() > 0


def test_the_train_step_uses_it():
    cfg = Config(
        model=dataclasses.replace(UNTIED_R, n_layer=2, cutoffs=()),
        optim=OptimConfig(optim="lamb", lr=0.1, scheduler="constant", clip=0.0, weight_decay=0.01),
        train=TrainConfig(batch=2, max_tokens=10_000),
    )
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    rows = np.random.default_rng(0).integers(0, 40, (2, 2, 4), dtype=np.int32)
    batch = place_batch(cfg, mesh, (rows[0], rows[1]))
    theirs = original_tensors(cfg.model, 0, 0.1)
    params = as_ours(cfg.model, theirs)
    memory = Memory.empty(cfg.model, 2)
    state = TrainState(
        jnp.int32(0),
        params,
        optim.make_optimizer(cfg).init(params),
        memory,
        jax.random.key(0),
        Totals.zero(),
    )
    graphdef, _ = abstract(cfg.model)

    def loss(params):
        return nnx.merge(graphdef, params)(*rows, memory)[0].mean()

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICKLY)(params)
    step: Any = make_train_step(cfg, mesh, 9)
    state = jax.device_put(state, state_shardings(cfg, mesh))
    state, _ = step.lower(state, *batch).compile(compiler_options=QUICKLY)(state, *batch)
    back: dict[str, np.ndarray] = {}
    for path, source in sources(cfg.model):
        leaf = gradient
        for key in path:
            leaf = leaf[key]
        places = source.convert(np.arange(math.prod(source.shape)).reshape(source.shape))
        for name, own in zip(source.names, leaf if source.stacked else [leaf], strict=True):
            back.setdefault(name, np.zeros(source.shape)).reshape(-1)[places] = own
    expected = SlowLamb("lamb", 0.01).update(back, theirs)
    moved = {name: theirs[name] + 0.1 * expected[name] for name in theirs}
    jax.tree.map(
        lambda got, right: np.testing.assert_allclose(got, right, rtol=1e-4, atol=2e-6),
        state.params,
        as_ours(cfg.model, moved),
    )
