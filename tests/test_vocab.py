import codecs
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax import vocab
from txl_jax.errors import UserError


@given(st.lists(st.binary(min_size=1), min_size=1))
def test_encode_and_decode_are_inverse(documents):
    voc = vocab.build("bytes", documents)
    assert len(voc) == len(set(b"".join(documents)))
    for text in documents:
        ids = voc.encode(text)
        assert ids.dtype == voc.dtype == np.uint8
        assert ids.shape == (len(text),)
        assert ids.max() < len(voc)
        assert voc.decode(ids) == text
        assert voc.decode(ids.tolist()) == text


def test_ids_are_in_the_order_of_byte_values():
    voc = vocab.build("bytes", [b"hello ", b"world"])
    assert voc.decode(range(len(voc))) == b" dehlorw"
    assert voc.encode(b"hew").tolist() == [3, 2, 7]


def test_every_byte_value_has_a_place():
    everything = bytes(range(256))
    voc = vocab.build("bytes", [everything[128:], everything[:128]])
    assert voc.encode(everything).tolist() == list(range(256))


def test_nothing_is_encoded_as_nothing():
    voc = vocab.build("bytes", [b"a"])
    assert voc.encode(b"").shape == (0,)
    assert voc.decode([]) == b""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("defend", r"byte 0x6E of 'n' \(at byte offset 4\)"),
        ("fée", r"byte 0xC3 of 'é' \(at byte offset 1\)"),
        ("\nfed", r"byte 0x0A of '\\n' \(at byte offset 0\)"),
        ("dèf", r"byte 0xC3 of 'è' \(at byte offset 1\)"),
    ],
)
def test_a_symbol_outside_the_vocabulary_is_named(text, says):
    voc = vocab.build("bytes", [b"def"])
    with pytest.raises(UserError, match=says + " is not among the vocabulary's 3 byte values"):
        voc.encode(text.encode())


def test_the_second_byte_of_a_character_is_reported_with_its_character():
    voc = vocab.build("bytes", ["aé".encode()])
    with pytest.raises(UserError, match=r"byte 0xA8 of 'è' \(at byte offset 4\)"):
        voc.encode("aéè".encode())


def test_characters_can_be_streamed_token_by_token():
    text = "naïve 日本 🎈"
    voc = vocab.build("bytes", [text.encode()])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(voc.decode([i])) for i in voc.encode(text.encode())]
    assert "".join(pieces) == text


@given(st.binary(min_size=1))
def test_a_saved_vocabulary_is_loaded_again(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "vocab.json"
    voc = vocab.build("bytes", [text])
    voc.save(path)
    assert vocab.load(path) == voc
    assert json.loads(path.read_text())["kind"] == "bytes"


@pytest.mark.parametrize(
    "saved",
    [
        "",
        "[]",
        "{}",
        '{"kind": "bytes"}',
        '{"kind": "runes", "values": [1]}',
        '{"kind": "bytes", "values": []}',
        '{"kind": "bytes", "values": [1, 1]}',
        '{"kind": "bytes", "values": [256]}',
        '{"kind": "bytes", "values": "ab"}',
        '{"kind": "bytes", "values": 1}',
        '{"kind": "bytes", "values": 3',
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, saved):
    path = tmp_path / "vocab.json"
    path.write_text(saved)
    with pytest.raises(UserError, match=r"vocab\.json is not a vocabulary, or is damaged"):
        vocab.load(path)


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*none\.json: No such file"):
        vocab.load(tmp_path / "none.json")
