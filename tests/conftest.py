"""How all tests run: on CPU, with several devices, no silent type promotion, no clock."""

import os
import signal

# In the environment, so that the processes which tests start run on CPU as well.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept where a test says so, and nowhere else: not in the user's home.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")

# Ignored where tests run in the background of a shell, and all processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few words may have the name of a data set whose size is known."""
    monkeypatch.setattr("txl_jax.known_sizes.check", lambda *found: None)
