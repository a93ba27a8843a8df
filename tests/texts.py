"""What a corpus holds, as tests compare it."""

from txl_jax.documents import Corpus


def documents(corpus: Corpus, split: str) -> list[bytes]:
    """Each document of a split as a whole."""
    return [b"".join(document) for document in corpus.documents(split)]
