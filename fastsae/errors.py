"""The errors a user can act on; the command line prints them without a traceback."""


class FastsaeError(Exception):
    """A run failed for a reason that the message names (exit status 1)."""


class UsageError(FastsaeError):
    """An argument is wrong; the message says what was expected and what came (exit status 2)."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, PyTorch on a CPU or PyTorch on a GPU says that there is no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
