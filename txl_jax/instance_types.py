"""What a prediction has to know of EC2's machines with eight GPUs.

The launcher asks EC2 itself for what it rents; this table is for plans on a machine without an
account.
"""

from dataclasses import dataclass

from txl_jax.config import nearest
from txl_jax.errors import UserError

PRICED = "us-east-1, Linux, September 2026 (p3dn: April 2026)"
"""Where and when the prices were on AWS' list."""


@dataclass(frozen=True)
class InstanceType:
    """An EC2 instance type; numbers from AWS' and NVIDIA's data sheets."""

    name: str
    gpus: int
    gpu: str
    """As `flops.peak_flops` knows it."""
    capability: float
    """Compute capability of the GPUs."""
    nvlink: float
    """What a GPU can send to the others over NVLink, GB/s in one direction."""
    network: float
    """What a host can send to others, over all its network cards, Gbit/s."""
    price: float
    """US dollars an hour on demand."""


TYPES = (
    InstanceType("p3.16xlarge", 8, "V100", 7.0, nvlink=150, network=25, price=24.48),
    InstanceType("p3dn.24xlarge", 8, "V100", 7.0, nvlink=150, network=100, price=31.212),
    InstanceType("p4d.24xlarge", 8, "A100", 8.0, nvlink=300, network=400, price=21.957642),
    InstanceType("p4de.24xlarge", 8, "A100", 8.0, nvlink=300, network=400, price=27.44705),
    InstanceType("p5.48xlarge", 8, "H100", 9.0, nvlink=450, network=3200, price=55.04),
    InstanceType("p5en.48xlarge", 8, "H200", 9.0, nvlink=450, network=3200, price=63.296),
)


def find(name: str) -> InstanceType:
    """The instance type of this name; UserError, naming all that are known, if it is not one."""
    known = {kind.name: kind for kind in TYPES}
    if name not in known:
        raise UserError(
            f"nothing is known of the network of instance type {name!r}{nearest(name, [*known])}; "
            f"--instance-type takes {', '.join(known)}"
        )
    return known[name]
