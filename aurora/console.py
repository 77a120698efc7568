"""Standard output and error that stop no program: a console may be gone, full, or know few letters."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

from aurora.errors import Exit

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # `| head` has read enough, a terminal was closed


class SteadyFile(io.FileIO):
    """A file that takes whatever is written to it; lost is the number of the first error, or 0."""

    lost = 0

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error.errno or errno.EIO
            return len(data)


def steady_streams() -> SteadyFile:
    """Let writing to sys.stdout and sys.stderr never fail from here; the file of standard output."""
    sys.stdout, file = steady(sys.stdout, 1)
    sys.stderr, _ = steady(sys.stderr, 2)
    return file


def steady(stream: TextIO | None, number: int) -> tuple[TextIO, SteadyFile]:
    if stream is None:  # closed before Python began
        return steady(open(os.devnull, "w"), os.open(os.devnull, os.O_WRONLY))
    file = SteadyFile(number, "w", closefd=False)
    is_raw = getattr(stream, "write_through", False)  # python -u
    text = io.TextIOWrapper(
        file if is_raw else io.BufferedWriter(file),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", number == 2),
        write_through=is_raw,
    )
    return text, file


def run_script(main: Callable[[], int]) -> int:
    """main() with a console that stops nothing; its exit code, or DISK where its output is a file that has no room."""
    file = steady_streams()
    try:
        code = main()
    except KeyboardInterrupt:
        return 130
    sys.stdout.flush()
    if file.lost and file.lost not in GONE:
        print(f"error: standard output is not whole: {os.strerror(file.lost)}; make room", file=sys.stderr)
        return code or int(Exit.DISK)
    return code
