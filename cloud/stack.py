"""Deploy the one template: code to S3, a change set, its execution, and the outputs that everything else reads.

The SAM transform runs on the server's side, at AWS as in the local cloud, so the same bytes go to both.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import botocore.exceptions

from cloud.errors import DeployError, StackMissingError
from cloud.package import BUILD, pack
from cloud.target import Target, translated

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient

TEMPLATE = Path(__file__).with_name("template.yaml")

#: CloudFormation takes minutes where a table or a role is new.
DEPLOY_SECONDS = 900.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Deployment:
    """A deployed stack: whether anything changed, and what its parts are called."""

    changed: bool
    outputs: Mapping[str, str]


def _silent(_: str) -> None: ...


def deploy(target: Target, progress: Progress = _silent, build: Path = BUILD) -> Deployment:
    """Bring the target's stack to what the template and the code say. Safe to repeat.

    Args:
        target: where.
        progress: told each step in a sentence.
        build: where the packed code is kept.

    Raises:
        CloudError: it did not work; the message says which resource and why.
    """
    with translated(target, "deploying the stack"):
        progress("packing the functions")
        package = pack(build)
        bucket = _bucket(target, progress)
        if not _uploaded(target, bucket, package.key):
            progress(f"uploading {package.key} ({package.path.stat().st_size // 1024} kB)")
            target.s3.put_object(Bucket=bucket, Key=package.key, Body=package.path.read_bytes())
        changed = _apply(target, {"CodeBucket": bucket, "CodeKey": package.key}, progress)
        return Deployment(changed, outputs(target))


def outputs(target: Target) -> dict[str, str]:
    """What the stack's parts are called.

    Raises:
        StackMissingError: it is not deployed there.
        CloudError: the target cannot be asked.
    """
    with translated(target, "asking for the stack"):
        status, found = _describe(target.cloudformation, target.stack)
    if status is None or not status.endswith("_COMPLETE") or status in {"DELETE_COMPLETE", "ROLLBACK_COMPLETE"}:
        raise StackMissingError(
            f"the stack {target.stack!r} is not deployed ({status or 'absent'}):"
            f" run `python -m cloud deploy --target {target.name}`"
        )
    return found


def _bucket(target: Target, progress: Progress) -> str:
    """The bucket for the code, made if it is absent: private, encrypted, one per account and region."""
    account = target.sts.get_caller_identity()["Account"]
    name = f"{target.stack}-code-{account}-{target.region}"
    try:
        target.s3.head_bucket(Bucket=name)
    except botocore.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
    else:
        return name
    progress(f"making the bucket {name}")
    if target.region == "us-east-1":  # the one region that must not be named
        target.s3.create_bucket(Bucket=name)
    else:
        # the stubs list every region by name; ours is a setting
        target.s3.create_bucket(
            Bucket=name,
            CreateBucketConfiguration={"LocationConstraint": target.region},  # type: ignore[typeddict-item]
        )
    target.s3.put_public_access_block(
        Bucket=name,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        },
    )
    return name


def _uploaded(target: Target, bucket: str, key: str) -> bool:
    try:
        target.s3.head_object(Bucket=bucket, Key=key)
    except botocore.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    return True


def _apply(target: Target, parameters: Mapping[str, str], progress: Progress) -> bool:
    cloudformation = target.cloudformation
    status, _ = _describe(cloudformation, target.stack)
    if status == "ROLLBACK_COMPLETE":  # a first attempt that failed; CloudFormation wants it removed first
        progress("removing the remains of a failed first deployment")
        cloudformation.delete_stack(StackName=target.stack)
        _settle(target, progress)
        status = None
    fresh = status in {None, "REVIEW_IN_PROGRESS", "DELETE_COMPLETE"}
    change_set = f"deploy-{time.time_ns()}"
    progress("asking CloudFormation what has to change")
    cloudformation.create_change_set(
        StackName=target.stack,
        ChangeSetName=change_set,
        ChangeSetType="CREATE" if fresh else "UPDATE",
        TemplateBody=TEMPLATE.read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        Capabilities=["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
        Tags=[{"Key": "product", "Value": "picket"}],
    )
    count = _changes(target, change_set)
    if not count:
        cloudformation.delete_change_set(StackName=target.stack, ChangeSetName=change_set)
        progress("nothing to change")
        return False
    progress(f"changing {count} resources")
    cloudformation.execute_change_set(StackName=target.stack, ChangeSetName=change_set)
    final = _settle(target, progress)
    if final not in {"CREATE_COMPLETE", "UPDATE_COMPLETE"}:
        raise DeployError(f"the stack {target.stack!r} ended as {final}: {_reason(cloudformation, target.stack)}")
    return True


def _changes(target: Target, change_set: str) -> int:
    """How many resources the change set touches; waits until CloudFormation has worked it out."""
    deadline = time.monotonic() + DEPLOY_SECONDS
    while time.monotonic() < deadline:
        found = target.cloudformation.describe_change_set(StackName=target.stack, ChangeSetName=change_set)
        if found["Status"] == "CREATE_COMPLETE":
            return len(found.get("Changes", []))
        if found["Status"] == "FAILED":
            reason = found.get("StatusReason", "")
            if "didn't contain changes" in reason or "No updates are to be performed" in reason:
                return 0
            raise DeployError(f"CloudFormation does not accept the template: {reason}")
        time.sleep(target.poll_seconds)
    raise DeployError("CloudFormation did not work out the changes in time: look at the stack in the console")


def _settle(target: Target, progress: Progress) -> str | None:
    """Wait until the stack rests; the state it rests in, None when it is gone."""
    deadline = time.monotonic() + DEPLOY_SECONDS
    told = ""
    while time.monotonic() < deadline:
        status, _ = _describe(target.cloudformation, target.stack)
        if status is None or not status.endswith("_IN_PROGRESS"):
            return status
        if status != told:
            progress(f"stack: {status.lower().replace('_', ' ')}")
            told = status
        time.sleep(target.poll_seconds)
    raise DeployError(f"the stack {target.stack!r} is still at work: look at it in the console")


def _describe(cloudformation: "CloudFormationClient", stack: str) -> tuple[str | None, dict[str, str]]:
    try:
        found = cloudformation.describe_stacks(StackName=stack)["Stacks"]
    except botocore.exceptions.ClientError as error:
        if "does not exist" in str(error):
            return None, {}
        raise
    if not found:
        return None, {}
    return found[0]["StackStatus"], {
        output["OutputKey"]: output["OutputValue"]
        for output in found[0].get("Outputs", [])
        if "OutputKey" in output and "OutputValue" in output
    }


def _reason(cloudformation: "CloudFormationClient", stack: str) -> str:
    """The first resource that failed in this deployment, in its own words; what failed after it only followed."""
    events = cloudformation.describe_stack_events(StackName=stack)["StackEvents"]  # the newest first
    failed = []
    for event in events:
        status = event.get("ResourceStatus", "")
        if status.endswith("_FAILED"):
            failed.append(event)
        own = event.get("PhysicalResourceId") == event.get("StackId")
        if own and status in {"CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS"}:
            break
    if not failed:
        return "no resource says why"
    first = failed[-1]
    return f"{first.get('LogicalResourceId')}: {first.get('ResourceStatusReason', 'no reason given')}"
