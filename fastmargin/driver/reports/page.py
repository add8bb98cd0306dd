"""A page of HTML in one file: no scripts, nothing to fetch, pictures as data URIs (RFC 2397).

Every function takes plain text, which it escapes, and returns HTML; only `Section.parts` and `folded` take HTML.
Names of classes and paths are untrusted text, so the page's Content-Security-Policy forbids it to load anything.
"""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: .8rem; white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; min-width: 4rem; }
thead th { border-bottom-width: 2px; }
th[scope=row] { font-weight: normal; min-width: 7.5rem; }
table.numeric td, table.numeric th + th { text-align: right; padding: .2rem 0 .2rem 1.2rem; overflow-wrap: normal; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; background: white; border-radius: .4rem; }
pre { background: var(--soft); padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<nav>$links</nav>
$sections
</body>
</html>
""")


class Section(NamedTuple):
    title: str
    parts: Sequence[str]  # HTML


def write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """A lone surrogate, which the name of a file may contain, becomes a character reference: browsers show \ufffd."""
    links = [f'<a href="#{anchor(section)}">{escape(section.title)}</a>' for section in sections]
    bodies = [
        f'<section id="{anchor(section)}">\n<h2>{escape(section.title)}</h2>\n{"".join(section.parts)}</section>'
        for section in sections
    ]
    whole = PAGE.substitute(title=escape(title), style=STYLE, links="\n".join(links), sections="\n".join(bodies))
    path.write_text(whole, encoding="utf-8", errors="xmlcharrefreplace")


def anchor(section: Section) -> str:
    return re.sub("[^a-z]+", "-", section.title.lower())


def paragraph(words: str) -> str:
    return f"<p>{escape(words)}</p>\n"


def picture(path: Path, words: str) -> str:
    """A PNG with alternative text."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(words)}"></figure>\n'


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), *, numeric: bool = False) -> str:
    """The first column has the names of the rows; `numeric` aligns the others to the right."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = [f"<thead><tr>{titles}</tr></thead>"] if head else []
    for first, *others in rows:
        cells = "".join(f"<td><bdi>{escape(cell)}</bdi></td>" for cell in others)
        lines.append(f'<tr><th scope="row"><bdi>{escape(first)}</bdi></th>{cells}</tr>')
    kind = ' class="numeric"' if numeric else ""
    return f"<table{kind}>\n" + "\n".join(lines) + "\n</table>\n"


def command(words: str) -> str:
    return f"<pre><code>{escape(words)}</code></pre>\n"


def folded(title: str, content: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>\n"
