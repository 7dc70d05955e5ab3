"""A page -> HTML that needs no network.

Its content security policy lets it reach none; it runs only the two scripts whose hashes it holds. Whatever comes from a study
is escaped: by Jinja in the page, by `html.escape` in figures, as JSON in scripts.
"""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainables.checkpoints import replacing
from trainables.data.visible import visible
from tune_app.report import figures
from tune_app.report.parts import Page
from tune_app.results.text import plain


def write(path: Path, page: Page) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(render(page), encoding="utf-8", errors="backslashreplace")
    return path


def render(page: Page) -> str:
    """Return the page as HTML."""
    script = asset("report.js")
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (_plotly(), script))
    text: str = (
        environment()
        .get_template("report.html")
        .render(
            **{
                name: getattr(page, name)
                for name in ("title", "subtitle", "asked", "found", "tiles", "sections", "footer")
            },
            refresh_s=page.refresh_s,
            script_hashes=Markup(hashes),
            css=Markup(asset("report.css")),
            palette=_json(figures.PALETTE),
            figures=_json(page.plots),
            plotly=Markup(_plotly()),
            script=Markup(script),
        )
    )
    return text


def figure_page(title: str, figure: figures.Figure) -> str:
    """Return one figure as HTML: a script that holds Plotly, and one that draws."""
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{Markup.escape(title)}</title>'
        f"<script>{_plotly()}</script></head><body><div id='figure'></div><script>"
        f"const figure = {_json(figure)};"
        "Plotly.newPlot('figure', figure.data, figure.layout, {responsive: true, displaylogo: false});"
        "</script></body></html>"
    )


@cache
def environment() -> Environment:
    """Return the templates of this package; every value in them is escaped, and its invisible characters written out."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: _shown(value) if type(value) is str else value,
    )
    found.filters["prose"] = _prose
    found.filters["breakable"] = lambda name: Markup("_<wbr>").join(_shown(name).split("_"))
    return found


def _shown(text: str) -> str:
    """Text with invisible characters written out: file names may hold escapes and signs that turn a line's direction."""
    return visible(text, keep="\n\t")


def _prose(text: str) -> Markup:
    """Text with `commands` set as code; everything in it is escaped."""
    text = _shown(text)
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else Markup.escape(part)
        for i, part in enumerate(parts)
    )


@cache
def asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text = str(get_plotlyjs())
    assert "</script" not in text.lower()
    return text


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON that no browser takes for the end of its script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=plain)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
