"""How many tokens the named data sets have, so that another text is not taken for one of them.

Not known are sizes in tokens of byte-pair encoding, the words of lm1b, which come in two valid
splits, and the bytes of WikiText, of which no count was found.
"""

from txl_jax.documents import SPLITS
from txl_jax.errors import UserError

_ALL = "all"
_WORDS = {
    "wikitext-103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
    "wikitext-2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
    "ptb": {"train": 929_589, "valid": 73_760, "test": 82_430},
}
"""Words, with <eos> at the end of each line."""
_BYTES: dict[str, dict[str, int | range]] = {
    # Of 100,000,000 bytes 1,128,023 are newlines, which are left out.
    "enwik8": {_ALL: 98_871_977},
    # prep_text8.py drops a space at the beginning and at the end of each part.
    "text8": {
        "train": range(89_999_998, 90_000_001),
        "valid": range(4_999_998, 5_000_001),
        "test": range(4_999_998, 5_000_001),
    },
    "ptb": {"train": 5_101_618, "valid": 399_782, "test": 449_945},
    "ptb-char": {"valid": 393_042, "test": 442_423},
    # Wherever it is cut: a part that ends within a line has a newline added.
    "tiny_shakespeare": {_ALL: range(1_115_394, 1_115_395 + len(SPLITS))},
}
_VOCABULARY = {
    "words": {"wikitext-103": 267_735, "wikitext-2": 33_278, "ptb": 10_000, "lm1b": 793_470},
    "bytes": {"enwik8": 204, "text8": 27, "ptb-char": 50, "tiny_shakespeare": 65},
}


def check(dataset: str, vocab: str, n_tokens: dict[str, int], vocab_size: int | None) -> None:
    """Raises UserError unless a corpus has the size of the data set whose name it has.

    n_tokens: tokens of each split. vocab_size: None where the vocabulary is not its own. What is
    not known of a data set, or of a kind of vocabulary, is not checked.
    """
    known = {"words": _WORDS, "bytes": _BYTES}.get(vocab, {}).get(dataset, {})
    sizes = n_tokens | {_ALL: sum(n_tokens.values())}
    numbers = {f"tokens in {split}": (sizes[split], size) for split, size in known.items()}
    if vocab_size is not None and (size := _VOCABULARY.get(vocab, {}).get(dataset)):
        numbers["tokens in its vocabulary"] = (vocab_size, size)
    wrong = [
        f"{number:,} {what} instead of {_shown(expected)}"
        for what, (number, expected) in numbers.items()
        if number not in (expected if isinstance(expected, range) else (expected,))
    ]
    if wrong:
        raise UserError(
            f"this is not {dataset}: it has {', '.join(wrong)}; remove its folder so that it is "
            "downloaded again, or train on other text with --dataset text --text-dir DIR"
        )


def _shown(expected: int | range) -> str:
    if isinstance(expected, range):
        return f"{expected[0]:,} to {expected[-1]:,}"
    return f"{expected:,}"
