import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from txl_jax.checks import check_optim
from txl_jax.config import Config, OptimConfig, TrainConfig
from txl_jax.errors import UserError
from txl_jax.optim import adam, clip, clip_by_norm, make_optimizer, make_schedule

TRAIN = TrainConfig(batch=64, max_tokens=10_000)
STEP_TOKENS = 100


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    """Of very different sizes, as a model's are."""
    rng = np.random.default_rng(0)
    sizes = {"w": 10.0 ** rng.uniform(-4, 2, (5, 7)), "b": 10.0 ** rng.uniform(-4, 2, 3)}
    return [
        {
            name: (size * rng.standard_normal(size.shape)).astype(np.float32)
            for name, size in sizes.items()
        }
        for _ in range(steps)
    ]


def float64_adam(beta1, beta2, eps, steps) -> list[dict[str, np.ndarray]]:
    """Updates for a rate of 1 (Kingma and Ba 2015, algorithm 1)."""
    updates = []
    m, v = {"w": 0.0, "b": 0.0}, {"w": 0.0, "b": 0.0}
    for t, gradient in enumerate(gradients(steps), start=1):
        update = {}
        for name, entries in gradient.items():
            g = entries.astype(np.float64)
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            update[name] = -(m[name] / (1 - beta1**t)) / (np.sqrt(v[name] / (1 - beta2**t)) + eps)
        updates.append(update)
    return updates


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal(entries.shape).astype(np.float32)
        for name, entries in gradients(1)[0].items()
    }


def run(optimizer, steps: int) -> list[dict[str, np.ndarray]]:
    """Updates for a rate of 1, of weights that stay as they are."""
    state, update = optimizer.init(weights()), jax.jit(optimizer.update)
    updates = []
    for gradient in gradients(steps):
        new, state = update(gradient, state, weights())
        updates.append(jax.tree.map(np.asarray, new))
    return updates


def configured(**fields):
    return make_optimizer(Config(optim=OptimConfig(**fields)))


@pytest.mark.parametrize(
    "beta1, beta2, eps", [(0.9, 0.999, 1e-8), (0.95, 0.98, 1e-3), (0.0, 0.9, 1e-8)]
)
def test_adam_is_the_algorithm_in_float64(beta1, beta2, eps):
    expected = float64_adam(beta1, beta2, eps, 100)
    got = run(adam(beta1, beta2, eps), 100)
    for name in ("w", "b"):
        left, right = (
            np.stack([update[name] for update in updates]) for updates in (got, expected)
        )
        # A mean of gradients that cancel is as exact as they are large.
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        drift = left.sum(0, dtype=np.float64) - right.sum(0)
        assert (abs(drift) < 1e-6 * abs(right).sum(0)).all()


def test_the_first_updates_of_adam_are_exact_to_rounding():
    expected = float64_adam(0.9, 0.999, 1e-8, 3)
    got = run(adam(0.9, 0.999, 1e-8), 3)
    for name in ("w", "b"):
        # A first update is the gradient's sign but for eps.
        np.testing.assert_allclose(got[0][name], expected[0][name], rtol=1e-6)
        for left, right in zip(got[1:], expected[1:], strict=True):
            np.testing.assert_allclose(left[name], right[name], rtol=1e-6, atol=1e-7)


def test_adam_without_decay_of_the_square_divides_by_the_gradient():
    updates = run(adam(0.0, 0.0, 1e-12), 2)
    for update, gradient in zip(updates, gradients(2), strict=True):
        np.testing.assert_allclose(update["w"], -np.sign(gradient["w"]), rtol=1e-6)


def test_adam_moves_nothing_without_a_gradient():
    weight = jnp.zeros(3)
    optimizer = adam(0.9, 0.999, 1e-8)
    update, _ = optimizer.update(weight, optimizer.init(weight), weight)
    np.testing.assert_array_equal(np.asarray(update), 0.0)


DECAY = 0.03


def torch_updates(name: str, decay: float, momentum: float = 0.0) -> list[dict[str, np.ndarray]]:
    """What torch.optim of this name adds to the weights for a rate of 1, in float64.

    Written from PyTorch's documentation, with its default betas and eps.
    """
    m, v = ({key: np.zeros(w.shape) for key, w in weights().items()} for _ in range(2))
    updates = []
    for t, gradient in enumerate(gradients(20), start=1):
        update = {}
        for key, entries in gradient.items():
            w, g = weights()[key].astype(np.float64), entries.astype(np.float64)
            if name != "adamw":
                g = g + decay * w
            if name == "sgd":
                m[key] = momentum * m[key] + g
                update[key] = -m[key]
            elif name == "adagrad":
                v[key] += g**2
                update[key] = -g / (np.sqrt(v[key]) + 1e-10)
            else:
                m[key] = 0.9 * m[key] + 0.1 * g
                v[key] = 0.999 * v[key] + 0.001 * g**2
                mean, square = m[key] / (1 - 0.9**t), v[key] / (1 - 0.999**t)
                update[key] = -mean / (np.sqrt(square) + 1e-8)
                if name == "adamw":
                    update[key] = update[key] - decay * w
        updates.append(update)
    return updates


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad"])
def test_adaptive_optimizers_are_pytorchs(name, decay):
    got = run(configured(optim=name, weight_decay=decay), 20)
    for left, right in zip(got, torch_updates(name, decay), strict=True):
        for key, expected in right.items():
            np.testing.assert_allclose(left[key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_weight_decay_is_felt(name):
    plain, decayed = torch_updates(name, 0.0), torch_updates(name, DECAY)
    assert max(abs(plain[3]["w"] - decayed[3]["w"]).ravel()) > 1e-2


def test_the_config_sets_betas_and_eps():
    fields = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-2}
    expected = float64_adam(0.8, 0.95, 1e-2, 5)
    for left, right in zip(run(configured(optim="adam", **fields), 5), expected, strict=True):
        np.testing.assert_allclose(left["w"], right["w"], rtol=1e-5, atol=1e-6)
    (update, *_) = run(configured(optim="adagrad", eps=3.0), 1)
    g = gradients(1)[0]["w"]
    np.testing.assert_allclose(update["w"], -g / (abs(g) + 3), rtol=1e-6)


def test_adagrad_moves_nothing_without_a_gradient():
    optimizer, weight = configured(optim="adagrad"), jnp.ones(3)
    update, _ = optimizer.update(jnp.zeros(3), optimizer.init(weight), weight)
    np.testing.assert_array_equal(np.asarray(update), 0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_sgd_with_momentum(momentum, decay):
    got = run(configured(optim="sgd", momentum=momentum, weight_decay=decay), 20)
    for left, right in zip(got, torch_updates("sgd", decay, momentum), strict=True):
        for key, expected in right.items():
            scale = abs(gradients(20)[0][key]).max()
            np.testing.assert_allclose(left[key], expected, rtol=1e-5, atol=1e-5 * scale)


@functools.cache
def schedule(**fields):
    cfg = OptimConfig(**{"lr": 0.5, **fields})
    return jax.jit(make_schedule(cfg, TRAIN, STEP_TOKENS))


def rate(tokens: float, **fields) -> float:
    result = schedule(**fields)(jnp.float32(tokens))
    assert result.dtype == jnp.float32 and result.shape == ()
    return float(result)


@pytest.mark.parametrize(
    "scheduler, tokens, fraction",
    [
        ("constant", 0, 1.0),
        ("constant", 5_000, 1.0),
        ("constant", 99_999, 1.0),
        ("cosine", 0, 1.0),
        ("cosine", 2_500, 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 5_000, 0.5),
        ("cosine", 10_000, 0.0),
        ("cosine", 12_345, 0.0),
        ("inv_sqrt", 0, 1.0),
        ("inv_sqrt", 300, 0.5),
        ("inv_sqrt", 9_900, 0.1),
        ("inv_sqrt", 39_900, 0.05),
        ("dev_perf", 0, 1.0),
        ("dev_perf", 99_999, 1.0),
    ],
)
def test_schedules_without_warmup(scheduler, tokens, fraction):
    assert rate(tokens, scheduler=scheduler) == pytest.approx(0.5 * fraction, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "inv_sqrt", "dev_perf"])
def test_warmup_rises_in_a_line_and_peaks_with_its_last_step(scheduler):
    fields = {"scheduler": scheduler, "warmup_tokens": 1_000}
    for step in range(10):
        expected = 0.5 * (step + 1) / 10
        assert rate(step * STEP_TOKENS, **fields) == pytest.approx(expected, rel=1e-5)
    after = {
        "cosine": 0.25 * (1 + math.cos(math.pi / 10)),
        "constant": 0.5,
        "inv_sqrt": 0.5 * math.sqrt(10 / 11),
        "dev_perf": 0.5,
    }
    assert rate(1_000, **fields) == pytest.approx(after[scheduler], rel=1e-5)


def test_a_warmup_that_ends_within_a_step_does_not_overshoot():
    # The third step sees tokens 200 … 300; it completes the warm-up.
    assert rate(100, scheduler="constant", warmup_tokens=250) == pytest.approx(0.5 * 200 / 250)
    assert rate(200, scheduler="constant", warmup_tokens=250) == pytest.approx(0.5)


def test_inverse_square_root_counts_from_the_start_of_the_run():
    fields = {"scheduler": "inv_sqrt", "warmup_tokens": 1_000}
    assert rate(3_900, **fields) == pytest.approx(0.5 * 0.5, rel=1e-5)


def test_cosine_ends_at_its_final_fraction():
    fields = {"scheduler": "cosine", "final_lr": 0.1}
    assert rate(0, **fields) == pytest.approx(0.5)
    assert rate(5_000, **fields) == pytest.approx(0.5 * 0.55)
    for tokens in (10_000, 20_000):
        assert rate(tokens, **fields) == pytest.approx(0.05)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "inv_sqrt", "dev_perf"])
@pytest.mark.parametrize("lr_batch, factor", [(0, 1.0), (32, 2.0), (128, 0.5)])
def test_the_rate_scales_with_the_batch(scheduler, lr_batch, factor):
    for tokens in (0, 700):
        plain = rate(tokens, scheduler=scheduler, warmup_tokens=500)
        scaled = rate(tokens, scheduler=scheduler, warmup_tokens=500, lr_batch=lr_batch)
        assert scaled == pytest.approx(factor * plain)


def test_clipping():
    tree = {"w": jnp.asarray([3.0, 0.0]), "b": jnp.asarray(4.0)}
    norm = jnp.float32(5.0)
    clipped = clip_by_norm(tree, norm, 0.25)
    np.testing.assert_allclose(clipped["w"], [3 * 0.25 / (5 + 1e-6), 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], 4 * 0.25 / (5 + 1e-6), rtol=1e-6)
    for limit in (0.0, 5.1, 100.0):
        jax.tree.map(np.testing.assert_array_equal, clip_by_norm(tree, norm, limit), tree)


def test_clipping_a_norm_at_the_limit_as_torch_does():
    tiny = {"w": jnp.asarray([1e-6])}
    np.testing.assert_allclose(clip_by_norm(tiny, jnp.float32(1e-6), 1e-6)["w"], 0.5e-6, rtol=1e-5)


def test_clipping_what_is_not_embedding():
    model = {
        "embedding": {"tables": {0: jnp.asarray([100.0])}},
        "output": {"biases": {0: jnp.asarray([100.0])}},
        "layers": {"w": jnp.asarray([3.0])},
        "r_w_bias": jnp.asarray([4.0]),
    }
    cfg = OptimConfig(clip=1.0, clip_nonemb=True)
    clipped = clip(cfg, model, optax.tree.norm(model))
    assert jax.tree.structure(clipped) == jax.tree.structure(model)
    assert [float(leaf[0]) for leaf in jax.tree.leaves(clipped)] == pytest.approx(
        [100.0, 0.6, 100.0, 0.8], rel=1e-5
    )
    for other in (OptimConfig(clip=1.0), OptimConfig(clip=0.0, clip_nonemb=True)):
        whole = clip(other, model, optax.tree.norm(model))
        jax.tree.map(
            np.testing.assert_array_equal,
            whole,
            clip_by_norm(model, optax.tree.norm(model), other.clip),
        )


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"lr": 0.0}, ["lr is 0.0", "above 0"]),
        ({"lr": -1e-3}, ["lr is -0.001", "above 0"]),
        *(
            ({name: -1}, [f"{name} is -1", "0 (off) or more"])
            for name in ("lr_batch", "warmup_tokens", "clip", "weight_decay")
        ),
        *(
            ({name: -1}, [f"{name} is -1", "has to be 0 or more"])
            for name in ("patience", "lr_min")
        ),
        *(({"decay_rate": value}, [f"decay_rate is {value}"]) for value in (0.0, 1.0, -0.5)),
        *(({"eps": value}, [f"eps is {value}", "above 0"]) for value in (0.0, -1e-8)),
        *(
            ({name: value}, [f"{name} is {value}", "[0, 1)"])
            for name in ("beta1", "beta2", "momentum")
            for value in (-0.1, 1.0)
        ),
        *(({"final_lr": value}, [f"final_lr is {value}", "[0, 1]"]) for value in (-0.1, 1.1)),
    ],
)
def test_a_config_that_cannot_work_is_one_line(changed, words):
    with pytest.raises(UserError) as raised:
        check_optim(dataclasses.replace(OptimConfig(), **changed))
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lr_batch": 0, "warmup_tokens": 0, "clip": 0.0},
        {"beta1": 0.0, "beta2": 0.0, "momentum": 0.0, "final_lr": 0.0},
        {"final_lr": 1.0},
        {"weight_decay": 0.0, "patience": 0, "lr_min": 0.0, "eps": None, "decay_rate": 0.99},
    ],
)
def test_configs_at_the_edge_pass(changed):
    check_optim(dataclasses.replace(OptimConfig(), **changed))
