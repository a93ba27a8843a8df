"""Training on more and more hosts: how fast it was, and how fast it would be.

    python -m txl_jax.scaling RUN …              runs beside one another, and beside the fork's
    python -m txl_jax.scaling predict --config=test_16 [--instance-type p4d.24xlarge]
    python -m txl_jax.scaling check              how far predictions are from published figures

The first prints a table and draws a picture; each RUN is a file that holds lines of --throughput
among others (as `python -m launcher logs NAME` prints them; - is standard input), or the folder of
a run. `predict` needs neither a GPU nor a network; it prints what it assumes. A folder whose name
is a command is written ./predict.
"""

from txl_jax import config
from txl_jax.config import parse_words
from txl_jax.errors import run_command
from txl_jax.scaling_arguments import Arguments, CheckArguments, PredictArguments

_PROG = "python -m txl_jax.scaling"


def main(words: list[str]) -> None:
    if words[:1] == ["predict"]:
        predict(words[1:])
    elif words[:1] == ["check"]:
        check(words[1:])
    else:
        compare(words)


def compare(words: list[str]) -> None:
    args = parse_words(Arguments, None, _PROG, __doc__ or "", words)
    args.check()
    from txl_jax import observed_scaling  # Matplotlib takes a moment, and --help needs none of it

    observed_scaling.run(args)


def predict(words: list[str]) -> None:
    args = config.parse(f"{_PROG} predict", words, PredictArguments)
    args.check()
    from txl_jax import scaling_prediction  # JAX takes a second

    scaling_prediction.run(args)


def check(words: list[str]) -> None:
    from txl_jax import scaling_check

    args = parse_words(CheckArguments, None, f"{_PROG} check", scaling_check.__doc__ or "", words)
    scaling_check.run(args)


if __name__ == "__main__":
    run_command(main)
