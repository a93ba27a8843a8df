"""The mesh of all devices, and what is split over it and what is repeated.

There is one mesh axis, `data`. The batch and the segment memory are split by sequence. Parameters,
and what the optimizer keeps for each of them, are repeated on every device, or split too: with
`zero` they are made whole once a step, with `fsdp` layer by layer.

Letters of parameters' axes: L layers, D d_model, N heads, H d_head, F d_inner, V vocabulary and E
embedding width of a cluster, C tails, K learned positions, 2 keys and values.

`python -m txl_jax.sharding report --config NAME` says what that comes to; see `account`.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from txl_jax.config import Config
from txl_jax.errors import UserError, run_command
from txl_jax.model import abstract, stacked

DATA = "data"
"""The mesh axis."""


class Rule(NamedTuple):
    """The axes of a parameter, and over which of them it may be split."""

    axes: str
    """A letter for each axis."""
    split: str = ""
    """Letters in the order in which they are tried; the first axis that the devices divide is
    split. Only what the model uses in `dtype` and nowhere in float32 has any: it is gathered in
    that type. The rest is less than a hundredth of a model, and whole on every device."""


RULES = {
    "embedding/tables/*": Rule("VE", "VE"),
    "embedding/projections/*": Rule("DE", "DE"),
    "output/tables/*": Rule("VE", "VE"),
    "output/projections/*": Rule("DE", "DE"),
    "output/biases/*": Rule("V"),
    "output/cluster_weight": Rule("CE"),
    "output/cluster_bias": Rule("C"),
    "r_w_bias": Rule("NH"),
    "r_r_bias": Rule("NH"),
    "layers/w_q": Rule("LDNH", "DNH"),
    "layers/w_kv": Rule("LD2NH", "DNH"),
    "layers/w_r": Rule("LDNH", "DNH"),
    "layers/w_o": Rule("LNHD", "DNH"),
    "layers/w_in": Rule("LDF", "DF"),
    "layers/w_out": Rule("LFD", "FD"),
    "layers/r_emb": Rule("LKNH", "NHK"),
    "layers/b_in": Rule("LF"),
    "layers/b_out": Rule("LD"),
    "layers/r_w_bias": Rule("LNH"),
    "layers/r_bias": Rule("LKN"),
    "layers/norm_*/*": Rule("LD"),
}
"""For each parameter, by its path; with untie_r, r_w_bias and r_r_bias have an axis L before."""


def make_mesh() -> Mesh:
    """All devices of all processes along the axis `data`."""
    return Mesh(np.asarray(jax.devices()), (DATA,))


def split(mesh: Mesh, axis: int) -> NamedSharding:
    """Arrays whose axis number `axis` runs over sequences."""
    return NamedSharding(mesh, split_spec(axis))


def split_spec(axis: int) -> PartitionSpec:
    """The partition of arrays whose axis number `axis` is split over the devices."""
    return PartitionSpec(*(None,) * axis, DATA)


def repeated(mesh: Mesh) -> NamedSharding:
    """Arrays of which every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch: int) -> slice:
    """The sequences of a batch of `batch` that this process's devices hold."""
    per_process = batch // jax.process_count()
    first = jax.process_index() * per_process
    return slice(first, first + per_process)


@dataclass(frozen=True, eq=False)
class Layout:
    """How parameters lie on the devices, and how they become whole.

    What the methods `gather` and `sum_gradients` do happens on one device, inside `jax.shard_map`.
    """

    mesh: Mesh
    axes: Any
    """Tree like the parameters': the axis that is split, -1 if none is."""
    dtype: str
    """Type in which split parameters are gathered."""
    by_layer: bool
    """Whether layers are gathered one after another in the model, or all of them before it."""

    @staticmethod
    def of(cfg: Config, mesh: Mesh) -> "Layout":
        """The layout that the config asks for; nothing is split where there is one device.

        Raises ValueError if not exactly one rule is that of a parameter, or its axes do not fit.
        """
        _, params = abstract(cfg.model)
        whole = mesh.devices.size == 1 or not (cfg.cluster.zero or cfg.cluster.fsdp)

        def axis(path, leaf):
            rule = _rule(_name(path), leaf, path[0].key in stacked(cfg.model))
            sizes = (leaf.shape[rule.axes.index(letter)] for letter in rule.split)
            divided = [size % mesh.devices.size == 0 for size in sizes]
            if whole or not any(divided):
                return -1
            return rule.axes.index(rule.split[divided.index(True)])

        axes = jax.tree_util.tree_map_with_path(axis, params)
        return Layout(mesh, axes, cfg.model.dtype, cfg.cluster.fsdp and not whole)

    @property
    def specs(self) -> Any:
        """Tree like the parameters': the partition of each."""
        return jax.tree.map(
            lambda axis: split_spec(axis) if axis >= 0 else PartitionSpec(), self.axes
        )

    @property
    def shardings(self) -> Any:
        """Tree like the parameters': how each lies on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs)

    @property
    def is_split(self) -> bool:
        """Whether any parameter is split."""
        return max(jax.tree.leaves(self.axes)) >= 0

    def whole(self, params: Any) -> Any:
        """The parameters with the whole of each on every device, to evaluate or to generate.

        They take 4 bytes a parameter for as long as they are used.
        """
        if not self.is_split:
            return params
        return jax.jit(lambda same: same, out_shardings=repeated(self.mesh))(params)

    @property
    def gather_layer(self) -> Callable[[Any], Any] | None:
        """What makes the parameters of one layer whole, for the model; None if they are already."""
        if not self.by_layer:
            return None
        axes = jax.tree.map(lambda axis: axis - 1, self.axes["layers"])  # without L
        return lambda layer: jax.tree.map(self._whole, layer, axes)

    def gather(self, params: Any) -> Any:
        """The whole parameters, float32, from a device's own part; by layer: all but the layers."""
        return {
            name: part
            if name == "layers" and self.by_layer
            else jax.tree.map(
                lambda x, axis: self._whole(x, axis).astype(x.dtype), part, self.axes[name]
            )
            for name, part in params.items()
        }

    def sum_gradients(self, gradients: Any, others: Any) -> tuple[Any, Any]:
        """Sums over the devices: gradients of what `gather` returned, laid out as the parameters
        are, and any tree of other numbers, whole."""
        if self.mesh.devices.size == 1:
            return gradients, others  # XLA for CPUs would copy them

        def is_summed(path, axis):
            """The gradient of a layer's `gather` has made the sum already."""
            return axis >= 0 and self.by_layer and path[0].key == "layers"

        leaves, tree = jax.tree.flatten(gradients)
        axes = jax.tree_util.tree_leaves_with_path(self.axes)
        whole = [leaf for leaf, (_, axis) in zip(leaves, axes, strict=True) if axis < 0]
        # All in one: XLA makes one all-reduce of it.
        others, whole = jax.lax.psum((others, whole), DATA)
        sums = iter(whole)
        summed = [
            next(sums)
            if axis < 0
            else leaf
            if is_summed(path, axis)
            else jax.lax.psum_scatter(leaf, DATA, scatter_dimension=axis, tiled=True)
            for leaf, (path, axis) in zip(leaves, axes, strict=True)
        ]
        return jax.tree.unflatten(tree, summed), others

    def _whole(self, x: jax.Array, axis: int) -> jax.Array:
        return _gather(x, axis, self.dtype) if axis >= 0 else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axis: int, dtype: str) -> jax.Array:
    """The whole of a float32 array that is split along `axis`, in `dtype`.

    Its gradient is summed over the devices in float32, and each gets its own part.
    """
    return jax.lax.all_gather(x.astype(dtype), DATA, axis=axis, tiled=True)


def _gather_forward(x, axis, dtype):
    return _gather(x, axis, dtype), None


def _gather_backward(axis, dtype, _, gradient):
    wide = gradient.astype(jnp.float32)
    return (jax.lax.psum_scatter(wide, DATA, scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(entry.key) for entry in path)


def _rule(name: str, leaf: Any, over_layers: bool) -> Rule:
    """The one rule for a parameter."""
    found = [rule for pattern, rule in RULES.items() if fnmatch.fnmatchcase(name, pattern)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rules of sharding.RULES are for {name}: it has to be 1")
    (rule,) = found
    if over_layers and not rule.axes.startswith("L"):
        rule = Rule("L" + rule.axes, rule.split)
    if len(rule.axes) != leaf.ndim:
        raise ValueError(f"{name} has shape {leaf.shape} and sharding.RULES says {rule.axes}")
    return rule


def main(words: list[str]) -> int:
    """The command `report`: see `account`."""
    # It needs the train step, which needs this module.
    from txl_jax import account

    if words[:1] != ["report"]:
        named = words[0] if words else "nothing"
        raise UserError(f"{named} is no command of txl_jax.sharding; there is: report")
    return account.main(words[1:])


if __name__ == "__main__":
    run_command(main)
