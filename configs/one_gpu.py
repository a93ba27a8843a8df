"""WikiText-103 on one GPU: the fork's SMALL with LAMB, 32 sequences.

    python -m txl_jax.train --local --config one_gpu

Source: `one_gpu` in launch.py of cybertronai/transformer-xl (a p3.2xlarge, one V100 of 16 GB).
Where EC2 has none left: --instance-type g5.2xlarge.

Expect: a test perplexity near that of one_machine, 24.6; the fork published none for this run. At
the 14,000 tokens/s that NVIDIA reports for a model of about this size on one V100 in float32, 30
hours; at the 37,000 in float16 (--dtype float16), 11 hours.
"""

from configs._fork import SMALL, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(
        SMALL, base_lr=0.000125 * 5 / 3 * 5, batch=32, gpus=1, instance_type="p3.2xlarge"
    )
