"""The README's way by hand, line by line, from a fresh checkout to a unit that passed."""

import json
import re
from pathlib import Path

import pytest

from tests.site import ROOT, as_a_user, fresh_checkout

pytestmark = pytest.mark.vm


def test_the_readmes_lines_make_a_unit(tmp_path: Path) -> None:
    clone = fresh_checkout(tmp_path / "picket")
    (clone / "build").mkdir()
    (clone / "build/cache").symlink_to(ROOT / "build/cache")  # the base root file system, which takes a minute
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (by_hand,) = (block for block in blocks if "ca init" in block)

    try:
        for line in by_hand.strip().splitlines():
            ran = as_a_user(clone, "sh", "-c", line)
            assert ran.returncode == 0, f"{line}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
    finally:
        as_a_user(clone, "make", "cloud-down")

    python, bench = ".venv/bin/python", "benches/virtual.toml"
    shown = as_a_user(clone, python, "station.py", "record", "PK-000001", "--bench", bench, "--json")
    (run,) = json.loads(shown.stdout)
    assert (run["outcome"], run["steps"][3]["notes"]["key"]) == ("pass", "tpm")
    assert (clone / "build/demo-vm/labels/PK-000001.png").exists()
