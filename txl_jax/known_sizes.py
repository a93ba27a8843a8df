"""How many tokens the data sets of the original have, so that a wrong text is noticed."""

from txl_jax.errors import UserError

_SIZES = {
    ("wikitext-103", "words"): (
        {"train": 103_227_021, "valid": 217_646, "test": 245_569},
        267_735,
    ),
}


def check(dataset: str, vocab_kind: str, n_tokens: dict[str, int], vocab_size: int) -> None:
    """Raises UserError where a known data set has other numbers of tokens, or of words, than it
    has in the original.
    """
    known = _SIZES.get((dataset, vocab_kind))
    if known is None or known == (n_tokens, vocab_size):
        return
    tokens, size = known
    there, here = (
        ", ".join(f"{count:,} {split}" for split, count in counts.items())
        for counts in (tokens, n_tokens)
    )
    raise UserError(
        f"{dataset} has {there} tokens and {size:,} {vocab_kind}, and this text has {here} and "
        f"{vocab_size:,}: get its files again"
    )
