from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax import text_files
from txl_jax.errors import UserError
from txl_jax.text_files import NotUtf8

parts = st.sampled_from([b"a", "é".encode(), "日".encode(), "🎈".encode(), b"\n", b"\0", b"\xff"])
contents = st.binary(max_size=12) | st.lists(parts, max_size=8).map(b"".join)


def in_blocks(content: bytes, size: int) -> list[bytes]:
    return [content[i : i + size] for i in range(0, len(content), size)]


@given(contents, st.integers(1, 5))
def test_characters_are_those_of_the_whole_wherever_blocks_end(content, size):
    blocks = in_blocks(content, size)
    try:
        expected = content.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(NotUtf8) as caught:
            list(text_files.characters(blocks))
        assert caught.value.offset == error.start
    else:
        assert "".join(text_files.characters(blocks)) == expected


@given(contents, st.integers(1, 5))
def test_text_is_utf8_without_nul_bytes(content, size):
    blocks = in_blocks(content, size)
    try:
        content.decode()
        valid = True
    except UnicodeDecodeError:
        valid = False
    if not valid and 0 not in content:
        with pytest.raises(NotUtf8):
            text_files.is_text(blocks)
    else:
        assert text_files.is_text(blocks) == (valid and bool(content) and 0 not in content)


@given(contents, st.integers(1, 5))
def test_lines_are_whole(content, size):
    expected = content if content.endswith(b"\n") else content + b"\n"
    assert b"".join(text_files.whole_lines(in_blocks(content, size))) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_a_file_is_read_as_often_as_it_is_asked_for(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_files, "_BLOCK", size)
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    content = text_files.blocks(path)
    for _ in range(2):
        assert b"".join(content) == b"abc"
        assert all(len(block) <= size for block in content)
    path.write_bytes(b"")
    assert b"".join(text_files.blocks(path)) == b""


def test_a_file_that_goes_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", 2)
    path: Path = tmp_path / "file"
    path.write_bytes(b"abc")
    content = text_files.blocks(path)
    path.unlink()
    for read in (lambda: list(content), lambda: text_files.blocks(path)):
        with pytest.raises(UserError, match=r"^cannot read .*/file: No such file or directory$"):
            read()
