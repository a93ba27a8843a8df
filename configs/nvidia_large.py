"""WikiText-103 by NVIDIA's recipe, large model, on 8 GPUs in float16: 285 million parameters.

    python -m txl_jax.train --local --config nvidia_large

Source: pytorch/wt103_large.yaml in PyTorch/LanguageModeling/Transformer-XL of NVIDIA's
DeepLearningExamples, the settings for 8 A100 in float16. On GPUs of 16 GB add --accumulate 4.

Expect: test perplexity 18.2 with tgt_len 128, mem_len 1600, clamp_len 1000 and same_length, in 430
min on 8 A100 or 984 min on 8 V100 of 16 GB (NVIDIA's README). 4.9 billion tokens.
"""

from configs._nvidia import large
from txl_jax.config import Config


def config() -> Config:
    return large()
