"""A learning rate to start with: `python -m txl_jax.lr_finder --local [--config NAME] …`.

The learning rate range test (Smith 2017, arXiv 1506.01186): the config's train step, from the
config's first parameters, at a rate that grows by the same factor in each step, until the loss
diverges. It trains on the config's batches with its optimizer; its --lr, --scheduler and
--warmup-tokens have no say. The run's own folder is not touched.

    lr_finder.png    loss against learning rate, as measured and smoothed
    lr_finder.json   the same points, and what was suggested
"""

from txl_jax import config
from txl_jax.errors import run_command
from txl_jax.lr_finder_arguments import Arguments


def main(words: list[str]) -> None:
    args = config.parse("python -m txl_jax.lr_finder", words, Arguments)
    args.check()
    from txl_jax import range_test  # JAX takes a second, and --help needs none of it

    range_test.run(args)


if __name__ == "__main__":
    run_command(main)
