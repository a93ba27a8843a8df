"""The evaluation settings behind the paper's numbers, by data set and size of the model.

Source: the `eval` part of pytorch/run_DATASET_SIZE.sh of kimiyoung/transformer-xl. A preset has the
name of the config in `configs/` that trains the model. The scripts' batch is left out: an exact
evaluation does not depend on it.
"""

from dataclasses import dataclass

from txl_jax.config import nearest
from txl_jax.errors import UserError


@dataclass(frozen=True)
class Preset:
    """Settings of a `ModelConfig` that an evaluation may change."""

    tgt_len: int
    mem_len: int
    clamp_len: int
    same_length: bool = True


PRESETS = {
    "wt103_base": Preset(tgt_len=64, mem_len=640, clamp_len=400),
    "wt103_large": Preset(tgt_len=128, mem_len=1600, clamp_len=1000),
    "enwik8_base": Preset(tgt_len=80, mem_len=2100, clamp_len=820),
    "enwik8_large": Preset(tgt_len=128, mem_len=3800, clamp_len=1000),
    "text8_base": Preset(tgt_len=80, mem_len=2100, clamp_len=820),
    "text8_large": Preset(tgt_len=128, mem_len=3800, clamp_len=1000),
    "lm1b_base": Preset(tgt_len=32, mem_len=128, clamp_len=-1),
    "lm1b_large": Preset(tgt_len=32, mem_len=128, clamp_len=-1),
}


def find(name: str) -> Preset:
    """The preset of this name, written with `_` or `-`; UserError where there is none."""
    written = name.replace("-", "_")
    if written not in PRESETS:
        raise UserError(
            f"there is no preset {name!r}{nearest(written, list(PRESETS))}; there are: "
            f"{', '.join(PRESETS)}"
        )
    return PRESETS[written]
