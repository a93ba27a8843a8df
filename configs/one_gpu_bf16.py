"""WikiText-103 on one modern GPU in bfloat16: NVIDIA's recipe for its base model.

    python -m txl_jax.train --local --config one_gpu_bf16

Source: as nvidia_base; bfloat16 needs no loss scaling. A step is split into 4 parts of 64
sequences, for less memory; more memory allows --accumulate 2 or 1.

Expect: test perplexity 23.2, as nvidia_base. At the 60,000 tokens/s that NVIDIA reports for one
A100 in float16, 9 hours.
"""

from dataclasses import replace

from configs._machines import ONE_L40S
from configs._nvidia import BASE, base
from txl_jax.config import Config


def config() -> Config:
    return base(replace(BASE, dtype="bfloat16"), accumulate=4, cluster=ONE_L40S)
