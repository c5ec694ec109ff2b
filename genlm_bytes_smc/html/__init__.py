"""Pages and notebook tables as jinja2 templates; how values are shown as text.

Every `.html.j2` file is a template; all values that it shows are escaped. Pages take one
stylesheet and need nothing from elsewhere. Text and numbers come from the modules that call
`render`; templates hold no arithmetic.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Return a template of this folder as HTML text, filled in with `values`."""
    return _environment().get_template(f"{template}.html.j2").render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not needed for a beam

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["parts"] = lambda text: text.split("`")
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made


def plain(shown: Any) -> str:
    """Return what rich shows of an object as text without colours, in 100 columns."""
    from rich.console import Console  # not needed for a beam

    console = Console(width=100, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip()


def printable(text: str | bytes) -> str:
    """Return text with escapes for what cannot be seen; bytes that are no UTF-8 too."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def probability(p: float) -> str:
    """Return a probability with four decimals, or two significant digits if it is small."""
    return f"{p:.4f}" if p >= 0.001 or p == 0 else f"{p:.1e}".replace("e-0", "e-")
