"""The first parameters of a run, taken from runs that are there already: from one, or two stacked.

`--init-from A`: layer i is layer i of A; embedding, softmax and the rest are A's. If A has fewer
layers than the model, those above stay at their random start; if it has more, its upper ones are
not used. The fork's large model grew into its huge one like this (18 layers, frozen, below 36 new).

`--init-from A --init-upper-from B`, the fork's chimera: A as before, and the layers above A's are
the topmost ones of B. With a B as deep as the model, as in the fork, every layer keeps its place;
with a B that has only the layers wanting, all of it stands on top of A.

Optimizer state, step and memory start fresh. Lengths (tgt_len, mem_len, clamp_len, same_length),
dropout and the type of activations may differ from those of A and B, and so may untie_r in one
direction: where layers shared a pair of biases, each gets a copy of it. With attn_type 1 and 3,
whose tables have tgt_len + mem_len rows, that sum has to be the same.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from txl_jax import sharding
from txl_jax.checkpoint_leaves import by_name
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.model import abstract, stacked
from txl_jax.token_files import TokenFiles
from txl_jax.trained import Trained, load_trained
from txl_jax.vocab import Vocab

_SAME = ("pre_lnorm",)
"""Fields that change what parameters compute, and not their shapes."""


@dataclass(frozen=True)
class Layers:
    """Layers `first` … `stop` - 1 of a model, and where they come from."""

    first: int
    stop: int
    source: int | None
    """0: the lower model, 1: the upper one; None: they stay at their random start."""
    source_first: int = 0
    """Which of the source's layers the first of these is."""

    @property
    def source_stop(self) -> int:
        return self.source_first + self.stop - self.first


class WarmStart:
    """Parameters of one trained model, or of a lower and an upper one, for a model of `cfg`.

    Raises:
      UserError: names what does not fit: another vocabulary, parameters that are missing, unknown
        or of another shape, too few or too many layers.
    """

    def __init__(self, cfg: Config, mesh: Mesh, vocab: Vocab, sources: list[Trained]):
        self._cfg, self._mesh, self._sources = cfg, mesh, sources
        self._over_layers = stacked(cfg.model)
        _check_vocab(sources[0], vocab)
        self._layers = _arrange(cfg.model.n_layer, sources)
        self._params = [_with_own_biases(source, cfg) for source in sources]
        # Of the upper model only layers are used, so the rest of it may have any shape.
        self._params[1:] = [self._only_layers(params) for params in self._params[1:]]
        for number, (source, params) in enumerate(zip(sources, self._params, strict=True)):
            _, expected = abstract(cfg.model)
            self._check_fits(source, params, self._only_layers(expected) if number else expected)

    def params(self, fresh: Any) -> Any:
        """The parameters to start from, laid out as the config wants; `fresh` are random ones."""

        def join(random: jax.Array, *loaded: jax.Array) -> jax.Array:
            parts = [
                random[part.first : part.stop]
                if part.source is None
                else loaded[part.source][part.source_first : part.source_stop]
                for part in self._layers
            ]
            return jnp.concatenate(parts)

        def assemble(fresh: Any, loaded: list[Any]) -> Any:
            return {
                name: jax.tree.map(join, leaves, *(params[name] for params in loaded))
                if name in self._over_layers
                else loaded[0][name]
                for name, leaves in fresh.items()
            }

        shardings = sharding.Layout.of(self._cfg, self._mesh).shardings
        return jax.jit(assemble, out_shardings=shardings)(fresh, self._params)

    def report(self) -> str:
        """Lines that say where every part of the model comes from, and what was not used."""
        names = [str(source.logdir) for source in self._sources]
        steps = [
            f"{name} (best, step {source.step})"
            for name, source in zip(names, self._sources, strict=True)
        ]
        own = sorted(self._params[0].keys() - self._over_layers)
        lines = [
            f"starts from the parameters of {' and '.join(steps)}; optimizer state, step and "
            "memory are new",
            f"  {', '.join(own)}: of {names[0]}",
        ]
        for part in self._layers:
            here = _span(part.first, part.stop)
            if part.source is None:
                n_layer = self._sources[0].cfg.model.n_layer
                lines.append(f"  {here}: random, as {names[0]} has only {n_layer}")
                continue
            there = f"{_span(part.source_first, part.source_stop)} of {names[part.source]}"
            if self._cfg.model.untie_r and not self._sources[part.source].cfg.model.untie_r:
                there += ", each with a copy of the biases that they shared"
            lines.append(f"  {here}: {there}")
        if unused := self._unused():
            lines.append(f"  not used: {'; '.join(unused)}")
        if below := self._cfg.optim.freeze_below:
            lines.append(f"  {_span(0, below)}: not trained (freeze_below {below})")
        return "\n".join(lines)

    def _only_layers(self, params: Any) -> Any:
        return {name: params[name] for name in self._over_layers}

    def _check_fits(self, source: Trained, params: Any, expected: Any) -> None:
        wrong = [
            f"{name} is {there!r} there and {here!r} here"
            for name in _SAME
            for there, here in [(getattr(source.cfg.model, name), getattr(self._cfg.model, name))]
            if there != here
        ]
        n_layer = source.cfg.model.n_layer
        found = {name: leaf.shape for name, leaf in by_name(params).items()}
        wanted = {
            # How many layers there are may differ.
            name: (n_layer, *leaf.shape[1:])
            if name.split("/")[0] in self._over_layers
            else leaf.shape
            for name, leaf in by_name(expected).items()
        }
        wrong += [f"{name} is missing from it" for name in wanted if name not in found]
        wrong += [f"{name} is not part of this model" for name in found if name not in wanted]
        wrong += [
            f"{name} has shape {found[name]}, expected {shape}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ]
        if wrong:
            raise UserError(f"cannot start from {source.logdir}: {'; '.join(wrong)}")

    def _unused(self) -> list[str]:
        """What was read and stands nowhere in the model, in words."""
        unused = []
        for number, source in enumerate(self._sources):
            used = [part for part in self._layers if part.source == number]
            n_layer = source.cfg.model.n_layer
            left = [(0, used[0].source_first), (used[-1].source_stop, n_layer)]
            parts = [_span(first, stop) for first, stop in left if first < stop]
            if number:
                parts += sorted(source.params.keys() - self._over_layers)
            if parts:
                unused.append(f"{', '.join(parts)} of {source.logdir}")
        return unused


def load(cfg: Config, mesh: Mesh, tokens: TokenFiles) -> WarmStart | None:
    """What `cfg` says to start from; None if it says nothing. Nothing is written.

    Raises:
      UserError: as `WarmStart`, or a folder holds no run, or one without a whole checkpoint.
    """
    folders = [folder for folder in (cfg.train.init_from, cfg.train.init_upper_from) if folder]
    if not folders:
        return None
    sources = [load_trained(folder, "best", mesh) for folder in folders]
    return WarmStart(cfg, mesh, tokens.vocab, sources)


def _arrange(n_layer: int, sources: list[Trained]) -> list[Layers]:
    """Which layer of a model of n_layer layers comes from where, from the lowest up."""
    lower = sources[0].cfg.model.n_layer
    layers = [Layers(0, min(lower, n_layer), 0)]
    if len(sources) == 1:
        return layers if lower >= n_layer else [*layers, Layers(lower, n_layer, None)]
    upper = sources[1].cfg.model.n_layer
    a, b = sources[0].logdir, sources[1].logdir
    if lower >= n_layer:
        raise UserError(
            f"{a} has all {n_layer} layers of this model, which leaves none for those of {b}: set "
            f"n_layer to {lower + upper} to stack both, or leave out init_upper_from"
        )
    if lower + upper < n_layer:
        raise UserError(
            f"{a} has {lower} layers and {b} has {upper}, too few for the {n_layer} of this model: "
            f"set n_layer to {lower + upper} or less"
        )
    return [*layers, Layers(lower, n_layer, 1, upper - (n_layer - lower))]


def _with_own_biases(source: Trained, cfg: Config) -> Any:
    """The source's parameters; with a copy of shared biases for each layer if `cfg` unties them."""
    model = source.cfg.model
    if model.untie_r or not cfg.model.untie_r:
        return source.params
    copies = {
        name: jnp.broadcast_to(source.params[name], (model.n_layer, *source.params[name].shape))
        for name in ("r_w_bias", "r_r_bias")
        if name in source.params
    }
    return source.params | copies


def _check_vocab(source: Trained, vocab: Vocab) -> None:
    """Raises UserError unless tokens have the ids that the source's embedding knows them by."""
    if source.vocab == vocab:
        return
    there, here = len(source.vocab), len(vocab)
    differ = (i for i in range(min(there, here)) if source.vocab.decode([i]) != vocab.decode([i]))
    first = next(differ, None)
    what = f"{there} tokens there, {here} here"
    if first is not None:
        what += f"; token {first} is {source.vocab.decode([first])!r} there, "
        what += f"{vocab.decode([first])!r} here"
    raise UserError(
        f"cannot start from {source.logdir}: its vocabulary is another one ({what}); take a run on "
        "the same corpus, or one with the same vocabulary"
    )


def _span(first: int, stop: int) -> str:
    """`layer 3` or `layers 3 to 5`; `stop` is one above the last."""
    return f"layer {first}" if stop == first + 1 else f"layers {first} to {stop - 1}"
