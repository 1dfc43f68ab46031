"""The one exception that means "the user can mend this"."""

MAX_LENGTH = 2000


class GraphLoraError(ValueError):
    """A mistake in a configuration, a file or a command, with the offending value and the remedy in one line.

    The command line prints the message alone and exits with status 2; from Python it is a `ValueError`. What a file
    put into the message cannot break the line, drive the terminal or flood it: see `one_line`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class Interrupted(KeyboardInterrupt):
    """Work that ended on a signal; the message says what is kept and how to go on.

    Attributes:
        exit_code: Exit code of a command that ends so: 128 and the signal's number (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, message: str, number: int = 2) -> None:
        """Say what was interrupted, and by which signal (2: SIGINT)."""
        super().__init__(message)
        self.exit_code = 128 + number


def one_line(text: str, limit: int = MAX_LENGTH) -> str:
    """Text from anywhere, safe to print: one line, control characters escaped, the middle left out where it is long.

    Args:
        text: Any text.
        limit: Most characters to give back.
    """
    if len(text) > limit:
        end = limit // 4
        text = f"{text[: limit - end - 5]} ... {text[-end:]}"
    if text.isprintable():
        return text
    shown = "".join(_shown(character) for character in text)
    return shown if len(shown) <= limit else one_line(shown, limit)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
