"""What keeps a Pi from starting."""


class NoBootError(Exception):
    """The medium does not boot; the message is what the firmware would blink if it could."""
