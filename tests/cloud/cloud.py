"""AWS on this machine, without AWS: for the launcher's tests, and for people by `make cloud`.

`LocalCloud` is moto's server on loopback and, for every running instance, a process tree with a
real sshd (host.py). See also server.py, ec2.py and metadata.py.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
from moto.core.base_backend import BackendDict
from moto.core.model_instances import reset_model_data
from moto.ec2.models.instances import Instance
from moto.iam.models import iam_backends
from moto.sts.models import sts_backends

from tests.cloud import cloud_init, ec2, linux, policy, s3
from tests.cloud.inside import REBOOT
from tests.cloud.machines import Machines, Spec
from tests.cloud.metadata import Metadata
from tests.cloud.server import Call, Fault, Refusal, Server

REGION = "us-east-1"
NETWORK = "127.1.0.0/16"
"""Private addresses of the hosts; the public ones are in 127.100.0.0/16 and above."""
MESSAGES = {
    "RequestLimitExceeded": ("Request limit exceeded.", 503),
    "UnauthorizedOperation": ("You are not authorized to perform this operation.", 403),
    "VcpuLimitExceeded": ("You have requested more vCPU capacity than your current limit.", 400),
    "MaxSpotInstanceCountExceeded": ("Max spot instance count exceeded", 400),
    "ExpiredToken": ("The security token included in the request is expired", 400),
    "InsufficientInstanceCapacity": ("We currently do not have sufficient capacity.", 500),
}
"""Of errors that can be asked for: what AWS says, and the HTTP status."""


def missing() -> str:
    """What this machine lacks for hosts, in a sentence; empty if nothing."""
    if os.geteuid() != 0:
        return "the local cloud's hosts take root: sshd on port 22, and namespaces"
    for program in ("sshd", "ssh-keygen", "tmux"):
        if not shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin"):
            return f"{program} is not installed (apt-get install openssh-server tmux)"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system"
    words = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "true"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


class LocalCloud:
    """Use as a context manager; afterwards nothing of it runs.

    While it is open, the thread that opened it, and all threads and processes that this one starts,
    are in a network with nothing but loopback: no test reaches the real AWS, whatever it does.
    `isolated=False` leaves out this network, for use from other terminals.
    """

    def __init__(
        self,
        folder: Path,
        isolated: bool = True,
        port: int = 0,
        grace: float = 5.0,
    ) -> None:
        """`folder`: for the hosts' files and the laptop's home. `port`: of the server; 0: a free
        one. `grace`: seconds that a host's processes get to end when it turns off.
        """
        self.folder, self.grace = folder, grace
        self._isolated, self._port = isolated, port
        self._home = folder / "laptop"
        self.shared = folder / "shared"
        """A folder that all hosts have at the same place, as a network's disk."""
        self._no_ssh: set[int] = set()
        self._dying: set[int] = set()
        self._wrong_key: set[int] = set()
        self._broken: dict[int, dict[str, str]] = {}
        self._keys: dict[str, dict[str, str]] = {}
        self._roles: dict[str, Any] = {}
        """Of hosts that have keys, which hold until they end, also while a host turns off."""

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open(self) -> None:
        if self._isolated:
            self._stack.enter_context(_own_network())
        BackendDict.reset()
        reset_model_data()
        self._stack.callback(BackendDict.reset)
        self._home.mkdir(parents=True, exist_ok=True)
        self.shared.mkdir(exist_ok=True)
        self.server = Server(self._port)
        self._stack.callback(self.server.close)
        self.machines = Machines(self.folder / "hosts", self._host_ended)
        self._stack.callback(self.machines.close)
        self.ec2 = ec2.Ec2(self.server, REGION, self._start_host, self._end_host)
        self._stack.enter_context(self.ec2.open(NETWORK))
        self._stack.enter_context(s3.as_over_tls())
        self.metadata = Metadata(self._values, self._credentials)
        self.server.folders["hosts"] = self.metadata.answer
        self.server.checks.append(self._check_role)
        self.environ = self.user("laptop")

    @property
    def url(self) -> str:
        """Of all services."""
        return self.server.url

    @property
    def calls(self) -> list[Call]:
        """All requests so far, of the laptop and of the hosts."""
        return self.server.calls

    def user(self, name: str) -> dict[str, str]:
        """The environment of a person with an account of that name, for processes of theirs."""
        iam = iam_backends[ec2.ACCOUNT]["aws"]
        if name not in iam.users:
            iam.create_user(REGION, name)
        key = iam.create_access_key(name)
        home = self._home if name == "laptop" else self.folder / name
        home.mkdir(exist_ok=True)
        return _plain_environ() | {
            "HOME": str(home),
            "AWS_ACCESS_KEY_ID": key.access_key_id,
            "AWS_SECRET_ACCESS_KEY": key.secret_access_key,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "JAX_PLATFORMS": "cpu",
        }

    def client(self, service: str) -> Any:
        """A boto3 client of the laptop's user."""
        session = boto3.Session(
            self.environ["AWS_ACCESS_KEY_ID"],
            self.environ["AWS_SECRET_ACCESS_KEY"],
            region_name=REGION,
        )
        return session.client(service, endpoint_url=self.url)

    def instances(self, *states: str) -> list[Instance]:
        """moto's instances in one of the states; without states those that cost money."""
        return self.ec2.instances(*(states or ("pending", "running")))

    def full(self, *zones: str) -> None:
        """These zones, and no others, have no capacity."""
        self.ec2.full = set(zones)

    def refuse(self, operation: str, code: str, times: int | None = None) -> Fault:
        """Has the next requests of an operation refused; for how often, see `Fault`."""
        message, status = MESSAGES.get(code, ("refused by the local cloud", 400))
        fault = Fault(operation, Refusal(code, message, status), times)
        self.server.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Takes back all faults for what comes."""
        self.server.faults.clear()
        self.ec2.full = set()
        self._no_ssh.clear()
        self._wrong_key.clear()
        self._broken.clear()

    def die_once(self, index: int) -> None:
        """The next new instance with this launch index is accepted, and dies before it runs."""
        self._dying.add(index)

    def break_ssh(self, host: str | int) -> None:
        """Nothing answers SSH: of a running instance, or of new ones with this launch index."""
        if isinstance(host, int):
            self._no_ssh.add(host)
        else:
            self.machines.tell(host, "ssh", "down")

    def mend_ssh(self, instance: str) -> None:
        self.machines.tell(instance, "ssh", "up")

    def wrong_key(self, index: int) -> None:
        """New instances with this launch index show another host key than the user data's."""
        self._wrong_key.add(index)

    def break_program(self, index: int, program: str, message: str) -> None:
        """A stand-in fails on new instances with this launch index."""
        self._broken.setdefault(index, {})[program] = message

    def interrupt(self, instance: str, notice: bool = True, seconds: float = 120.0) -> None:
        """Takes a spot instance back: `seconds` after a notice, or at once without one."""
        if not notice:
            self.ec2.take_back(self.ec2.instance(instance))
            return
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        self.metadata.notices[instance] = until.strftime("%Y-%m-%dT%H:%M:%SZ")
        timer = threading.Timer(seconds, self._take_back, [instance])
        timer.daemon = True
        timer.start()

    def pass_minutes(self, minutes: float) -> None:
        """Brings the shutdowns that are scheduled on the hosts nearer, as if time had passed."""
        for host in self.machines.running():
            with contextlib.suppress(KeyError):
                self.machines.tell(host, "pass", str(60 * minutes))

    def crash(self, instance: str) -> None:
        """Ends a host as if its power had failed; EC2 calls it stopped or terminated."""
        self.machines.wait(instance, 0)
        self.ec2.turned_off(self.ec2.instance(instance))

    def home(self, instance: str) -> Path:
        """The login's home on a host."""
        return self.machines.folder(instance) / "home"

    def log(self, instance: str) -> Path:
        """/var/log of a host."""
        return self.machines.folder(instance) / "log"

    def recorded(self, instance: str, program: str = "") -> list[list[str]]:
        """The words with which stand-ins were called on a host: of one program, or of all."""
        path = self.log(instance) / "stand-ins.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = map(json.loads, lines)
        return [[c["name"], *c["words"]] for c in calls if program in ("", c["name"])]

    def _start_host(self, instance: Instance, new: bool) -> None:
        kind = self.ec2.hardware(instance.instance_type)
        gpu = kind.get("GpuInfo", {}).get("Gpus", [{"Count": 0, "Name": ""}])[0]
        image = next((i for i in ec2.IMAGES.values() if i.id == instance.image_id), None)
        data = instance.user_data.as_bytes() if instance.user_data else b""
        index = int(instance.ami_launch_index)
        keys = self.ec2.backend.key_pairs
        key = keys[instance.key_name].material_public.decode() if instance.key_name else ""
        if index in self._dying:
            self._dying.remove(index)
            self.ec2.turned_off(instance)
            return
        spec = Spec(
            id=instance.id,
            hostname="ip-" + str(instance.private_ip).replace(".", "-"),
            addresses=ec2.addresses(instance),
            user="ubuntu",
            authorized_key=key.strip(),
            user_data=cloud_init.parse(base64.b64decode(data)),
            gpus=gpu["Count"],
            gpu=gpu["Name"],
            driver=image is not None and image.driver,
            spot=instance.lifecycle == "spot",
            environ={
                "AWS_ENDPOINT_URL": self.url,
                "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.url}/hosts/{instance.id}/",
                "JAX_PLATFORMS": "cpu",
            },
            grace=self.grace,
            shared=str(self.shared),
            boot=self.ec2.boots.get(instance.id, 0),
            ssh="down" if index in self._no_ssh else "up",
            wrong_key=index in self._wrong_key,
            broken=self._broken.get(index, {}),
        )
        self.machines.start(spec)
        self.ec2.set_running(instance)

    def _end_host(self, instance: Instance) -> None:
        self.machines.turn_off(instance.id)

    def _host_ended(self, name: str, status: int) -> None:
        instance = self.ec2.instance(name)
        if status == REBOOT and instance.state == "running":
            self.ec2.boots[name] = self.ec2.boots.get(name, 0) + 1
            threading.Thread(target=self._start_host, args=(instance, False), daemon=True).start()
        else:
            self.ec2.turned_off(instance)

    def _take_back(self, name: str) -> None:
        instance = self.ec2.instance(name)
        if instance.state == "running":
            self.ec2.take_back(instance)

    def _check_role(self, call: Call) -> None:
        """Hosts may do what the policies of their role say, and nothing else."""
        host = next((h for h, k in self._keys.items() if k["AccessKeyId"] == call.access_key), "")
        if not host or call.service == "sts":
            return
        context: policy.Context = {"aws:userid": f"AROA:{host}"}
        if call.service == "s3":
            action, resource = policy.asked_of_s3(call)
        else:
            action = f"{call.service}:{call.operation}"
            target = call.parameters.get("ResourceId.1", "*")
            resource = f"arn:aws:ec2:{REGION}:{ec2.ACCOUNT}:instance/{target}"
            tagged = [k for k in call.parameters if re.fullmatch(r"Tag\.\d+\.Key", k)]
            context["ec2:InstanceID"] = target
            context["aws:TagKeys"] = [call.parameters[key] for key in tagged]
        documents = list(self._roles[host].policies.values())
        if not policy.allows(documents, action, resource, context):
            message = f"{host} is not authorized to perform: {action} on resource: {resource}"
            raise Refusal(
                "UnauthorizedOperation" * (call.service == "ec2") or "AccessDenied", message, 403
            )

    def _role(self, host: str) -> Any:
        """moto's role of a host's instance profile; None without one."""
        instance = self.ec2.instance(host)
        if not instance.iam_instance_profile:
            return None
        arn = instance.iam_instance_profile["Arn"]
        profiles = iam_backends[ec2.ACCOUNT]["aws"].get_instance_profiles()
        return next(iter(next(p for p in profiles if p.arn == arn).roles))

    def _values(self, name: str) -> dict[str, str] | None:
        """What the instance metadata service tells a host."""
        found = [i for i in self.ec2.instances() if i.id == name]
        if not found:
            return None
        instance = found[0]
        return {
            "instance-id": instance.id,
            "instance-type": instance.instance_type,
            "ami-launch-index": str(instance.ami_launch_index),
            "local-ipv4": str(instance.private_ip),
            "public-ipv4": str(instance.public_ip or ""),
            "placement/availability-zone": str(instance.placement.zone),
            "placement/region": REGION,
            "instance-life-cycle": instance.lifecycle or "on-demand",
        }

    def _credentials(self, name: str) -> tuple[str, dict[str, str]] | None:
        """The name of a host's role, and what it may sign with."""
        role = self._role(name)
        if role is None:
            return None
        if name not in self._keys:
            self._roles[name] = role
            given = sts_backends[ec2.ACCOUNT]["aws"].assume_role(
                REGION, name, role.arn, "", 6 * 3600, ""
            )
            self._keys[name] = {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "LastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "AccessKeyId": given.access_key_id,
                "SecretAccessKey": given.secret_access_key,
                "Token": given.session_token,
                "Expiration": given.expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        return role.name, self._keys[name]


@contextlib.contextmanager
def _own_network() -> Any:
    """The calling thread is in a network of its own meanwhile, with nothing but loopback."""
    before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    linux.unshare(linux.CLONE_NEWNET)
    try:
        linux.start_loopback()
        yield
    finally:
        linux.enter_network(before)
        os.close(before)


def _plain_environ() -> dict[str, str]:
    """This process's environment without anything that leads to an account of AWS."""
    unwanted = ("AWS_", "BOTO", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
