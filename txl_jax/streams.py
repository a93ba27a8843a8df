"""A split cut into streams, and the streams into segments [batch, time].

All documents of a split are one text, which is cut into B stretches, wherever the cuts may lie. (In
the scaling fork all streams are in the same file.) `skip_files` counts documents: files, and with
`wiki` articles.

Letters: B batch, T segment (tgt_len).
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.sentences import Epoch, Sentences
from txl_jax.token_files import TokenFiles


@dataclass(frozen=True, eq=False)
class Streams:
    """A split cut into `batch` contiguous streams, and the streams into segments of `tgt_len`.

    Row b of segment i + 1 goes on where row b of segment i ended, so that memory can be carried
    from one to the next. A prediction j has token j as its input and token j + 1 as its target.

    The streams have no state: `at(n)` is what a training step reads before which n segments were
    read, in this epoch and those before.
    """

    tokens: NDArray[np.integer] | Epoch
    """The split, [tokens]."""
    batch: int
    """Streams B."""
    tgt_len: int
    """Predictions T of one stream in a segment."""
    stride: int
    """Predictions from the start of one stream to the start of the next."""
    length: int
    """Predictions of a stream."""
    sentences: Sentences | None = None
    """Whence `tokens` of every epoch come; None: they are the same in all."""
    context: int = 0
    """Predictions with which every stream but the first begins that are not its own: their tokens
    are read, for the sake of memory, but the stream before predicts them."""

    @classmethod
    def trimmed(cls, tokens: NDArray[np.integer] | Sentences, batch: int, tgt_len: int) -> Self:
        """For training: streams of n = len(tokens) // batch tokens, each n - 1 predictions.

        This is the original's `LMOrderedIterator`: the split's last len(tokens) % batch tokens are
        left out, and no stream predicts the first token of the next. The last segment of an epoch
        may be shorter than tgt_len; it is padded. Of `Sentences` the streams are cut anew in every
        epoch, from their order in it.

        Raises UserError where a stream is shorter than one segment.
        """
        check_length(len(tokens), batch, tgt_len)
        n = len(tokens) // batch
        if isinstance(tokens, Sentences):
            first = tokens.epoch(0)
            return cls(first, batch, tgt_len, stride=n, length=n - 1, sentences=tokens)
        return cls(np.asarray(tokens), batch, tgt_len, stride=n, length=n - 1)

    @classmethod
    def covering(cls, tokens: NDArray[np.integer], batch: int, tgt_len: int) -> Self:
        """For a quick evaluation: every one of the len(tokens) - 1 predictions once.

        Streams hold n = ceil((len(tokens) - 1) / batch) predictions; the last ones are padded. Each
        begins with empty memory, so that a larger batch makes the mean loss a little higher.

        Raises UserError where there are fewer than two tokens.
        """
        n = -(-_predictions(tokens) // batch)
        return cls(np.asarray(tokens), batch, tgt_len, stride=n, length=n)

    @classmethod
    def seamless(
        cls, tokens: NDArray[np.integer], batch: int, tgt_len: int, context: int, together: int = 1
    ) -> Self:
        """For an exact evaluation: every prediction once, as if there were one stream.

        Streams are cut where the segments of one stream end, and every stream but the first reads
        `context` segments before its own ones. The first has as many more of its own, so that all
        take equally long: batch x n + context segments cover the text, for the least n. If
        `context` reaches as far back as a prediction can look, its loss does not depend on batch.

        Args:
          context: segments that are read before those that count.
          together: streams are cut only between blocks of this many segments (where memory is
            emptied before each block, context can be 0).

        Raises UserError where there are fewer than two tokens.
        """
        segments = -(-_predictions(tokens) // tgt_len)
        blocks = -(-max(1, segments - context) // together)
        own = together * -(-blocks // batch)
        return cls(
            np.asarray(tokens),
            batch,
            tgt_len,
            stride=own * tgt_len,
            length=min(context + own, segments) * tgt_len,
            context=context * tgt_len,
        )

    def __len__(self) -> int:
        """Segments in an epoch."""
        return -(-self.length // self.tgt_len)

    @property
    def n_tokens(self) -> int:
        """Predictions in an epoch, padding and context not counted."""
        own = max(0, self.length - self.context)
        return min(self.length + (self.batch - 1) * own, len(self.tokens) - 1)

    @property
    def n_context(self) -> int:
        """Tokens that streams with predictions of their own read as context."""
        others = -(-(len(self.tokens) - 1 - self.context) // self.stride) - 1
        return self.context * min(max(0, others), self.batch - 1)

    def at(self, n: int, rows: slice = slice(None)) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The segment that is read after n others, from the first epoch on, as `segment` has it."""
        epoch, i = divmod(n, len(self))
        own, left = range(self.batch)[rows], len(self) - 1 - i
        if self.sentences and left < len(own):
            # Where all streams begin anew, the first segment would take seconds.
            self.sentences.epoch(epoch + 1).prepare(own[left] * self.stride)
        return self.epoch(epoch).segment(i, rows)

    def epoch(self, epoch: int) -> Self:
        """The streams of an epoch."""
        return replace(self, tokens=self.sentences.epoch(epoch)) if self.sentences else self

    def segment(
        self, i: int, rows: slice = slice(None)
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Inputs and targets of segment i of this epoch, int32 [rows, T] each.

        Padding is input 0, target -1.

        Targets of context are -1 too. Only the tokens of these rows are read. Raises IndexError
        where there is no segment i.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"segment {i} of {len(self)}")
        streams = range(self.batch)[rows]
        inputs = np.zeros((len(streams), self.tgt_len), np.int32)
        targets = np.full_like(inputs, -1)
        done = i * self.tgt_len
        for row, stream in enumerate(streams):
            start = stream * self.stride + done
            left = min(self.length - done, len(self.tokens) - 1 - start)
            n = max(0, min(self.tgt_len, left))
            if n == 0:
                continue
            read = self.tokens[start : start + n + 1]
            inputs[row, :n] = read[:n]
            skipped = min(n, max(0, self.context - done)) if stream else 0
            targets[row, skipped:n] = read[skipped + 1 :]
        return inputs, targets


def training_streams(cfg: Config, files: TokenFiles) -> Streams:
    """The streams that a run of `cfg` reads of the train split.

    Sentences that follow each other in no order have another one in every epoch, by `train.seed`.

    Raises UserError where `data.skip_files` leaves nothing, or as `Streams.trimmed`.
    """
    tokens = files.splits["train"][_skipped(cfg.data.skip_files, files.documents["train"]) :]
    batch, tgt_len = cfg.train.batch, cfg.model.tgt_len
    if files.sentences:
        eos = int(files.vocab.start[0])
        return Streams.trimmed(Sentences(tokens, eos, cfg.train.seed), batch, tgt_len)
    return Streams.trimmed(tokens, batch, tgt_len)


def _skipped(n_files: float, documents: NDArray[np.int64]) -> int:
    """How many tokens so many files have, the first ones of the split."""
    most = len(documents) - 1
    if not 0 <= n_files < most:
        raise UserError(
            f"skip_files is {n_files:g}; it has to be at least 0 and less than {most}, the number "
            "of documents in the train split"
        )
    whole = int(n_files)
    begin, end = (int(offset) for offset in documents[whole : whole + 2])
    return begin + int((n_files - whole) * (end - begin))


def _predictions(tokens: NDArray[np.integer]) -> int:
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} tokens hold nothing to predict: 2 or more are needed")
    return len(tokens) - 1


def check_length(n_tokens: int, batch: int, tgt_len: int) -> None:
    """Raises UserError unless `n_tokens` in `batch` streams give each a segment of `tgt_len`."""
    n = n_tokens // batch
    if n > tgt_len:
        return
    fits = []
    if n >= 2:
        fits.append(f"--tgt-len {n - 1} or less")
    if most := n_tokens // (tgt_len + 1):
        fits.append(f"--batch {most} or less")
    raise UserError(
        f"{n_tokens} tokens in a batch of {batch} give streams of {n} tokens, too short for a "
        f"tgt_len of {tgt_len} (and 1 to predict): use {' or '.join([*fits, 'more text'])}"
    )
