"""How a command prints, a line at a time. No torch here."""

import re
import sys
from collections.abc import Callable

Log = Callable[[str], None]

# Control characters, separators of lines, and those that turn the direction of text: with them a file name moves the
# cursor, colors the screen, or shows as another name.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def log(text: str) -> None:
    """Prints without buffering; characters that the terminal's encoding lacks, as in file names, are escaped, and so
    are UNSAFE ones except for line breaks."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(map(on_one_line, text.split("\n")))
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def on_one_line(text: str) -> str:
    """For a line of a message, a name with its line breaks and all other UNSAFE characters escaped."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
