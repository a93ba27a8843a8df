"""Shows what a host costs now: spot in each zone, and on demand."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher import hardware
from launcher.aws import Account
from launcher.hardware import InstanceType, Prices
from launcher.options import InRegion


@dataclass(frozen=True, kw_only=True)
class Options(InRegion):
    """Options of the command."""

    type: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TYPE")]
    """Instance type, as p3dn.24xlarge."""
    json: bool = False
    """As JSON, for programs."""


def main(options: Options) -> int:
    """Exit status 0. Raises UserError for a type that the region does not offer."""
    account = Account.open(options.region)
    kind = hardware.describe(account, options.type)
    prices = hardware.prices(account, kind)
    if options.json:
        told = {"type": kind.name, "on_demand": prices.on_demand, "spot": prices.spot}
        print(json.dumps(told, indent=2))
    else:
        Console(highlight=False).print(_table(account, kind, prices))
    return 0


def _table(account: Account, kind: InstanceType, prices: Prices) -> Table:
    gpus = f", {kind.gpus} x {kind.gpu_name}" if kind.gpus else ""
    title = f"{kind.name}{gpus} in {account.region}, US dollars an hour of one host"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    table.title = title
    table.add_column("where")
    table.add_column("price", justify="right")
    table.add_column("below on demand", justify="right")
    base = prices.on_demand
    for zone in sorted(kind.zones, key=lambda zone: (prices.spot.get(zone, float("inf")), zone)):
        price = prices.spot.get(zone)
        saved = "" if price is None or not base else f"{100 * (1 - price / base):.0f} %"
        table.add_row(Text(f"spot, {zone}"), "unknown" if price is None else f"{price:.4f}", saved)
    table.add_row("on demand", "unknown" if base is None else f"{base:.4f}")
    return table
