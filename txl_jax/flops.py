"""How many floating-point operations training takes, and how many a device can do.

Letters: T tgt_len, M mem_len, S = M + T keys, D d_model, E d_embed, V vocabulary.
"""

from jax.sharding import Mesh

from txl_jax.adaptive import is_projected
from txl_jax.config import ModelConfig

# Dense 16-bit matrix products with 32-bit sums, FLOP/s of one device, from NVIDIA's data sheets.
_PEAK = {"V100": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device of this kind at best, or None where that is not known."""
    if dtype == "float32":
        return None
    return next((flops for name, flops in _PEAK.items() if name in device_kind), None)


def utilization(cfg: ModelConfig, tokens_per_sec: float, mesh: Mesh) -> float | None:
    """Model FLOP/s of training as a fraction of the mesh's peak (MFU); None if it is not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind, cfg.dtype)
    if peak is None:
        return None
    return tokens_per_sec * train_flops_per_token(cfg) / (mesh.devices.size * peak)


def train_flops_per_token(cfg: ModelConfig) -> float:
    """FLOPs of matrix products to train on one token: forward, and twice that backward.

    Keys and values of memory are counted, since each segment computes them anew, but nothing goes
    back through them, unless learned positions were added (attn_type 3). Recomputation (remat) is
    not counted, nor are the tails of an adaptive softmax, a few percent, which hang on the text.
    """
    tgt_len, keys = cfg.tgt_len, cfg.mem_len + cfg.tgt_len
    width = cfg.n_head * cfg.d_head
    d_embed = cfg.d_embed or cfg.d_model
    per_segment = 2 * cfg.d_model * width * (2 * tgt_len + 2 * keys)
    # Scores by content, scores by distance where positions are relative, weighted values.
    products = 3 if cfg.attn_type in (0, 1) else 2
    per_segment += products * 2 * tgt_len * keys * width
    per_segment += 2 * 2 * tgt_len * cfg.d_model * cfg.d_inner
    scored = cfg.cutoffs[0] + len(cfg.cutoffs) if cfg.cutoffs else cfg.n_token
    per_token = cfg.n_layer * per_segment / tgt_len + 2 * d_embed * scored
    if is_projected(cfg):
        per_token += 2 * 2 * cfg.d_model * d_embed
    into_memory = 0 if cfg.attn_type == 3 else 2 * cfg.d_model * width * 2 * cfg.mem_len
    return 3 * per_token - cfg.n_layer * into_memory / tgt_len
