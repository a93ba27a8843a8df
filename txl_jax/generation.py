"""Text from a trained model, written as `generate.py` was told."""

import codecs
import dataclasses
import os
import sys
import time
from collections.abc import Iterator

from txl_jax import compilation_cache, host_memory, sharding
from txl_jax.beam import BeamSearch
from txl_jax.generate_arguments import Arguments
from txl_jax.generator import TOKENS_AT_ONCE, Drawn, Generator
from txl_jax.stops import StopStrings
from txl_jax.texts import Sample, drawn_results, found_results
from txl_jax.trained import load_trained


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


def run(args: Arguments) -> None:
    """Prints the texts; UserError where there is no model, or a stop string is empty."""
    stops = StopStrings([os.fsencode(string) for string in args.stop])
    prompt = args.read_prompt()
    compilation_cache.keep_programs()
    mesh = sharding.make_mesh()
    host_memory.keep_freed(mesh)
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
