"""The one exception that means "the user can mend this"."""


class GraphLoraError(ValueError):
    """A mistake in a configuration, a file or a command, with the offending value and the remedy in one line.

    The command line prints the message alone and exits with status 2; from Python it is a `ValueError`.
    """
