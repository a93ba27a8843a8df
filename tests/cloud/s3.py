"""What moto's S3 lacks here: the server speaks no TLS, and bucket policies ask for it."""

import contextlib
import json
from typing import Any
from unittest import mock

from moto.iam.access_control import IAMPolicy, PermissionResult
from moto.s3.models import FakeBucket

_WITHOUT_TLS = {"Bool": {"aws:SecureTransport": "false"}}


def as_over_tls() -> contextlib.AbstractContextManager[Any]:
    """Has bucket policies judge every request as if it had come over TLS, until it is left."""

    def permission(bucket: FakeBucket, action: str, resource: str) -> PermissionResult:
        policy = json.loads(bucket.policy or b'{"Statement": []}')
        met = [s for s in policy["Statement"] if s.get("Condition") != _WITHOUT_TLS]
        return IAMPolicy(json.dumps(policy | {"Statement": met})).is_action_permitted(
            action, resource
        )

    return mock.patch.object(FakeBucket, "get_permission", permission)
