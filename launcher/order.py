"""What EC2 is asked for: the hosts of a launch, as its record and the account have them."""

from launcher import ec2, names
from launcher.bootstrap import HostKey, user_data
from launcher.hardware import Image, InstanceType
from launcher.on_host.keeper import StopRules
from launcher.record import Record
from launcher.request import LaunchCommand
from launcher.standing import Standing

_NEVER_HOURS = 24.0 * 365 * 10


def order_of(
    command: LaunchCommand,
    known: Record,
    kind: InstanceType,
    image: Image,
    prices: dict[str, float],
    made: Standing,
    again: bool,
) -> ec2.Order:
    """The order of all hosts of a launch.

    Args:
      known: of the launch that `command` made.
      prices: US dollars an hour of one host, by zone, where it is known.
      again: the launch may have started hosts before.
    """
    host_key = HostKey.of(made.key_path.read_bytes(), known.launch)
    rules = StopRules(max_hours=_NEVER_HOURS if command.keep else command.max_hours)
    return ec2.Order(
        name=command.name,
        launch=known.launch,
        kind=kind,
        image=image,
        count=known.config.cluster.machines,
        standing=made,
        zones=known.zones,
        spot=command.spot,
        max_price=command.max_price,
        user_data=user_data(host_key, image.user, rules),
        tags={
            names.TAG_CONFIG: command.config,
            names.TAG_LOGDIR: f"s3://{made.bucket}/runs/{command.name}",
            names.TAG_HOST_KEY: host_key.public,
            names.TAG_STARTED: known.started.isoformat(timespec="seconds"),
        },
        reservation=command.reservation,
        capacity_block=command.capacity_block,
        private_ip=command.private_ip,
        prices=prices,
        again=again,
    )
