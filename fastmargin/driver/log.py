"""What a command says, a line at a time. No torch here."""

import sys
from collections.abc import Callable

Log = Callable[[str], None]


def log(text: str) -> None:
    """Prints at once, whatever is in a name: what the terminal cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
