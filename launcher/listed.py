"""A launch on machines that run already (`--hosts`): the same set-up, without AWS."""

import contextlib
import dataclasses
import ipaddress
import json
import socket

from rich.console import Console
from rich.text import Text

from launcher import corpus, plan, setup
from launcher.corpus import Corpus
from launcher.names import printable, quoted
from launcher.progress import Progress
from launcher.remote import Hosts
from launcher.request import Request
from launcher.source import Source
from txl_jax.config import Config
from txl_jax.errors import UserError

SSH_SECONDS = 30.0
"""For which a host may take to answer."""
_SHORT = 60.0
_ABOUT = "txl/launched.json"
"""On a host: what was launched there last."""
_OWN_ADDRESS = (
    "import socket, sys\n"
    "probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "probe.connect((sys.argv[1], 22))\n"  # sends nothing
    "print(probe.getsockname()[0])\n"
)


def launch(request: Request, source: Source, console: Console) -> int:
    """Exit status 0 when trainers run.

    Raises UserError: hosts are listed twice, cannot be reached, have other GPUs than the others or
    none that divide the batch, or train something else.
    """
    command = request.command
    with Hosts.listed(command.hosts) as hosts:
        number, logdir = len(hosts.names), command.experiment.train.logdir
        if number > 1 and not logdir:
            raise UserError(
                "several hosts keep a run in one place: name it with --logdir, s3://BUCKET/FOLDER "
                "or a folder that all of them see"
            )
        with console.status("reading the corpus …"):
            found = corpus.find(command.experiment.data)
        request = request.with_corpus(found)
        planned = plan.make_listed(request, number)
        if command.json and command.dry_run:
            print(json.dumps(plan.as_json(planned), indent=2))
            return 0
        console.print(plan.show(planned))
        if command.dry_run:
            return 0
        with Progress(console) as progress:
            progress.watch(hosts.names, hosts.seconds)
            _start(request, source, found, hosts, progress)
        for line in _how_it_goes_on(command.name, hosts):
            console.print(Text(line), soft_wrap=True)
        if command.json:
            print(json.dumps(plan.as_json(planned) | {"hosts": list(hosts.names)}, indent=2))
    return 0


def _start(
    request: Request, source: Source, found: Corpus | None, hosts: Hosts, progress: Progress
) -> None:
    """Prepares the hosts and starts the trainers; what fails stops them again."""
    command, number = request.command, len(hosts.names)
    progress.begin("SSH", SSH_SECONDS)
    hosts.wait(SSH_SECONDS)
    cfg = _with_machines(command.experiment, number)
    gpus = _gpus(hosts)
    plan.check_on(cfg, gpus)
    about = {"name": command.name, "words": request.trainer_words, "hosts": hosts.names}
    if _train_already(hosts, json.dumps(about)):
        return
    hosts.run("umask 077; mkdir -p ~/txl", timeout=_SHORT)
    hosts.put(json.dumps(about).encode(), _ABOUT)
    work = setup.Work(
        words=request.trainer_words,
        logdir=cfg.train.logdir,
        output="",
        archive=source.path,
        sha256=source.sha256,
        corpus=found,
        coordinator=_address_of_first(hosts) if number > 1 else "",
        gpus=gpus,
        needs_driver=False,
        efa_interfaces=0,
        network_gbps=0.0,
    )
    try:
        for name, seconds in setup.phases(hosts, work, progress.say):
            progress.begin(name, seconds)
    except BaseException:
        with contextlib.suppress(OSError, SystemExit):  # nobody may be there to read it
            progress.say("stopping trainers that have started …")
        # Ctrl-C has closed the connections.
        with contextlib.suppress(UserError), Hosts.listed(command.hosts) as again:
            setup.stop_trainer(again)
        raise


def _with_machines(cfg: Config, machines: int) -> Config:
    return dataclasses.replace(cfg, cluster=dataclasses.replace(cfg.cluster, machines=machines))


def _gpus(hosts: Hosts) -> int:
    """GPUs of each host. Raises UserError if they have different numbers of them."""
    count = "nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true"
    counts = [each.out.strip() for each in hosts.run(count, timeout=_SHORT)]
    if len(set(counts)) > 1:
        told = ", ".join(
            f"{name} {printable(found)}" for name, found in zip(hosts.names, counts, strict=True)
        )
        raise UserError(f"the hosts have different numbers of GPUs ({told}): take hosts alike")
    if not counts[0].isdecimal():
        raise UserError(
            f"{hosts.names[0]} prints at a login by SSH ({printable(counts[0])!r}): what runs for "
            "commands too, such as ~/.bashrc, has to be silent"
        )
    return int(counts[0])


def _train_already(hosts: Hosts, about: str) -> bool:
    """Whether all hosts train what this launch is about.

    Raises UserError if one trains something else.
    """
    conditions = setup.conditions(hosts)
    known = hosts.run(f"cat ~/{_ABOUT} 2>/dev/null || true", timeout=_SHORT)
    busy = [
        f"{name} ({_name_in(each.out)})"
        for name, each, now in zip(hosts.names, known, conditions, strict=True)
        if now.training and each.out != about
    ]
    if busy:
        raise UserError(
            f"these hosts train another run: {', '.join(busy)}; end it there with "
            "`tmux kill-session -t txl`, or take other hosts"
        )
    return all(now.training for now in conditions)


def _name_in(about: str) -> str:
    try:
        return printable(str(json.loads(about)["name"]))
    except (KeyError, TypeError, ValueError):
        return "its name is not known"


def _address_of_first(hosts: Hosts) -> str:
    """The address by which the others reach host 0: the one that it has towards host 1."""
    try:
        towards = str(socket.getaddrinfo(hosts.addresses[1], 22, socket.AF_INET)[0][4][0])
    except OSError:
        towards = hosts.addresses[1]  # a name that only SSH's settings know
    probe = quoted(["python3", "-c", _OWN_ADDRESS, towards])
    commands = [probe, *["true"] * (len(hosts.names) - 1)]
    first, *_ = hosts.run(commands, timeout=_SHORT)
    return str(ipaddress.ip_address(first.out.strip()))


def _how_it_goes_on(name: str, hosts: Hosts) -> list[str]:
    host, _, port = hosts.names[0].partition(":")
    first = quoted([*(["-p", port] if port else []), host])
    return [
        "",
        f"{name} trains on {len(hosts.names)} hosts. It goes on without this machine.",
        f"  output   ssh {first} tail -f txl/output.txt",
        f"  log in   ssh -t {first} tmux attach -t txl",
        f"  end      ssh {first} tmux send-keys -t txl C-c; the other hosts end with it",
        "Nothing stops these machines.",
    ]
