"""How a text is to be continued, as the command line says it: drawn, or searched for."""

from dataclasses import dataclass

from txl_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: repetition first, then temperature, top_k and top_p."""

    temperature: float = 1.0
    """Below 1 sharper, above 1 flatter than the model's; 0: always the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Log-probabilities of recent tokens are multiplied by this (CTRL: 1.2); 1: they are not."""
    no_repeat_ngram: int = 0
    """Never write the same n tokens a second time; 0: they may be."""
    repeat_window: int = 512
    """How many of the newest tokens count as recent for these two, the prompt's included."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first field that cannot work."""
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it has to be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it has to be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it has to be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it has to be above 0 (1: none, "
                "above 1: less repetition)"
            )
        if self.no_repeat_ngram < 0:
            raise UserError(
                f"no_repeat_ngram is {self.no_repeat_ngram}; it has to be 0 (no limit) or more"
            )
        if self.repeat_window < max(1, self.no_repeat_ngram):
            raise UserError(
                f"repeat_window is {self.repeat_window}; it has to be at least "
                f"{max(1, self.no_repeat_ngram)}, so that what it looks for fits into it"
            )

    @property
    def remembered(self) -> int:
        """How many of the newest tokens `discourage` has to be given."""
        controlled = self.repetition_penalty != 1 or self.no_repeat_ngram
        return self.repeat_window if controlled else 0


@dataclass(frozen=True)
class Beam:
    """How wide a search is, and how different what it finds has to be."""

    beam: int = 0
    """Search for the likeliest text with this many hypotheses K at a time; 0: draw samples."""
    groups: int = 1
    """Groups into which the hypotheses are divided; a group avoids the tokens of those before."""
    diversity: float = 0.5
    """What a token costs a group, in nats, for each hypothesis of earlier groups that has it."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first field that cannot work."""
        if self.beam < 0:
            raise UserError(f"beam is {self.beam}; it has to be 0 (draw samples) or more")
        if self.groups < 1:
            raise UserError(f"groups is {self.groups}; it has to be at least 1")
        if self.groups > 1 and not self.beam:
            raise UserError("groups divide a beam, and there is none; add --beam")
        if self.beam % self.groups:
            raise UserError(
                f"beam is {self.beam}, which {self.groups} groups cannot divide; use a multiple of "
                f"{self.groups}"
            )
        if self.diversity < 0:
            raise UserError(f"diversity is {self.diversity}; it has to be 0 or more")
