"""The template, the package and the deployment; and how errors on the way are told."""

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography import x509
from samtranslator.translator.transform import transform
from samtranslator.yaml_helper import yaml_parse

from cloud import jitp, package, registry, stack
from cloud.errors import CloudError, CloudMisconfigured, CloudUnreachable, DeployError
from cloud.local.endpoint import LocalEndpoint
from cloud.registry import Registry
from cloud.target import Target, aws_target, open_target, translated
from tests.cloud.conftest import Fleet

MEASURED_IN = {"CodeBucket": "a-bucket", "CodeKey": "a-key.zip"}


@pytest.fixture(scope="module")
def expanded() -> dict[str, Any]:
    """The template as CloudFormation sees it, after the same SAM transform that AWS runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        made: dict[str, Any] = transform(yaml_parse(stack.TEMPLATE.read_text()), MEASURED_IN, _NoManagedPolicies())
    return made


class _NoManagedPolicies:
    def load(self) -> dict[str, str]:
        return {}


def _of_type(expanded: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: each["Properties"] for name, each in expanded["Resources"].items() if each["Type"] == kind}


def test_every_function_runs_on_the_same_python_and_has_a_role_of_its_own(expanded: dict[str, Any]) -> None:
    functions = _of_type(expanded, "AWS::Lambda::Function")

    assert {each["Runtime"] for each in functions.values()} == {"python3.13"}
    assert {name: each["Role"]["Fn::GetAtt"][0] for name, each in functions.items()} == {
        "ProcessAlarm": "ProcessAlarmRole",
        "RegisterDevice": "RegisterDeviceRole",
        "RotateCertificate": "RotateCertificateRole",
    }


def test_every_rule_has_an_error_action_and_leave_to_call_its_function(expanded: dict[str, Any]) -> None:
    rules = _of_type(expanded, "AWS::IoT::TopicRule")
    allowed = {
        each["SourceArn"]["Fn::GetAtt"][0]: each["FunctionName"]["Ref"]
        for each in _of_type(expanded, "AWS::Lambda::Permission").values()
    }

    for name, rule in rules.items():
        payload = rule["TopicRulePayload"]
        (action,) = payload["Actions"]
        assert "Sqs" in payload["ErrorAction"]
        assert allowed[name] == action["Lambda"]["FunctionArn"]["Fn::GetAtt"][0]


def test_what_no_retry_could_handle_goes_to_the_dead_letters(expanded: dict[str, Any]) -> None:
    configs = _of_type(expanded, "AWS::Lambda::EventInvokeConfig").values()

    assert {each["FunctionName"]["Ref"] for each in configs} == {"ProcessAlarm", "RegisterDevice", "RotateCertificate"}
    for each in configs:
        assert each["DestinationConfig"]["OnFailure"]["Destination"] == {"Fn::GetAtt": ["DeadLetters", "Arn"]}


def test_no_role_may_do_everything_and_only_a_few_actions_have_no_resource(expanded: dict[str, Any]) -> None:
    everywhere = set()
    for role in _of_type(expanded, "AWS::IAM::Role").values():
        assert "ManagedPolicyArns" not in role
        for policy in role["Policies"]:
            for statement in policy["PolicyDocument"]["Statement"]:
                actions = statement["Action"]
                actions = [actions] if isinstance(actions, str) else actions
                assert not [action for action in actions if "*" in action]
                if statement["Resource"] == "*":
                    everywhere |= set(actions)

    assert everywhere == {
        "sns:Publish",  # a phone number is no resource; topics are denied beside it
        "iot:CreateCertificateFromCsr",  # a certificate that does not exist yet has no name
        "iot:RegisterThing",
        "iot:RegisterCertificate",
        "iot:GetPolicy",
        "iot:ListPrincipalThings",
    }


def test_the_device_policy_fits_into_awss_limit(fleet: Fleet) -> None:
    document = fleet.target.iot.get_policy(policyName=fleet.outputs["DevicePolicy"])["policyDocument"]

    assert len(document) <= 2048  # https://docs.aws.amazon.com/general/latest/gr/iot-core.html


def test_archives_are_private_and_metadata_can_be_read_but_not_listed_or_written(expanded: dict[str, Any]) -> None:
    buckets = _of_type(expanded, "AWS::S3::Bucket")
    (policy,) = _of_type(expanded, "AWS::S3::BucketPolicy").values()
    (statement,) = policy["PolicyDocument"]["Statement"]

    assert all(buckets["Releases"]["PublicAccessBlockConfiguration"].values())
    assert policy["Bucket"] == {"Ref": "Metadata"}
    assert (statement["Principal"], statement["Action"]) == ("*", "s3:GetObject")
    assert statement["Resource"] == {"Fn::Sub": "${Metadata.Arn}/*"}
    assert {name: expanded["Resources"][name]["DeletionPolicy"] for name in buckets} == dict.fromkeys(buckets, "Retain")


@pytest.mark.parametrize(
    ("role", "action", "prefix"), [("DownloadRole", "s3:GetObject", "targets"), ("UploadRole", "s3:PutObject", "logs")]
)
def test_who_presigns_may_do_one_thing_in_one_place(
    expanded: dict[str, Any], role: str, action: str, prefix: str
) -> None:
    properties = expanded["Resources"][role]["Properties"]
    (policy,) = properties["Policies"]
    (trust,) = properties["AssumeRolePolicyDocument"]["Statement"]

    assert policy["PolicyDocument"]["Statement"] == [
        {"Effect": "Allow", "Action": action, "Resource": {"Fn::Sub": f"${{Releases.Arn}}/{prefix}/*"}}
    ]
    assert trust["Principal"] == {"Service": "iot.amazonaws.com"}
    assert set(trust["Condition"]) == {"StringEquals", "ArnLike"}  # no other account's job may borrow it


def test_cloudformation_reads_the_template_without_aliases() -> None:
    """CloudFormation takes no YAML aliases; the parser of these tests would."""
    assert not re.search(r"[:\-] [&*][a-z]", stack.TEMPLATE.read_text())


def test_the_table_keeps_its_data_safe(expanded: dict[str, Any]) -> None:
    (table,) = _of_type(expanded, "AWS::DynamoDB::Table").values()

    assert table["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert table["SSESpecification"] == {"SSEEnabled": True}
    assert table["TimeToLiveSpecification"] == {"AttributeName": "expires", "Enabled": True}
    assert expanded["Resources"]["Table"]["DeletionPolicy"] == "Retain"


def test_the_local_cloud_knows_all_of_the_rules_sql(fleet: Fleet) -> None:
    log = (fleet.state / "log").read_text()

    assert "not implemented" not in log
    assert "not supported" not in log


def test_deploying_again_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    assert stack.deploy(fleet.target, build=tmp_path).changed is False


def test_a_stack_that_fails_is_told_with_the_resources_own_reason(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "template.yaml"
    broken.write_text(stack.TEMPLATE.read_text().replace('"Status": "ACTIVE"', '"Status": "PERHAPS"'))
    monkeypatch.setattr(stack, "TEMPLATE", broken)
    other = Target("local", fleet.target.region, fleet.target.session, fleet.target.endpoint_url, fleet.cloud, "broken")

    with pytest.raises(DeployError, match=r"JitpTemplate: .*Status"):
        stack.deploy(other, build=tmp_path)
    broken.write_text(
        broken.read_text().replace("JitpTemplate:", "OtherTemplate:").replace("!Ref JitpTemplate", "none")
    )
    with pytest.raises(DeployError, match=r"OtherTemplate: .*Status"):  # this time's reason, and a stack to try it on
        stack.deploy(other, build=tmp_path)


def test_the_same_sources_make_the_same_package(tmp_path: Path) -> None:
    first, second = package.pack(tmp_path / "a"), package.pack(tmp_path / "b")

    assert first.key == second.key
    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_package_is_made_once(tmp_path: Path) -> None:
    made = package.pack(tmp_path)
    before = made.path.stat().st_mtime_ns

    assert package.pack(tmp_path) == made
    assert made.path.stat().st_mtime_ns == before


def test_the_functions_run_from_their_package_with_nothing_else_of_ours(tmp_path: Path) -> None:
    """Beside the package stands only what Lambda brings along: boto3 and botocore with what they need."""
    with zipfile.ZipFile(io.BytesIO(package.pack(tmp_path).path.read_bytes())) as archive:
        archive.extractall(tmp_path / "task")
    site = Path(boto3.__file__).parents[1]
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    for name in ("boto3", "botocore", "s3transfer", "urllib3", "dateutil", "six.py"):
        (runtime / name).symlink_to(site / name)
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'task')!r}, {str(runtime)!r}]\n"
        "import zoneinfo; zoneinfo.reset_tzpath(to=[])\n"
        "from cloud.handlers import clock, process_alarm, register_device\n"
        "from datetime import datetime, UTC\n"
        "print(process_alarm.__file__, clock.local(datetime(2026, 7, 1, tzinfo=UTC), 'Europe/Berlin'))\n"
    )
    environment = {"POWERTOOLS_SERVICE_NAME": "picket", "AWS_DEFAULT_REGION": "us-east-1"}

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].startswith(str(tmp_path / "task"))
    assert done.stdout.split(maxsplit=1)[1].strip() == "2026-07-01 02:00:00"


def _deaf(name: str = "local") -> Target:
    """A target where nobody listens: port 9 (discard) of loopback."""
    session = boto3.Session(aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1")
    endpoint = LocalEndpoint("http://127.0.0.1:9", "localhost", 9, "nowhere.picket.test", "us-east-1", 0)
    return Target("local", "us-east-1", session, endpoint.url, endpoint, name)


@pytest.mark.parametrize(
    "ask",
    [
        lambda registry: registry.certificate("0" * 64),
        lambda registry: registry.thing("PK-1"),
        lambda registry: registry.trust_bundle(),
        lambda registry: registry.owner("PK-1", "+491701234567", "UTC"),
    ],
)
def test_a_cloud_that_does_not_answer_is_said_to_be_unreachable(ask: Any) -> None:
    with pytest.raises(CloudUnreachable, match="python -m cloud up"):
        ask(Registry(_deaf()))


def test_missing_aws_credentials_say_how_to_sign_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")

    with pytest.raises(CloudMisconfigured, match="aws configure"):
        stack.outputs(aws_target())


def test_a_missing_region_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    with pytest.raises(CloudMisconfigured, match="AWS_REGION"):
        aws_target()


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(CloudMisconfigured, match="local or aws"):
        open_target("azure")


def test_a_refusal_carries_awss_own_words(fleet: Fleet) -> None:
    with (
        pytest.raises(CloudError, match=r"describing.*ResourceNotFoundException"),
        translated(fleet.target, "describing"),
    ):
        fleet.target.iot.describe_thing(thingName="PK-NOBODY")


def test_devices_of_the_real_cloud_trust_amazons_two_roots() -> None:
    roots = x509.load_pem_x509_certificates(registry.amazon_roots().encode())

    assert [root.subject.rfc4514_string().split(",")[0] for root in roots] == [
        "CN=Amazon Root CA 1",
        "CN=Amazon Root CA 3",
    ]


def test_every_parameter_of_the_provisioning_template_can_come_from_a_subject(fleet: Fleet) -> None:
    body = fleet.target.iot.describe_provisioning_template(templateName=fleet.outputs["JitpTemplate"])["templateBody"]

    declared = set(json.loads(body)["Parameters"]) - {"AWS::IoT::Certificate::Id"}
    assert declared <= set(jitp.SUBJECT_ATTRIBUTES)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("sms",), 3, "python -m cloud up"),
        (("deploy",), 3, "python -m cloud up"),
        (("deploy", "--target", "azure"), 2, "local or aws"),
        (("up", "--port", "99999"), 2, "65535"),
        (("fly",), 2, "No such command"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    state = () if code == 2 else ("--state", str(tmp_path / "none"))
    done = subprocess.run(
        [sys.executable, "-m", "cloud", *arguments, *state],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == code
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
