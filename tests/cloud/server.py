"""The HTTP server of the local cloud: moto's, with what moto lacks and what can go wrong.

Every request is written down. A request fails if a fault says so; it is answered here if an
`Answer` is known for its operation, and by moto otherwise.
"""

import io
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import BaseWSGIServer, make_server

Environ = dict[str, Any]
_QUERY_SERVICES = ("ec2", "iam", "sts")


@dataclass
class Call:
    """One request."""

    service: str
    operation: str
    """RunInstances, GetParameter, …; of S3 the method: PUT, GET, …"""
    path: str
    query: str
    parameters: dict[str, Any]
    access_key: str
    region: str
    time: float = field(default_factory=time.time)
    status: int = 0

    def numbered(self, name: str) -> list[str]:
        """A list in EC2's query protocol: NAME.1, NAME.2, …"""
        found = []
        while (value := self.parameters.get(f"{name}.{len(found) + 1}")) is not None:
            found.append(value)
        return found

    def filters(self) -> dict[str, list[str]]:
        """EC2's filters: name → values."""
        filters, number = {}, 1
        while (name := self.parameters.get(f"Filter.{number}.Name")) is not None:
            filters[name] = self.numbered(f"Filter.{number}.Value")
            number += 1
        return filters


class Refusal(Exception):
    """An AWS error as the answer of a request."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(code)
        self.code, self.message, self.status = code, message, status


@dataclass
class Fault:
    """Requests that are refused."""

    operation: str
    """As `Call.operation`, perhaps with the service: s3:PUT; * is any."""
    refusal: Refusal
    times: int | None
    """How often; None: always."""

    def meets(self, call: Call) -> bool:
        service, _, operation = self.operation.rpartition(":")
        return operation in ("*", call.operation) and service in ("", call.service)


Answer = Callable[[Call], "str | dict[str, Any] | None"]
"""XML within the response element, or an object for JSON; None: moto answers. Raises `Refusal`."""


class Server:
    """Serves on a free port of 127.0.0.1, in threads."""

    def __init__(self, port: int = 0) -> None:
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.answers: dict[str, Answer] = {}
        """By SERVICE:OPERATION."""
        self.checks: list[Callable[[Call], None]] = []
        """Called before a request is answered; raise `Refusal`."""
        self.folders: dict[str, Callable[[Environ], tuple[str, str]]] = {}
        """By the path's first part: what serves what lies there, outside of AWS's services."""
        self.current = threading.local()
        """`.call`: the request that this thread answers."""
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer = make_server(
            "127.0.0.1", port, self._respond, threaded=True, request_handler=_Quiet
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _respond(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        folder = environ["PATH_INFO"].split("/")[1]
        if folder in self.folders:
            status, text = self.folders[folder](environ)
            start(status, [("Content-Type", "text/plain")])
            return [text.encode()]
        call = _read(environ)
        self.calls.append(call)
        self.current.call = call

        def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            call.status = int(status.split()[0])
            return start(status, headers, *rest)

        try:
            for fault in self.faults:
                if fault.meets(call) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    raise fault.refusal
            for check in self.checks:
                check(call)
            answer = self.answers.get(f"{call.service}:{call.operation}")
            said = answer(call) if answer else None
            return self._moto(environ, started) if said is None else _success(call, said, started)
        except Refusal as refusal:
            return _failure(call, refusal, started)


class _Quiet(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def _read(environ: Environ) -> Call:
    """What a request asks for; its body can be read again."""
    words = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].split(",")[0]
    scope = words.split("/")
    key, region, service = (scope[0], scope[2], scope[3]) if len(scope) == 5 else ("", "", "")
    target = environ.get("HTTP_X_AMZ_TARGET", "")
    parameters: dict[str, Any] = {}
    operation = environ["REQUEST_METHOD"]
    if target or service in _QUERY_SERVICES:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if target:
            operation, parameters = target.rpartition(".")[2], json.loads(body or b"{}")
        else:
            parameters = dict(parse_qsl(body.decode(), keep_blank_values=True))
            operation = parameters.get("Action", "")
    path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
    return Call(service, operation, path, query, parameters, key, region)


def _success(call: Call, answer: str | dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
    if call.parameters.get("DryRun") == "true":
        raise Refusal("DryRunOperation", "Request would have succeeded.", 412)
    if isinstance(answer, dict):
        start("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(answer).encode()]
    start("200 OK", [("Content-Type", "text/xml")])
    name = call.operation
    if call.service != "ec2":
        answer = f"<{name}Result>{answer}</{name}Result>"
    return [f"<{name}Response><requestId>request</requestId>{answer}</{name}Response>".encode()]


def _failure(call: Call, refusal: Refusal, start: Callable[..., Any]) -> list[bytes]:
    code, message = refusal.code, refusal.message
    error = f"<Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
    kind = "text/xml"
    if call.service == "ec2":
        text = (
            f"<Response><Errors><Error>{error}</Error></Errors><RequestID>r</RequestID></Response>"
        )
    elif call.service == "s3":
        text = f"<Error>{error}<RequestId>r</RequestId></Error>"
    elif call.service in _QUERY_SERVICES:
        text = f"<ErrorResponse><Error>{error}</Error><RequestId>r</RequestId></ErrorResponse>"
    else:
        kind = "application/x-amz-json-1.1"
        text = json.dumps({"__type": code, "message": message})
    start(f"{refusal.status} Refused", [("Content-Type", kind)])
    return [b"" if call.operation == "HEAD" else text.encode()]
