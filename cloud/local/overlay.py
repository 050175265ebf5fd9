"""What ministack lacks to stand in for AWS IoT: the amendments, and the guard that they still fit.

ministack registers a device certificate just in time but stops there; asks for a client certificate without insisting;
listens on every interface; and hands a rule's event to a Lambda function once, without AWS's retries. Each amendment
below replaces one of its functions by name; what jobs lack is in `jobs`. The names belong to another project, so
`check_pinned` refuses to start on any other version, or when a name or its signature is not what was written against.

Documents: JITP https://docs.aws.amazon.com/iot/latest/developerguide/jit-provisioning.html, certificate states
https://docs.aws.amazon.com/iot/latest/apireference/API_UpdateCertificate.html, asynchronous invocation
https://docs.aws.amazon.com/lambda/latest/dg/invocation-async.html.
"""

import asyncio
import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import random
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud.errors import LocalCloudError
from cloud.jitp import missing_parameters, subject_parameters
from cloud.local import jobs

PINNED = "1.5.33"

log = logging.getLogger("picket.overlay")

#: Every name of ministack that the amendments replace or call, with the signature that they were written against.
WRAPPED: Mapping[str, Mapping[str, str]] = {
    "ministack.services.iot": {
        "_publish_certificate_registered": (
            "(account_id: str, region: str, record: dict, source_ip: str | None,"
            " registration_timestamp: str | None) -> None"
        ),
        "_provisioning_plan": "(template: dict, parameters: dict, cert_id: str) -> dict",
        "_provisioning_template_body": "(t: dict)",
        "_apply_provisioning_plan": "(plan: dict, cert: dict, role_arn: str) -> str | None",
        "_mtls_build_ssl_context": "() -> ssl.SSLContext",
        "_mtls_start_locked": "() -> None",
        "_mtls_context": "() -> ssl.SSLContext | None",
        "_handle_certificate": "(method: str, path: str, body: bytes, qp: dict) -> tuple",
        "_dispatch_rule_to_lambda": "(account_id: str, region: str, function_arn: str, event) -> None",
        "mtls_is_listening": "() -> bool",
        "get_ca_cert_pem": "() -> str",
        "_endpoint_prefix": "(account_id: str) -> str",
    },
    "ministack.services.lambda_svc": {
        "invoke_async_with_retry": "(func: dict, event: dict) -> None",
        "_execution_record_for_config": "(func: dict, config: dict) -> dict",
        "_get_func_record_for_ref_in_scope": (
            "(function_ref: str, *, account_id: str | None = None, region: str | None = None)"
            " -> tuple[dict | None, dict | None, str]"
        ),
    },
    "ministack.core.lambda_runtime": {
        "acquire_worker": (
            "(func_name: str, config: dict, code_zip: bytes, qualifier: str = '$LATEST',"
            " max_concurrency: int | None = None)"
        ),
        "_worker_key": "(func_name: str, config: dict, qualifier: str) -> str",
        "ensure_spawned": "(worker: ministack.core.lambda_runtime.Worker) -> None",
        "release_worker": "(worker: ministack.core.lambda_runtime.Worker) -> None",
    },
    "ministack.services.sns": {
        "_publish": "(params)",
        "_sms_log_for": "(phone_number: str) -> list",
    },
    "ministack.core.iam_actions": {
        "extract_resource_arn": (
            "(service: str, method: str, path: str, headers: dict, body: bytes, query_params: dict,"
            " region: str, account_id: str) -> str"
        ),
    },
    "ministack.app": {
        "_build_persistence_save_dict": "()",
    },
}


@dataclass(frozen=True)
class Behaviour:
    """How the stand-in behaves where AWS has a range.

    `jitp_delay_seconds`: from the hang-up until the certificate is ACTIVE; AWS takes one to three seconds.
    `minute_seconds`: how long a minute of jobs is: of their rollout rates and timers. Tests have no time.
    """

    jitp_delay_seconds: tuple[float, float] = (1.0, 3.0)
    minute_seconds: float = 60.0


def check_pinned(
    version: str | None = None, wrapped: Sequence[Mapping[str, Mapping[str, str]]] = (WRAPPED, jobs.WRAPPED)
) -> None:
    """Refuse any ministack but the one that the amendments were written against.

    Args:
        version: the installed version; read from the installed package when None.
        wrapped: module, name, signature of everything the amendments touch; one mapping per file of amendments.

    Raises:
        LocalCloudError: another version, or a name that is gone or has another signature.
    """
    if version is None:
        try:
            version = importlib.metadata.version("ministack")
        except importlib.metadata.PackageNotFoundError as error:
            raise LocalCloudError(f"ministack is not installed: install ministack=={PINNED} from the lock") from error
    if version != PINNED:
        raise LocalCloudError(
            f"the local cloud is written against ministack {PINNED}, installed is {version}:"
            f" install ministack=={PINNED}, or port cloud/local/overlay.py to {version}"
        )
    for module_name, names in (item for each in wrapped for item in each.items()):
        module = importlib.import_module(module_name)
        for name, expected in names.items():
            found = getattr(module, name, None)
            if found is None:
                raise LocalCloudError(f"{module_name}.{name} is gone: the overlay no longer fits this ministack")
            signature = str(inspect.signature(found)).replace("'", "")  # quoted where annotations are postponed
            if signature != expected.replace("'", ""):
                raise LocalCloudError(
                    f"{module_name}.{name} has the signature {signature}, the overlay was written against {expected}"
                )


def _module(name: str) -> Any:
    """One of ministack's modules; untyped, which is why `check_pinned` looks at every name before it is used."""
    return importlib.import_module(name)


def install(behaviour: Behaviour, mqtt_socket: socket.socket) -> None:
    """Put every amendment in place. Once per process, before the service starts."""
    require_client_certificate()
    listen_on(mqtt_socket)
    provision_just_in_time(behaviour)
    drop_sessions_of_dead_certificates()
    invoke_functions_as_aws_does()
    name_the_target_of_a_policy()
    date_text_messages()
    jobs.install(behaviour.minute_seconds)


def require_client_certificate() -> None:
    """A device without a certificate, or without a server name (SNI), never gets past the handshake.

    AWS IoT requires both on 8883; ministack asks for the certificate but serves a client that has none.
    """
    iot = _module("ministack.services.iot")
    build = iot._mtls_build_ssl_context  # noqa: SLF001 - guarded by WRAPPED

    def strict() -> Any:
        context: Any = build()
        context.verify_mode = ssl.CERT_REQUIRED
        refresh = context.sni_callback

        def on_hello(connection: Any, server_name: str | None, hello_context: ssl.SSLContext) -> int | None:
            refresh(connection, server_name, hello_context)
            return None if server_name else int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)

        context.sni_callback = on_hello
        return context

    iot._mtls_build_ssl_context = strict  # noqa: SLF001


def listen_on(mqtt_socket: socket.socket) -> None:
    """MQTT listens on the socket that the launcher bound, so on loopback; ministack's own is on every interface."""
    iot = _module("ministack.services.iot")

    async def start_locked() -> None:
        if iot._mtls_server is not None:  # noqa: SLF001
            return
        loop = asyncio.get_running_loop()
        iot._mtls_server = await loop.create_server(iot._MtlsAcceptor, sock=mqtt_socket.dup())  # noqa: SLF001
        iot._mtls_loop = loop  # noqa: SLF001

    iot._mtls_start_locked = start_locked  # noqa: SLF001


def provision_just_in_time(behaviour: Behaviour) -> None:
    """Run a CA's provisioning template for a certificate that has just been registered.

    The connection that registered it is hung up (ministack does that), the template runs a moment later. While it
    runs, further connections are hung up too. A certificate that lacks a parameter stays PENDING_ACTIVATION for good.
    A CA without a template publishes its `registered` event instead (JITR), as ministack does.
    """
    iot = _module("ministack.services.iot")
    publish = iot._publish_certificate_registered  # noqa: SLF001
    running: dict[tuple[str, str, str], asyncio.Task[None]] = {}

    async def registered(
        account_id: str, region: str, record: dict[str, Any], source_ip: str | None, registration_timestamp: str | None
    ) -> None:
        authority = iot._ca_certificates.get_scoped(account_id, region, record["caCertificateId"]) or {}  # noqa: SLF001
        config = authority.get("registrationConfig")
        if not config:
            await publish(account_id, region, record, source_ip, registration_timestamp)
            return
        key = (account_id, region, record["certificateId"])
        if key not in running:
            delay = random.uniform(*behaviour.jitp_delay_seconds)  # noqa: S311 - a delay, not a secret
            running[key] = asyncio.create_task(_provision(iot, key, config, delay))
            running[key].add_done_callback(lambda _: running.pop(key))

    iot._publish_certificate_registered = registered  # noqa: SLF001


async def _provision(iot: Any, key: tuple[str, str, str], config: Mapping[str, str], delay: float) -> None:
    await asyncio.sleep(delay)
    account_id, region, certificate_id = key
    with iot.request_scope(account_id, region):
        record = iot._certificates.get(certificate_id)  # noqa: SLF001
        if record is None or record["status"] != "PENDING_ACTIVATION":
            return
        template = _template(iot, config)
        if template is None:
            log.warning(
                "JITP: certificate %s stays PENDING_ACTIVATION: its CA names no usable template", certificate_id
            )
            return
        pem = record["certificatePem"]
        body = iot._provisioning_template_body(template)  # noqa: SLF001
        missing = missing_parameters(body, pem)
        if missing:
            log.warning("JITP: certificate %s stays PENDING_ACTIVATION: no value for %s", certificate_id, missing)
            return
        try:
            plan = iot._provisioning_plan(template, subject_parameters(pem), certificate_id)  # noqa: SLF001
            await iot._apply_provisioning_plan(plan, record, template["provisioningRoleArn"])  # noqa: SLF001
        except iot._ProvisioningRejected as rejected:  # noqa: SLF001
            log.warning("JITP: certificate %s stays PENDING_ACTIVATION: %s", certificate_id, rejected.reply)
        else:
            log.info("JITP: certificate %s is provisioned", certificate_id)


def _template(iot: Any, config: Mapping[str, str]) -> dict[str, Any] | None:
    """The CA's template: by name, and then it must exist, be enabled and of type JITP; or the inline body."""
    if config.get("templateName"):
        template: dict[str, Any] | None = iot._provisioning_templates.get(config["templateName"])  # noqa: SLF001
        return template if template and template["enabled"] and template["type"] == "JITP" else None
    if config.get("templateBody") and config.get("roleArn"):
        return {
            "templateName": "inline",
            "provisioningRoleArn": config["roleArn"],
            "defaultVersionId": 1,
            "versions": {"1": {"templateBody": config["templateBody"]}},
        }
    return None


def drop_sessions_of_dead_certificates() -> None:
    """A certificate that leaves ACTIVE, or is deleted, ends its sessions. AWS does so within minutes, we at once."""
    iot = _module("ministack.services.iot")
    handle = iot._handle_certificate  # noqa: SLF001

    def handle_and_drop(method: str, path: str, body: bytes, qp: dict[str, Any]) -> tuple[Any, ...]:
        answer: tuple[Any, ...] = handle(method, path, body, qp)
        certificate_id = path.removeprefix("/certificates/")
        record = iot._certificates.get(certificate_id)  # noqa: SLF001
        if method in {"PUT", "DELETE"} and (record is None or record["status"] != "ACTIVE"):
            iot._mtls_loop.call_soon_threadsafe(_drop_sessions, iot, certificate_id)  # noqa: SLF001
        return answer

    iot._handle_certificate = handle_and_drop  # noqa: SLF001


_closing: set[asyncio.Task[None]] = set()


def _drop_sessions(iot: Any, certificate_id: str) -> None:
    for session in list(iot._connected_clients.values()):  # noqa: SLF001
        if session.certificate_id == certificate_id:
            task = asyncio.ensure_future(session._send({"type": "websocket.close"}))  # noqa: SLF001
            _closing.add(task)
            task.add_done_callback(_closing.discard)


def invoke_functions_as_aws_does() -> None:
    """A rule invokes its function asynchronously: two retries, then the function's on-failure destination."""
    iot = _module("ministack.services.iot")
    lambda_svc = _module("ministack.services.lambda_svc")

    def dispatch(account_id: str, region: str, function_arn: str, event: Any) -> None:
        function, config, _ = lambda_svc._get_func_record_for_ref_in_scope(  # noqa: SLF001
            function_arn, account_id=account_id, region=region
        )
        if not function or not config:
            raise LookupError(f"no function {function_arn}")  # the rule's errorAction gets it
        lambda_svc.invoke_async_with_retry(
            lambda_svc._execution_record_for_config(function, config),  # noqa: SLF001
            event,
        )

    iot._dispatch_rule_to_lambda = dispatch  # noqa: SLF001


def name_the_target_of_a_policy() -> None:
    """AttachPolicy and DetachPolicy are permitted by the certificate they act on, as at AWS; ministack asks for "*".

    https://docs.aws.amazon.com/service-authorization/latest/reference/list_awsiot.html
    """
    iam_actions = _module("ministack.core.iam_actions")
    extract = iam_actions.extract_resource_arn

    @functools.wraps(extract)
    def with_target(
        service: str, method: str, path: str, headers: dict[str, str], body: bytes, *others: Any, **named: Any
    ) -> str:
        if service == "iot" and path.startswith("/target-policies/"):
            with contextlib.suppress(ValueError):
                target = (json.loads(body) or {}).get("target")
                if isinstance(target, str):
                    return target
        found: str = extract(service, method, path, headers, body, *others, **named)
        return found

    iam_actions.extract_resource_arn = with_target


def date_text_messages() -> None:
    """Stamp every text message in the outbox with the time it arrived there (`PublishedAt`, Unix seconds)."""
    sns = _module("ministack.services.sns")
    publish = sns._publish  # noqa: SLF001

    @functools.wraps(publish)
    def dated(params: dict[str, Any]) -> Any:
        answer = publish(params)
        number = sns._p(params, "PhoneNumber")  # noqa: SLF001
        if number:
            for message in sns._sms_log_for(number):  # noqa: SLF001
                message.setdefault("PublishedAt", time.time())
        return answer

    sns._publish = dated  # noqa: SLF001


#: Functions whose present code cannot start; each says so again when it is invoked.
_broken: set[tuple[str, str]] = set()


def keep_functions_warm() -> None:
    """Start one instance of every function that has none, so that an alarm never waits for a cold start.

    On AWS that is what provisioned concurrency buys, and what a function that ran a few minutes ago has anyway.
    """
    lambda_svc = _module("ministack.services.lambda_svc")
    runtime = _module("ministack.core.lambda_runtime")
    for function in list(lambda_svc._functions._data.values()):  # noqa: SLF001
        config, code = function.get("config") or {}, function.get("code_zip")
        if not code or config.get("State") != "Active":
            continue
        build = (config["FunctionArn"], config.get("CodeSha256", ""))
        if build in _broken or runtime._workers.get(runtime._worker_key(config["FunctionName"], config, "$LATEST")):  # noqa: SLF001
            continue  # never take the instance that an event may want at this very moment
        worker, _ = runtime.acquire_worker(config["FunctionName"], config, code)
        try:
            runtime.ensure_spawned(worker)
        except RuntimeError as error:
            log.warning("%s does not start: %s", config["FunctionName"], error)
            _broken.add(build)
        finally:
            runtime.release_worker(worker)


#: What of ministack's state is the stack's; the rest is empty.
_OURS = frozenset(
    {"cloudformation", "cloudwatch", "cloudwatch_logs", "dynamodb", "iam", "iot", "lambda", "s3", "sns", "sqs", "sts"}
)


def save_state() -> None:
    """Write everything down now. ministack alone does so only when it is asked to stop, and a power cut never asks."""
    app = _module("ministack.app")
    services = app._build_persistence_save_dict()  # noqa: SLF001
    app.save_all({name: get for name, get in services.items() if name in _OURS})
