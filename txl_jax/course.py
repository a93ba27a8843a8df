"""How far a run is after each of its steps, also when its batch was another before."""

from dataclasses import dataclass
from typing import Self, TypeVar

_Step = TypeVar("_Step")
"""An int, or a traced int32."""


@dataclass(frozen=True)
class Course:
    """Tokens seen and segments read, for every step from the last change of the batch on.

    A step is an update of the optimizer, whatever its batch, so that steps of one run have numbers
    that only rise. Tokens are counted exactly. Segments are counted as if all had been of today's
    batch: as many as the tokens seen would fill.
    """

    step_tokens: int
    """Tokens of a step."""
    ahead: int = 0
    """Segments read less steps made: 0 where the batch has never been another."""
    rest: int = 0
    """Tokens seen beyond whole segments, 0 … step_tokens - 1. They are read once more."""

    @classmethod
    def after(cls, step_tokens: int, step: int, tokens: int) -> Self:
        """The course of a run that has seen so many tokens in so many steps."""
        segments, rest = divmod(tokens, step_tokens)
        return cls(step_tokens, segments - step, rest)

    def segment(self, step: _Step) -> _Step:
        """The number, over all epochs, of the segment that is read after `step` steps."""
        return step + self.ahead  # pyright: ignore[reportOperatorIssue]

    def tokens(self, step: int) -> int:
        """Tokens seen after `step` steps."""
        return self.segment(step) * self.step_tokens + self.rest

    def steps(self, max_tokens: int) -> int:
        """The first step after which at least `max_tokens` tokens have been seen."""
        return -(-(max_tokens - self.rest) // self.step_tokens) - self.ahead
