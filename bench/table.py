"""The one table of what is measured. The targets are for two cores."""

from bench import boards, building, flashing, units
from bench.figures import Measurement, Target

MEASUREMENTS = (
    Measurement(
        name="image-cold",
        what="build of the image with empty caches",
        peer="mmdebstrap, download and unpack only",
        target=Target(360.0),
        run=building.cold,
        slow=True,
    ),
    Measurement(
        name="image-agent-change",
        what="build after a change in the agent",
        peer="cp and zstd of the image",
        target=Target(45.0),
        run=building.after_agent_change,
    ),
    Measurement(
        name="virtual-boot",
        what="virtual Pi from power-on to its banner",
        peer="the same kernel, a one-line init",
        target=Target(30.0),
        run=boards.to_banner,
    ),
    Measurement(
        name="virtual-unit",
        what="a unit on the virtual Pi, whole line",
        peer="two boots",
        target=Target(180.0),
        run=units.virtual,
    ),
    Measurement(
        name="simulated-unit",
        what="a unit on the simulated board, whole line",
        peer="bare JITP, PIR baseline and hold",
        target=Target(5.0),
        run=units.simulated,
    ),
    Measurement(
        name="flash",
        what="flash and read back of the image, to a file",
        peer="dd, fsync, direct read",
        target=Target(1.2, of_peer=True),
        run=flashing.to_file,
    ),
    Measurement(
        name="flash-block",
        what="flash and read back of the image, to a block device",
        peer="blkdiscard, dd, fsync, direct read",
        target=Target(1.2, of_peer=True),
        run=flashing.to_block_device,
    ),
    Measurement(
        name="edge-to-sms",
        what="PIR edge to SMS in the outbox",
        peer="a bare MQTT client's publish to SMS",
        target=Target(1.0),
        run=units.edge_to_sms,
    ),
)
