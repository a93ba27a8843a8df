import pytest

from txl_jax import known_sizes
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError

WIKITEXT = {"train": 103_227_021, "valid": 217_646, "test": 245_569}


def test_the_right_sizes_and_what_is_not_known_pass():
    known_sizes.check("wikitext-103", "words", WIKITEXT, 267_735)
    known_sizes.check("wikitext-103", "bytes", dict.fromkeys(WIKITEXT, 1), 3)
    known_sizes.check("ptb-char", "bytes", {"train": 1, "valid": 393_042, "test": 442_423}, 50)
    known_sizes.check("text", "words", dict.fromkeys(WIKITEXT, 1), 3)
    known_sizes.check("lm1b", "bytes", dict.fromkeys(WIKITEXT, 1), 27)
    for text8 in ((89_999_999, 5_000_000, 5_000_000), (89_999_998, 4_999_998, 4_999_999)):
        known_sizes.check("text8", "bytes", dict(zip(SPLITS, text8, strict=True)), 27)
    enwik8 = {"train": 88_871_977, "valid": 5_000_000, "test": 5_000_000}
    known_sizes.check("enwik8", "bytes", enwik8, 204)
    ptb = {"train": 5_101_618, "valid": 399_782, "test": 449_945}
    known_sizes.check("ptb", "bytes", ptb, 50)
    known_sizes.check("ptb", "bpe", dict.fromkeys(SPLITS, 1), None)
    for plays in ((1_003_854, 55_770, 55_770), (1_003_855, 55_771, 55_771)):
        known_sizes.check("tiny_shakespeare", "bytes", dict(zip(SPLITS, plays, strict=True)), 65)


@pytest.mark.parametrize(
    ("sizes", "vocab_size", "says"),
    [
        (
            WIKITEXT | {"test": 245_568},
            267_735,
            "it has 245,568 tokens in test instead of 245,569;",
        ),
        (WIKITEXT, 267_736, "it has 267,736 tokens in its vocabulary instead of 267,735;"),
        (
            *({"train": 2_088_628, "valid": 217_646, "test": 245_569}, 33_278),
            "this is not wikitext-103: it has 2,088,628 tokens in train instead of 103,227,021, "
            "33,278 tokens in its vocabulary instead of 267,735; remove its folder",
        ),
    ],
)
def test_other_words_are_one_line(sizes, vocab_size, says):
    with pytest.raises(UserError) as caught:
        known_sizes.check("wikitext-103", "words", sizes, vocab_size)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "sizes", "says"),
    [
        ("enwik8", (90_000_000, 5_000_000, 5_000_000), "100,000,000 tokens in all instead of 98,"),
        (
            *("text8", (90_000_001, 4_999_997, 5_000_000)),
            "it has 90,000,001 tokens in train instead of 89,999,998 to 90,000,000, 4,999,997 "
            "tokens in valid instead of 4,999,998 to 5,000,000; remove",
        ),
        ("ptb", (5_101_618, 399_782, 449_944), "it has 449,944 tokens in test instead of 449,945;"),
        (
            *("tiny_shakespeare", (1_003_854, 55_770, 55_769)),
            "1,115,393 tokens in all instead of 1,115,394 to 1,115,397;",
        ),
    ],
)
def test_other_bytes_are_one_line(dataset, sizes, says):
    with pytest.raises(UserError) as caught:
        known_sizes.check(dataset, "bytes", dict(zip(SPLITS, sizes, strict=True)), None)
    assert says in str(caught.value) and "\n" not in str(caught.value)
