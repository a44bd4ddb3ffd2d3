"""Self-contained HTML pages: style, pictures and data are inside the file.

All pages share the style sheet `page.css`: templates include it, or a page puts it before its own.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

SHARED = Path(__file__).parent  # folder of page.css


def environment(folder: Path) -> Environment:
    """Loads the templates of `folder`, which may include page.css, with every value escaped."""
    return Environment(
        loader=FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def picture_uri(content: bytes) -> str:
    """Encodes a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def json_in_html(value: Any) -> Markup:
    """Encodes a value as JSON for a script element, such that no character can end the element.

    All characters other than ASCII are escaped, and so are <, > and &.

    Raises:
        ValueError: the value contains NaN.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def content_policy(style: str, script: str) -> str:
    """Returns a Content-Security-Policy that lets a page load nothing from outside.

    The policy allows this style and this script, by their hashes, and pictures inside the page.
    """
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    """Returns the SHA-256 hash of a text as a policy writes it."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
