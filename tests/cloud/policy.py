"""Whether the policies of a role allow what a host asks for, as IAM decides it.

As much of IAM's language as policies here use; anything else is an error, so that nothing passes
because it was not understood.
"""

import fnmatch
import json
import re
from typing import Any
from urllib.parse import parse_qsl, unquote

from tests.cloud.server import Call

Context = dict[str, str | list[str]]
"""Values of condition keys."""


def allows(documents: list[str], action: str, resource: str, context: Context) -> bool:
    """Whether a statement allows the action, and none denies it."""
    effects = {
        statement["Effect"]
        for document in documents
        for statement in json.loads(document)["Statement"]
        if _meets(statement, action, resource, context)
    }
    return effects == {"Allow"}


def asked_of_s3(call: Call) -> tuple[str, str]:
    """Action and resource of a request to S3, its bucket in the path."""
    bucket, _, key = unquote(call.path).lstrip("/").partition("/")
    asked = dict(parse_qsl(call.query, keep_blank_values=True))
    arn = f"arn:aws:s3:::{bucket}"
    if key:
        return f"s3:{_object_action(call.operation, asked)}", f"{arn}/{key}"
    if call.operation == "POST" and "delete" in asked:
        return "s3:DeleteObject", f"{arn}/*"
    if call.operation in ("GET", "HEAD"):
        known = {"location": "GetBucketLocation", "uploads": "ListBucketMultipartUploads"}
        names = [name for word, name in known.items() if word in asked]
        return f"s3:{names[0] if names else 'ListBucket'}", arn
    return f"s3:{call.operation}Bucket", arn


def _object_action(method: str, asked: dict[str, str]) -> str:
    if method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in asked else "DeleteObject"
    if method in ("PUT", "POST"):
        return "PutObject"
    return "ListMultipartUploadParts" if "uploadId" in asked else "GetObject"


def _meets(statement: dict[str, Any], action: str, resource: str, context: Context) -> bool:
    if unknown := statement.keys() - {"Sid", "Effect", "Action", "Resource", "Condition"}:
        raise ValueError(f"statement with {unknown}")
    return (
        any(fnmatch.fnmatchcase(action, form) for form in _listed(statement["Action"]))
        and any(fnmatch.fnmatchcase(resource, form) for form in _listed(statement["Resource"]))
        and all(
            _holds(operator, key, _listed(wanted), context)
            for operator, keys in statement.get("Condition", {}).items()
            for key, wanted in keys.items()
        )
    )


def _holds(operator: str, key: str, wanted: list[str], context: Context) -> bool:
    wanted = [re.sub(r"\$\{(.+?)\}", lambda name: str(context[name[1]]), form) for form in wanted]
    given = _listed(context.get(key, []))
    if operator == "ForAllValues:StringEquals":
        return set(given) <= set(wanted)
    if operator == "StringLike":
        return any(fnmatch.fnmatchcase(value, form) for value in given for form in wanted)
    if operator == "StringEquals":
        return bool(set(given) & set(wanted))
    raise ValueError(f"condition {operator}")


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
