"""How a command prints, a line at a time. No torch here."""

import sys
from collections.abc import Callable

Log = Callable[[str], None]


def log(text: str) -> None:
    """Prints without buffering; characters that the terminal's encoding lacks, as in file names, are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
