"""The errors a user can act on; the command line prints them without a traceback."""


class FastsaeError(Exception):
    """A run failed for a reason that the message names (exit status 1)."""


class UsageError(FastsaeError):
    """An argument is wrong; the message says what was expected and what came (exit status 2)."""
