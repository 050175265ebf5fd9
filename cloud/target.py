"""Where we deploy to and ask: an AWS account, or the local cloud. Nothing beyond this file knows which."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import boto3
import botocore.exceptions
import botocore.session
from botocore.config import Config

from cloud.errors import CloudError, CloudMisconfigured, CloudUnreachable
from cloud.local import launcher
from cloud.local.endpoint import ACCESS_KEY, DEFAULT_STATE, REGION, SECRET_KEY, LocalEndpoint

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_iot import IoTClient
    from mypy_boto3_lambda import LambdaClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sns import SNSClient
    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sts import STSClient

STACK = "picket"


@dataclass(frozen=True)
class Target:
    """A cloud to talk to.

    `session` has credentials of its own for the local cloud, so that a user's real ones are never sent there; for AWS
    it follows boto3's ordinary chain. `local` is set for the local cloud only.
    """

    name: Literal["local", "aws"]
    region: str
    session: boto3.Session
    endpoint_url: str | None = None
    local: LocalEndpoint | None = None
    stack: str = STACK

    @property
    def poll_seconds(self) -> float:
        """How often to ask about something that takes its time."""
        return 0.1 if self.local else 3.0

    @property
    def _config(self) -> Config:
        """A station waits for the network, but not for ever; throttled calls are tried again, where there are any."""
        return Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "max_attempts": 1 if self.local else 8},
            s3={"addressing_style": "path"},
            proxies={} if self.local else None,  # a proxy has no way to this machine's loopback
        )

    @property
    def iot(self) -> "IoTClient":
        """AWS IoT's control plane."""
        return self.session.client("iot", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def dynamodb(self) -> "DynamoDBClient":
        """The table's service."""
        return self.session.client("dynamodb", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def cloudformation(self) -> "CloudFormationClient":
        """The stack's service."""
        return self.session.client("cloudformation", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def s3(self) -> "S3Client":
        """Where the functions' code is put."""
        return self.session.client("s3", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def functions(self) -> "LambdaClient":
        """The functions, to call one by hand."""
        return self.session.client("lambda", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def sqs(self) -> "SQSClient":
        """The dead letters."""
        return self.session.client("sqs", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def sns(self) -> "SNSClient":
        """The operations topic."""
        return self.session.client("sns", endpoint_url=self.endpoint_url, config=self._config)

    @property
    def sts(self) -> "STSClient":
        """Who we are."""
        return self.session.client("sts", endpoint_url=self.endpoint_url, config=self._config)


def local_target(state: Path = DEFAULT_STATE) -> Target:
    """The local cloud that runs on this state directory.

    Raises:
        CloudUnreachable: none runs there.
    """
    endpoint = launcher.find(state)
    if endpoint is None:
        raise CloudUnreachable(f"no local cloud runs on {state}: start it by `python -m cloud up`")
    # no profile, no files, nothing from the environment: the user's AWS settings are for AWS
    ours = botocore.session.Session(
        session_vars={
            "profile": (None, None, None, None),
            "config_file": (None, None, os.devnull, None),
            "credentials_file": (None, None, os.devnull, None),
        }
    )
    session = boto3.Session(
        aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name=REGION, botocore_session=ours
    )
    return Target("local", REGION, session, endpoint.url, endpoint)


def aws_target(region: str | None = None, profile: str | None = None) -> Target:
    """AWS, by the ordinary credential chain.

    Raises:
        CloudMisconfigured: no region is set, or the profile does not exist.
    """
    try:
        session = boto3.Session(region_name=region, profile_name=profile)
    except botocore.exceptions.ProfileNotFound as error:
        raise CloudMisconfigured(f"{error}: see ~/.aws/config, or choose another by AWS_PROFILE") from error
    if session.region_name is None:
        raise CloudMisconfigured("no AWS region is set: set AWS_REGION, e.g. AWS_REGION=eu-central-1")
    return Target("aws", session.region_name, session)


def open_target(name: str, state: Path = DEFAULT_STATE) -> Target:
    """The target called `name`: `local` or `aws`.

    Raises:
        CloudError: there is no such target, or it cannot be used.
    """
    match name:
        case "local":
            return local_target(state)
        case "aws":
            return aws_target()
        case _:
            raise CloudMisconfigured(f"no cloud is called {name!r}: say local or aws")


@contextlib.contextmanager
def translated(target: Target, doing: str) -> Iterator[None]:
    """What boto3 raises inside becomes one of our errors; `doing` says what we were at, e.g. "asking for a thing".

    Raises:
        CloudUnreachable: nobody answered.
        CloudMisconfigured: the cloud refused.
    """
    where = target.endpoint_url or f"AWS in {target.region}"
    try:
        yield
    except CloudError:
        raise
    except (
        botocore.exceptions.EndpointConnectionError,
        botocore.exceptions.ConnectionClosedError,
        botocore.exceptions.HTTPClientError,
    ) as error:
        remedy = "is it running? `python -m cloud up`" if target.local else "check the network"
        raise CloudUnreachable(f"{where} does not answer ({doing}): {remedy}") from error
    except (
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.TokenRetrievalError,
        botocore.exceptions.UnauthorizedSSOTokenError,
        botocore.exceptions.CredentialRetrievalError,
    ) as error:
        raise CloudMisconfigured(
            f"no AWS credentials ({doing}): {error}; sign in by `aws configure` or `aws sso login`, or set AWS_PROFILE"
        ) from error
    except botocore.exceptions.ClientError as error:
        raise CloudMisconfigured(_explain(error, where, doing)) from error
    except botocore.exceptions.BotoCoreError as error:
        raise CloudMisconfigured(f"{where} cannot be asked ({doing}): {error}") from error


def _explain(error: botocore.exceptions.ClientError, where: str, doing: str) -> str:
    code = error.response.get("Error", {}).get("Code", "")
    said = error.response.get("Error", {}).get("Message", "") or str(error)
    if code in {"ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException"}:
        return f"{where} does not accept the credentials ({doing}): {said}; sign in again"
    if code in {"AccessDenied", "AccessDeniedException", "UnauthorizedException"}:
        return f"{where} does not allow it ({doing}): {said}; ask for that permission"
    return f"{where} refused ({doing}): {code}: {said}"
