"""Something that moves in front of the PIR: the operator's hand."""

from factory.drivers.prompts import Operator


class OperatorStimulus:
    """The operator waves. Their reaction is part of every latency that is measured from here."""

    #: HC-SR501: up to a minute of false highs after its supply came.
    settle_seconds = 60.0
    reaction_seconds = 8.0

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def wave(self) -> None:
        """Tell them, and return at once: the unit watches already."""
        self._operator.tell("Wave your hand before the PIR now!")
