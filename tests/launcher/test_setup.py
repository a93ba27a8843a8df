"""Hosts are prepared through real sshds and tmux; what would change this machine is a stand-in."""

import dataclasses
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import corpus, setup
from launcher.aws import Account
from launcher.on_host import keeper
from launcher.remote import Hosts
from launcher.setup import Work
from launcher.shared import Shared
from txl_jax.config import DataConfig
from txl_jax.errors import UserError

pytest_plugins = ["tests.buckets", "tests.launcher.sshd"]

pytestmark = [pytest.mark.processes, pytest.mark.cloud]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ["install.py", "requirements.txt", "requirements.lock", "configs", "launcher", "txl_jax"]
NASTY = ["a'b", '"', "$(touch pwned)", "`touch pwned`", "; touch pwned", "two\nlines", "-x", "*"]
HEALTH = {
    "hosts": 2,
    "devices": 16,
    "network": "EFA",
    "bytes": 128 << 20,
    "ms": 25.0,
    "bus_gbps": 80.0,
    "warnings": [],
}

# Of a host: makes an environment without installing anything.
PYTHON3 = f"""
case "$1" in
*/install.py)
    echo "install $*" >>~/calls
    [ ! -e ~/install-fails ] || {{ echo "ERROR: no matching distribution"; exit 1; }}
    mkdir -p "$2/bin" && cp ~/environment-python "$2/bin/python" && exit;;
esac
exec {sys.executable} "$@"
"""
# Its python: the health check and the trainer are stand-ins, the rest is real.
ENVIRONMENT_PYTHON = f"""#!/bin/bash
case "$2" in
txl_jax.health) echo "health $*" >>~/calls; . ~/health;;
txl_jax.train)
    printf '%s\\0' "$@" >~/trainer-words
    env >~/trainer-environ
    echo "train" >>~/calls
    echo "step 1"
    . ~/trainer
    exit 0;;
*) exec {sys.executable} "$@";;
esac
"""
TRAINER = "trap 'echo saved; exit 75' TERM; while :; do sleep 0.1; done"
APT_GET = 'echo "apt-get $*" >>~/calls; [ ! -e ~/apt-fails ]'
SMI = 'echo "smi $*" >>~/calls; [ "$1" != -L ] || seq 0 7 | sed "s/.*/GPU &: Tesla V100/"'


SYSTEMCTL = '[ "$*" = "is-active --quiet txl-keeper" ] && [ ! -e ~/no-keeper ]'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts wait as long as they have to here."""
    monkeypatch.setattr(setup, "_GPU_SECONDS", 1)
    monkeypatch.setattr(setup, "_LIVE_SECONDS", 1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as the hosts get it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in SOURCE:
            tar.add(ROOT / name, name, filter=lambda e: None if "__pycache__" in e.name else e)
    path = tmp_path_factory.mktemp("source") / "source.tar.gz"
    path.write_bytes(gzip.compress(packed.getvalue(), 1))
    return path


class Bench:
    """Some hosts with stand-ins, and the work that they are prepared for."""

    def __init__(self, machines: Any, archive: Path):
        self.machines, self.servers = machines, machines.servers
        for server in self.servers:
            server.tool("python3", PYTHON3)
            server.tool("apt-get", APT_GET)
            server.tool("sudo", '[ "$1" != -n ] || shift; exec "$@"')
            server.tool("nvidia-smi", SMI)
            server.tool("modprobe", 'echo "modprobe $*" >>~/calls')
            server.tool("apt-mark", 'echo "apt-mark $*" >>~/calls')
            server.tool("systemctl", SYSTEMCTL)
            server.tool("uname", "echo 6.8.0-1021-aws")
            (server.home / "calls").touch()
            (server.home / "txl").mkdir(mode=0o700)
            (server.home / "txl" / keeper.BOOTED).touch(mode=0o600)
            (server.home / "environment-python").write_text(ENVIRONMENT_PYTHON)
            (server.home / "environment-python").chmod(0o755)
            (server.home / "health").write_text(f"echo '{json.dumps(HEALTH)}'")
            (server.home / "trainer").write_text(TRAINER)
        self.work = Work(
            words=("--config", "quickstart"),
            logdir="",
            output="",
            archive=archive,
            sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
            corpus=None,
            coordinator=self.servers[0].address,
            gpus=8,
            needs_driver=False,
            efa_interfaces=0,
            network_gbps=100.0,
        )
        self.said: list[str] = []

    def hosts(self) -> Hosts:
        return self.machines.hosts()

    def do(self, phases: int = 99, **changes: Any) -> list[str]:
        """Does so many phases; their names."""
        work = dataclasses.replace(self.work, **changes)
        with self.hosts() as hosts:
            names = []
            for name, limit in setup.phases(hosts, work, self.said.append):
                assert limit > 0
                names.append(name)
                if len(names) > phases:
                    break
        return names

    def calls(self, host: int = 0) -> list[str]:
        """What the stand-ins of a host were called with."""
        return (self.servers[host].home / "calls").read_text().splitlines()

    def trainer_words(self, host: int = 0) -> list[str]:
        path = self.servers[host].home / "trainer-words"
        until(path.exists)
        return path.read_text().split("\0")[:-1]


def until(done: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def bench(machines, archive) -> Callable[[int], Bench]:
    return lambda number: Bench(machines(number), archive)


ALL = ["packages", "driver", "source", "Python", "health check", "trainer"]


def test_from_nothing_to_trainers(bench):
    some = bench(2)
    assert some.do() == ALL
    first, second = (server.address for server in some.servers)
    for number in range(2):
        assert some.trainer_words(number) == [
            *("-m", "txl_jax.train", "--config", "quickstart", "--supervise"),
            *("--coordinator", f"{first}:8476"),
            *("--num-processes", "2", "--process-id", str(number)),
        ]
        (check,) = (call for call in some.calls(number) if call.startswith("health"))
        assert check.split()[3:] == [
            *("--gpus", "8", "--gbps", "100", "--coordinator", f"{first}:8477"),
            *("--num-processes", "2", "--process-id", str(number)),
        ]
        environ = (some.servers[number].home / "trainer-environ").read_text().splitlines()
        assert "JAX_PLATFORMS=cuda,cpu" in environ
    assert second not in " ".join(some.trainer_words(1))
    with some.hosts() as hosts:
        assert setup.is_training(hosts)
        (output, _) = hosts.run("cat ~/txl/output.txt", timeout=300)
    assert output.out.splitlines()[1] == "step 1"
    assert some.said == [
        "an all-reduce of 128 MiB over 16 devices took 25.0 ms, 80.0 Gbit/s of bus bandwidth "
        "through EFA"
    ]


def test_nobody_else_can_read_what_is_on_a_host(bench):
    some = bench(1)
    some.do()
    some.trainer_words()
    open_to_others = [
        path
        for path in (some.servers[0].home / "txl").iterdir()
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    assert not open_to_others


@pytest.mark.parametrize("phases", range(len(ALL)))
def test_broken_off_after_any_phase_and_done_again(bench, phases):
    some = bench(2)
    assert len(some.do(phases=phases)) == phases + 1
    some.do()
    for number in range(2):
        some.trainer_words(number)
        calls = some.calls(number)
        assert calls.count("train") == 1
        assert sum(call.startswith("install") for call in calls) == 1


def test_one_set_up_at_a_time(bench):
    """What was cut off goes on for a while on its host, and another begins."""
    some = bench(1)
    folder = some.servers[0].home / "txl"
    words = ["flock", str(folder / "lock"), "sh", "-c", "sleep 3; touch $0", str(folder / "over")]
    with subprocess.Popen(words) as other:
        until((folder / "lock").exists)
        some.do(phases=1)
        assert (folder / "over").exists()
        assert other.wait() == 0
    with some.hosts() as hosts:
        (condition,) = setup.conditions(hosts)  # it may be asked meanwhile
        assert (condition.training, condition.status) == (False, None)


def test_a_set_up_does_not_wait_for_ever_for_another(bench, monkeypatch):
    monkeypatch.setattr(setup, "_PACKAGES", 2.0)
    some = bench(1)
    folder = some.servers[0].home / "txl"
    with subprocess.Popen(["flock", str(folder / "lock"), "sleep", "60"]) as other:
        until((folder / "lock").exists)
        with pytest.raises(UserError, match=r"another set-up is at work here|took longer than 2 s"):
            some.do()
        with some.hosts() as hosts:
            (condition,) = setup.conditions(hosts)
            assert (condition.training, condition.status, condition.busy) == (False, None, True)
        subprocess.run(["pkill", "-P", str(other.pid)])


def test_every_phase_is_a_sign_of_life(bench, tmp_path):
    some = bench(1)
    mark = some.servers[0].home / "txl" / keeper.SET_UP
    work = dataclasses.replace(some.work, **with_text(tmp_path / "text"))
    done: list[str] = []
    began = int(time.time())
    with some.hosts() as hosts:
        for name, _ in setup.phases(hosts, work, some.said.append):
            assert not done or mark.stat().st_mtime > 1, done
            if done:
                os.utime(mark, (1, 1))
            done.append(name)
        assert mark.stat().st_mtime > 1
        os.utime(mark, (1, 1))
        setup.stop_trainer(hosts)
        assert mark.stat().st_mtime == 1
    assert done == [*ALL[:4], "data", *ALL[4:]]
    assert began <= int(mark.read_text()) <= time.time()


def test_an_old_host_lives_through_another_set_up(bench):
    some = bench(1)
    some.do()
    some.trainer_words()
    with some.hosts() as hosts:
        setup.stop_trainer(hosts)
        folder = some.servers[0].home / "txl"
        for hours, name in enumerate([keeper.STATUS, keeper.PID, keeper.BOOTED], 4):
            long_ago = time.time() - 3600 * hours
            os.utime(folder / name, (long_ago, long_ago))
        names: list[str] = []
        for name, _ in setup.phases(hosts, some.work, some.said.append):
            due = keeper.deadline(keeper.StopRules(), folder)
            assert due.time > time.time() or not names, (names, due.why)
            names.append(name)
    due = keeper.deadline(keeper.StopRules(), folder)
    assert due.time > time.time() and due.why == "training makes no steps"


def test_where_all_train_nothing_is_done(bench):
    some = bench(1)
    some.do()
    some.trainer_words()
    before = some.calls()
    assert some.do() == []
    assert some.calls() == before


def test_what_else_a_person_does_in_the_session_does_not_matter(bench):
    some = bench(1)
    some.do()
    some.trainer_words()
    with some.hosts() as hosts:
        hosts.run("tmux split-window -d -t =txl: 'exit 3'", timeout=300)
        hosts.run("tmux split-window -t =txl: 'exec sleep 600'", timeout=300)
        hosts.run("tmux new-window -d -t =txl: 'exec sleep 600'", timeout=300)
        assert setup.is_training(hosts)
        assert some.do() == []
        setup.stop_trainer(hosts)
        assert [condition.status for condition in setup.conditions(hosts)] == [75]
    assert some.do()[-1] == "trainer"
    until(lambda: some.calls().count("train") == 2)


def test_hosts_tell_how_it_stands(bench):
    some = bench(2)
    nothing = setup.Condition(False, None, trainer=-1.0, set_up=-1.0, busy=False)
    with some.hosts() as hosts:
        assert setup.conditions(hosts) == [nothing, nothing]
    some.do()
    for number in range(2):
        some.trainer_words(number)
    (some.servers[0].home / "txl" / "status").write_text("3\n")
    with some.hosts() as hosts:
        for name, age in ((keeper.PID, 7200), ("set-up", 7260)):
            hosts.run(f"touch -d '-{age} seconds' ~/txl/{name}", timeout=300)
        with (some.servers[1].home / "txl" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            first, second = setup.conditions(hosts)
        assert not setup.conditions(hosts)[1].busy
    assert (first.training, first.status, first.busy) == (False, 3, False)
    assert (second.training, second.status, second.busy) == (True, None, True)
    assert 7200 <= second.trainer < second.set_up


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("training\n7\n60\nidle\n", setup.Condition(True, None, 7.0, 60.0, False)),
        ("training\n7\n-1\nbusy\n", setup.Condition(True, None, 7.0, -1.0, True)),
        ("ended 0\n7\n60\nidle\n", setup.Condition(False, 0, 7.0, 60.0, False)),
        ("ended 137\n7\n60\nidle\n", setup.Condition(False, 137, 7.0, 60.0, False)),
        ("ended \n7\n60\nidle\n", setup.Condition(False, None, 7.0, 60.0, False)),
        ("nothing\n-1\n-1\nidle\n", setup.Condition(False, None, -1.0, -1.0, False)),
    ],
)
def test_what_a_host_tells_is_read(told, found):
    assert setup._condition("night-0", told.split("\n")) == found


@pytest.mark.parametrize(
    "told",
    [
        *("", "training\n", "training\n7\n60", "ended x\n7\n60\nidle", "\x1b[2J"),
        "training\n\n60\nidle",
    ],
)
def test_a_host_that_does_not_tell_is_named(told):
    with pytest.raises(UserError, match=r"night-0 does not tell how it stands: ") as caught:
        setup._condition("night-0", told.split("\n"))
    assert str(caught.value).isprintable()


def test_where_one_trains_the_other_is_started(bench):
    some = bench(2)
    some.do()
    for number in range(2):
        some.trainer_words(number)
    some.machines.servers = some.servers[:1]
    with some.hosts() as hosts:
        setup.stop_trainer(hosts)
    some.machines.servers = some.servers
    assert "health check" not in some.do()
    until(lambda: some.calls(0).count("train") == 2)
    assert some.calls(1).count("train") == 1


def test_words_reach_the_trainer_as_they_are(bench):
    some = bench(1)
    some.do(words=tuple(NASTY), logdir="runs/a $(touch pwned) 'b'")
    words = some.trainer_words()
    assert words[2 : 2 + len(NASTY)] == NASTY
    assert words[-1] == "runs/a $(touch pwned) 'b'"
    home = some.servers[0].home
    assert not [*home.rglob("pwned"), *Path.home().glob("pwned"), *ROOT.glob("pwned")]
    link = os.readlink(home / "txl" / "heartbeats")
    assert link == "work/runs/a $(touch pwned) 'b'/heartbeats"


def test_the_trainer_is_asked_to_save_and_its_status_kept(bench):
    some = bench(2)
    with some.hosts() as hosts:
        setup.stop_trainer(hosts)  # none is there yet
    some.do()
    for number in range(2):
        some.trainer_words(number)
    with some.hosts() as hosts:
        setup.stop_trainer(hosts)
        assert not setup.is_training(hosts)
        for output in hosts.run("cat ~/txl/status; tail -n 1 ~/txl/output.txt", timeout=300):
            assert output.out == "75\nsaved\n"
        # What it said last can be looked at.
        (pane, _) = hosts.run("tmux capture-pane -p -S - -t =txl:", timeout=300)
        assert "saved" in pane.out


def test_a_trainer_that_does_not_save_in_time_is_named(bench):
    some = bench(1)
    (some.servers[0].home / "trainer").write_text("trap '' TERM; sleep 30")
    some.do()
    some.trainer_words()
    with some.hosts() as hosts, pytest.raises(UserError, match="night-0: the trainer did not end"):
        setup.stop_trainer(hosts, timeout=1)


@pytest.mark.parametrize(
    "keys, signal", [("kill-session -t =txl", "TERM"), ("send-keys -t =txl: C-c", "INT")]
)
def test_ctrl_c_and_the_end_of_the_session_reach_the_trainer(bench, keys, signal):
    some = bench(1)
    home = some.servers[0].home
    (home / "trainer").write_text(TRAINER.replace("TERM", signal))
    some.do()
    some.trainer_words()
    with some.hosts() as hosts:
        hosts.run(f"tmux {keys}", timeout=300)
        until((home / "txl" / "status").exists)
    assert (home / "txl" / "status").read_text() == "75\n"
    assert (home / "txl" / "output.txt").read_text().endswith("saved\n")


def test_a_trainer_that_cannot_start_says_why(bench):
    some = bench(1)
    (some.servers[0].home / "environment-python").write_text(
        "#!/bin/bash\n[ $2 = txl_jax.health ] && . ~/health && exit\necho no module x; exit 1\n"
    )
    with pytest.raises(UserError, match=r"night-0: the trainer did not start: no module x"):
        some.do()
    assert (some.servers[0].home / "txl" / "status").read_text() == "1\n"


LAST_MOMENTS = """case "$1" in new-session)
    if [ ! -e ~/no-server ]; then touch ~/no-server; echo server exited unexpectedly >&2; exit 1; fi
esac
"""


def test_a_server_of_tmux_in_its_last_moments_is_asked_once_more(bench):
    some = bench(1)
    home = some.servers[0].home
    some.servers[0].tool("tmux", LAST_MOMENTS + f'exec {shutil.which("tmux")} "$@"')
    assert some.do() == ALL
    assert some.trainer_words()
    assert (home / "no-server").exists()
    some.servers[0].tool("tmux", '[ "$1" != new-session ] || { echo full >&2; exit 1; }')
    (home / "txl" / "status").touch()
    with pytest.raises(UserError, match="night-0: tmux does not start the trainer: full"):
        some.do()


FIRST_STEP = "mkdir -p runs/a/heartbeats; sleep 0.5; touch runs/a/heartbeats/0.json; "


def test_a_trainer_that_ends_at_once_is_no_training(bench, monkeypatch):
    monkeypatch.setattr(setup, "_LIVE_SECONDS", 100)
    some = bench(2)
    (some.servers[0].home / "trainer").write_text(FIRST_STEP + TRAINER)
    (some.servers[1].home / "trainer").write_text("echo 'error: no such data'; exit 2")
    with pytest.raises(UserError) as caught:
        some.do(logdir="runs/a")
    assert str(caught.value) == (
        "failed on 1 of 2 hosts: night-1: the trainer has ended, with status 2: error: no such data"
    )


def test_a_trainer_with_nothing_left_to_do_is_no_failure(bench, monkeypatch):
    monkeypatch.setattr(setup, "_LIVE_SECONDS", 100)
    some = bench(1)
    (some.servers[0].home / "trainer").write_text("exit 0")
    assert some.do()[-1] == "trainer"


def test_a_first_step_ends_the_look_at_the_trainer(bench, monkeypatch):
    monkeypatch.setattr(setup, "_LIVE_SECONDS", 100_000)
    some = bench(1)
    (some.servers[0].home / "trainer").write_text(FIRST_STEP + TRAINER)
    assert some.do(logdir="runs/a")[-1] == "trainer"


DRIVER = ["linux-modules-nvidia-580-server-6.8.0-1021-aws", "nvidia-headless-no-dkms-580-server"]


def test_a_driver_is_installed_where_there_is_none(bench):
    some = bench(1)
    server = some.servers[0]
    server.tool("nvidia-smi", f"grep -q modprobe ~/calls || exit 9\n{SMI}")
    some.do(phases=1, needs_driver=True)
    assert "driver" in some.do(needs_driver=True)
    installs = [call for call in some.calls() if "install" in call and "apt-get" in call]
    (install,) = installs
    assert install.split()[-3:] == [*DRIVER, "nvidia-utils-580-server"]
    assert "modprobe nvidia" in some.calls() and "smi -pm 1" in some.calls()
    assert f"apt-mark hold {' '.join(install.split()[-3:])}" in some.calls()


def test_modules_are_built_if_ubuntu_has_none_for_the_kernel(bench):
    some = bench(1)
    server = some.servers[0]
    server.tool("nvidia-smi", f"grep -q modprobe ~/calls || exit 9\n{SMI}")
    server.tool("apt-get", f'{APT_GET}\ncase "$*" in *no-dkms*) exit 100;; esac')
    some.do(needs_driver=True)
    assert any("linux-headers-6.8.0-1021-aws nvidia-headless-580-server" in c for c in some.calls())


def test_gpus_that_take_their_time_are_waited_for(bench, monkeypatch):
    monkeypatch.setattr(setup, "_GPU_SECONDS", 300)
    some = bench(1)
    late = 'echo looked >>~/looks; [ "$(wc -l <~/looks)" -gt 2 ] || exit 9\n'
    some.servers[0].tool("nvidia-smi", late + SMI)
    assert some.do(phases=2)[-1] == "source"


@pytest.mark.parametrize("needs_driver", [False, True])
def test_missing_gpus_are_named_with_their_host(bench, needs_driver):
    some = bench(2)
    some.servers[1].tool("nvidia-smi", "echo 'GPU 0: Tesla V100'")
    with pytest.raises(UserError) as caught:
        some.do(needs_driver=needs_driver)
    assert str(caught.value) == (
        "failed on 1 of 2 hosts: night-1: nvidia-smi lists 1 GPUs and should list 8"
    )
    assert any("apt-get" in call for call in some.calls(1)) == needs_driver
    assert not any("apt-get" in call for call in some.calls(0))


def test_a_driver_that_cannot_be_installed(bench):
    some = bench(1)
    some.servers[0].tool("nvidia-smi", "exit 9")
    (some.servers[0].home / "apt-fails").touch()
    with pytest.raises(UserError, match="apt-get cannot install NVIDIA's driver 580-server"):
        some.do(needs_driver=True)


def test_hosts_without_gpus_train_on_their_cpu(bench):
    some = bench(1)
    assert "driver" not in some.do(gpus=0)
    some.trainer_words()
    environ = (some.servers[0].home / "trainer-environ").read_text().splitlines()
    assert "JAX_PLATFORMS=cpu" in environ
    (check,) = (call for call in some.calls() if call.startswith("health"))
    assert check.split()[3:] == ["--gpus", "1", "--gbps", "100", "--local"]


@pytest.mark.skipif(Path("/opt/amazon/efa").exists(), reason="this machine has EFA's software")
def test_without_efa_the_hosts_speak_through_tcp_and_that_is_said(bench):
    some = bench(2)
    for server in some.servers:
        server.tool("curl", "exit 6")
        (server.home / "health").write_text(f"echo '{json.dumps(HEALTH | {'network': 'TCP'})}'")
    assert some.do(efa_interfaces=1)[-1] == "trainer"
    first, second, _, third = some.said
    assert first == (
        "warning: night-0: the installer of EFA cannot be fetched; without it the hosts speak "
        "through TCP, which is slower"
    )
    assert second.startswith("warning: night-1: ")
    assert third == "warning: the hosts have EFA, and TCP carries what they send"
    for server in some.servers:
        assert "FI_PROVIDER=efa" in (server.home / "txl" / "environment.sh").read_text()
        # The limits that its installer raises hold for new logins.
        assert server.log().count("Accepted publickey") == 2


def test_one_host_alone_needs_no_efa(bench):
    some = bench(1)
    assert "EFA" not in some.do(phases=5, efa_interfaces=4)
    assert "FI_PROVIDER" not in (some.servers[0].home / "txl" / "environment.sh").read_text()


class Efa:
    """efa.sh on a machine with a /opt of its own, which holds what an installer has left there."""

    def __init__(self, home: Path):
        self.home, self.tools = home, home / "tools"
        self.tools.mkdir(parents=True)
        self.tool("tmux", "exit 1")
        self.opt = home / "opt"
        self.opt.mkdir()
        # curl -fsSL --retry 3 --connect-timeout 10 -o FILE URL
        self.tool("curl", f'echo curl >>{home}/calls\ncp {home}/installer.tar.gz "$7"')
        self.pack(
            "mkdir -p {plugin} {program}; touch {plugin}/libnccl-net.so; "
            "printf '#!/bin/sh\n[ ! -e {home}/no-efa ]\n' >{program}/fi_info; "
            "chmod +x {program}/fi_info"
        )

    def tool(self, name: str, does: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (self.tools / name).chmod(0o755)

    def pack(self, does: str) -> None:
        """An installer that does so."""
        script = "#!/bin/sh\n" + does.format(
            plugin="/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu",
            program="/opt/amazon/efa/bin",
            home=self.home,
        )
        entry = tarfile.TarInfo("aws-efa-installer/efa_installer.sh")
        entry.mode, entry.size = 0o755, len(script)
        with tarfile.open(self.home / "installer.tar.gz", "w:gz") as tar:
            tar.addfile(entry, io.BytesIO(script.encode()))

    def run(self, sha256: str = "") -> str:
        """What it says is wrong."""
        content = (self.home / "installer.tar.gz").read_bytes()
        words = [setup.EFA_INSTALLER, sha256 or hashlib.sha256(content).hexdigest()]
        own = f"mount --bind {self.opt} /opt && exec {setup._script('efa', 60, *words)}"
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", own],
            env={"HOME": str(self.home), "PATH": f"{self.tools}:/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
        )
        return done.stderr.strip()

    def fetched(self) -> int:
        """How often the installer was fetched."""
        return len((self.home / "calls").read_text().split())


@pytest.fixture
def efa(tmp_path: Path) -> Efa:
    if os.getuid() != 0:
        pytest.skip("only root may have a /opt of its own")
    return Efa(tmp_path / "home")


def test_efa_is_installed_once(efa):
    assert [efa.run(), efa.run()] == ["", ""]
    assert efa.fetched() == 1


def test_an_installation_of_efa_that_was_broken_off_is_done_again(efa):
    (efa.opt / "amazon" / "efa" / "bin").mkdir(parents=True)
    assert efa.run() == ""
    (efa.opt / "amazon" / "efa" / "bin" / "fi_info").unlink()
    assert efa.run() == ""
    assert efa.fetched() == 2


def test_efa_that_does_not_work_is_said(efa):
    (efa.home / "no-efa").touch()
    assert efa.run() == "fi_info finds no EFA: see ~/txl/setup.log"
    efa.pack("mkdir -p {program}; cp /bin/true {program}/fi_info")
    shutil.rmtree(efa.opt / "amazon")
    assert efa.run() == "NCCL's plugin for EFA is not in /opt/amazon"


def test_another_installer_of_efa_is_not_run(efa):
    assert efa.run("0" * 64) == "the installer of EFA is not the one that AWS has published"
    assert not list(efa.opt.iterdir())


def test_cloud_init_is_waited_for(cloud, bench):
    some = bench(1)
    home = some.servers[0].home
    booted = home / "txl" / keeper.BOOTED
    booted.unlink()
    does = f'echo "cloud-init $*" >>~/calls; sleep 1; touch {booted}'
    some.servers[0].tool("cloud-init", does)
    some.do(phases=1, shared=cloud.shared)
    assert "cloud-init status --wait" in some.calls()


@pytest.mark.parametrize("lacks", ["the keeper", "its start"])
def test_a_host_that_would_not_stop_by_itself_is_not_used(cloud, bench, lacks):
    some = bench(2)
    home = some.servers[1].home
    if lacks == "the keeper":
        (home / "no-keeper").touch()
    else:
        (home / "txl" / keeper.BOOTED).unlink()
    with pytest.raises(UserError, match=r"of 2 hosts: night-1: txl-keeper is not at work"):
        some.do(shared=cloud.shared)
    assert some.do(phases=1)  # with --hosts nothing is expected to


def test_what_takes_too_long_as_root_is_ended_too(bench, monkeypatch):
    monkeypatch.setattr(setup, "_PACKAGES", 3.0)
    some = bench(1)
    server = some.servers[0]
    server.tool("id", "echo 1000")
    # As where sudo makes a session, and its process is root's.
    server.tool("sudo", 'shift; exec setsid -w "$@"')
    server.tool("apt-get", "echo $$ >~/apt-pid; exec sleep 600")
    server.tool("python3", 'case "$*" in "-m ensurepip"*) exit 1;; esac' + PYTHON3)
    with pytest.raises(UserError, match=r"night-0: took longer than 3 s|apt-get cannot install"):
        some.do(phases=1)
    pid = int((server.home / "apt-pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_programs_that_are_missing_are_installed(bench):
    some = bench(1)
    server = some.servers[0]
    # As in an image without python3-venv; apt-get brings it.
    missing = 'case "$*" in "-m ensurepip"*) grep -q python3-venv ~/calls || exit 1;; esac'
    server.tool("python3", missing + PYTHON3)
    some.do(phases=1)
    (install,) = (call for call in some.calls() if " install " in call)
    assert install.endswith("install --no-install-recommends python3-venv")


def test_python_that_is_too_old_is_named(bench):
    some = bench(1)
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        some.servers[0].tool(name, "exit 1")
    with pytest.raises(UserError, match=r"night-0: has no Python 3\.11 or later"):
        some.do()


def test_packages_that_cannot_be_installed(bench):
    some = bench(2)
    (some.servers[1].home / "install-fails").touch()
    with pytest.raises(UserError) as caught:
        some.do()
    assert str(caught.value) == (
        "failed on 1 of 2 hosts: night-1: ERROR: no matching distribution: see ~/txl/setup.log"
    )
    (some.servers[1].home / "install-fails").unlink()
    assert some.do()[-1] == "trainer"


def test_a_change_of_requirements_is_installed(bench, archive, tmp_path):
    some = bench(1)
    some.do(phases=4)
    server = some.servers[0]
    (server.home / "txl" / "source" / "requirements.txt").write_text("another\n")
    some.do(phases=4)
    assert sum(call.startswith("install") for call in some.calls()) == 2


@pytest.mark.parametrize(
    "says, problem",
    [
        ("echo 'error: host b sees 7 GPU devices' >&2; exit 2", "night-1: error: host b sees 7"),
        ("echo nothing", None),
        ("echo '{}'", None),
        ("echo '[1]'; echo '{\"hosts\": \"x\"}'", None),
    ],
)
def test_an_unhealthy_host_is_named_and_no_trainer_starts(bench, says, problem):
    some = bench(2)
    number = 1 if problem else 0
    (some.servers[number].home / "health").write_text(says)
    with pytest.raises(UserError, match=problem or "ended without a result"):
        some.do()
    assert not any("train" in some.calls(host) for host in range(2))


def test_warnings_of_the_health_check_are_said(bench):
    some = bench(2)
    found = HEALTH | {"warnings": ["slow \u001b[31m"]}
    (some.servers[0].home / "health").write_text(f"cat <<'E'\n{json.dumps(found)}\nE\n")
    some.do()
    assert some.said[-1] == "warning: slow \\x1b[31m"


def test_a_damaged_archive_is_refused(bench):
    some = bench(1)
    with pytest.raises(UserError, match=r"night-0: sources/f*\.tar\.gz is damaged"):
        some.do(sha256="f" * 64)


def test_a_name_from_elsewhere_runs_nothing_on_a_host(bench):
    some = bench(1)
    with pytest.raises(UserError):
        some.do(sha256="x; cd; touch pwned; `cd; touch pwned`; $(cd; touch pwned) #")
    assert not list(some.servers[0].home.rglob("pwned"))


class Cloud:
    """The bucket through which hosts get files."""

    def __init__(self, s3: Any):
        self.s3 = s3
        self.shared = Shared(Account.open(), s3.bucket)

    def files(self) -> dict[str, int]:
        """Files in the bucket, and how often each was brought there."""
        found = self.s3.direct.list_objects_v2(Bucket=self.s3.bucket).get("Contents", [])
        sent = [
            request for request in self.s3.proxy.requests if request.startswith(("PUT", "POST"))
        ]
        return {one["Key"]: sum(one["Key"] in request for request in sent) for one in found}


@pytest.fixture
def cloud(s3) -> Cloud:
    return Cloud(s3)


def test_hosts_fetch_the_source_from_the_bucket_where_it_is_brought_once(cloud, bench):
    some = bench(2)
    for server in some.servers:
        curl = 'tr "\\0" " " </proc/$$/cmdline >>~/curl; exec /usr/bin/curl "$@"'
        server.tool("curl", curl)
    some.do(phases=3, shared=cloud.shared)
    some.do(phases=3, shared=cloud.shared)
    key = f"sources/{some.work.sha256}.tar.gz"
    assert cloud.files() == {key: 1}
    for server in some.servers:
        assert (server.home / "txl" / "source" / "txl_jax" / "train.py").exists()
        command = (server.home / "curl").read_text()
        assert "--config" in command and "http" not in command and "ignature" not in command


class Unreachable(Shared):
    """A bucket that the hosts cannot read from."""

    def url(self, key: str) -> str:
        return "http://127.0.0.1:9/"


def test_a_bucket_that_hosts_cannot_read(cloud, bench):
    some = bench(1)
    some.servers[0].tool("curl", 'exec /usr/bin/curl "$@" --retry 0')
    with pytest.raises(UserError, match=r"night-0: curl: .* connect"):
        some.do(phases=3, shared=Unreachable(cloud.shared.account, cloud.s3.bucket))


def with_text(folder: Path) -> dict[str, Any]:
    """What of the work is another for a trainer that reads a folder of text."""
    folder.mkdir()
    for number in range(200):
        (folder / f"it's {number}.txt").write_text(f"text {number}\n")
    found = corpus.find(DataConfig(dataset="text", text_dir=str(folder)))
    assert found
    return {"corpus": found, "words": ("--config", "quickstart", *found.words)}


def test_a_corpus_of_this_machine_is_brought_once(cloud, bench, tmp_path):
    some = bench(2)
    changes = with_text(tmp_path / "my text") | {"shared": cloud.shared}
    assert "data" in some.do(**changes)
    (key,) = (key for key in cloud.files() if key.startswith("data/"))
    sent = some.trainer_words(0)
    place = len(sent) - 1 - sent[::-1].index("--text-dir")
    for server in some.servers:
        folder = server.home / "txl" / "work" / sent[place + 1]
        assert len(list(folder.iterdir())) == 200
        assert (folder / "it's 7.txt").read_text() == "text 7\n"
    with some.hosts() as hosts:
        setup.stop_trainer(hosts)
    some.do(**changes)
    assert cloud.files()[key] == 1


class Slow(Shared):
    """A bucket far away."""

    def upload(self, key: str, path: Path) -> None:
        if key.startswith("data/"):
            os.utime(MARKS[0], (1, 1))
            until(lambda: MARKS[0].stat().st_mtime > 1)
        super().upload(key, path)


MARKS: list[Path] = []


def test_hosts_live_while_a_corpus_is_on_its_way_to_the_bucket(cloud, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "_SIGN_SECONDS", 0.2)
    some = bench(1)
    MARKS[:] = [some.servers[0].home / "txl" / keeper.SET_UP]
    shared = Slow(cloud.shared.account, cloud.s3.bucket)
    some.do(**with_text(tmp_path / "text"), shared=shared)


def test_a_corpus_of_other_files_than_it_should_have_is_refused(cloud, bench, tmp_path):
    some = bench(1)
    changes = with_text(tmp_path / "text") | {"shared": cloud.shared}
    found = changes["corpus"]
    (tmp_path / "text" / "it's 7.txt").write_text("text of somebody else\n")
    found.pack(tmp_path / "other.tar.gz")
    (tmp_path / "text" / "it's 7.txt").write_text("text 7\n")
    cloud.shared.upload(f"data/{found.hash}/corpus.tar.gz", tmp_path / "other.tar.gz")
    with pytest.raises(UserError, match=rf"corpora/{found.hash}.tar.gz has not what its name says"):
        some.do(**changes)
    assert not (some.servers[0].home / "txl" / "corpora" / found.hash).exists()


def test_a_corpus_without_a_bucket(bench, tmp_path):
    some = bench(1)
    some.do(**with_text(tmp_path / "text"))
    sent = some.trainer_words()
    folder = some.servers[0].home / "txl" / "work" / sent[sent.index("--text-dir") + 1]
    assert len(list(folder.iterdir())) == 200


def test_what_a_host_printed_is_in_the_bucket(cloud, bench, monkeypatch):
    monkeypatch.setattr(setup, "_LIVE_SECONDS", 100)
    some = bench(1)
    (some.servers[0].home / "trainer").write_text("echo last; exit 3")
    output = f"s3://{cloud.s3.bucket}/launches/night"
    with pytest.raises(UserError, match="the trainer has ended, with status 3: last"):
        some.do(shared=cloud.shared, output=output)
    status = some.servers[0].home / "txl" / "status"
    until(status.exists)
    assert status.read_text() == "3\n"
    key = "launches/night/output-0.txt"
    body = cloud.s3.direct.get_object(Bucket=cloud.s3.bucket, Key=key)["Body"].read()
    assert body.decode().splitlines()[1:] == ["step 1", "last"]


@pytest.mark.slow
def test_two_hosts_train_to_the_end(cloud, bench, tmp_path):
    """Nothing but the environment's making is a stand-in."""
    some = bench(2)
    text = tmp_path / "text"
    shutil.copytree(ROOT / "txl_jax", text, ignore=shutil.ignore_patterns("__pycache__"))
    for server in some.servers:
        python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        (server.home / "environment-python").write_text(python)
    words = ["--config", "quickstart", "--dataset", "text", "--text-dir", str(text)]
    found = corpus.find(DataConfig(dataset="text", text_dir=str(text)))
    assert found
    words += ["--n-layer", "1", "--d-model", "16", "--n-head", "1", "--d-head", "16"]
    words += ["--batch", "2", "--max-tokens", "12800", "--eval-every", "1000", "--log-every", "10"]
    work = {
        "corpus": found,
        "words": (*words, *found.words),
        "gpus": 0,
        "network_gbps": 0.0,
        "shared": cloud.shared,
        "logdir": f"s3://{cloud.s3.bucket}/runs/night",
        "output": f"s3://{cloud.s3.bucket}/launches/night",
    }
    names = some.do(**work)
    assert names == ["packages", "source", "Python", "data", "health check", "trainer"]
    assert re.fullmatch(r"an all-reduce of 4 MiB over 2 devices took .* through TCP", some.said[0])
    folders = [server.home / "txl" for server in some.servers]
    for number, folder in enumerate(folders):
        until((folder / "status").exists, 300)
        output = (folder / "output.txt").read_text()
        assert (folder / "status").read_text() == "0\n", output
        sign = json.loads((folder / "heartbeats" / f"{number}.json").read_text())
        assert sign["step"] == 200
    files = cloud.files()
    expected = ["config.json", "metrics.jsonl", "results.json", "heartbeats/0.json"]
    for name in [*expected, "heartbeats/1.json"]:
        assert f"runs/night/{name}" in files
    for number in range(2):
        key = f"launches/night/output-{number}.txt"
        kept = cloud.s3.direct.get_object(Bucket=cloud.s3.bucket, Key=key)["Body"].read()
        assert kept == (folders[number] / "output.txt").read_bytes()


def test_shell_scripts_are_sound():
    for path in sorted((ROOT / "launcher" / "on_host").glob("*.sh")):
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert shlex.split(path.read_text().splitlines()[0], comments=True) == []
