"""Lists runs: hosts, cost so far, and how training goes.

A run of whose hosts none has shown a sign of life for ten minutes is called stalled; hosts whose
devices are 20 % slower than the others' are named below the table. Hosts that have ended are shown
for about an hour, as EC2 remembers them for so long.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher import runs, slow, status
from launcher.amounts import dollars, duration
from launcher.aws import Account
from launcher.options import InRegion
from launcher.runs import Run
from launcher.slow import SlowHost
from launcher.status import Status
from txl_jax.errors import UserError

_SILENT = timedelta(minutes=2)
"""Processes show a sign of life every 15 s, and it is in S3 some seconds later."""
_STALLED = timedelta(minutes=10)
"""As a watcher has it (`inquiry.py`), which takes long to import."""


@dataclass(frozen=True, kw_only=True)
class Options(InRegion):
    """Options of the command."""

    all: bool = False
    """Everybody's runs."""
    json: bool = False
    """As JSON, for programs."""


@dataclass(frozen=True)
class _Row:
    run: Run
    status: Status
    readable: bool
    """Whether the run's bucket lets us read how it goes."""
    now: datetime
    slow: tuple[SlowHost, ...] = ()

    @property
    def cost(self) -> float | None:
        return self.run.cost_so_far(self.now, self.status.seen)

    @property
    def state(self) -> str:
        """How the run stands, in a word or two."""
        hosts = self.run.current().hosts
        states = Counter(host.state for host in hosts)
        if len(states) > 1:
            return ", ".join(f"{count} {state}" for state, count in states.most_common())
        if "running" not in states:
            ((state, _),) = states.items()
            return f"finished, {state}" if self.status.finished else state
        if not self.readable:
            return "running"
        if self.status.finished:
            return "finished"
        seen = self.status.seen
        if seen is None or seen < min(host.launched for host in hosts):
            return "setting up"
        if (silence := self.now - seen) > _SILENT:
            return f"{'stalled' if silence >= _STALLED else 'silent'} for {duration(silence)}"
        return "training"


def main(options: Options) -> int:
    """Exit status 0. Raises UserError as AWS refuses."""
    account = Account.open(options.region)
    rows = _rows(account, options.all)
    if options.json:
        print(json.dumps([_as_json(row) for row in rows], indent=2))
    elif rows:
        console = Console(highlight=False)
        console.print(_table(rows, options.all))
        for row in rows:
            if row.slow:
                named = ", ".join(f"host {slow.host} ({slow.ratio:.1f} x)" for slow in row.slow)
                console.print(Text(f"{row.run.name}: slower than the others: {named}"))
    else:
        whose = "" if options.all else " of yours; --all shows everybody's"
        print(f"no runs in {account.region}{whose}")
    return 0


def _rows(account: Account, everybody: bool) -> list[_Row]:
    found = runs.find(account, all_users=everybody, gone=True)
    latest = {(run.owner, run.name): run for run in found}
    shown = [
        run
        for run in found
        if run is latest[run.owner, run.name]
        or any(host.state in runs.STANDING for host in run.hosts)
    ]
    now = datetime.now(UTC)
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda run: _row(account, run, now), shown))


def _row(account: Account, run: Run, now: datetime) -> _Row:
    bucket = run.logdir.removeprefix("s3://").split("/")[0]
    try:
        told = status.read(account, bucket, run.name)
        row = _Row(run, told, True, now)
        # Signs of an earlier launch of the name may be there while hosts are set up.
        found = slow.find(account, bucket, run) if row.state == "training" else ()
        return replace(row, slow=found)
    except UserError:  # one that we may not read, perhaps by a false tag
        return _Row(run, Status(), False, now)


def _table(rows: list[_Row], owners: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("name", "hosts", "state"):
        table.add_column(title)
    for title in ("age", "cost", "step", "loss", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    if owners:
        table.add_column("launched by")
    for row in rows:
        told = row.status
        cells = [
            row.run.name,
            _hosts(row.run),
            row.state,
            duration(row.now - row.run.started),
            dollars(row.cost),
            "" if told.step is None else f"{told.step:,}",
            "" if told.loss is None else f"{told.loss:.3f}",
            "" if told.tokens_per_s is None else f"{told.tokens_per_s:,.0f}",
            *([row.run.owner] if owners else []),
        ]
        gone = not any(host.state in runs.STANDING for host in row.run.hosts)
        table.add_row(*(Text(cell) for cell in cells), style="dim" if gone else "")
    return table


def _hosts(run: Run) -> str:
    hosts = run.current().hosts
    kinds = " + ".join(sorted({host.kind for host in hosts}))
    return f"{len(hosts)} x {kinds}{' spot' if hosts[0].spot else ''}"


def _as_json(row: _Row) -> dict[str, Any]:
    told = row.status
    return {
        "name": row.run.name,
        "config": row.run.config,
        "owner": row.run.owner,
        "launch": row.run.launch,
        "logdir": row.run.logdir,
        "state": row.state,
        "started": row.run.started.isoformat(),
        "cost": None if row.cost is None else round(row.cost, 4),
        "step": told.step,
        "loss": told.loss,
        "tokens_per_s": told.tokens_per_s,
        "seen": told.seen.isoformat() if told.seen else None,
        "finished": told.finished,
        "slow": [{"host": slow.host, "ratio": round(slow.ratio, 2)} for slow in row.slow],
        "hosts": [
            {
                "host": host.index,
                "instance": host.instance_id,
                "state": host.state,
                "type": host.kind,
                "zone": host.zone,
                "spot": host.spot,
                "price": host.price,
                "private_ip": host.private_ip,
                "public_ip": host.public_ip,
            }
            for host in row.run.hosts
        ],
    }
