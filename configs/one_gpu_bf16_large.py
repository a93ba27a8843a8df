"""WikiText-103 on one modern GPU in bfloat16: NVIDIA's recipe for its large model.

    python -m txl_jax.train --local --config one_gpu_bf16_large

Source: as nvidia_large; bfloat16 needs no loss scaling. A step is split into 8 parts of 16
sequences, as many as NVIDIA puts on an A100.

Expect: test perplexity 18.2, as nvidia_large. At the 25,000 tokens/s that NVIDIA reports for one
A100 in float16, 55 hours.
"""

from dataclasses import replace

from configs._machines import ONE_L40S
from configs._nvidia import LARGE, large
from txl_jax.config import Config


def config() -> Config:
    return large(replace(LARGE, dtype="bfloat16"), accumulate=8, cluster=ONE_L40S)
