"""Identify: ask the board who it is, and compare with the banner, the label and the records."""

from dataclasses import dataclass

from factory.answers import Answer
from factory.bench import Agent, Image, Unit
from factory.errors import UnitFault
from factory.record import Records, Step
from firmware_agent.wire import Banner


@dataclass(frozen=True)
class Identity:
    """What a board says of itself. `key_store` is where it is configured to keep its key: `file` or `tpm`."""

    board: str
    revision: str
    model: str
    macs: dict[str, str]
    medium_cid: str | None
    memory_bytes: int
    tpm: bool
    ek_sha256: str | None
    key_store: str
    agent: str
    image: str
    boot_id: str


def identify(agent: Agent, banner: Banner, unit: Unit, image: Image, records: Records, step: Step) -> Identity:
    """Ask the board who it is.

    Raises:
        UnitFault: it is not the board of the banner, or the records know it, or the serial, otherwise.
    """
    identity = _parse(Answer("identify", agent.ask("identify", seconds=60)))
    for name, value in vars(identity).items():
        step.note(name, value if not isinstance(value, dict) else ", ".join(f"{k} {v}" for k, v in value.items()))
    if (identity.board, identity.boot_id) != (banner.board, banner.boot_id):
        raise UnitFault(
            f"the console belongs to board {banner.board}, but SSH reached board {identity.board}",
            advice="Two units are crossed: check which cable goes to which unit.",
        )
    if identity.image != f"{image.name} {image.version}":
        raise UnitFault(
            f"the agent runs from image {identity.image}, not {image.name} {image.version}",
            advice="Remove any second medium from the unit, then run it again.",
        )
    other = records.unit_of_board(identity.board)
    if other not in {None, unit.serial}:
        raise UnitFault(
            f"board {identity.board} was already made into {other}: a re-used board, or a clone of its serial number",
            advice=f"Find {other}. If its board was taken for this unit, run it under its own serial.",
        )
    before = records.board_of(unit.serial)
    if before not in {None, identity.board}:
        raise UnitFault(
            f"{unit.serial} was begun on board {before}, but this is board {identity.board}",
            advice="Check the label. A unit keeps its board; a new board gets a new serial.",
        )
    records.bind_board(unit.serial, identity.board)
    return identity


def _parse(answer: Answer) -> Identity:
    medium, tpm, image = answer.inner("medium"), answer.inner("tpm"), answer.inner("image")
    return Identity(
        board=answer.text("board"),
        revision=answer.text("revision"),
        model=answer.text("model"),
        macs=answer.texts("macs"),
        medium_cid=medium.optional_text("cid"),
        memory_bytes=int(answer.number("memory_bytes")),
        tpm=tpm.flag("present"),
        ek_sha256=tpm.optional_text("ek_sha256"),
        key_store=answer.text("key_store"),
        agent=answer.text("agent"),
        image=f"{image.text('name')} {image.text('version')}",
        boot_id=answer.text("boot_id"),
    )
