"""What a board keeps across a reset."""

from pathlib import Path

import pytest

from image.firmware import Reset, ResetRegister


def test_a_flag_is_there_once(tmp_path: Path) -> None:
    register = ResetRegister(tmp_path / "reset")
    register.set(Reset(2, tryboot=True))

    assert ResetRegister(tmp_path / "reset").take() == Reset(2, tryboot=True)
    assert ResetRegister(tmp_path / "reset").take() == Reset()


def test_a_loss_of_power_clears_it(tmp_path: Path) -> None:
    register = ResetRegister(tmp_path / "reset")
    register.set(Reset(tryboot=True))

    register.clear()
    register.clear()

    assert register.read() == Reset()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"partition": 99, "tryboot": true}', '{"partition": 1}', "1"]
)
def test_a_damaged_register_is_an_empty_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "reset").write_text(content)

    assert ResetRegister(tmp_path / "reset").read() == Reset()
