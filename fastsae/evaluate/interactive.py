"""Pages with a script: their data packed into the file, and the style and functions that all of them share."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsae.evaluate.page import write_page
from fastsae.evaluate.style import CSS

_HERE = Path(__file__).parent
_START = """
unpack().then(start, (error) => {
  document.getElementById("main").textContent = `This page needs a newer browser: ${error}`;
});
"""


def write_interactive_page(
    path: str | Path, title: str, *, css: str, sections: Sequence[str], data: dict[str, Any], script: str
) -> None:
    """Writes a page that loads nothing from elsewhere, atomically; its script starts with `start(data)`.

    Args:
        path: The file.
        title: Plain text.
        css: What the page adds to the style of all pages.
        sections: HTML, with an element of id `main`.
        data: JSON without NaN. It is packed, so that no text in it can end the element that holds it.
        script: JavaScript that defines `start`; it may use what `interactive.js` defines.
    """
    packed = b64encode(
        gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    ).decode()
    shared_css, shared_script = (
        (_HERE / name).read_text(encoding="utf-8") for name in ("interactive.css", "interactive.js")
    )
    held = f'<script type="text/plain" id="data">{packed}</script>'
    write_page(path, title, "\n".join((CSS, shared_css, css)), [*sections, held], f"{shared_script}\n{script}{_START}")
