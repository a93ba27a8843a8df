"""EC2 machines for experiments that are not from EC2: their GPUs divide the batch, hold the model.

What a GPU has to hold was read off `python -m txl_jax.sharding report`; JAX takes three quarters of
a GPU's memory.
"""

from txl_jax.config import ClusterConfig

ONE_L40S = ClusterConfig(gpus=1, instance_type="g6e.2xlarge")
"""45 GiB. EC2 has no machine with one A100."""
FOUR_A10G = ClusterConfig(gpus=4, instance_type="g5.12xlarge")
"""22 GiB each."""
EIGHT_A100 = ClusterConfig(gpus=8, instance_type="p4d.24xlarge")
"""40 GiB each."""
EIGHT_A100_80 = ClusterConfig(gpus=8, instance_type="p4de.24xlarge")
"""80 GiB each."""
