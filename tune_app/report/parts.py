"""The elements of a page: sections with paragraphs, tables and figures."""

import time
from dataclasses import dataclass, field
from typing import Any

from tune_app.report import figures


@dataclass(frozen=True)
class Cell:
    text: str
    kind: str = ""
    """Class of the cell: number, text, nowrap."""
    value: str | None = None
    """The value it sorts by, when that is not its text."""
    mark: str = ""
    """good, bad or open: how the text is set off."""
    pick: str = ""
    """The trial that a click on it picks."""


@dataclass(frozen=True)
class Head:
    text: str
    kind: str = ""
    first: str = ""
    """Order of the first click: ascending or descending."""


@dataclass(frozen=True)
class Row:
    cells: list[Cell]
    trial: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    label: str
    heads: list[Head]
    rows: list[Row]


@dataclass
class Section:
    """A headed part of the page; parts are what report.html knows how to set."""

    id: str
    title: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def text(self, text: str, *, style: str = "") -> None:
        """Add a paragraph; `style` is its class: faint, or mouse for what only a mouse can do."""
        self.parts.append({"kind": "text", "text": text, "style": style})

    def head(self, text: str) -> None:
        self.parts.append({"kind": "head", "text": text})

    def figure(
        self,
        page: "Page",
        name: str,
        figure: figures.Figure,
        label: str,
        caption: str = "",
        wide: int = 0,
    ) -> None:
        page.plots[name] = figure
        self.parts.append(
            {"kind": "figure", "id": name, "caption": caption, "label": label, "wide": wide}
        )

    def table(self, table: Table, *, name: str = "", style: str = "", fold: str = "") -> None:
        self.parts.append(
            {"kind": "table", "table": table, "id": name, "style": style, "fold": fold}
        )


@dataclass
class Page:
    title: str
    subtitle: str
    asked: str
    found: str
    tiles: list[dict[str, str]]
    footer: str
    sections: list[Section] = field(default_factory=list)
    plots: dict[str, figures.Figure] = field(default_factory=dict)
    refresh_s: float | None = None

    def section(self, name: str, title: str) -> Section:
        section = Section(name, title)
        self.sections.append(section)
        return section


def written_at() -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime())
