"""Training: `python -m txl_jax.train --local [--config NAME] [--FIELD VALUE …]`."""

from txl_jax import config
from txl_jax.config import TrainCommand
from txl_jax.errors import run_command


def main(words: list[str]) -> int:
    command = config.parse("python -m txl_jax.train", words, TrainCommand)
    from txl_jax import training  # JAX takes a second, and --help needs none of it

    return training.run(command, words)


if __name__ == "__main__":
    run_command(main)
