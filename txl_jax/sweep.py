"""Perplexity against length of memory, as a picture."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from txl_jax import storage
from txl_jax.errors import UserError


def draw(path: Path, title: str, perplexities: dict[int, float]) -> None:
    """Writes a PNG of the perplexity for each mem_len; UserError where it cannot be written."""
    lengths = list(perplexities)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="mem_len", ylabel="perplexity")
    axes.plot(lengths, list(perplexities.values()), marker="o")
    # Lengths usually double; 0 has its place on such an axis too.
    axes.set_xscale("symlog", base=2, linthresh=min(filter(None, lengths), default=1))
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    try:
        storage.write_bytes(path, picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another --out") from None
