"""Text from a trained model: `python -m txl_jax.generate --logdir DIR --prompt "def main("`."""

from txl_jax.config import parse_words
from txl_jax.errors import run_command
from txl_jax.generate_arguments import Arguments


def main(words: list[str]) -> None:
    args = parse_words(Arguments, None, "python -m txl_jax.generate", __doc__ or "", words)
    args.check()
    from txl_jax import generation  # JAX takes a second, and --help needs none of it

    generation.run(args)


if __name__ == "__main__":
    run_command(main)
