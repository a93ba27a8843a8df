"""How well a trained model predicts a whole text: `python -m txl_jax.evaluate --logdir DIR`.

Every token but the first is predicted once, with the memory that it has if the text is read from
its beginning to its end, whatever the batch and the number of devices. --sweep shows what memory is
worth; --preset takes the settings of the paper.
"""

from txl_jax.config import parse_words
from txl_jax.errors import run_command
from txl_jax.evaluate_arguments import Arguments


def main(words: list[str]) -> None:
    args = parse_words(Arguments, None, "python -m txl_jax.evaluate", __doc__ or "", words)
    args.check()
    from txl_jax import evaluation  # JAX takes a second, and --help needs none of it

    evaluation.run(args)


if __name__ == "__main__":
    run_command(main)
