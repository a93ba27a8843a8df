import codecs
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax import vocab
from txl_jax.errors import UserError
from txl_jax.measure import BITS_PER_BYTE, PERPLEXITY
from txl_jax.vocab import WordsVocab


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


def original(documents: list[str], lower_case: bool = False) -> tuple[list[str], list[list[str]]]:
    """The words by id, and the words of each document, as the original makes them: line by line."""
    counts: dict[str, int] = {}
    read = []
    for document in documents:
        words = []
        for line in document.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
            for word in (line.lower() if lower_case else line).split():
                words.append(word)
                counts[word] = counts.get(word, 0) + 1
            words.append("<eos>")
        read.append(words)
    order = list(counts)
    by_frequency = sorted(order, key=lambda word: (-counts[word], order.index(word)))
    return ["<eos>", *(word for word in by_frequency if word != "<eos>")], read


lines = st.text("abAÉé \n\r\t\f\x1c\u3000", max_size=40).map(lambda text: text + "\n")


@given(st.lists(lines, min_size=1, max_size=5), st.booleans())
def test_words_are_read_and_numbered_as_the_original_does(documents, lower_case):
    words, read = original(documents, lower_case)
    voc = vocab.build("words", [text.encode() for text in documents], lower_case)
    assert isinstance(voc, WordsVocab) and list(voc.words) == words
    for text, expected in zip(documents, read, strict=True):
        ids = voc.encode(text.encode())
        assert ids.dtype == voc.dtype == np.uint8
        assert [words[i] for i in ids] == expected
        assert voc.encode(voc.decode(ids)).tolist() == ids.tolist()
        assert b"".join(voc.decode([i]) for i in ids) == voc.decode(ids)


def test_words_are_numbered_by_frequency_and_then_as_they_first_occur():
    voc = vocab.build("words", [b"b a c\nc <eos>\n", b"\n d c a <eos> <eos>\n"])
    assert isinstance(voc, WordsVocab) and voc.words == ("<eos>", "c", "a", "b", "d")
    ids = voc.encode(b"\n d c a <eos>\nb")
    assert ids.tolist() == [0, 4, 1, 2, 0, 0, 3]
    assert voc.decode(ids) == b"\n d c a\n\n b"
    assert voc.encode(b" \t").shape == (0,)


@pytest.mark.parametrize(("size", "dtype"), [(256, "u1"), (257, "u2"), (65_536, "u2")])
def test_ids_of_words_have_the_smallest_type(size, dtype):
    voc = vocab.build("words", [" ".join(map(str, range(size - 1))).encode()])
    assert len(voc) == size
    ids = voc.encode(str(size - 2).encode())
    assert voc.dtype == ids.dtype == dtype
    assert ids.tolist() == [size - 1]


@pytest.mark.parametrize("unknown", ["<unk>", "<UNK>"])
def test_a_word_outside_the_vocabulary_is_read_as_the_word_for_such(unknown):
    voc = vocab.build("words", [f"a a {unknown}\n".encode()])
    assert voc.encode(b"b a\n").tolist() == [2, 1, 0]


def test_without_such_a_word_it_is_named():
    voc = vocab.build("words", [b"der Hund\n"])
    with pytest.raises(UserError, match=r"^'Größe' is not among the vocabulary's 3 words: use"):
        voc.encode("der Größe nach ein Hund".encode())
    with pytest.raises(UserError, match="is not among the vocabulary's 3 words"):
        voc.encode(b"\xff\xfe")


def test_a_document_begins_after_the_sign_that_ends_one():
    assert vocab.build("words", [b"a b\n"]).start.tolist() == [0]
    for text, sign in ((b"a \n\f", b"\f"), (b"a \n", b"\n"), (b"a b", b" "), (b"ba", b"a")):
        voc = vocab.build("bytes", [text])
        assert voc.decode(voc.start) == sign


def test_losses_are_shown_in_what_the_tokens_are():
    assert vocab.build("bytes", [b"a"]).measure is BITS_PER_BYTE
    assert vocab.build("words", [b"a"]).measure is PERPLEXITY
    assert BITS_PER_BYTE.text(1.5432) == "2.2264"
    assert PERPLEXITY.text(3.0) == "20.086"
    assert PERPLEXITY.text(1e6) == "inf"


def test_a_list_of_words_numbers_them_by_its_lines(tmp_path):
    path = tmp_path / "1b_word_vocab.txt"
    path.write_text("</S>\n<S> 7\n<UNK>\nthe\nday\n\n", "utf-8")
    voc = WordsVocab.listed(path, "<S>")
    assert voc.words == ("</S>", "<S>", "<UNK>", "the", "day")
    assert voc.encode(b"the other day\n").tolist() == [3, 2, 4, 1]
    assert voc.decode([3, 4, 1, 3]) == b" the day\n the"
    assert voc.start.tolist() == [1]


@pytest.mark.parametrize("content", [b"the\nday\n", b"", b"<S>\n\xff\n"])
def test_another_file_is_no_list_of_words(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt is not a list of words with <S> among them"):
        WordsVocab.listed(path, "<S>")
    with pytest.raises(UserError, match=r"cannot read .*none\.txt: No such file"):
        WordsVocab.listed(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("content", "words", "eos"),
    [
        ("<eos>\nthe\n<unk>\n", ("<eos>", "the", "<unk>"), "<eos>"),
        ("the 7\r\n\n<eos> 5\nthe 2", ("the", "<eos>"), "<eos>"),
        ("<S>\n<UNK>\n", ("<S>", "<UNK>"), "<S>"),
        ("der\nGröße", ("<eos>", "der", "Größe"), "<eos>"),
        ("7\n[\n", ("<eos>", "7", "["), "<eos>"),
        ("a\n10\u00a0000\n1\u00a0m\nb\nc\n", ("<eos>", "a", "10", "1", "b", "c"), "<eos>"),
    ],
)
def test_a_list_of_words_that_a_user_names(tmp_path, content, words, eos):
    path = tmp_path / "words.txt"
    path.write_text(content, "utf-8")
    assert vocab.given(path, "words") == WordsVocab(words, eos)
    assert vocab.given(path, "words", lower_case=True) == WordsVocab(words, eos, True)


@pytest.mark.parametrize("content", ["", "\n \n", "two words\n", "a 7 8\n", "a\n7 b\n"])
def test_a_file_that_is_no_vocabulary_of_words(tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"words\.txt is neither a vocab\.json nor a list with a"):
        vocab.given(path, "words")
    with pytest.raises(UserError, match=r"words\.txt is not a vocabulary, or is damaged"):
        vocab.given(path, "bytes")


def test_a_vocabulary_that_a_user_names_may_be_a_saved_one(tmp_path):
    path = tmp_path / "vocab.json"
    for voc in (vocab.build("words", [b"a b\n"]), vocab.build("bytes", [b"a b\n"])):
        voc.save(path)
        assert vocab.given(path, "words") == voc
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"vocab\.json is not a vocabulary, or is damaged"):
        vocab.given(path, "words")
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*none: No such file"):
        vocab.given(tmp_path / "none", "words")


def test_a_saved_vocabulary_of_words_is_loaded_again(tmp_path):
    path = tmp_path / "vocab.json"
    voc = vocab.build("words", ['naïve \u2028 日本 "\n'.encode()])
    voc.save(path)
    assert vocab.load(path) == voc


@pytest.mark.parametrize(
    ("words", "eos"),
    [
        *(([], "<eos>"), (["a"], "<eos>"), (["<eos>", "a", "a"], "<eos>")),
        *((["<eos>", "a b"], "<eos>"), (["<eos>", ""], "<eos>"), (["<eos>", 1], "<eos>")),
        *((1, "<eos>"), (["<eos>"], ["<eos>"])),
    ],
)
def test_a_damaged_vocabulary_of_words_is_refused(tmp_path, words, eos):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"kind": "words", "words": words, "eos": eos}))
    with pytest.raises(UserError, match=r"vocab\.json is not a vocabulary, or is damaged"):
        vocab.load(path)
