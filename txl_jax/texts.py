"""Texts as they are written: what stands in them, why they ended, how they are printed."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from txl_jax.beam import Hypothesis
from txl_jax.generator import Drawn
from txl_jax.stops import StoppedText, StopStrings
from txl_jax.vocab import Vocab


class Sample:
    """A continuation as it grows."""

    def __init__(self, vocab: Vocab, stops: StopStrings):
        self._vocab, self._text = vocab, StoppedText(stops)
        self.tokens: list[int] = []
        """All that were drawn, those of a stop string too."""
        self.log_prob = 0.0
        """Sum of the model's log-probabilities of the tokens."""
        self.shown = bytearray()
        """Its text, as far as it is certain that no stop string begins in it."""
        self.reason: Literal["stop", "length"] | None = None
        """Why it ended, if it has."""

    def add(self, tokens: Iterable[int], log_probs: Iterable[float]) -> None:
        """Goes on, up to a stop string."""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.reason:
                return
            self.tokens.append(int(token))
            self.log_prob += float(log_prob)
            self.shown += self._text.add(self._vocab.decode([token]))
            if self._text.ended:
                self.reason = "stop"

    def end(self) -> None:
        """There is no more to come."""
        if not self.reason:
            self.shown += self._text.rest()
            self.reason = "length"


def grown(samples: list[Sample], parts: Iterator[Drawn]) -> Iterator[int]:
    """Lets samples grow to their ends, and gives the place of each when it is there."""
    growing = dict(enumerate(samples))
    for drawn in parts:
        for place, sample in list(growing.items()):
            sample.add(drawn.tokens[place], drawn.log_probs[place])
            if sample.reason:
                del growing[place]
                yield place
        if not growing:
            return
    for place, sample in growing.items():
        sample.end()
        yield place


class Result(NamedTuple):
    """A text that was written."""

    heading: str
    """What stands above it on the screen."""
    text: bytes
    """Without the prompt."""
    facts: dict[str, Any]
    """What `--json` says about it besides."""

    def show(self, prompt: bytes) -> str:
        """Heading, prompt and text, for people."""
        text = (prompt + self.text).decode(errors="replace")
        return f"--- {self.heading} ({self.facts['reason']}) ---\n{text}"

    def json(self) -> str:
        """The text and the facts in one line, for programs."""
        return json.dumps(self.facts | {"text": self.text.decode(errors="replace")})


def drawn_results(samples: list[Sample], parts: Iterator[Drawn]) -> Iterator[Result]:
    """Each sample when it has ended."""
    for place in grown(samples, parts):
        sample = samples[place]
        yield Result(
            f"sample {place + 1} of {len(samples)}",
            bytes(sample.shown),
            {
                "sample": place + 1,
                "tokens": sample.tokens,
                "log_prob": sample.log_prob,
                "reason": sample.reason,
            },
        )


def found_results(found: list[Hypothesis], vocab: Vocab, stops: StopStrings) -> Iterator[Result]:
    """Hypotheses as they are shown, each without the stop string that ended it."""
    for number, hypothesis in enumerate(found, 1):
        text = StoppedText(stops)
        shown = text.add(vocab.decode(hypothesis.tokens)) + text.rest()
        yield Result(
            f"hypothesis {number} of {len(found)}, group {hypothesis.group}, "
            f"{hypothesis.score:.4f} for each token",
            shown,
            {"hypothesis": number, "score": hypothesis.score} | dataclasses.asdict(hypothesis),
        )
