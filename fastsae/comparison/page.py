"""stub"""

from pathlib import Path
from typing import Any


def write_page(path: Path, result: Any) -> None:
    """Nothing yet."""
    path.write_text("")
