"""The one table of what is measured. The targets are for two cores."""

from bench import agent, boards, building, flashing, units
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
    Measurement(
        name="agent-memory",
        what="resident memory of the connected agent",
        peer="a sample on AWS's SDK, with MotionSensor",
        target=Target(40.0),
        run=agent.memory,
        unit="MB",
    ),
    Measurement(
        name="agent-idle-cpu",
        what="processor time of the idle agent",
        peer="a sample on AWS's SDK, with MotionSensor",
        target=Target(0.3),
        run=agent.idle_processor,
        unit="%",
    ),
    Measurement(
        name="edge-to-publish",
        what="PIR edge to PUBLISH on the wire, p99",
        peer="MotionSensor and AWS's SDK, nothing kept",
        target=Target(5.0),
        run=agent.edge_to_publish,
        unit="ms",
    ),
    Measurement(
        name="spool-drain",
        what="10,000 spooled alarms, to the last PUBACK",
        peer="10,000 publishes from memory by AWS's SDK",
        target=Target(60.0),
        run=agent.drain,
    ),
    Measurement(
        name="idle-bytes",
        what="bytes on the wire in an idle day",
        peer="a sample on AWS's SDK: pings only",
        target=Target(2000.0),
        run=agent.idle_bytes,
        unit="kB",
        slow=True,
    ),
)
