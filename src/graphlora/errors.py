"""The one exception that means "the user can mend this"."""


class GraphLoraError(ValueError):
    """A mistake in a configuration, a file or a command, with the offending value and the remedy in one line.

    The command line prints the message alone and exits with status 2; from Python it is a `ValueError`.
    """


class Interrupted(KeyboardInterrupt):
    """Work that ended on a signal; the message says what is kept and how to go on.

    Attributes:
        exit_code: Exit code of a command that ends so: 128 and the signal's number (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, message: str, number: int = 2) -> None:
        """Say what was interrupted, and by which signal (2: SIGINT)."""
        super().__init__(message)
        self.exit_code = 128 + number
