"""The line: the whole life of a unit at the station, on one screen."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from factory.authority import CertificateAuthority
from factory.bench import Bench, Cloud, Endpoint, Image, Unit
from factory.boot import boot
from factory.burn_in import burn_in
from factory.certify import DeviceCertificate, certify
from factory.connect import connect
from factory.enrol import enrol
from factory.flash import flash
from factory.identify import identify
from factory.label import label
from factory.limits import ProductLimits
from factory.record import Journal
from factory.seal import seal
from factory.self_test import self_test

STEPS = ("flash", "boot", "identify", "enrol", "certify", "burn-in", "self-test", "connect", "seal", "label")


@dataclass(frozen=True)
class Product:
    """What is made: its name on the label, its limits, where its labels go, where its units connect."""

    name: str
    limits: ProductLimits
    labels: Path
    endpoint: Endpoint


@dataclass(frozen=True)
class Made:
    """A unit that passed."""

    unit: Unit
    certificate: DeviceCertificate
    key: str
    label: Path


def produce(
    unit: Unit,
    product: Product,
    image: Image,
    bench: Bench,
    signing: CertificateAuthority,
    cloud: Cloud,
    journal: Journal,
) -> Made:
    """Take one unit through every step in order; the first fault ends its run.

    Raises:
        UnitFault: the unit is at fault.
        StationFault: the station is.
    """
    with ExitStack() as session:
        with journal.step("flash") as step:
            bench.power.off()
            flash(bench.storage, image, step)
        with journal.step("boot") as step:
            booted = session.enter_context(boot(bench, image, step))
            banner, agent = booted.banner, booted.agent
        with journal.step("identify") as step:
            identity = identify(agent, banner, unit, image, journal.records, step)
        with journal.step("enrol") as step:
            enrolment = enrol(agent, unit, identity, step)
        with journal.step("certify") as step:
            certificate = certify(signing, cloud, journal, unit, identity, enrolment, step)
        with journal.step("burn-in") as step:
            burn_in(agent, unit, enrolment, certificate, product.endpoint, cloud.trust_bundle(), step)
        with journal.step("self-test") as step:
            self_test(agent, bench.stimulus, identity, booted.powered, product.limits, step)
        with journal.step("connect") as step:
            connect(agent, cloud, unit, identity, certificate, product.limits, step)
        with journal.step("seal") as step:
            seal(agent, bench.shell, cloud, unit, identity, banner, certificate, step)
    with journal.step("label") as step:
        printed = label(unit, product.name, product.labels, step)
    return Made(unit, certificate, enrolment.key, printed)
