"""What was found in a corpus when it was prepared."""

from dataclasses import asdict
from typing import Any

from txl_jax.documents import SPLITS
from txl_jax.token_files import TokenFiles


def numbers(files: TokenFiles) -> dict[str, Any]:
    """What was found as it stands in JSON."""
    return {
        "folder": str(files.folder),
        "fingerprint": files.fingerprint,
        "vocab": files.vocab.kind,
        "vocab_size": len(files.vocab),
        "splits": {
            split: asdict(counts) | {"out_of_vocabulary": counts.unknown / counts.tokens}
            for split, counts in files.counts.items()
        },
        "commonest": [{"token": token, "count": count} for token, count in files.commonest],
    }


def table(files: TokenFiles) -> str:
    """What was found as people read it."""
    rows = [("", "documents", "tokens", "out of vocabulary")]
    for split in SPLITS:
        counts = files.counts[split]
        share = f"{counts.unknown / counts.tokens:.2%}"
        rows.append((split, f"{counts.documents:,}", f"{counts.tokens:,}", share))
    lines = [f"{a:<5}  {b:>9}  {c:>13}  {d:>17}" for a, b, c, d in rows]
    n_train = files.counts["train"].tokens
    common = ", ".join(f"{token} {count / n_train:.1%}" for token, count in files.commonest)
    lines.append(f"vocabulary ({files.vocab.kind}): {len(files.vocab):,}")
    lines.append(f"commonest in train: {common}")
    lines.append(f"token files: {files.folder}")
    return "\n".join(lines)
