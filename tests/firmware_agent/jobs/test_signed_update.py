"""An update with nothing replaced but the board: TUF repository, metadata over HTTP, delta, launcher, jobs service."""

import json
from pathlib import Path

import pytest

from firmware_agent.jobs.update import Update
from firmware_agent.update.trust import Trust
from tests import updates
from tests.firmware_agent.jobs.test_update import WHOLE, Field
from tests.firmware_agent.jobs.world import HARDWARE, SERIAL, Goods, Unit, Web
from tests.firmware_agent.jobs_service import JobsService, LocalLink


@pytest.fixture
def world(tmp_path: Path) -> updates.World:
    return updates.World(tmp_path / "world")


def publish(world: updates.World, goods: Goods) -> str:
    """The new release, as its makers describe it."""
    built = updates.build(
        world.base / "built",
        "1.1.0",
        content=goods.full,
        security_version=2,
        deltas_from={goods.old.tar.sha256: goods.delta},
    )
    description = json.loads(built.read_text())
    description["archive"] |= {"tar_sha256": goods.target.tar_sha256, "tar_size": goods.target.tar_size}
    description["deltas"][0]["to"] = goods.target.tar_sha256
    built.write_text(json.dumps(description))
    path = world.repository.add(built, "main")
    world.publish()
    return path


@pytest.mark.parametrize("ends", ["well", "unsigned", "expired"])
def test_a_signed_release_is_installed_and_another_is_not(
    world: updates.World, goods: Goods, web: Web, tmp_path: Path, ends: str
) -> None:
    target = publish(world, goods)
    service = JobsService()
    link = LocalLink(service, SERIAL)
    unit = Unit.make(tmp_path / "disk", goods, link)
    field = Field(unit, service, link, web)
    trust = Trust(
        root=world.root,
        metadata=unit.state / "tuf",
        floor=unit.state / "floor.json",
        product="picket",
        serial=SERIAL,
        now=lambda: world.now,
    )
    unit.kinds = lambda name: [Update(unit.releases, name, [HARDWARE], trust, link, lambda: None, unit.limits)]
    patch = f"agent/picket-agent-1.1.0.from-{goods.old.tar.sha256[:8]}.zpatch"
    web.content |= {f"/{target}": goods.full, f"/{patch}": goods.delta}
    web.asked.clear()
    if ends == "unsigned":
        target = target.replace("1.1.0", "1.1.1")
    if ends == "expired":
        world.pass_days(3650)
    with updates.serve(world.directory) as served:
        urls = {path: f"{web.url}/{path}?X-Amz-Signature=5ecret" for path in (target, patch)}
        version = target.rpartition("-")[2].removesuffix(".tar.zst")
        field.offer(target=target, version=version, metadata=f"{served.url}/metadata/", urls=urls)

        runs = field.live()

    match ends:
        case "well":
            assert (field.reports, runs) == (WHOLE, goods.new)
            assert web.asked == [f"/{patch}"]
            assert trust.security_floor() == 2
        case "unsigned":
            assert (field.reports, runs) == (["IN_PROGRESS check", "REJECTED bad-signature"], goods.old.name)
        case _:
            assert (field.reports, runs) == (["IN_PROGRESS check", "FAILED download"], goods.old.name)
    assert {path for path in unit.orphans() if not path.startswith("state/tuf")} == set()
