"""Where the processes of a run listen, on hosts with a private and a public network."""

import pytest

from tests.members import Members, listening
from txl_jax import distributed
from txl_jax.distributed import Cluster

pytest_plugins = ["tests.namespaces"]
pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    "addresses, family", [("private", None), ("private6", "AF_INET6")], ids=["IPv4", "IPv6"]
)
def test_all_that_listens_is_in_the_private_network(hosts, tmp_path, addresses, family):
    own = getattr(hosts, addresses)
    coordinator = f"[{own[0]}]:4321" if family else f"{own[0]}:4321"
    environs = [distributed.environ(Cluster(coordinator, len(own), i)) for i in range(len(own))]
    environs[2]["NCCL_SOCKET_IFNAME"] = "eth"
    within = [hosts.within(i) for i in range(len(own))]
    folder = tmp_path / "run"
    with Members(folder, len(own), "1000000", environs=environs, within=within) as run:
        run.wait_for("step 20\n")
        for i, address in enumerate(own):
            assert list(listening(run.pid(i))) == [address]
            assert f"NCCL {'eth None' if i == 2 else f'=private {family}'}\n" in run.log(i)
