"""What a train step has to compute and to move, and the least time that takes on known GPUs.

    python -m bench.roofline [--config one_machine_fp16 test_1 nvidia_base]

Prints a table in Markdown for each config: one device's share of a step, by part of the model. It
is an account, not a measurement, and needs no GPU.

A step is taken for a list of kernels. FLOPs are those of matrix products, forward and backward.
Bytes are those that cross device memory if a kernel reads each of its operands once and writes each
of its results once, and if all that works element by element is part of the kernel before or after
it. A kernel takes at least as long as its FLOPs do at the device's peak, and as its bytes do at its
bandwidth; kernels follow one another. So a part's least time is a sum of maxima, and it is bound by
that of the two in whose kernels it spends more of the time.

Not counted: what is computed again in the backward pass, padding, random bits, what crosses
between devices, and time between kernels. Scores that no query sees are counted, as products of
full tiles are what GPUs do.

Letters: B sequences, T segment, M memory, S = M + T keys, N = B T tokens, D d_model, W = heads x
d_head, F d_inner, V and E vocabulary and width of a cluster, c bytes of an activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from txl_jax import metrics
from txl_jax.account import with_known_vocabulary
from txl_jax.adaptive import clusters, is_projected
from txl_jax.config import Config, ModelConfig, load, parse_words
from txl_jax.errors import UserError, run_command
from txl_jax.flops import peak_flops
from txl_jax.model import abstract
from txl_jax.throughput import zipf_probabilities

PARTS = ("embedding", "attention", "feed-forward", "softmax", "optimizer")
_WORD = 4
"""Bytes of a float32: parameters, gradients, optimizer state, logits, scores."""
_OPTIMIZER_STATE = {"adam": 2, "adamw": 2, "lamb": 2, "optax_lamb": 2, "adagrad": 1}
"""Words of state for each parameter."""


class Card(NamedTuple):
    """A GPU; numbers from NVIDIA's data sheets."""

    name: str
    bandwidth: float
    """Of its memory, bytes/s."""
    fused: bool
    """Whether attention is one kernel on it (attention_kernel.py) and no score is written."""


CARDS = (
    Card("V100", 900e9, fused=False),
    Card("A100", 1555e9, fused=True),
    Card("H100", 3350e9, fused=True),
    Card("H200", 4800e9, fused=True),
)
"""V100 SXM2 of 16 or 32 GB, A100 SXM of 40 GB, H100 SXM of 80 GB, H200 SXM of 141 GB."""


class Kernel(NamedTuple):
    """What is done between reading from and writing to device memory, all times in a step."""

    part: str
    name: str
    flops: float
    bytes: float


def kernels(cfg: Config, fused: bool) -> list[Kernel]:
    """One device's train step of `cfg`, whose n_token is known.

    Args:
      fused: whether attention is one kernel, forward and backward.

    Raises:
      UserError: attention of another type than 0, or a batch that the devices cannot share.
    """
    model, devices = cfg.model, cfg.cluster.machines * cfg.cluster.gpus
    parts = devices * cfg.train.accumulate
    if model.attn_type != 0:
        raise UserError(f"attn_type is {model.attn_type}; the account is that of attn_type 0")
    if cfg.train.batch % parts:
        raise UserError(f"a batch of {cfg.train.batch} has no {parts} parts of the same size")
    batch = cfg.train.batch // parts
    n_parameters = metrics.count(abstract(model)[1])
    forward_and_backward = [
        *_embedding(model, batch),
        *(
            kernel._replace(flops=model.n_layer * kernel.flops, bytes=model.n_layer * kernel.bytes)
            for kernel in [*_attention(model, batch, fused), *_feed_forward(model, batch)]
        ),
        *_softmax(model, batch),
    ]
    times = cfg.train.accumulate
    return [
        *(
            kernel._replace(flops=times * kernel.flops, bytes=times * kernel.bytes)
            for kernel in forward_and_backward
        ),
        *_optimizer(cfg, n_parameters),
    ]


def seconds(kernel: Kernel, card: Card, dtype: str) -> tuple[float, float]:
    """How long its FLOPs and how long its bytes take at least."""
    peak = peak_flops(card.name, dtype)
    if peak is None:
        raise UserError(f"dtype is {dtype}; peaks are known for float16 and bfloat16")
    return kernel.flops / peak, kernel.bytes / card.bandwidth


def token_shares(cfg: ModelConfig) -> list[float]:
    """What part of the tokens each cluster has, by the law that synthetic tokens follow."""
    probability = zipf_probabilities(cfg.n_token)
    return [float(probability[part.start : part.stop].sum()) for part in clusters(cfg)]


def _embedding(cfg: ModelConfig, batch: int) -> Iterator[Kernel]:
    n, d, c = batch * cfg.tgt_len, cfg.d_model, _item(cfg)
    parts, shares = clusters(cfg), token_shares(cfg)
    read = n * _WORD * sum(share * part.width for share, part in zip(shares, parts, strict=True))
    # With div_val 1 the rows of all clusters are added up before they are projected.
    widths = [part.width for part in parts] if cfg.div_val > 1 else [parts[0].width]
    looked_up = n * c * sum(widths)
    yield Kernel("embedding", "rows of tables", 0, read + looked_up)
    if is_projected(cfg):
        for width in widths:
            yield from _product("embedding", "projection", n, width, d, c)
        # Its gradient is that of every cluster, and is not copied.
        yield Kernel("embedding", "sum of clusters", 0, (len(widths) + 1) * n * d * c)
    yield Kernel("embedding", "gradients of rows", 0, looked_up + 2 * read)


def _attention(cfg: ModelConfig, batch: int, fused: bool) -> Iterator[Kernel]:
    """Of one layer."""
    n, keys, c = batch * cfg.tgt_len, cfg.mem_len + cfg.tgt_len, _item(cfg)
    d, w = cfg.d_model, cfg.n_head * cfg.d_head
    yield from _product("attention", "queries", n, d, w, c)
    yield from _product("attention", "keys and values", n, d, 2 * w, c)
    memory = batch * cfg.mem_len
    yield from _product("attention", "those of memory", memory, d, 2 * w, c, into_input=False)
    # Positions are sinusoids, to which no gradient goes.
    yield from _product("attention", "positions", keys, d, w, c, into_input=False)
    yield from _mix(cfg, batch, fused)
    yield from _product("attention", "output", n, w, d, c)
    yield from _residual_and_norm("attention", n * d * c, products_of_input=2)
    yield Kernel("attention", "new memory", 0, 2 * batch * cfg.mem_len * d * c)


def _mix(cfg: ModelConfig, batch: int, fused: bool) -> Iterator[Kernel]:
    """Scores by content and by distance, softmax, weighted values."""
    n, keys, c = batch * cfg.tgt_len, cfg.mem_len + cfg.tgt_len, _item(cfg)
    w = cfg.n_head * cfg.d_head
    queries, contexts, positions = n * w * c, batch * keys * w * c, keys * w * c
    product = 2 * n * keys * w
    if fused:
        sums = n * cfg.n_head * _WORD
        read = queries + 2 * contexts + positions
        yield Kernel("attention", "mix", 3 * product, read + queries + sums)
        # Read again, with the result and its gradient; gradients of all four written.
        yield Kernel("attention", "mix, gradients", 6 * product, 2 * read + 2 * queries + sums)
        return
    scores = n * keys * cfg.n_head
    wide, narrow = _WORD * scores, c * scores
    for name, other in (("content", contexts), ("distance", positions)):
        yield Kernel("attention", f"scores by {name}", product, queries + other + wide)
        for of in ("queries", "keys"):
            moved = narrow + queries + other
            yield Kernel("attention", f"scores by {name}, gradients of {of}", product, moved)
    yield Kernel("attention", "softmax", 0, 2 * wide + narrow)
    yield Kernel("attention", "values", product, narrow + contexts + queries)
    yield Kernel("attention", "values, gradients of weights", product, queries + contexts + narrow)
    yield Kernel("attention", "values, gradients of values", product, narrow + queries + contexts)
    yield Kernel("attention", "softmax, gradients", 0, 3 * narrow)
    yield Kernel("attention", "shift, gradients", 0, 2 * narrow)


def _feed_forward(cfg: ModelConfig, batch: int) -> Iterator[Kernel]:
    """Of one layer."""
    n, d, f, c = batch * cfg.tgt_len, cfg.d_model, cfg.d_inner, _item(cfg)
    yield from _product("feed-forward", "inner", n, d, f, c)
    yield from _product("feed-forward", "outer", n, f, d, c)
    yield Kernel("feed-forward", "gradients of relu", 0, n * f * c)  # where it was above 0
    yield from _residual_and_norm("feed-forward", n * d * c, products_of_input=1)


def _softmax(cfg: ModelConfig, batch: int) -> Iterator[Kernel]:
    n, d, c = batch * cfg.tgt_len, cfg.d_model, _item(cfg)
    parts = clusters(cfg)
    for i, (part, share) in enumerate(zip(parts, token_shares(cfg), strict=True)):
        name = f"tail {i}" if i else "head"
        tokens = share * n if i else n
        words = part.stop - part.start + (0 if i else len(parts) - 1)
        if is_projected(cfg):
            yield from _product("softmax", f"{name}, projection", tokens, d, part.width, c)
        yield from _product("softmax", name, tokens, part.width, words, c, result=_WORD)
        logits = tokens * words
        yield Kernel("softmax", f"{name}, sums", 0, _WORD * logits)
        yield Kernel("softmax", f"{name}, gradients", 0, (_WORD + c) * logits)


def _optimizer(cfg: Config, n_parameters: int) -> Iterator[Kernel]:
    sums = 3 * cfg.train.accumulate if cfg.train.accumulate > 1 else 0
    yield Kernel("optimizer", "sums of parts", 0, sums * _WORD * n_parameters)
    yield Kernel("optimizer", "norm of all gradients", 0, _WORD * n_parameters)
    optim = cfg.optim.optim
    state = _OPTIMIZER_STATE.get(optim, int(bool(cfg.optim.momentum)))
    # Reads gradient and parameter, writes the parameter; reads and writes the state.
    words = 3 + 2 * state
    if optim in ("lamb", "optax_lamb"):
        # Writes the update, whose norm it takes; then reads that and the parameter again.
        words += 3
    yield Kernel("optimizer", optim, 0, words * _WORD * n_parameters)


def _product(
    part: str,
    name: str,
    rows: float,
    inner: int,
    columns: int,
    c: int,
    result: int | None = None,
    into_input: bool = True,
) -> Iterator[Kernel]:
    """A product with weights [inner, columns] and its gradients.

    Args:
      result: bytes of an entry of the result, c unless it is given; its gradient has c.
      into_input: whether there is a gradient of what is multiplied.
    """
    flops, weights = 2 * rows * inner * columns, inner * columns
    x, y = rows * inner * c, rows * columns * c
    if c != _WORD:
        yield Kernel(part, f"{name}, weights in 16 bits", 0, (_WORD + c) * weights)
    yield Kernel(part, name, flops, x + c * weights + rows * columns * (result or c))
    if into_input:
        yield Kernel(part, f"{name}, gradients of input", flops, y + c * weights + x)
    yield Kernel(part, f"{name}, gradients of weights", flops, x + y + _WORD * weights)


def _residual_and_norm(part: str, size: int, products_of_input: int) -> Iterator[Kernel]:
    """After a sub-layer, whose input and output have `size` bytes."""
    yield Kernel(part, "residual and norm", 0, 3 * size)
    yield Kernel(part, "residual and norm, gradients", 0, 4 * size)
    # That of the residual, those of the products that read the input, and what they add up to.
    yield Kernel(part, "sum of gradients", 0, (products_of_input + 2) * size)


def _item(cfg: ModelConfig) -> int:
    return _WORD if cfg.dtype == "float32" else 2


@dataclass(frozen=True)
class Arguments:
    """Which experiments to account for."""

    config: tuple[str, ...] = ("one_machine_fp16", "test_1", "nvidia_base")
    """Names of configs in 16 bits: SMALL and LARGE of the fork, and NVIDIA's base."""


def table(name: str, cfg: Config) -> str:
    """The account of a config, in Markdown."""
    cfg = with_known_vocabulary(cfg)
    devices = cfg.cluster.machines * cfg.cluster.gpus
    tokens = cfg.train.batch * cfg.model.tgt_len // devices
    counted = {fused: kernels(cfg, fused) for fused in (True, False)}
    lines = [
        f"**{name}**, {cfg.model.dtype}: {cfg.train.batch // devices} sequences x "
        f"{cfg.model.tgt_len} = {tokens:,} tokens a step on each device",
        "",
        "| | MFLOP a token | kB a token | without the kernel | "
        + " | ".join(f"{card.name}, ms" for card in CARDS)
        + " |",
        "| --- |" + " ---: |" * (3 + len(CARDS)),
    ]
    for part in (*PARTS, "all"):
        own = {
            fused: [kernel for kernel in found if part in (kernel.part, "all")]
            for fused, found in counted.items()
        }
        cells = [
            f"{sum(kernel.flops for kernel in own[True]) / tokens / 1e6:,.1f}",
            *(f"{sum(k.bytes for k in own[fused]) / tokens / 1e3:,.0f}" for fused in (True, False)),
            *(_cell(own[card.fused], card, cfg.model.dtype) for card in CARDS),
        ]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    rates = []
    for card in CARDS:
        least = sum(max(seconds(k, card, cfg.model.dtype)) for k in counted[card.fused])
        rates.append(f"{tokens / least:,.0f}")
    lines.append("| tokens/s at most | | | | " + " | ".join(rates) + " |")
    return "\n".join(lines)


def _cell(own: list[Kernel], card: Card, dtype: str) -> str:
    """Least time, and what of it goes to kernels that memory bounds."""
    times = [seconds(kernel, card, dtype) for kernel in own]
    least = sum(map(max, times))
    memory = sum(moving for computing, moving in times if moving > computing)
    return f"{1000 * least:.2f} ({memory / least:.0%})"


def main(words: list[str]) -> None:
    arguments = parse_words(Arguments, None, "python -m bench.roofline", __doc__ or "", words)
    print("\n\n".join(table(name, load(name)) for name in arguments.config))


if __name__ == "__main__":
    run_command(main)
