"""Text from a trained model: `python -m txl_jax.generate --logdir DIR --prompt "def main("`."""

import codecs
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from txl_jax import compilation_cache, sharding
from txl_jax.beam import Beam, BeamSearch
from txl_jax.config import parse_words
from txl_jax.errors import UserError, run_command
from txl_jax.generator import TOKENS_AT_ONCE, Drawn, Generator
from txl_jax.sampling import Sampling
from txl_jax.stops import StopStrings
from txl_jax.texts import Sample, drawn_results, found_results
from txl_jax.trained import load_trained


@dataclass(frozen=True)
class Arguments:
    """What to write."""

    logdir: str
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; empty: start a document."""
    prompt_file: str = ""
    """File whose whole text is continued, its last newline too; -: standard input."""
    tokens: int = 200
    """How many tokens to write."""
    samples: int = 1
    """How many texts to write, each drawn on its own."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text ends before this string; may be given several times."""
    json: bool = False
    """Print each text as one line of JSON, without the prompt."""
    checkpoint: Literal["best", "latest"] = "best"
    """The step with the lowest validation loss, or the newest."""
    mem_len: int | None = None
    """Hidden states that are remembered for each layer; None: as in training."""
    seed: int = 0
    """The same seed writes the same text."""
    sampling: Sampling = field(default_factory=Sampling)
    search: Beam = field(default_factory=Beam)

    def check(self) -> None:
        """Raises UserError, in one line, for the first field that cannot work."""
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt-file both give a prompt; leave one of them out")
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        self.sampling.check()
        self.search.check()
        if self.search.beam:
            drawing = [("samples", self.samples, 1)] + [
                (name, value, getattr(Sampling(), name))
                for name, value in dataclasses.asdict(self.sampling).items()
            ]
            for name, value, default in drawing:
                if value != default:
                    raise UserError(
                        f"{name} is {value}, which is for drawing samples, and beam search draws "
                        "none; leave it or --beam out"
                    )

    def read_prompt(self) -> bytes:
        """The text to continue; UserError where its file cannot be read."""
        if not self.prompt_file:
            return os.fsencode(self.prompt)
        if self.prompt_file == "-":
            return sys.stdin.buffer.read()
        try:
            return Path(self.prompt_file).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the prompt from {self.prompt_file}: {error.strerror}"
            ) from None


def stream(prompt: bytes, sample: Sample, parts: Iterator[Drawn]) -> None:
    """Prints the prompt and what follows it as soon as it is there."""
    utf8, printed = codecs.getincrementaldecoder("utf-8")("replace"), 0
    # A prompt may end inside a character, which the first tokens then complete.
    print(utf8.decode(prompt), end="", flush=True)
    for drawn in parts:
        sample.add(drawn.tokens[0], drawn.log_probs[0])
        print(utf8.decode(sample.shown[printed:]), end="", flush=True)
        printed = len(sample.shown)
        if sample.reason:
            break
    sample.end()
    print(utf8.decode(sample.shown[printed:], final=True))


class Clock:
    """Tokens per second, from the moment when the first are there: they waited for compilation."""

    def __init__(self) -> None:
        self._started, self._first, self._tokens = 0.0, 0, 0

    def timed(self, parts: Iterator[Drawn]) -> Iterator[Drawn]:
        """The same parts, counted."""
        for drawn in parts:
            if not self._tokens:
                self._started, self._first = time.perf_counter(), drawn.tokens.size
            self._tokens += drawn.tokens.size
            yield drawn

    def report(self) -> None:
        """Prints how many there were and how fast they came, if more than the first did."""
        if self._tokens > self._first:
            rate = (self._tokens - self._first) / (time.perf_counter() - self._started)
            print(f"{self._tokens} tokens, {rate:.0f} tokens/s", file=sys.stderr)


def main(words: list[str]) -> None:
    args = parse_words(Arguments, None, "python -m txl_jax.generate", __doc__ or "", words)
    args.check()
    stops = StopStrings([os.fsencode(string) for string in args.stop])
    prompt = args.read_prompt()
    compilation_cache.keep_programs()
    mesh = sharding.make_mesh()
    trained = load_trained(args.logdir, args.checkpoint, mesh)
    params, vocab, cfg = trained.params, trained.vocab, trained.cfg.model
    if args.mem_len is not None:
        cfg = dataclasses.replace(cfg, mem_len=args.mem_len)
    context = vocab.encode(prompt)
    if not context.size:
        context = vocab.start
    streaming = args.samples == 1 and not args.json
    clock = Clock()

    def drawn() -> Iterator[Drawn]:
        at_once = 1 if streaming else TOKENS_AT_ONCE
        generator = Generator(cfg, mesh, args.sampling, args.samples, at_once)
        return clock.timed(generator(params, context, args.seed, args.tokens))

    if args.search.beam:
        search = BeamSearch(cfg, mesh, args.search, stops.table(vocab))
        found = found_results(search(params, context, args.tokens), vocab, stops)
    elif streaming:
        stream(prompt, Sample(vocab, stops), drawn())
        found = iter(())
    else:
        samples = [Sample(vocab, stops) for _ in range(args.samples)]
        found = drawn_results(samples, drawn())
    for result in found:
        print(result.json() if args.json else result.show(prompt), flush=True)
    clock.report()


if __name__ == "__main__":
    run_command(main)
