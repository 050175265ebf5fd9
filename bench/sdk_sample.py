"""The peer of the agent: what one would write in an afternoon with AWS's SDK and gpiozero's MotionSensor.

    python sdk_sample.py HOST PORT CA CERTIFICATE KEY THING

It connects, makes the service clients for jobs and shadows, and publishes at each motion. Lines on standard input set
the level of its mock pin (`1` or `0`), or ask for as many publishes at once (`flood 1000`), which it answers by
`flooded` when the last is acknowledged; it says `connected` once. No spool, no updates, no state: an alarm that
finds no link is lost with the process.
"""

import json
import sys
import threading
import uuid
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path

from awscrt import mqtt5, mqtt_request_response
from awsiot import iotjobs, iotshadow, mqtt5_client_builder
from gpiozero import MotionSensor
from gpiozero.pins.mock import MockFactory

LINE = 17


def main(host: str, port: str, trust: str, certificate: str, key: str, thing: str) -> None:
    connected = threading.Event()
    client = mqtt5_client_builder.mtls_from_path(
        cert_filepath=certificate,
        pri_key_filepath=key,
        ca_filepath=trust,
        endpoint=host,
        port=int(port),
        client_id=thing,
        keep_alive_interval_sec=45,
        on_lifecycle_connection_success=lambda _: connected.set(),
    )
    options = mqtt_request_response.ClientOptions(
        max_request_response_subscriptions=4, max_streaming_subscriptions=4, operation_timeout_in_seconds=30
    )
    services = (iotjobs.IotJobsClientV2(client, options), iotshadow.IotShadowClientV2(client, options))
    client.start()
    connected.wait()

    def moved() -> "Future[object]":
        body = {"event_id": str(uuid.uuid4()), "at": datetime.now(UTC).isoformat(), "kind": "motion"}
        packet = mqtt5.PublishPacket(
            topic=f"dt/picket/{thing}/alarm", payload=json.dumps(body).encode(), qos=mqtt5.QoS.AT_LEAST_ONCE
        )
        published: Future[object] = client.publish(packet)
        return published

    factory = MockFactory()
    sensor = MotionSensor(LINE, pin_factory=factory)
    sensor.when_motion = moved
    pin = factory.pin(LINE)
    print("connected", flush=True)
    for line in sys.stdin:
        word, _, count = line.strip().partition(" ")
        if word == "flood":
            for published in [moved() for _ in range(int(count))]:
                published.result()
            print("flooded", flush=True)
        else:
            pin.drive_high() if word == "1" else pin.drive_low()
    del services


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    main(*sys.argv[1:])
