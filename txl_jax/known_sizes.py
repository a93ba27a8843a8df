"""How many tokens the named data sets have, so that another text is not taken for one of them."""

from txl_jax.errors import UserError

_WORDS = {
    "wikitext-103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
    "wikitext-2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
    "ptb": {"train": 929_589, "valid": 73_760, "test": 82_430},
}
"""Words, with <eos> at the end of each line."""
_BYTES = {"ptb-char": {"valid": 393_042, "test": 442_423}}
_VOCABULARY = {
    "words": {"wikitext-103": 267_735, "wikitext-2": 33_278, "ptb": 10_000, "lm1b": 793_470},
    "bytes": {"enwik8": 204, "text8": 27, "ptb-char": 50},
}


def check(dataset: str, vocab: str, n_tokens: dict[str, int], vocab_size: int | None) -> None:
    """Raises UserError unless a corpus has the size of the data set whose name it has.

    n_tokens: tokens of each split. vocab_size: None where the vocabulary is not its own. What is
    not known of a data set, or of a kind of vocabulary, is not checked.
    """
    known = {"words": _WORDS, "bytes": _BYTES}.get(vocab, {}).get(dataset, {})
    found = {split: (n_tokens[split], expected) for split, expected in known.items()}
    numbers = {f"{split} tokens": pair for split, pair in found.items()}
    if vocab_size is not None and (expected := _VOCABULARY.get(vocab, {}).get(dataset)):
        numbers["tokens in its vocabulary"] = (vocab_size, expected)
    wrong = [
        f"{number:,} {what} instead of {expected:,}"
        for what, (number, expected) in numbers.items()
        if number != expected
    ]
    if wrong:
        raise UserError(
            f"this is not {dataset}: it has {', '.join(wrong)}; remove its folder so that it is "
            "downloaded again, or train on other text with --dataset text --text-dir DIR"
        )
