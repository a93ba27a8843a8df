"""Shows runs in TensorBoard on this machine, from S3.

It listens on this machine only, and opens nothing to anyone else.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

from launcher import lookup
from launcher.aws import Account
from launcher.options import OfBucket, RunNames
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OfBucket):
    """Options of the command."""

    names: RunNames = ()
    """Runs to show; none: all."""
    port: int = 6006
    """Port on this machine, at http://localhost:PORT."""


def main(options: Options) -> int:
    """Exit status of TensorBoard. Raises UserError if it is not installed, or for no bucket."""
    if not importlib.util.find_spec("tensorboard"):
        raise UserError("TensorBoard is not installed here: pip install tensorboard")
    account = Account.open(options.region)
    words = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1"]
    words += ["--port", str(options.port), *_where(account, options)]
    environ = os.environ | {"AWS_DEFAULT_REGION": account.region, "AWS_REGION": account.region}
    return subprocess.run(words, env=environ).returncode


def _where(account: Account, options: Options) -> list[str]:
    """Options that tell TensorBoard what to show."""
    if not options.names:
        # Of the bucket itself, TensorBoard would read the sources and corpora too.
        return ["--logdir", f"s3://{lookup.check_bucket(account, options.bucket)}/runs"]
    folders = {
        name: f"s3://{lookup.bucket(account, name, options.bucket)}/runs/{name}"
        for name in options.names
    }
    if len(folders) == 1:
        return ["--logdir", *folders.values()]
    return ["--logdir_spec", ",".join(f"{name}:{folder}" for name, folder in folders.items())]
