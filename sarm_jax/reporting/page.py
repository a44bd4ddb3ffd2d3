"""HTML pages that need nothing but themselves: templates, pictures and data inside the file.

`page.css` is the look that they share; a template includes it, or `style` joins it with more.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent


def environment(folder: Path) -> Environment:
    """Templates of `folder`, which may include page.css; every value is escaped."""
    return Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def picture_uri(content: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def json_in_html(value: Any) -> Markup:
    """JSON that can stand in a script element: no character of it ends the element or the line.

    Everything but ASCII is written as an escape, and so are <, > and &. NaN raises ValueError.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def content_policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which a page loads nothing from anywhere.

    Only this style and this script are allowed, by their hashes, and pictures in the page itself.
    """
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
