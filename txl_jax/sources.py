"""Where the named data sets come from: addresses, sizes and hashes.

Hashes and sizes are those that others published for the first address; what a mirror gives is held
against them.
"""

from dataclasses import dataclass

from txl_jax.documents import SPLITS
from txl_jax.downloads import Download


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and where its text is in what is downloaded."""

    archive: Download
    version: str = "1.0.0"
    """Raised when the same archive would be prepared in another way than before."""
    member: str = ""
    """The file of a split in the archive, with {} for the split's name."""
    held_out: int = 0
    """Length in bytes of valid and of test, which end the one member; 0: each has its own."""
    splits: tuple[str, str, str] = SPLITS
    """What train, valid and test are called in the prepared data set, or which parts of it."""


_PTB = Download(
    "simple-examples.tgz",
    (
        "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        "https://dataset.bj.bcebos.com/imikolov%2Fsimple-examples.tgz",
    ),
    "md5:30177ea32e27c525793142b6bf2c8e2d",
    34_869_662,
)
_NEWS = "1-billion-word-language-modeling-benchmark-r13output"
SOURCES = {
    "wikitext-103": Source(
        Download(
            "wikitext-103-v1.zip",
            (
                "https://wikitext.smerity.com/wikitext-103-v1.zip",
                "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
            ),
            "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            190_229_076,
        ),
        member="wikitext-103/wiki.{}.tokens",
    ),
    "wikitext-2": Source(
        Download(
            "wikitext-2-v1.zip",
            (
                "https://wikitext.smerity.com/wikitext-2-v1.zip",
                "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
            ),
            "sha256:92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            4_475_746,
        ),
        member="wikitext-2/wiki.{}.tokens",
    ),
    "enwik8": Source(
        Download(
            "enwik8.zip",
            ("http://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
            "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            36_445_475,
        ),
        member="enwik8",
        held_out=5_000_000,
    ),
    "text8": Source(
        Download(
            "text8.zip",
            ("http://mattmahoney.net/dc/text8.zip", "https://data.deepai.org/text8.zip"),
            "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            31_344_016,
        ),
        member="text8",
        held_out=5_000_000,
    ),
    "ptb": Source(_PTB, member="./simple-examples/data/ptb.{}.txt"),
    "ptb-char": Source(_PTB, member="./simple-examples/data/ptb.char.{}.txt"),
    "lm1b": Source(
        Download(
            f"{_NEWS}.tar.gz",
            (f"http://www.statmt.org/lm-benchmark/{_NEWS}.tar.gz",),
            "sha256:01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
            1_792_209_805,
        ),
        version="1.1.0",
        splits=("train", "test[:2%]", "test[2%:]"),
    ),
    "tiny_shakespeare": Source(
        Download(
            "tiny_shakespeare.txt",
            (
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                "input.txt",
            ),
            "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            1_115_394,
        ),
        splits=("train", "validation", "test"),
    ),
}
"""By the names of the data sets, as in `LAYOUTS`."""

WORD_LISTS = {
    "lm1b": Download(
        "1b_word_vocab.txt",
        (
            "https://github.com/rafaljozefowicz/lm/raw/master/1b_word_vocab.txt",
            "https://s3-us-west-2.amazonaws.com/sparse-dataset/gbw/1b_word_vocab.txt",
        ),
        "git:249020af8359cef6aff5ce083bad42bc7cce0715",
    )
}
"""The words of the vocabulary, for data sets where they come in a file of their own."""
