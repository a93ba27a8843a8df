"""A small run of several processes: `python -m tests.members FOLDER STEPS [WHAT]`.

Steps are sums over all devices; process 0 writes every tenth into FOLDER, and the run goes on from
there. WHAT: `bug=2`, `mistake=2`: what process 2 does after step 20; `facts=2`: it has other facts.
"""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from txl_jax import distributed, sharding, supervise
from txl_jax.errors import RESTART_STATUS, UserError, run_command
from txl_jax.peers import Peers
from txl_jax.signals import caught_signals


def say(*what: object) -> None:
    print(*what, flush=True)


def run(peers: Peers, me: int, folder: Path, steps: int, does: str, who: int) -> int:
    here = {"code": "0" * 64, "jax": "0.11.0"} if who == me and does == "facts" else {}
    peers.check_same({"code": "f" * 64, "jax": "0.10.2", "python": "3.11"} | here)
    mesh = sharding.make_mesh()
    values = np.ones(len(jax.local_devices()), np.float32)
    x = jax.make_array_from_process_local_data(sharding.split(mesh, 0), values)
    add_up = jax.jit(jnp.sum, out_shardings=sharding.repeated(mesh))
    saved = folder / "step"
    n = max(
        int(text or 0)
        for text in peers.gather("start", saved.read_text() if saved.exists() else "")
    )
    say("begins after", n)
    stop = False
    with caught_signals(peers.several):
        while n < steps and not stop:
            assert float(add_up(x)) == mesh.devices.size
            n += 1
            if n == 20 and who == me and does == "bug":
                raise ZeroDivisionError("a bug")
            if n == 20 and who == me and does == "mistake":
                raise UserError("the disk is full; make room")
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
        return run(peers, me, Path(folder), int(steps), does, int(who or -1))


if __name__ == "__main__":
    run_command(main)
