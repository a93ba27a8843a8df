import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax import pieces, vocab
from txl_jax.bpe_vocab import BpeVocab
from txl_jax.errors import UserError
from txl_jax.measure import TOKEN_PERPLEXITY

TEXT = (
    "The cat sat on the mat, the naïve cat's hat; 日本 日本語 🎈 12 123\n\n\tthat is it.\n".encode()
)


@pytest.fixture(scope="module")
def voc() -> BpeVocab:
    return BpeVocab.build([TEXT * 3 + b"\f", TEXT], 290)


@given(st.text())
def test_encode_and_decode_are_inverse(voc, text):
    ids = voc.encode(text.encode())
    assert ids.dtype == voc.dtype == np.uint16
    assert voc.decode(ids) == text.encode()
    assert b"".join(voc.decode([i]) for i in ids) == text.encode()


@given(
    st.lists(st.sampled_from(["the", " cat", "日", "\f", "\n", " ", "\u3000", "'s", "1", "\u2028"]))
)
def test_what_a_text_is_cut_into_changes_no_token(voc, parts):
    text = "".join(parts).encode()
    together = [voc.encode(piece) for piece in pieces.cut([text], 1)]
    assert np.concatenate([*together, []]).tolist() == voc.encode(text).tolist()


def test_frequent_pairs_become_tokens(voc):
    assert len(voc) == 290
    assert len(voc.encode(TEXT)) < len(TEXT)
    assert [voc.decode([i]) for i in voc.encode(b" the cat")] == [b" the", b" cat"]
    assert voc.encode(b"").shape == (0,)
    assert voc.encode(b"").dtype == voc.dtype
    assert voc.decode([]) == b""
    assert voc.unknown is None and voc.measure is TOKEN_PERPLEXITY
    assert voc.shown(int(voc.encode(b" cat")[0])) == "' cat'"


def test_the_end_of_a_document_is_a_token_of_its_own(voc):
    assert voc.decode(voc.start) == b"\f" and len(voc.start) == 1
    # A vocabulary that has a newline and a form feed in one token.
    voc = BpeVocab((*voc.tokens, "ĊČ"), (*voc.merges, ("Ċ", "Č")))
    ids = voc.encode(b"the\f\fthe\n\f").tolist()
    assert ids.count(voc.start[0]) == 3
    assert ids[-1] == voc.start[0]


def test_a_model_of_others_sees_its_own_sign_for_the_end():
    plain = BpeVocab.build([TEXT * 9], 280)
    voc = BpeVocab((*plain.tokens, "<|endoftext|>"), plain.merges)
    assert voc.start.tolist() == [280]
    assert voc.decode(voc.encode(b"a\n\fb")) == b"a\n\fb"
    sign = voc.encode(b"<|endoftext|>")
    assert 280 not in sign and voc.decode(sign) == b"<|endoftext|>"


def test_text_that_is_not_utf8_is_refused(voc):
    with pytest.raises(UserError, match=r"byte 0xFF of b'a\\xff'… is not UTF-8"):
        voc.encode(b"a\xff")


def test_the_same_text_gives_the_same_encoding_in_another_process(voc):
    program = (
        "import sys; from txl_jax.bpe_vocab import BpeVocab\n"
        f"print(BpeVocab.build([{TEXT!r} * 3 + b'\\f', {TEXT!r}], 290).to_json())"
    )
    root = Path(__file__).resolve().parent.parent
    for seed in "12":
        command = [sys.executable, "-c", program]
        output = subprocess.check_output(command, cwd=root, env={"PYTHONHASHSEED": seed}, text=True)
        assert output == voc.to_json() + "\n"


def test_a_long_run_is_no_burden(voc):
    run = b"ab" * 200_000 + b" " * 100_000 + b"\xe6\x97\xa5" * 100_000
    found = BpeVocab.build([run], 300)
    assert found.decode(found.encode(run)) == run


def test_a_failing_corpus_is_what_is_reported():
    def texts():
        yield TEXT
        raise UserError("file 7 is not UTF-8")

    with pytest.raises(UserError, match="file 7 is not UTF-8"):
        BpeVocab.build(texts(), 300)


def test_a_saved_encoding_is_loaded_again(voc, tmp_path):
    voc.save(tmp_path / "vocab.json")
    assert vocab.load(tmp_path / "vocab.json") == voc
    assert json.loads((tmp_path / "vocab.json").read_text())["kind"] == "bpe"


def files_of_gpt2(voc: BpeVocab, folder: Path) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(voc.tokens)}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = "".join(f"{first} {second}\n" for first, second in voc.merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    return ids


def test_an_encoding_in_the_files_of_gpt2(voc, tmp_path):
    ids = files_of_gpt2(voc, tmp_path / "gpt2")
    assert vocab.load(tmp_path / "gpt2") == voc
    saved = {
        "model": {"type": "BPE", "vocab": ids, "merges": [list(pair) for pair in voc.merges]},
        "pre_tokenizer": {"type": "ByteLevel"},
        "normalizer": None,
        "added_tokens": [{"id": 290, "content": "<|endoftext|>"}],
    }
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    loaded = vocab.load(folder)
    assert loaded == BpeVocab((*voc.tokens, "<|endoftext|>"), voc.merges)
    for change in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "WordPiece", "vocab": ids}},
    ):
        (folder / "tokenizer.json").write_text(json.dumps(saved | change))
        with pytest.raises(UserError, match="other holds no byte-level BPE as GPT-2's"):
            vocab.load(folder)


def test_a_folder_without_an_encoding(voc, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json: No such file"):
        vocab.load(tmp_path)
    ids = files_of_gpt2(voc, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\nnever seen\n")
    with pytest.raises(UserError, match="gpt2 holds no byte-level BPE"):
        vocab.load(tmp_path / "gpt2")
    ids.pop("a")
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(UserError, match="gpt2 holds no byte-level BPE"):
        vocab.load(tmp_path / "gpt2")


@pytest.mark.parametrize(
    "change",
    [{"tokens": 1}, {"tokens": ["a"]}, {"merges": [["a"]]}, {"merges": [["a", "never"]]}],
)
def test_a_damaged_encoding_is_refused(voc, tmp_path, change):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(json.loads(voc.to_json()) | change))
    with pytest.raises(UserError, match=r"vocab\.json is not a vocabulary, or is damaged"):
        vocab.load(path)
