"""What a user can act on, and the exit codes. Needs nothing but Python."""

import enum


class Exit(enum.IntEnum):
    """Exit codes."""

    DONE = 0  # there is nothing left to do
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    NON_FINITE = 5
    PEER = 6
    DISK = 7
    RANKS_DISAGREE = 8
    PREEMPTED = 75


class HarnessError(Exception):
    """An error that the user can act on: printed as one line, without a traceback."""

    def __init__(self, reason: Exit, message: str):
        super().__init__(message)
        self.reason = reason


def is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # of CUDA's libraries, and of the host
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
