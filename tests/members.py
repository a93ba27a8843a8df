"""A small run of several processes: `python -m tests.members FOLDER STEPS [WHAT]`.

Steps are sums over all devices; process 0 writes every tenth into FOLDER, and the run goes on from
there. WHAT is `facts=2` if process 2 has other facts than the others, or what it does at step 20:
`bug=2`, `mistake=2`, `device=2`, to have a GPU that fails, `break=2`, to break its connections to
the others, or `slow=2`, to compute for long without a step. Before the first step `late=2` connects
when the others have given up, and `compiles=2` takes as long for its program.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from txl_jax import distributed, sharding, supervise
from txl_jax.distributed import Cluster
from txl_jax.errors import RESTART_STATUS, UserError, run_command
from txl_jax.peers import SILENCE_SECONDS, Peers
from txl_jax.signals import caught_signals

GLOO_SECONDS = 30
"""For which processes on CPUs wait for one another before their first collective."""
DEVICE_ERROR = "INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error"
ROOT = Path(__file__).resolve().parent.parent


class Members:
    """The processes of one run on this machine; each may have a parent. `with` ends them all."""

    def __init__(
        self,
        folder: Path,
        number: int,
        *words: str,
        restarts: int | None = None,
        environs: list[dict[str, str]] | None = None,
        within: list[list[str]] | None = None,
    ):
        """
        Args:
          environs: the variables by which each member finds its cluster, if not JAX's own.
          within: for each member the words before its command, a program that runs it elsewhere.
        """
        folder.mkdir()
        self.logs = [folder / f"log.{i}" for i in range(number)]
        parent = (
            [] if restarts is None else ["txl_jax.supervise", str(restarts), sys.executable, "-m"]
        )
        command = [sys.executable, "-m", *parent, "tests.members", str(folder), *words]
        address = f"127.0.0.1:{free_port()}"
        environs = environs or [
            distributed.environ(Cluster(address, number, i)) for i in range(number)
        ]
        self.started: list[subprocess.Popen[bytes]] = []
        for i, log in enumerate(self.logs):
            with log.open("wb") as output:
                self.started.append(
                    subprocess.Popen(
                        [*(within[i] if within else []), *command],
                        cwd=ROOT,
                        env=os.environ | {"AWS_EC2_METADATA_DISABLED": "true"} | environs[i],
                        stdout=output,
                        stderr=output,
                    )
                )

    def log(self, member: int) -> str:
        return self.logs[member].read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until every member has said so."""
        end = time.monotonic() + 300
        while any(path.read_text().count(text) < times for path in self.logs):
            assert time.monotonic() < end, "\n".join(path.read_text() for path in self.logs)
            time.sleep(0.1)

    def pid(self, member: int) -> int:
        """The newest trainer's, not its parent's."""
        return int(re.findall(r"^process (\d+)$", self.log(member), re.M)[-1])

    def kill(self, member: int, number: signal.Signals) -> None:
        os.kill(self.pid(member), number)

    def statuses(self, *members: int) -> list[int]:
        """Exit statuses of these, when they have ended; of all if none is named."""
        chosen = [self.started[i] for i in members or range(len(self.started))]
        return [process.wait(timeout=300) for process in chosen]

    def __enter__(self) -> "Members":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listening(pid: int) -> dict[str, set[int]]:
    """The addresses and ports at which a process listens."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        sockets.add(os.readlink(entry))
    found: dict[str, set[int]] = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state != "0A" or f"socket:[{rest[5]}]" not in sockets:
                continue
            number, port = local.split(":")
            words = [bytes.fromhex(number[i : i + 8])[::-1] for i in range(0, len(number), 8)]
            address = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
            found.setdefault(address, set()).add(int(port, 16))
    return found


def say(*what: object) -> None:
    print(*what, flush=True)


def break_connections() -> None:
    """As a network does that forgets them; the store's stays."""
    store = int(os.environ[distributed.COORDINATOR].rpartition(":")[2])
    for found in psutil.Process().net_connections("tcp"):
        if found.raddr and store not in (found.laddr.port, found.raddr.port):
            with socket.socket(fileno=os.dup(found.fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def come_late(peers: Peers) -> None:
    """Has this process come to the next collective when the others have given up."""
    meet = peers.gather

    def linger(name: str, value: str) -> list[str]:
        peers.gather = meet
        found = meet(name, value)
        time.sleep(GLOO_SECONDS + 3)
        return found

    peers.gather = linger


def run(peers: Peers, me: int, folder: Path, steps: int, does: str, who: int) -> int:
    here = {"code": "0" * 64, "jax": "0.11.0"} if who == me and does == "facts" else {}
    peers.check_same({"code": "f" * 64, "jax": "0.10.2", "python": "3.11"} | here)
    mesh = sharding.make_mesh()
    if who == me and does == "late":
        come_late(peers)
    peers.connect(mesh)
    saved = folder / "step"
    n = max(
        int(text or 0)
        for text in peers.gather("start", saved.read_text() if saved.exists() else "")
    )
    say("begins after", n)
    values = np.ones(len(jax.local_devices()), np.float32)
    x = jax.make_array_from_process_local_data(sharding.split(mesh, 0), values)

    def sums(own: jax.Array) -> jax.Array:
        if who == me and does == "compiles":
            time.sleep(GLOO_SECONDS + 3)
        for_each = jnp.tile(own.sum(), mesh.devices.size)
        return jax.lax.psum_scatter(for_each, sharding.DATA, tiled=True)

    specs = sharding.split_spec(0)
    add_up = peers.compiled(
        jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=specs)), x
    )
    stop = False
    with caught_signals(peers.several):
        while n < steps and not stop:
            for shard in add_up(x).addressable_shards:
                assert shard.data == mesh.devices.size
            n += 1
            if n == 20 and who == me and does == "bug":
                raise ZeroDivisionError("a bug")
            if n == 20 and who == me and does == "mistake":
                raise UserError("the disk is full; make room")
            if n == 20 and who == me and does == "device":
                raise jax.errors.JaxRuntimeError(DEVICE_ERROR)
            if n == 20 and who == me and does == "break":
                break_connections()
            if n == 20 and who == me and does == "slow":
                time.sleep(SILENCE_SECONDS + 3)
            if n % 10 == 0:
                say("step", n)
            stop = peers.stop_agreed(n)
            if me == 0 and (n % 10 == 0 or stop):
                saved.write_text(str(n))
            time.sleep(0.02)
    say("all well", peers.everyone(True), "one not", peers.everyone(me != 1))
    say("ends after", n)
    return RESTART_STATUS if stop else 0


def main(words: list[str]) -> int:
    folder, steps, does, _, who = *words[:2], *(words[2:] or [""])[0].partition("=")
    supervise.is_child()
    cluster = distributed.find(local=False)
    say("process", os.getpid())
    with Peers.join(cluster) as peers:
        me = cluster.process if cluster else 0
        peers.before_end((Path(folder) / f"last.{me}").touch)
        say("NCCL", *map(os.environ.get, ("NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY")))
        return run(peers, me, Path(folder), int(steps), does, int(who or -1))


if __name__ == "__main__":
    run_command(main)
