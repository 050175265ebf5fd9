"""Seal: the unit leaves factory mode, and is seen connected once more as the product that it now is."""

from factory.bench import Agent, Cloud, Shell, Unit
from factory.certify import DeviceCertificate
from factory.connect import wait_until
from factory.errors import UnitFault
from factory.identify import Identity
from factory.record import Step
from firmware_agent.wire import Banner

CONNECTED_SECONDS = 150.0


def seal(
    agent: Agent,
    shell: Shell,
    cloud: Cloud,
    unit: Unit,
    identity: Identity,
    banner: Banner,
    certificate: DeviceCertificate,
    step: Step,
) -> None:
    """Take the factory's access away, let the unit reboot, and wait until the cloud sees it as a product.

    Raises:
        UnitFault: it does not come back, or the factory still has access.
    """
    agent.ask("seal")

    def came_back() -> bool:
        device = cloud.device(unit.serial)
        return (
            device is not None
            and device.mode == "product"
            and device.boot_id != identity.boot_id
            and device.certificate_id == certificate.id
        )

    step.progress(0, 2, "reboots into product mode")
    if not wait_until(came_back, CONNECTED_SECONDS):
        raise UnitFault(
            f"the unit was sealed, but did not connect as a product within {CONNECTED_SECONDS:.0f} s",
            advice="Look at its console. Run the unit again: it is flashed anew, and its old certificate is retired.",
        )
    step.note("connected_again", value=True)
    step.progress(1, 2, "factory access")
    if not shell.closed(banner):
        raise UnitFault(
            "the unit was sealed, but still lets the factory key in",
            advice="Do not ship it. Put it on the repair shelf and report it.",
        )
    step.note("factory_access", value=False)
