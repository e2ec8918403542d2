"""A small SVG writer for the documentation's pictures: boxes, arrows and words, in light and dark.

A picture brings its own background and follows the reader's colour scheme by itself, so it can stand in a
page of any colour. Words are text, so they can be searched, copied and read aloud.
"""

from collections.abc import Sequence
from html import escape

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]
"""Left, top, width and height."""

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.strong { font-weight: 600 }
.quiet { fill: #59636e }
.code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px }
.paper { fill: #ffffff; stroke: #d1d9e0 }
.box { fill: #f3f5f8; stroke: #8c96a3 }
.good { fill: #d9f0e1; stroke: #2c7a4b }
.new { fill: #dbe9fb; stroke: #2467b3 }
.wait { fill: #fdf0cf; stroke: #96690a }
.bad { fill: #fbdfdd; stroke: #b3312a }
.line { fill: none; stroke: #59636e; stroke-width: 1.5 }
.line.bad { fill: none; stroke: #b3312a }
.dashed { stroke-dasharray: 5 4 }
.head { fill: #59636e; stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #e6eaef }
.quiet { fill: #a7b0ba }
.paper { fill: #15191f; stroke: #3a424c }
.box { fill: #242a32; stroke: #7d8793 }
.good { fill: #173a26; stroke: #55b57d }
.new { fill: #172f4d; stroke: #6aa5ea }
.wait { fill: #3d3010; stroke: #d0a53f }
.bad { fill: #46201e; stroke: #e5756e }
.line { stroke: #a7b0ba }
.line.bad { stroke: #e5756e }
.head { fill: #a7b0ba }
}
"""
"""Two schemes of the same classes; text has a contrast of at least 4.5 on each fill."""

LINE_HEIGHT = 18
"""Pixels from one line of a box's text to the next."""

BASELINE = 4.5
"""Pixels from the middle of a line of text down to its baseline, at 13 px."""


class Picture:
    """An SVG file that is written from top to bottom.

    Args:
        title: what the picture shows, in some words.
        description: the same for a reader who does not see it: all that it says; its spaces are joined.
        width: in pixels, as is everything here.
        height: of the whole picture.
    """

    def __init__(self, title: str, description: str, width: int, height: int) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{escape(title)}</title>\n'
            f'<desc id="desc">{escape(" ".join(description.split()))}</desc>\n'
            f"<style>{STYLE}</style>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 10 5 0 10Z"/></marker></defs>\n'
        )
        self._parts: list[str] = []
        self._add(f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>')

    def svg(self) -> str:
        """Return the file's text."""
        return "".join([self._head, *self._parts, "</svg>\n"])

    def box(self, place: Rectangle, lines: Sequence[str], kind: str = "box") -> None:
        """Draw a rectangle with centred lines; the first is strong, the others are quiet."""
        x, y, width, height = place
        self._add(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>')
        top = y + height / 2 - LINE_HEIGHT * (len(lines) - 1) / 2
        for index, line in enumerate(lines):
            style = "quiet" if index else "strong"
            self.words(x + width / 2, top + index * LINE_HEIGHT, line, style, anchor="middle")

    def words(self, x: float, y: float, line: str, style: str = "", *, anchor: str = "start") -> None:
        """Write one line whose middle is at a height; `anchor` is start, middle or end."""
        looks = f' class="{style}"' if style else ""
        side = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._add(f'<text{looks} x="{x:g}" y="{y + BASELINE:g}"{side}>{escape(line, quote=False)}</text>')

    def line(self, *points: Point, style: str = "") -> None:
        """Draw a line through points."""
        self._path(points, style, "")

    def arrow(self, *points: Point, style: str = "") -> None:
        """Draw a line through points, with a head at the last one."""
        self._path(points, style, ' marker-end="url(#head)"')

    def _path(self, points: Sequence[Point], style: str, more: str) -> None:
        looks = f"line {style}".strip()
        way = " ".join(f"{x:g} {y:g}" for x, y in points)
        self._add(f'<path class="{looks}" d="M{way}"{more}/>')

    def _add(self, part: str) -> None:
        self._parts.append(f"{part}\n")
