"""The unit's answers, parsed at the edge: a missing or misshapen field is the unit's fault, with its name."""

from collections.abc import Mapping
from typing import Any

from factory.errors import UnitFault


class Answer:
    """One answer of the agent, read field by field."""

    def __init__(self, what: str, fields: Mapping[str, Any]) -> None:
        self._what = what
        self._fields = fields

    def _get(self, name: str, *kinds: type) -> Any:
        value = self._fields.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UnitFault(
                f"the unit answered {self._what} without a usable {name!r}: {str(value)[:60]}",
                advice="Its agent does not fit this station. Flash the image of this release.",
            )
        return value

    def text(self, name: str) -> str:
        """A text."""
        return str(self._get(name, str))

    def optional_text(self, name: str) -> str | None:
        """A text or null."""
        value = self._get(name, str, type(None))
        return None if value is None else str(value)

    def number(self, name: str) -> float:
        """A number."""
        return float(self._get(name, int, float))

    def optional_number(self, name: str) -> float | None:
        """A number or null."""
        value = self._get(name, int, float, type(None))
        return None if value is None else float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        return bool(self._get(name, bool))

    def texts(self, name: str) -> dict[str, str]:
        """A mapping of texts."""
        return {str(key): str(value) for key, value in self._get(name, dict).items()}

    def inner(self, name: str) -> "Answer":
        """An object inside."""
        return Answer(f"{self._what}.{name}", self._get(name, dict))

    def each(self, name: str) -> list["Answer"]:
        """A list of objects."""
        return [Answer(f"{self._what}.{name}", entry) for entry in self._get(name, list) if isinstance(entry, dict)]
