"""Names of runs, and foreign text."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import names
from txl_jax.errors import UserError

GOOD = ["a", "0", "run-7", "x" * 40, "a-"]
BAD = ["", "-a", "A", "a b", "a/b", "..", "a\n", "x" * 41, "a;b", "$(id)", "ü", "a_b", "a\x00"]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_of_a_run_is_returned(name):
    assert names.check_run_name(name) == name


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_of_a_run_is_refused_in_one_printable_line(name):
    with pytest.raises(UserError) as error:
        names.check_run_name(name)
    assert str(error.value).isprintable()


@given(st.text())
def test_foreign_text_becomes_one_line_that_cannot_act_on_a_terminal(text):
    assert names.printable(text).isprintable()


def test_what_can_be_shown_stays_as_it_is():
    assert names.printable("größer × 2 – 東京") == "größer × 2 – 東京"


def test_escape_sequences_line_ends_and_turned_text_are_shown_as_what_they_are():
    assert names.printable("\x1b[31m\r\n\u202e\x9b") == r"\x1b[31m\r\n\u202e\x9b"


@given(st.lists(st.text().filter(lambda word: "\0" not in word)))
def test_a_shell_reads_quoted_words_back(words):
    assert shlex.split(names.quoted(words)) == words


def test_no_two_tags_share_a_key():
    tags = {name: getattr(names, name) for name in dir(names) if name.startswith("TAG_")}
    assert len(set(tags.values())) == len(tags)
