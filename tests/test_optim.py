import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax.config import OptimConfig, TrainConfig
from txl_jax.errors import UserError
from txl_jax.optim import adam, check, clip_by_norm, make_optimizer, make_schedule

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


def run(optimizer, steps: int) -> list[dict[str, np.ndarray]]:
    params = jax.tree.map(jnp.zeros_like, gradients(1)[0])
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    updates = []
    for gradient in gradients(steps):
        new, state = update(gradient, state, params)
        updates.append(jax.tree.map(np.asarray, new))
    return updates


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


def test_the_config_chooses_the_optimizer():
    cfg = OptimConfig(optim="adam", beta1=0.8, beta2=0.95, eps=1e-2)
    for left, right in zip(
        run(make_optimizer(cfg), 5), float64_adam(0.8, 0.95, 1e-2, 5), strict=True
    ):
        np.testing.assert_allclose(left["w"], right["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_momentum(momentum):
    velocity = {"w": 0.0, "b": 0.0}
    got = run(make_optimizer(OptimConfig(optim="sgd", momentum=momentum)), 20)
    for update, gradient in zip(got, gradients(20), strict=True):
        for name, entries in gradient.items():
            velocity[name] = momentum * velocity[name] + entries.astype(np.float64)
            scale = abs(entries).max()
            np.testing.assert_allclose(update[name], -velocity[name], rtol=1e-5, atol=1e-5 * scale)


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
    ],
)
def test_schedules_without_warmup(scheduler, tokens, fraction):
    assert rate(tokens, scheduler=scheduler) == pytest.approx(0.5 * fraction, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "inv_sqrt"])
def test_warmup_rises_in_a_line_and_peaks_with_its_last_step(scheduler):
    fields = {"scheduler": scheduler, "warmup_tokens": 1_000}
    for step in range(10):
        expected = 0.5 * (step + 1) / 10
        assert rate(step * STEP_TOKENS, **fields) == pytest.approx(expected, rel=1e-5)
    after = {
        "cosine": 0.25 * (1 + math.cos(math.pi / 10)),
        "constant": 0.5,
        "inv_sqrt": 0.5 * math.sqrt(10 / 11),
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


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "inv_sqrt"])
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


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"lr": 0.0}, ["lr is 0.0", "above 0"]),
        ({"lr": -1e-3}, ["lr is -0.001", "above 0"]),
        *(
            ({name: -1}, [f"{name} is -1", "0 (off) or more"])
            for name in ("lr_batch", "warmup_tokens", "clip")
        ),
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
        check(dataclasses.replace(OptimConfig(), **changed))
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
    ],
)
def test_configs_at_the_edge_pass(changed):
    check(dataclasses.replace(OptimConfig(), **changed))
