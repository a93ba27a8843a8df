"""WikiText-103 by NVIDIA's recipe, base model, on 8 GPUs in float16: 192 million parameters.

    python -m txl_jax.train --local --config nvidia_base

Source: pytorch/wt103_base.yaml in PyTorch/LanguageModeling/Transformer-XL of NVIDIA's
DeepLearningExamples, the settings for 8 GPUs in float16.

Expect: test perplexity 23.2 with tgt_len 64, mem_len 640, clamp_len 400 and same_length, in 76 min
on 8 A100 or 121 min on 8 V100 of 16 GB (NVIDIA's README). 1.97 billion tokens.
"""

from configs._nvidia import base
from txl_jax.config import Config


def config() -> Config:
    return base()
