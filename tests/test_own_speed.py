"""The time of a small computation on this process's devices alone."""

from itertools import count

import jax
import numpy as np
import pytest

from txl_jax import own_speed
from txl_jax.own_speed import OwnSpeed


def test_alone_nothing_is_timed():
    assert OwnSpeed(several=False).times() == {}


def test_it_computes_on_every_local_device():
    made = OwnSpeed(several=True)
    assert [operand.devices() for operand in made._operands] == [{d} for d in jax.local_devices()]
    for operand in made._operands:
        done = made._work(operand)
        assert done.devices() == operand.devices()
        np.testing.assert_allclose(np.asarray(done), 1 / len(operand), rtol=1e-5)
    (took,) = made.times().values()
    assert took > 0


def test_the_slowest_device_counts_and_the_quickest_of_three_times(monkeypatch):
    made = OwnSpeed(several=True)
    delays, calls, devices = iter((0.03, 0.01, 0.02)), count(), len(made._operands)

    def work(operand: jax.Array) -> jax.Array:
        if next(calls) % devices == devices - 1:  # the last device alone
            clock[0] += next(delays)
        return operand

    clock = [0.0]
    monkeypatch.setattr(made, "_work", work)
    monkeypatch.setattr(own_speed.time, "perf_counter", lambda: clock[0])
    assert made.times()["times/own"] == pytest.approx(10.0)
    assert next(calls) == 3 * devices


def test_on_gpus_products_are_in_float32():
    matrix = jax.ShapeDtypeStruct((2048, 2048), np.float32)
    lowered = jax.jit(own_speed._chain).trace(matrix).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("precision = [HIGHEST, HIGHEST]") == own_speed._PRODUCTS


def test_products_of_the_operand_do_not_vanish_or_overflow():
    operand = np.full((256, 256), 1 / 256, np.float32)
    result = operand
    for _ in range(own_speed._PRODUCTS):
        result = result @ operand
    np.testing.assert_allclose(result, operand, rtol=1e-4)
