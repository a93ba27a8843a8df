"""Corpora of Wikipedia articles: what wikiextractor makes of a dump.

It writes folders AA, AB, … of files wiki_00, wiki_01, …, where each article stands between
`<doc id="…" url="…" title="…">` and `</doc>`, or, with --json, is a line of JSON. A document is one
article: its title, a blank line and its text, as extracted. All articles of a file go to the same
split.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from txl_jax.config import DataConfig
from txl_jax.documents import END, check_utf8
from txl_jax.errors import UserError
from txl_jax.folders import Folder, chosen, deal, files_of, whole_lines


@dataclass(frozen=True)
class Wiki(Folder):
    """Files of articles that are dealt to the splits by a hash of their names."""

    def documents_by_file(self, split: str) -> Iterator[tuple[str, Iterable[bytes]]]:
        """The articles of a split, in order, each in one block, with the path of its file.

        Articles without text are left out.

        Raises UserError for a file that cannot be read, is not UTF-8, is cut off or comes from
        something else, and at the end of a split that had no article.
        """
        return super().documents_by_file(split)

    def _documents_of(self, name: str) -> Iterator[Iterable[bytes]]:
        path = self.root / name
        with path.open("rb") as file:
            articles = _from_json if file.read(1) == b"{" else _from_tags
            file.seek(0)
            for text in articles(file, path):
                yield [whole_lines(text) + END]


def wiki(cfg: DataConfig) -> Wiki:
    """The articles below `cfg.text_dir`, in files whose names begin with `wiki_`.

    Raises UserError as `folders.chosen`, and where there is no such file.
    """
    root, paths = chosen(cfg)
    files = files_of(paths)
    corpus = deal(Wiki, root, (path for path in files if path.name.startswith("wiki_")))
    if not corpus.n_bytes:
        raise UserError(
            f"--text-dir {cfg.text_dir} has no files wiki_00, wiki_01, … with text: name the "
            "folder that wikiextractor wrote (its option -o)"
        )
    return corpus


def _from_tags(file: BinaryIO, path: Path) -> Iterator[bytes]:
    article: list[bytes] | None = None
    start = 0
    for line in file:
        check_utf8(line, path, start)
        if article is None:
            if line.startswith(b"<doc "):
                article = []
            elif line.strip():
                raise _unfit(path, start)
        elif line.rstrip() == b"</doc>":
            text = b"".join(article).strip()
            if b"\n" in text:  # more than the title
                yield text
            article = None
        else:
            article.append(line)
        start += len(line)
    if article is not None:
        raise UserError(f"{path} is cut off within an article: extract the dump again")


def _from_json(file: BinaryIO, path: Path) -> Iterator[bytes]:
    start = 0
    for line in file:
        check_utf8(line, path, start)
        try:
            article = json.loads(line)
            title, text = article["title"].strip(), article["text"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _unfit(path, start) from None
        if text:
            # Some versions of wikiextractor put the title into the text, others do not.
            whole = text if text.split("\n")[0].strip() == title else f"{title}\n\n{text}"
            yield whole.encode(errors="replace")
        start += len(line)


def _unfit(path: Path, start: int) -> UserError:
    return UserError(
        f"{path} is no output of wikiextractor at byte offset {start}: its articles stand between "
        "<doc …> and </doc>, or each in a line of JSON; for plain text take --dataset text"
    )
