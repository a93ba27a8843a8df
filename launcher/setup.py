"""Prepares hosts and starts the trainer on them; every phase may be done again after a crash.

All that it puts on a host lies in `~/txl` of the login:

    source            link to the source in sources/SHA256
    venv              Python with the packages of the source's requirements.lock
    corpora/HASH      files of a corpus
    work              where the trainer runs: its runs/ and data/
    environment.sh    variables of the trainer
    train.sh          starts the trainer, in the tmux session `txl`
    setup.log         what installers say
    set-up            touched by every phase, for which on_host/keeper.py lets the host run on
    pane              of tmux, in which the trainer runs
    output.txt pid status heartbeats/   of the trainer (on_host/output.py, on_host/keeper.py)

What a host does is in the scripts of `on_host`. Words of the command line, a config or S3 reach
them as arguments, quoted.
"""

import contextlib
import json
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import corpus, trainer
from launcher.corpus import Corpus
from launcher.names import printable, quoted
from launcher.on_host import keeper
from launcher.remote import Hosts
from launcher.shared import Shared
from txl_jax.errors import UserError
from txl_jax.store import local_folder

HEALTH_PORT = 8477
"""Where host 0 listens for the others during the health check."""
DRIVER = "580-server"
"""Ubuntu's name for branch R580 of NVIDIA's driver with the closed module, the last for V100."""
EFA_INSTALLER = "https://efa-installer.amazonaws.com/aws-efa-installer-1.47.0.tar.gz"
EFA_SHA256 = "2df4201e046833c7dc8160907bee7f52b76ff80ed147376a2d0ed8a0dd66b2db"
"""Of the installer, as AWS' documentation of EC2 has it."""
_SCRIPTS = Path(__file__).resolve().parent / "on_host"
_SOURCES = "sources"
_PYTHON = "../venv/bin/python"
_TIMED_OUT = 124  # as `timeout` says
_GRACE_SECONDS = 20.0
_SHORT = 120.0
# Seconds that phases may take, all of them shorter than the keeper's setup_minutes.
_PACKAGES, _DRIVER, _EFA, _SOURCE, _ENVIRONMENT = 900.0, 900.0, 900.0, 300.0, 1200.0
_DATA, _HEALTH = 1500.0, 300.0
_GPU_SECONDS = 120
"""For which GPUs may take to be seen."""
_LIVE_SECONDS = 20
"""For which a trainer is looked at after its start."""
_SIGN_SECONDS = 300.0
"""From one sign of life to the next while files go to the bucket."""


@dataclass(frozen=True)
class Work:
    """What hosts are prepared for."""

    words: tuple[str, ...]
    """Words of the trainer: `--config NAME …`, without cluster addresses and --logdir."""
    logdir: str
    """s3://BUCKET/runs/NAME; with --hosts also a folder. Empty: the trainer's own choice."""
    output: str
    """s3://BUCKET/launches/NAME, where the hosts' output goes; empty: it stays on the hosts."""
    archive: Path
    """The source, tar.gz."""
    sha256: str
    """Of the archive."""
    corpus: Corpus | None
    """What the trainer reads; None: it makes that itself."""
    coordinator: str
    """Address of host 0 in the private network."""
    gpus: int
    """GPUs of a host; 0: it trains on its CPU."""
    needs_driver: bool
    efa_interfaces: int
    network_gbps: float
    """Rate of a host's network; 0: not known."""
    shared: Shared | None = None
    """Through which hosts get files; None: each gets them from this machine."""


@dataclass(frozen=True)
class Condition:
    """How it stands on a host."""

    training: bool
    status: int | None
    """Exit status of the trainer; None: it has not ended."""
    trainer: float
    """Seconds since the trainer's start; -1: there was none."""
    set_up: float
    """Seconds since the last phase of a set-up has begun; -1: none has."""
    busy: bool
    """A phase of a set-up is under way."""


def phases(hosts: Hosts, work: Work, say: Callable[[str], None]) -> Iterator[tuple[str, float]]:
    """Prepares the hosts, which answer, and starts the trainer, phase by phase.

    Yields the name of a phase, and the seconds that it may take at most, before it is done; it is
    done when the next one comes. `say` gets warnings, and what the health check has found.

    Raises UserError: names the hosts where the phase failed.
    """
    trained = [condition.training for condition in conditions(hosts)]
    if all(trained):
        return
    yield "packages", _PACKAGES
    # Hosts with a bucket are AWS', and have to stop by themselves.
    _do(hosts, "packages", _PACKAGES, keeper.UNIT if work.shared else "")
    if work.gpus:
        yield "driver", _DRIVER
        branch = DRIVER if work.needs_driver else ""
        _do(hosts, "driver", _DRIVER, str(work.gpus), str(_GPU_SECONDS), branch)
    if _speak_through_efa(hosts, work):
        yield "EFA", _EFA
        _install_efa(hosts, say)
    yield "source", _SOURCE
    _bring_source(hosts, work)
    yield "Python", _ENVIRONMENT
    _do(hosts, "python", _ENVIRONMENT)
    if work.corpus:
        yield "data", _DATA
        _bring_corpus(hosts, work, work.corpus)
    _prepare_folder(hosts, work)
    if not any(trained):  # it would share the devices
        yield "health check", _HEALTH
        _check_health(hosts, work, say)
    yield "trainer", _SHORT
    _start(hosts, work)


def is_training(hosts: Hosts) -> bool:
    """Whether a trainer is at work on every host.

    Raises UserError for hosts that cannot be reached.
    """
    return all(condition.training for condition in conditions(hosts))


def stop_trainer(hosts: Hosts, timeout: float = 180.0) -> None:
    """Has the trainers save and end, and waits for that; where none is at work, nothing is done.

    Raises UserError: names the hosts where it did not end in `timeout` seconds.
    """
    _do(hosts, "stop", timeout + _GRACE_SECONDS, str(round(timeout)))


def conditions(hosts: Hosts) -> list[Condition]:
    """How it stands on each host.

    Raises UserError for hosts that cannot be reached.
    """
    done = hosts.run(_script("state", _SHORT), timeout=_SHORT + _GRACE_SECONDS)
    return [_condition(each.host, each.out.split("\n")) for each in done]


def _condition(host: str, lines: list[str]) -> Condition:
    try:
        state, trainer, set_up, busy, *_ = lines
        _, _, status = state.partition("ended ")
        return Condition(
            training=state == "training",
            status=int(status) if status else None,
            trainer=float(trainer),
            set_up=float(set_up),
            busy=busy == "busy",
        )
    except ValueError as error:
        raise UserError(f"{host} does not tell how it stands: {printable(lines[0])}") from error


def _do(
    hosts: Hosts, name: str, seconds: float, *words: str, input: str = "", check: bool = True
) -> list[str]:
    """Runs a script of `on_host` on all hosts; of each what is wrong, empty if nothing is."""
    command = _script(name, seconds, *words)
    done = hosts.run(command, timeout=seconds + _GRACE_SECONDS, input=input, check=check)
    return [f"{each.host}: {each.last_line()}" if each.status else "" for each in done]


def _script(name: str, seconds: float, *words: str) -> str:
    text = "".join((_SCRIPTS / f"{part}.sh").read_text() for part in ("common", name))
    text = f"limit={seconds:.0f}\n{text}"
    return _timed(seconds, ["bash", "-c", text, name, *words])


def _timed(seconds: float, command: Sequence[str]) -> str:
    """A shell's command that ends its processes after so long, and says so."""
    late = f"took longer than {seconds:.0f} s"
    code = (
        f'timeout -k 10 {seconds:.0f} "$@"; code=$?; '
        f'[ $code != {_TIMED_OUT} ] || echo "{late}" >&2; exit $code'
    )
    return quoted(["sh", "-c", code, "sh", *command])


def _speak_through_efa(hosts: Hosts, work: Work) -> bool:
    return work.efa_interfaces > 0 and len(hosts.names) > 1


def _install_efa(hosts: Hosts, say: Callable[[str], None]) -> None:
    problems = _do(hosts, "efa", _EFA, EFA_INSTALLER, EFA_SHA256, check=False)
    for problem in filter(None, problems):
        say(f"warning: {problem}; without it the hosts speak through TCP, which is slower")
    # The memory that may be locked, which EFA takes, is what it was at a login's begin.
    hosts.close_connections()


def _bring_source(hosts: Hosts, work: Work) -> None:
    _bring(hosts, work, _SOURCES, work.sha256, lambda: work.archive, _SOURCE, work.sha256)
    link = f"ln -sfn {_SOURCES}/{shlex.quote(work.sha256)} ~/txl/source"
    hosts.run(link, timeout=_SHORT)


def _bring_corpus(hosts: Hosts, work: Work, found: Corpus) -> None:
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:

        def pack() -> Path:
            path = Path(folder) / "corpus.tar.gz"
            found.pack(path)
            return path

        _bring(hosts, work, corpus.FOLDER, found.hash, pack, _DATA)


def _bring(
    hosts: Hosts,
    work: Work,
    folder: str,
    name: str,
    pack: Callable[[], Path],
    seconds: float,
    sha256: str = "",
) -> None:
    """Has an archive unpacked in ~/txl/FOLDER/NAME of all hosts that have not got it yet.

    `sha256`: of the archive; empty: `name` is the hash of what is in it (on_host/contents.py).
    In the bucket it is {sources/SHA256,data/HASH/corpus}.tar.gz, brought there if it is not.
    """
    place = f"~/txl/{shlex.quote(folder)}/{shlex.quote(name)}"
    there = hosts.run(f"test -d {place}", timeout=_SHORT, check=False)
    if not any(each.status for each in there):
        return
    if not work.shared:
        hosts.run(f"umask 077; mkdir -p ~/txl/{shlex.quote(folder)}", timeout=_SHORT)
        hosts.put(pack(), f"txl/{folder}/{name}.tar.gz")
        _do(hosts, "unpack", seconds, folder, name, sha256, "")
        return
    key = f"sources/{name}.tar.gz" if folder == _SOURCES else corpus.key(name)
    if not work.shared.has(key):
        with _signs_of_life(hosts):
            work.shared.upload(key, pack())
    settings = f"url = {json.dumps(work.shared.url(key))}\n"
    _do(hosts, "unpack", seconds, folder, name, sha256, "fetch", input=settings)


@contextlib.contextmanager
def _signs_of_life(hosts: Hosts) -> Iterator[None]:
    """Tells the hosts that their set-up goes on, while the block does what they see nothing of."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(_SIGN_SECONDS):
            hosts.run(f"touch ~/txl/{keeper.SET_UP}", timeout=_SHORT, check=False)

    thread = threading.Thread(target=work, name="signs of life")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _prepare_folder(hosts: Hosts, work: Work) -> None:
    hosts.run("umask 077; mkdir -p ~/txl/work", timeout=_SHORT)
    environment = _environment(work, _speak_through_efa(hosts, work))
    hosts.put(environment.encode(), "txl/environment.sh")


def _environment(work: Work, efa: bool) -> str:
    """Variables of all that runs on the devices."""
    # With the GPUs named, JAX does not make do with the CPU where they fail.
    platforms = "cuda,cpu" if work.gpus else "cpu"
    lines = [
        'export PYTHONPATH="$HOME/txl/source" PYTHONUNBUFFERED=1',
        f"export JAX_PLATFORMS={platforms}",
    ]
    if work.shared:
        lines.append(f"export AWS_DEFAULT_REGION={shlex.quote(work.shared.account.region)}")
        # Otherwise a metadata service that takes a second once means: no credentials.
        lines.append("export AWS_METADATA_SERVICE_TIMEOUT=5 AWS_METADATA_SERVICE_NUM_ATTEMPTS=5")
    if efa:
        lines += [
            "export FI_PROVIDER=efa",
            "for folder in /opt/amazon/efa/lib* /opt/amazon/ofi-nccl/lib* \\",
            "    /opt/amazon/ofi-nccl/lib*/*-linux-gnu /opt/aws-ofi-nccl/lib* \\",
            '    "$HOME"/txl/venv/lib/python3*/site-packages/nvidia/cuda_runtime/lib; do',
            '    [ -d "$folder" ] || continue',
            '    LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"',
            "done",
            "export LD_LIBRARY_PATH",
        ]
    return "\n".join(lines) + "\n"


def _check_health(hosts: Hosts, work: Work, say: Callable[[str], None]) -> None:
    number = len(hosts.names)
    shared = ["--gpus", str(work.gpus or 1), "--gbps", f"{work.network_gbps:g}"]
    commands = []
    for process in range(number):
        place = ["--local"]
        if number > 1:
            place = ["--coordinator", f"{work.coordinator}:{HEALTH_PORT}"]
            place += ["--num-processes", str(number), "--process-id", str(process)]
        check = [_PYTHON, "-m", "txl_jax.health", *shared, *place]
        line = f"cd ~/txl/work && touch ../{keeper.SET_UP} && . ../environment.sh"
        commands.append(_timed(_HEALTH, ["bash", "-c", f"{line} && exec {quoted(check)}"]))
    first, *_ = hosts.run(commands, timeout=_HEALTH + _GRACE_SECONDS)
    for line in _report(first.out, work):
        say(line)


def _report(text: str, work: Work) -> Iterator[str]:
    """What the check says, from its line of JSON, in words."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1])
        hosts, devices, network = int(found["hosts"]), int(found["devices"]), str(found["network"])
        size, ms, rate = float(found["bytes"]), float(found["ms"]), found["bus_gbps"]
        warnings = [str(warning) for warning in found["warnings"]]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError("the health check ended without a result; run it again") from error
    if rate is not None:
        through = f" through {network}" if hosts > 1 else ""
        yield printable(
            f"an all-reduce of {size / 2**20:.0f} MiB over {devices} devices took {ms:.1f} ms, "
            f"{float(rate):.1f} Gbit/s of bus bandwidth{through}"
        )
    if hosts > 1 and work.efa_interfaces and network != "EFA":
        warnings.append(f"the hosts have EFA, and {network} carries what they send")
    for warning in warnings:
        yield printable(f"warning: {warning}")


def _start(hosts: Hosts, work: Work) -> None:
    number = len(hosts.names)
    scripts = []
    for process in range(number):
        command = trainer.command(work.words, work.logdir, number, work.coordinator, str(process))
        scripts.append(_train_script(work, process, command))
    hosts.put([script.encode() for script in scripts], "txl/train.sh", mode=0o700)
    _do(hosts, "start", _SHORT, str(_LIVE_SECONDS))


def _train_script(work: Work, process: int, command: tuple[str, ...]) -> str:
    """The script of the tmux session; it writes the trainer's exit status last."""
    output = ["-m", "launcher.on_host.output", str(process), work.output]
    beats = ""
    if work.logdir:
        folder = Path("work") / local_folder(work.logdir) / keeper.HEARTBEATS
        beats = f"ln -sfn {shlex.quote(str(folder))} ../{keeper.HEARTBEATS}\n"
    return (
        "#!/bin/bash\n"
        "umask 077\n"
        "cd ~/txl/work\n"
        ". ../environment.sh\n"
        f"rm -f ../{keeper.STATUS}\n"
        f"{beats}"
        f"{quoted([_PYTHON, *output, _PYTHON, *command])} &\n"
        # The end of the session reaches this shell only; Ctrl-C reaches the trainer by itself.
        "trap 'again=1; kill -TERM $!' TERM HUP\n"
        "trap again=1 INT\n"
        "again=1\n"
        "while [ $again = 1 ]; do\n"
        "    again=0\n"
        "    wait $!\n"  # a signal ends it too
        "    code=$?\n"
        "done\n"
        f"echo $code >../{keeper.STATUS}.tmp\n"
        f"mv ../{keeper.STATUS}.tmp ../{keeper.STATUS}\n"
    )
