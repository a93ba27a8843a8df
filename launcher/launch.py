"""A launch from the command line to trainers at work: `python -m launcher --config NAME …`.

request → plan → question → what stands in the account → record → hosts → set-up → training. What it
has to remember is in S3 (the record) and in the hosts' tags, so that the same command typed again
goes on where a killed one was. Until trainers run, an error or Ctrl-C terminates the hosts.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher import again, corpus, ec2, listed, plan, record, setup, speed, standing
from launcher.amounts import dollars
from launcher.aws import Account
from launcher.bootstrap import HostKey
from launcher.corpus import Corpus
from launcher.hold import Hold, new_attempt
from launcher.interrupts import signals_as_interrupts
from launcher.on_host.keeper import KEEP, StopRules
from launcher.order import order_of
from launcher.plan import Plan, Rental
from launcher.progress import Progress
from launcher.record import Record
from launcher.remote import Hosts
from launcher.request import LaunchCommand, Request, parse
from launcher.runs import Host, Run
from launcher.shared import Shared
from launcher.source import Source, archive
from launcher.standing import Standing
from launcher.undo import Undo
from txl_jax import corpora
from txl_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SSH_SECONDS = again.SSH_SECONDS
_FRESH = timedelta(minutes=15)
"""EC2 shows what was started long before that; so does what it has terminated."""
_SHORT = 60.0
_DECLINED_STATUS = 1


def main(words: list[str]) -> int:
    """Exit status 0 when trainers run; 1 if the question was answered with no.

    Raises UserError, and nothing runs then but what it names.
    """
    request = parse(words)
    command = request.command
    console = Console(stderr=command.json, highlight=False)
    plan.check(command.experiment)
    if not command.dry_run:
        # Once, here: the hosts get it from the bucket.
        corpora.obtain(command.experiment.data)
    with signals_as_interrupts(), tempfile.TemporaryDirectory(prefix="txl-") as folder:
        source = archive(ROOT, Path(folder), command.committed)
        if source.warning:
            console.print(Text(source.warning), soft_wrap=True)
        launch = listed.launch if command.hosts else _on_aws
        return launch(request, source, console)


def _on_aws(request: Request, source: Source, console: Console) -> int:
    command = request.command
    account = Account.open(command.region)
    data, found = command.experiment.data, None
    if command.dry_run and corpora.is_missing(data):
        console.print(f"{data.dataset} is downloaded first, to {data.data_dir}", soft_wrap=True)
    else:
        with console.status("reading the corpus …"):
            found = corpus.find(data)
    request = request.with_corpus(found)
    with console.status("asking AWS …"):
        planned = plan.make(account, request)
    run = _to_go_on_with(account, planned, request)
    if command.json and command.dry_run:
        print(json.dumps(plan.as_json(planned), indent=2))
        return 0
    console.print(plan.show(planned))
    if command.dry_run:
        return 0
    assert planned.rental
    if run:
        console.print(Text(f"{run.name} stands already: going on with it"), soft_wrap=True)
    elif not _agreed(planned, planned.rental, request):
        return _DECLINED_STATUS
    rented = _Launch(account, request, planned, planned.rental, source, found, console)
    run, training = rented.adopt(run) if run else (None, False)
    if not training:
        run = rented.start()
    else:
        assert run
        _say_how_it_goes_on(console, planned.rental, run, command)
    assert run
    if command.json:
        print(json.dumps(plan.as_json(planned) | {"hosts": _hosts_as_json(run)}, indent=2))
    return 0


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What renting hosts and preparing them takes."""

    account: Account
    request: Request
    plan: Plan
    rental: Rental
    source: Source
    corpus: Corpus | None
    console: Console

    def adopt(self, run: Run) -> tuple[Run, bool]:
        """The run of an earlier launch, and whether all of its trainers are at work."""
        if any(host.state != "running" for host in run.hosts):
            return run, False
        # They may be training: whatever happens here, they are left alone.
        ids = ", ".join(host.instance_id for host in run.hosts)
        kill = self.request.command.follow_up("kill")
        stand = f"the hosts of {run.name} stand ({ids}): `{kill}`"
        try:
            made = self._ensure(run.launch)
            host_key = HostKey.of(made.key_path.read_bytes(), run.launch)
            sure = run.with_host_key(host_key.public)
            with Hosts.of(sure, made.key_path, self.request.command.private_ip) as hosts:
                hosts.wait(SSH_SECONDS)
                training = setup.is_training(hosts)
                if training:
                    self._keep(hosts)
                return run, training
        except KeyboardInterrupt:
            self.console.print(Text(f"{stand} ends them"), soft_wrap=True)
            raise
        except UserError as error:
            raise UserError(f"{error}; {stand} ends them") from error

    def start(self) -> Run:
        """Rents the hosts, or goes on with those of the same launch, and starts the trainers."""
        command, launch = self.request.command, self._launch_id()
        with Undo(self.account, command, launch, self._say) as undo:
            with Progress(self.console) as progress:
                run = self._train(launch, undo, progress)
            _say_how_it_goes_on(self.console, self.rental, run, command)
        return run

    def _train(self, launch: str, undo: Undo, progress: Progress) -> Run:
        command = self.request.command
        undo.started(*(run.hosts for run in self.plan.standing if run.launch == launch))
        progress.begin("account")
        made = self._ensure(launch)
        written = self._write_record(made, launch)
        hold = Hold(self.account, made.bucket, command.name, written.attempt)
        undo.holds(hold)
        host_key = HostKey.of(made.key_path.read_bytes(), launch)
        progress.begin("hosts")
        order = order_of(
            command,
            written,
            self.rental.kind,
            self.rental.image,
            self.rental.prices,
            made,
            again=self._earlier(written.launch) is not None,
        )
        run = ec2.start(self.account, order, progress.say, lambda: not hold.lost())
        undo.started(run.hosts)
        hold.check()
        sure = run.with_host_key(host_key.public)
        with Hosts.of(sure, made.key_path, command.private_ip) as hosts:
            progress.watch(hosts.names, hosts.seconds)
            progress.begin("SSH", SSH_SECONDS)
            hosts.wait(SSH_SECONDS)
            work = self._work(made, run)
            for name, seconds in setup.phases(hosts, work, progress.say):
                hold.check()
                progress.begin(name, seconds)
            self._keep(hosts)
        undo.release()
        self._remember_speed(made)
        return run

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _keep(self, hosts: Hosts) -> None:
        """With --keep, tells hosts that train not to stop; until then they stop as others do."""
        if self.request.command.keep:
            hosts.run(f"touch ~/txl/{KEEP}", timeout=_SHORT)

    def _launch_id(self) -> str:
        """That of the earlier launch which this one goes on with, or a new one.

        What a killed launch has started may not be seen yet. EC2 answers the request for it once
        more with the same hosts if the launch has the same id.
        """
        known = self.plan.record
        if not known or known.owner != self.account.caller:
            return record.new_launch()
        stands = any(run.launch == known.launch for run in self.plan.standing)
        seen = any(run.launch == known.launch for run in self.plan.runs)
        fresh = datetime.now(UTC) - known.started < _FRESH
        same = not record.differences(known, self.request.command)
        return known.launch if stands or (fresh and same and not seen) else record.new_launch()

    def _ensure(self, launch: str) -> Standing:
        near = self.rental.near(self._zones(launch))
        return standing.ensure(self.account, self.request.command, self.rental.ssh, near)

    def _zones(self, launch: str) -> tuple[str, ...]:
        """In another order, a launch that goes on would begin in a zone where nothing stands."""
        earlier = self._earlier(launch)
        return earlier.zones if earlier else self.rental.zones

    def _earlier(self, launch: str) -> Record | None:
        """The record of this launch, if it is an earlier one that goes on."""
        known = self.plan.record
        return known if known and known.launch == launch else None

    def _write_record(self, made: Standing, launch: str) -> Record:
        """Notes what is launched, before anything is started."""
        earlier = self._earlier(launch)
        written = Record(
            launch=launch,
            owner=self.account.caller,
            started=earlier.started if earlier else datetime.now(UTC),
            config=self.request.command.experiment,
            words=self.request.trainer_words,
            options=record.options(self.request.command),
            zones=self._zones(launch),
            source=self.source.sha256,
            corpus=self.corpus.hash if self.corpus else "",
            revision=self.source.revision + "-dirty" * self.source.dirty,
            attempt=new_attempt(),
        )
        record.write(
            self.account, made.bucket, self.request.command.name, written, self.plan.version
        )
        return written

    def _work(self, made: Standing, run: Run) -> setup.Work:
        kind = self.rental.kind
        return setup.Work(
            words=self.request.trainer_words,
            logdir=self.plan.logdir,
            output=f"s3://{made.bucket}/launches/{run.name}",
            archive=self.source.path,
            sha256=self.source.sha256,
            corpus=self.corpus,
            coordinator=run.hosts[0].private_ip,
            gpus=kind.gpus,
            needs_driver=self.rental.image.needs_driver,
            efa_interfaces=kind.efa_interfaces,
            network_gbps=kind.network_gbps,
            shared=Shared(self.account, made.bucket),
        )

    def _remember_speed(self, made: Standing) -> None:
        """A later plan can do without; the run goes on whatever S3 says."""
        command = self.request.command
        with contextlib.suppress(UserError):
            speed.remember(
                self.account, made.bucket, command.name, command.config, command.experiment
            )


def _to_go_on_with(account: Account, planned: Plan, request: Request) -> Run | None:
    """The run of this name that stands, if this request is the same; None if nothing stands.

    Raises UserError if it is somebody else's or another one, or not all of its hosts run.
    """
    if not planned.standing:
        return None
    name, kill = planned.name, f"`{request.command.follow_up('kill')}`"
    run = planned.standing[-1].current()
    if run.owner != account.caller:
        raise UserError(f"a run {name} of {run.owner} stands already; take another --name")
    if len(planned.standing) > 1:
        raise UserError(f"hosts of several launches of {name} stand; end them with {kill}")
    known = planned.record
    if not known or known.launch != run.launch:
        raise UserError(
            f"a run {name} stands already, and what it was launched with is not known any more; "
            f"take another --name, or end it with {kill}"
        )
    if differ := record.differences(known, request.command):
        raise UserError(
            f"a run {name} stands already, launched with other words ({'; '.join(differ)}); take "
            f"another --name, or end it with {kill}"
        )
    alive = [host for host in run.hosts if host.state in ("pending", "running")]
    gone = len(run.hosts) - len(alive)
    if any(host.state in ("stopping", "stopped") for host in run.hosts):
        raise UserError(
            f"hosts of {name} have stopped: `{request.command.follow_up('start')}` starts them "
            f"again, {kill} ends them"
        )
    if gone or len(alive) != planned.machines:
        why = "; ".join(sorted({host.reason for host in run.hosts if host.reason}))
        raise UserError(
            f"{planned.machines - len(alive)} of {planned.machines} hosts of {name} are gone"
            f"{f' ({why})' if why else ''}: `{request.command.follow_up('watch')}` replaces them; "
            f"{kill} ends the others, and the same command then goes on from the last checkpoint"
        )
    return run


def _agreed(planned: Plan, rental: Rental, request: Request) -> bool:
    """Whether somebody wants to pay for it.

    Raises UserError if nobody is there to be asked.
    """
    if request.command.yes:
        return True
    price = rental.price(planned.machines)
    cost = "at a price that is not known" if price is None else f"for ${price:,.2f} an hour"
    if not sys.stdin.isatty():
        raise UserError(f"to rent {planned.machines} hosts {cost} without being asked, add --yes")
    print(f"Rent {planned.machines} hosts {cost}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _say_how_it_goes_on(console: Console, rental: Rental, run: Run, command: LaunchCommand) -> None:
    cost = "" if run.price is None else f", {dollars(run.price)} an hour"
    name, rules = run.name, StopRules()
    private = ("--private-ip",) if command.private_ip else ()
    lines = [
        "",
        f"{name} trains on {len(run.hosts)} hosts{cost}. It goes on without this machine.",
        f"  output   {command.follow_up('logs', '-f')}",
        f"  recover  {command.follow_up('watch', *private, '--detach')}",
        f"  curves   {command.follow_up('tensorboard')}",
        f"  log in   {command.follow_up('ssh', *private)}",
        f"  end      {command.follow_up('kill')}",
    ]
    if rental.max_hours is None:
        lines.append("With --keep its hosts run, and cost, until then.")
    else:
        last = max(host.launched for host in run.hosts) + timedelta(hours=rental.max_hours)
        lines.append(
            f"Its hosts {'terminate' if rental.spot else 'stop'} by themselves "
            f"{rules.after_success:g} minutes after success, {rules.after_error:g} after an error, "
            f"{rules.idle:g} after the last step, and at {last:%Y-%m-%d %H:%M} UTC at the latest."
        )
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _hosts_as_json(run: Run) -> list[dict[str, Any]]:
    def shown(host: Host) -> dict[str, Any]:
        return {
            "host": host.index,
            "instance": host.instance_id,
            "zone": host.zone,
            "private_ip": host.private_ip,
            "public_ip": host.public_ip,
        }

    return [shown(host) for host in run.hosts]
