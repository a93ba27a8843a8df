import pytest

from txl_jax import known_sizes
from txl_jax.errors import UserError

WIKITEXT = {"train": 103_227_021, "valid": 217_646, "test": 245_569}


def test_the_right_sizes_and_what_is_not_known_pass():
    known_sizes.check("wikitext-103", "words", WIKITEXT, 267_735)
    known_sizes.check("wikitext-103", "bytes", dict.fromkeys(WIKITEXT, 1), 3)
    known_sizes.check("ptb-char", "bytes", {"train": 1, "valid": 393_042, "test": 442_423}, 50)
    known_sizes.check("text", "words", dict.fromkeys(WIKITEXT, 1), 3)
    known_sizes.check("text8", "bytes", dict.fromkeys(WIKITEXT, 1), 27)


@pytest.mark.parametrize(
    ("sizes", "vocab_size", "says"),
    [
        (WIKITEXT | {"test": 245_568}, 267_735, "it has 245,568 test tokens instead of 245,569;"),
        (WIKITEXT, 267_736, "it has 267,736 tokens in its vocabulary instead of 267,735;"),
        (
            *({"train": 2_088_628, "valid": 217_646, "test": 245_569}, 33_278),
            "this is not wikitext-103: it has 2,088,628 train tokens instead of 103,227,021, "
            "33,278 tokens in its vocabulary instead of 267,735; remove its folder",
        ),
    ],
)
def test_other_sizes_are_one_line(sizes, vocab_size, says):
    with pytest.raises(UserError) as caught:
        known_sizes.check("wikitext-103", "words", sizes, vocab_size)
    assert says in str(caught.value) and "\n" not in str(caught.value)
