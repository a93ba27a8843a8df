import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax.errors import UserError
from txl_jax.stops import ENDED, StoppedText, StopStrings


class Pieces:
    """A vocabulary whose tokens are these texts."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, ids) -> bytes:
        return b"".join(self.pieces[token] for token in ids)


def shown(strings: list[bytes], pieces: list[bytes]) -> tuple[list[bytes], bool]:
    """What is seen after each piece, and in the end; and whether a stop string came."""
    text, seen = StoppedText(StopStrings(strings)), [b""]
    for piece in pieces:
        seen.append(seen[-1] + text.add(piece))
        if text.ended:
            break
    return [*seen[1:], seen[-1] + text.rest()], text.ended


@pytest.mark.parametrize(
    "strings, pieces, expected",
    [
        ([], [b"ab", b"", b"c"], [b"ab", b"ab", b"abc", b"abc"]),
        ([b"x"], [b"ab", b"cxd", b"e"], [b"ab", b"abc", b"abc"]),
        ([b"END"], [b"aE", b"N", b"Db"], [b"a", b"a", b"a", b"a"]),
        ([b"END"], [b"aE", b"NE", b"ND"], [b"a", b"aEN", b"aEN", b"aEN"]),
        ([b"END"], [b"aE", b"N"], [b"a", b"a", b"aEN"]),
        ([b"aab"], [b"a", b"a", b"a", b"b"], [b"", b"", b"a", b"a", b"a"]),
        ([b"abcd", b"bc"], [b"a", b"abcd"], [b"", b"aa", b"aa"]),
        ([b"c", b"abc"], [b"xab", b"c"], [b"x", b"x", b"x"]),
        ([b"\xc3\xa9"], [b"a\xc3\xa9"], [b"a", b"a"]),
        ([b"\xc3\xa9"], [b"a\xc3", b"\xa8"], [b"a", b"a\xc3\xa8", b"a\xc3\xa8"]),
    ],
)
def test_a_text_ends_before_a_stop_string_would_be_shown(strings, pieces, expected):
    assert shown(strings, pieces)[0] == expected


def cut(strings: list[bytes], text: bytes) -> tuple[bytes, bool]:
    """The text before the first stop string, by trying every place."""
    for end in range(len(text) + 1):
        if endings := [s for s in strings if text[:end].endswith(s)]:
            return text[: end - max(map(len, endings))], True
    return text, False


few_letters = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=5).map(b"".join)


@given(
    st.lists(few_letters.filter(bool), max_size=4),
    st.lists(few_letters, max_size=12),
)
def test_it_ends_where_every_place_was_tried_whatever_the_pieces(strings, pieces):
    seen, ended = shown(strings, pieces)
    assert (seen[-1], ended) == cut(strings, b"".join(pieces))
    text = b"".join(pieces)
    for so_far in seen:
        assert text.startswith(so_far), "nothing that was shown is taken back"


@given(
    st.lists(few_letters.filter(bool), max_size=4),
    st.lists(few_letters, min_size=1, max_size=5),
    st.lists(st.integers(0, 4), max_size=12),
)
def test_the_table_follows_the_text_of_tokens(strings, pieces, tokens):
    stops, vocab = StopStrings(strings), Pieces(*pieces)
    table = stops.table(vocab)  # pyright: ignore[reportArgumentType]
    assert table.shape == (len(stops.step), len(pieces))
    assert table.dtype == np.int32
    state, text = 0, b""
    for token in tokens:
        token %= len(pieces)
        state = table[state, token]
        text += pieces[token]
        assert (state == ENDED) == cut(strings, text)[1]
        if state == ENDED:
            break


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        StopStrings([b"a", b""])
