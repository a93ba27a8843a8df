"""Starts, stops and terminates the hosts of a run.

All hosts of a run are started by one request, in one zone, or none. The request has a token that
comes from the launch and the zone: EC2 answers it a second time with the same hosts. So a launch
that was killed at any moment can be repeated, and costs nothing twice.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from botocore.exceptions import ClientError

from launcher import names, runs
from launcher.aws import (
    THROTTLED,
    UNREACHABLE,
    Account,
    error_code,
    error_message,
    explained,
    is_quota,
)
from launcher.hardware import Image, InstanceType
from launcher.runs import Host, Run
from launcher.standing import Standing
from txl_jax.errors import UserError

POLL_SECONDS = 1.0
_REQUEST_SECONDS = 90.0
"""For which a request is repeated while EC2 does not know yet what was made a moment ago."""
_STATE_SECONDS = 600.0
"""For which hosts may take to come to a state."""
_LATE_SECONDS = 6.0
"""After which an instance that a request has started is seen by others."""
_ROOT_GIB = 200
"""Of a host's disk: image, Python environment, data, checkpoints on their way to S3."""

_NO_ROOM = {
    *("InsufficientCapacity", "InsufficientFreeAddressesInSubnet", "InsufficientHostCapacity"),
    *("InsufficientInstanceCapacity", "InsufficientReservedInstanceCapacity"),
    *("InsufficientVolumeCapacity", "ReservationCapacityExceeded", "SpotMaxPriceTooLow"),
    *("UnfulfillableCapacity", "Unsupported"),
}
"""Another zone may have room; a quota of the account holds in all of them."""
_NOT_KNOWN_YET = {
    *("InvalidGroup.NotFound", "InvalidKeyPair.NotFound", "InvalidPlacementGroup.Unknown"),
    *("InvalidSecurityGroupID.NotFound", "InvalidSubnetID.NotFound"),
}
_BROKEN = {"InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable"}
_DEAD = ("shutting-down", "terminated")
_STOPPED = ("stopping", "stopped")


class Full(UserError):
    """No zone has room for the hosts."""


class Quota(UserError):
    """The account may have no more hosts; those that shut down count until they are terminated."""


class Stopped(UserError):
    """Hosts of a launch were stopped meanwhile: they are kept."""


class _Refused(ClientError):
    """EC2 refuses to start hosts, and cannot have started any before."""


class Undone(NamedTuple):
    """What has become of the hosts of a launch."""

    terminated: list[Host]
    stopped: list[Host]
    """Those that somebody has stopped; they are kept."""


@dataclass(frozen=True)
class Order:
    """What is to be started."""

    name: str
    """Of the run."""
    launch: str
    """Id of the launch: letters, digits and `._:-`, the same when it is repeated."""
    kind: InstanceType
    image: Image
    count: int
    """Hosts."""
    standing: Standing
    zones: tuple[str, ...]
    """In the order in which they are tried."""
    spot: bool
    max_price: float | None
    """Of one spot host, US dollars an hour; None: up to the price on demand."""
    user_data: str
    tags: dict[str, str]
    """Of every host, beside those that `start` knows itself: made-by, run, launch, owner, spot,
    user, price, and, when the hosts run, host and Name."""
    reservation: str = ""
    """Id of the capacity reservation that the hosts use."""
    capacity_block: str = ""
    """Id of the capacity block that the hosts use."""
    private_ip: bool = False
    """They are reached by their private addresses."""
    prices: dict[str, float] = field(default_factory=dict)
    """US dollars an hour of one host in a zone, for the tag."""
    again: bool = False
    """The launch may have started hosts a moment ago, before it was cut off."""
    number: int | None = None
    """Of the one host that is wanted, beside those of the launch that stand; None: all hosts."""
    round: int = 0
    """Tells this request of the launch from earlier ones, whose hosts are gone."""

    @property
    def wanted(self) -> int:
        """Hosts that the request starts."""
        return self.count if self.number is None else 1


def check_reachable(kind: InstanceType, count: int, private_ip: bool) -> None:
    """Raises UserError for hosts that would have no address which the launcher could reach.

    EC2 gives a public address only to a host with a single network interface, and hosts that train
    together have as many as their type has EFA interfaces. Several of them want --private-ip, and a
    subnet from which they reach the internet (a NAT gateway).
    """
    several = len(_efa_cards(kind, count) - {0})
    if several and not private_ip:
        raise UserError(
            f"hosts of type {kind.name} have {several + 1} network interfaces and so no public "
            "address: add --private-ip, and --subnet with one that has a NAT gateway, from a "
            "machine within the VPC or with a VPN to it"
        )


@explained()
def start(
    account: Account,
    order: Order,
    say: Callable[[str], None],
    held: Callable[[], bool] = lambda: True,
) -> Run:
    """All hosts of a run, running and numbered, in the first zone that has room for all of them.

    Hosts that this launch has started before are taken on instead. Whatever ends it otherwise,
    Ctrl-C too: what it started has been terminated then; after a SIGKILL the same order takes it
    on, or `undo` terminates it.

    Args:
      say: is told, in a line, of every zone without room and of long waits.
      held: tells whether the launch is still this command's; otherwise nothing is terminated.

    Raises Full if no zone has room, with each zone's answer; UserError for a quota, if AWS refuses,
    or if the hosts do not come up; Stopped if they were stopped, which leaves them as they are.
    """
    check_reachable(order.kind, order.count, order.private_ip)
    answers, asked = [], []
    try:
        standing = _standing_by_now(account, order) if order.again else _standing(account, order)
        if any(host.state in _STOPPED for host in standing):
            raise _stopped(account, order)
        for zone, found in _attempts(account, order, standing, say):
            asked = found if isinstance(found, list) else []
            outcome = _all_running(account, order, asked) if asked else found
            if isinstance(outcome, Run):
                return outcome
            answers.append(f"{zone}: {outcome}")
            say(f"no hosts in {answers[-1]}")
    except Stopped:
        raise
    except BaseException as end:
        try:
            with explained():
                if held():
                    _terminate(account, asked)
                    ended = list(asked)
                    if not isinstance(end, _Refused):
                        found = undo(account, order.name, order.launch).terminated
                        ended += [host.instance_id for host in found]
                    if ended:
                        say(f"terminated: {', '.join(dict.fromkeys(ended))}")
        except Exception as error:
            raise UserError(
                f"hosts of {order.name} may be running ({error}): terminate them with "
                f"{account.command('kill', order.name)}"
            ) from end
        raise
    raise Full(_all_full(order, answers))


@explained()
def start_one(account: Account, order: Order, zone: str, say: Callable[[str], None]) -> str:
    """Starts the host `order.number` beside those that stand; its id, before it runs.

    The same order is answered with the same host, also where that has died meanwhile.

    Raises Full if the zone has no room, Quota for a quota, UserError if AWS refuses otherwise.
    """
    try:
        found = _request(account, order, zone, say)
    except ClientError as error:
        if not is_quota(error):
            raise
        raise Quota(f"a quota of the account is reached ({error_message(error)})") from error
    if isinstance(found, str):
        raise Full(f"no room for host {order.number} of {order.name} in {zone}: {found}")
    return found[0]


@explained()
def undo(account: Account, name: str, launch: str) -> Undone:
    """Terminates what a launch has started, but for hosts that somebody has stopped meanwhile.

    EC2 shows an instance only some seconds after the request that started it, which may have been
    cut off: if there is nothing, it looks again.
    """
    terminated: dict[str, Host] = {}
    deadline = time.monotonic() + _LATE_SECONDS
    while True:
        found = [
            host
            for run in runs.find(account, name, all_users=True)
            for host in run.hosts
            if run.launch == launch and host.instance_id not in terminated
        ]
        stopped = [host for host in found if host.state in _STOPPED]
        new = [host for host in found if host not in stopped]
        terminate(account, new)
        terminated |= {host.instance_id: host for host in new}
        if not new and (terminated or stopped or time.monotonic() > deadline):
            return Undone(list(terminated.values()), stopped)
        time.sleep(POLL_SECONDS)


@explained()
def stop(account: Account, hosts: Iterable[Host]) -> None:
    """Stops hosts; their disks stay, and cost a little.

    Raises UserError for spot hosts, which end when they stop.
    """
    hosts = list(hosts)
    if any(host.spot for host in hosts):
        raise UserError("spot hosts cannot be stopped and started again: kill them")
    if hosts:
        account.client("ec2").stop_instances(InstanceIds=[host.instance_id for host in hosts])


@explained()
def start_again(account: Account, hosts: Iterable[Host], last_seen: datetime | None = None) -> None:
    """Starts hosts that were stopped, and notes for how long they have run, which EC2 forgets.

    `last_seen`: as for `Host.hours`.

    Raises Full if their zone has no room for them now.
    """
    hosts, now = list(hosts), datetime.now(UTC)
    if not hosts:
        return
    for host in hosts:
        hours = {"Key": names.TAG_HOURS, "Value": f"{host.hours(now, last_seen):.4f}"}
        account.client("ec2").create_tags(Resources=[host.instance_id], Tags=[hours])
    try:
        account.client("ec2", attempts=1).start_instances(
            InstanceIds=[host.instance_id for host in hosts]
        )
    except ClientError as error:
        if error_code(error) not in _NO_ROOM:
            raise
        raise Full(
            f"{hosts[0].zone} has no room for the hosts now ({error_code(error)}): try again "
            "later, or kill them and launch the run anew, from its checkpoint in S3"
        ) from error


@explained()
def terminate(account: Account, hosts: Iterable[Host]) -> None:
    """Terminates hosts, for good; what is gone already is no error."""
    _terminate(account, [host.instance_id for host in hosts])


@explained()
def until_terminated(account: Account, hosts: Iterable[Host]) -> None:
    """Waits until hosts that were terminated count against no quota any more."""
    _wait_until_terminated(account, [host.instance_id for host in hosts])


@explained()
def wait(account: Account, run: Run, state: str) -> Run:
    """The run, as EC2 tells of it when all its hosts are in a state.

    Raises UserError if some have come to another end, or take too long.
    """
    return wait_for(account, run.name, [host.instance_id for host in run.hosts], state)


@explained()
def wait_for(account: Account, name: str, instance_ids: list[str], state: str) -> Run:
    """As `wait`, for hosts of the run `name`, all of one launch, by their ids."""
    deadline = time.monotonic() + _STATE_SECONDS
    while True:
        instances = _describe(account, instance_ids)
        found = {instance["State"]["Name"] for instance in instances}
        if found == {state} and len(instances) == len(instance_ids):
            return _only(instances)
        if "terminated" in found:
            raise UserError(f"hosts of {name} are terminated: {_why_dead(instances)}")
        if time.monotonic() > deadline:
            raise UserError(f"hosts of {name} are {', '.join(sorted(found))}, not {state}")
        time.sleep(POLL_SECONDS)


def _attempts(
    account: Account, order: Order, standing: list[Host], say: Callable[[str], None]
) -> Iterable[tuple[str, list[str] | str]]:
    """Zone after zone, the ids of its hosts or why there are none; first where some stand."""
    done = {host.zone for host in standing}
    for zone in sorted(done):
        say(f"hosts of this launch stand in {zone} already")
        yield zone, [host.instance_id for host in standing if host.zone == zone]
    for zone in order.zones:
        if zone in done:
            continue
        if zone not in order.standing.subnets:
            yield zone, "no subnet"
            continue
        yield zone, _request(account, order, zone, say)


def _standing(account: Account, order: Order) -> list[Host]:
    return [
        host
        for run in runs.find(account, order.name, all_users=True)
        if run.launch == order.launch
        for host in run.hosts
    ]


def _standing_by_now(account: Account, order: Order) -> list[Host]:
    """Without the patience, hosts that EC2 does not show yet would be joined by another zone's."""
    deadline = time.monotonic() + _LATE_SECONDS
    while not (standing := _standing(account, order)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return standing


def _request(
    account: Account, order: Order, zone: str, say: Callable[[str], None]
) -> list[str] | str:
    """Ids of the zone's hosts, as EC2 has them started; or why it has no room for them."""
    # EC2 answers a full zone with a status that boto3 would take for a passing fault.
    ec2 = account.client("ec2", attempts=1)
    parameters = _parameters(account, order, zone)
    deadline = time.monotonic() + _REQUEST_SECONDS
    told = unclear = False
    while True:
        try:
            answer = ec2.run_instances(**parameters)
            return [instance["InstanceId"] for instance in answer["Instances"]]
        except ClientError as error:
            if error_code(error) in _NO_ROOM:
                return f"{error_code(error)}, {error_message(error)}"
            if error_code(error) == "IdempotentParameterMismatch":
                return _of_the_first_request(account, order, zone)
            unclear = unclear or error_code(error) in _BROKEN
            if not _passes(error) or time.monotonic() > deadline:
                if unclear:
                    raise
                raise _Refused(error.response, error.operation_name) from error
            cause = error_code(error)
        except UNREACHABLE:
            unclear = True
            if time.monotonic() > deadline:
                raise
            cause = "no answer"
        if not told:
            say(f"asking EC2 in {zone} again for up to {_REQUEST_SECONDS:.0f} s: {cause}")
            told = True
        time.sleep(2 * POLL_SECONDS)


def _passes(error: ClientError) -> bool:
    """Whether EC2 may answer otherwise in a moment."""
    code = error_code(error)
    young_profile = (
        code == "InvalidParameterValue" and "iam instance profile" in error_message(error).lower()
    )
    return young_profile or code in _NOT_KNOWN_YET | _BROKEN | THROTTLED


def _of_the_first_request(account: Account, order: Order, zone: str) -> list[str] | str:
    """Ids of the hosts that an earlier request with this token has started, with other parameters.

    That happens when the launch was cut off and its parameters are new, such as the spot price.
    """
    here = [
        host
        for host in _standing_by_now(account, order)
        if host.zone == zone and order.number in (None, host.index)
    ]
    if not here:
        return "the hosts that this launch had there are gone"
    return [host.instance_id for host in here]


def _parameters(account: Account, order: Order, zone: str) -> dict[str, Any]:
    standing, image = order.standing, order.image
    tags = [{"Key": key, "Value": value} for key, value in _tags(account, order, zone).items()]
    tagged = ["instance", "volume", "network-interface"]
    parameters: dict[str, Any] = {
        "ClientToken": _token(order, zone),
        "MinCount": order.wanted,
        "MaxCount": order.wanted,
        "InstanceType": order.kind.name,
        "ImageId": image.id,
        "KeyName": standing.key_name,
        "IamInstanceProfile": {"Name": standing.profile},
        "NetworkInterfaces": _interfaces(order, zone),
        "UserData": order.user_data,
        "BlockDeviceMappings": [
            {
                "DeviceName": image.root_device,
                "Ebs": {
                    "VolumeType": "gp3",
                    "VolumeSize": max(_ROOT_GIB, image.root_gib),
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        "MetadataOptions": {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            # A token reaches the host itself and nothing behind it: no container, no proxy that
            # somebody talks a program on the host into using, gets the role's credentials.
            "HttpPutResponseHopLimit": 1,
        },
        # A host ends by shutting itself down. The disk of one that may start again is kept.
        "InstanceInitiatedShutdownBehavior": "terminate" if order.spot else "stop",
    }
    if order.spot:
        tagged.append("spot-instances-request")
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        if order.max_price is not None:
            options["MaxPrice"] = f"{order.max_price:g}"
        parameters["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    if order.capacity_block:
        parameters["InstanceMarketOptions"] = {"MarketType": "capacity-block"}
    if reserved := order.capacity_block or order.reservation:
        parameters["CapacityReservationSpecification"] = {
            "CapacityReservationTarget": {"CapacityReservationId": reserved}
        }
    elif zone in standing.placement_groups and order.kind.clusters:
        parameters["Placement"] = {"GroupName": standing.placement_groups[zone]}
    parameters["TagSpecifications"] = [{"ResourceType": kind, "Tags": tags} for kind in tagged]
    return parameters


def _token(order: Order, zone: str) -> str:
    """EC2 answers a request with a token that it knows with what that has started."""
    parts = [order.launch, zone]
    if order.round:
        parts.append(f"round {order.round}")
    if order.number is not None:
        parts.append(f"host {order.number}")
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _tags(account: Account, order: Order, zone: str) -> dict[str, str]:
    price = order.prices.get(zone)
    return {
        **order.tags,
        **({} if price is None else {names.TAG_PRICE: f"{price:g}"}),
        **({} if order.number is None else _number_tags(order.name, order.number)),
        names.TAG_MADE_BY: names.MADE_BY,
        names.TAG_RUN: names.check_run_name(order.name),
        names.TAG_LAUNCH: order.launch,
        names.TAG_OWNER: account.caller,
        names.TAG_SPOT: "true" if order.spot else "false",
        names.TAG_USER: order.image.user,
    }


def _number_tags(name: str, number: int) -> dict[str, str]:
    return {names.TAG_HOST: str(number), names.TAG_NAME: f"{name}-{number}"}


def _efa_cards(kind: InstanceType, count: int) -> set[int]:
    """Network cards that get an EFA interface: none on a host that is alone."""
    return set(kind.efa_cards) if count > 1 else set()


def _interfaces(order: Order, zone: str) -> list[dict[str, Any]]:
    """One interface with an address, and on each further card one for EFA alone."""
    efa = _efa_cards(order.kind, order.count)
    common = {
        "SubnetId": order.standing.subnets[zone],
        "Groups": [order.standing.security_group],
        "DeleteOnTermination": True,
    }
    first = {
        **common,
        "NetworkCardIndex": 0,
        "DeviceIndex": 0,
        "InterfaceType": "efa" if 0 in efa else "interface",
    }
    others = [
        {**common, "NetworkCardIndex": card, "DeviceIndex": 1, "InterfaceType": "efa-only"}
        for card in sorted(efa - {0})
    ]
    if not others and not order.private_ip:
        first["AssociatePublicIpAddress"] = True
    return [first, *others]


def _all_running(account: Account, order: Order, instance_ids: list[str]) -> Run | str:
    """The run when all hosts are running; if some have died, the others are terminated."""
    deadline = time.monotonic() + _STATE_SECONDS
    while True:
        instances = _describe(account, instance_ids)
        states = [instance["State"]["Name"] for instance in instances]
        if any(state in _STOPPED for state in states):
            raise _stopped(account, order)
        if any(state in _DEAD for state in states) or len(instance_ids) != order.count:
            _terminate(account, sorted(set(instance_ids) - _dead(instances)))
            _wait_until_terminated(account, instance_ids)
            return _why_dead(instances) or f"only {len(instance_ids)} of {order.count} hosts stand"
        if states == ["running"] * order.count:
            return _numbered(account, order, instances)
        if time.monotonic() > deadline:
            raise UserError(
                f"hosts of {order.name} did not come up in {_STATE_SECONDS / 60:.0f} minutes "
                f"({', '.join(sorted(set(states))) or 'EC2 does not show them'}); they have been "
                "terminated"
            )
        time.sleep(POLL_SECONDS)


def _wait_until_terminated(account: Account, instance_ids: list[str]) -> None:
    """They count against the quota until then, and the next zone's would exceed it."""
    deadline = time.monotonic() + _STATE_SECONDS
    while time.monotonic() < deadline:
        instances = _describe(account, instance_ids)
        if all(instance["State"]["Name"] == "terminated" for instance in instances):
            return
        time.sleep(POLL_SECONDS)


def _numbered(account: Account, order: Order, instances: list[dict[str, Any]]) -> Run:
    """The run, each host with its number and name in its tags."""
    ec2 = account.client("ec2")
    for instance in instances:
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        # A launch that was cut off may have numbered some: EC2's own numbering is always the same.
        new = _number_tags(order.name, instance.get("AmiLaunchIndex", 0))
        if new.items() <= tags.items():
            continue
        ec2.create_tags(
            Resources=[instance["InstanceId"]],
            Tags=[{"Key": key, "Value": value} for key, value in new.items()],
        )
        # EC2 would show them only in a moment.
        instance["Tags"] = [{"Key": key, "Value": value} for key, value in {**tags, **new}.items()]
    return _only(instances)


def _only(instances: list[dict[str, Any]]) -> Run:
    (run,) = runs.read(instances)
    return run


def _describe(account: Account, instance_ids: list[str]) -> list[dict[str, Any]]:
    """EC2's descriptions of instances, without those that it does not show yet."""
    pages = account.client("ec2").get_paginator("describe_instances")
    # A filter and not the ids themselves: for one unknown id there would be no answer at all.
    asked = [{"Name": "instance-id", "Values": instance_ids}]
    return [
        instance
        for page in pages.paginate(Filters=asked)
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    ]


def _dead(instances: list[dict[str, Any]]) -> set[str]:
    return {instance["InstanceId"] for instance in instances if instance["State"]["Name"] in _DEAD}


def _stopped(account: Account, order: Order) -> Stopped:
    return Stopped(
        f"hosts of {order.name} have been stopped: {account.command('start', order.name)} starts "
        f"them again, {account.command('kill', order.name)} terminates them"
    )


def _why_dead(instances: list[dict[str, Any]]) -> str:
    reasons = {
        names.printable(instance.get("StateReason", {}).get("Message", ""))
        for instance in instances
        if instance["State"]["Name"] in _DEAD
    }
    return "; ".join(sorted(reasons - {""}))


def _terminate(account: Account, instance_ids: list[str]) -> None:
    """EC2 refuses the whole request for one unknown id, so each is asked for alone then."""
    if not instance_ids:
        return
    ec2 = account.client("ec2")
    try:
        ec2.terminate_instances(InstanceIds=instance_ids)
    except ClientError as error:
        if error_code(error) != "InvalidInstanceID.NotFound":
            raise
        if len(instance_ids) > 1:
            for instance_id in instance_ids:
                _terminate(account, [instance_id])


def _all_full(order: Order, answers: list[str]) -> str:
    advice = "a higher --max-price" if any("SpotMaxPrice" in told for told in answers) else ""
    advice = advice or ("--nospot" if order.spot else "another --instance-type")
    return (
        f"no zone has room for {order.count} × {order.kind.name} now, nothing is running: "
        f"{'; '.join(answers)}. Try {advice}, another --region, fewer --machines, or later"
    )
