"""Figures of the report: rows of plain data in, one SVG out, which is well-formed XML without scripts or references.

Text and axes take the page's colour; series have colours of Okabe and Ito, and a dash pattern each.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape as _escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")
WIDTH = 360  # units, so that letters stay readable on a phone
HEIGHT = 236  # of a plot with its labels, in the same units


def clean(text) -> str:
    """Return a text with what XML cannot hold or a page should not show replaced: controls, direction marks."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def escape(text) -> str:
    """Return any text, safe between tags and in quoted attributes."""
    return _escape(clean(text), {'"': "&quot;", "'": "&#39;"})


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], at most six."""
    step = 10.0 ** math.floor(math.log10((high - low) / 6))
    step *= next(k for k in (1, 2, 5, 10, 20) if (high - low) / (step * k) <= 5)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def bounds(values) -> tuple[float, float]:
    """Return the range of the values with a margin; a range around the value where there is only one."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def lines(title: str, rows, x: str, y: str, labels: tuple[str, str]) -> str:
    """Draw row[y] over row[x], whole numbers, as a line per ``series``; rows without a y are left out."""
    rows = [row for row in rows if row[y] is not None]
    names = list(dict.fromkeys(row["series"] for row in rows))
    return _svg(title, HEIGHT + 16 * len(names), [*_plot(rows, names, x, y, labels), *_legend(rows, names)])


def panels(title: str, plots: dict, names, x: str, y: str, labels: tuple[str, str]) -> str:
    """Draw several :func:`lines` in two columns, ``plots`` by their headings, with one legend: the series of ``names``,
    which look the same in all of them. x has one range; a row without an x is a level, drawn across its plot."""
    placed = [row for rows in plots.values() for row in rows if row[x] is not None]
    drawn = [[_text(64, 0, heading), *_plot(rows, names, x, y, labels, placed)] for heading, rows in plots.items()]
    drawn.append(_legend(placed, names, 24))
    height = 16 + max(HEIGHT, 16 * len(names))
    parts = [part for n, own in enumerate(drawn) for part in
             (f'<g transform="translate({n % 2 * WIDTH} {16 + n // 2 * height})">', *own, "</g>")]
    return _svg(title, 16 + (len(drawn) + 1) // 2 * height, parts, 2 * WIDTH)


def _plot(rows, names, x: str, y: str, labels, across=None) -> list[str]:
    """Draw one plot, in WIDTH x HEIGHT units; a series looks as its place among ``names`` says, and x has the range of
    the rows ``across``."""
    (x0, x1), (y0, y1) = bounds([row[x] for row in across or rows]), bounds([row[y] for row in rows])
    left, right, top, bottom = 64, WIDTH - 10, 10, 190
    px = lambda value: left + (value - x0) / (x1 - x0) * (right - left)  # noqa: E731
    py = lambda value: bottom - (value - y0) / (y1 - y0) * (bottom - top)  # noqa: E731
    parts = []
    for tick in ticks(y0, y1):
        parts += [f'<line class="grid" x1="{left}" x2="{right}" y1="{py(tick):.2f}" y2="{py(tick):.2f}"/>',
                  _text(left - 5, round(py(tick) + 4, 2), f"{tick:.6g}", "end")]
    parts += [_text(round(px(tick), 2), bottom + 14, f"{tick:.6g}", "middle")
              for tick in ticks(x0, x1) if tick == round(tick)]
    parts += [_text((left + right) / 2, bottom + 30, labels[0], "middle"),
              f'<text x="12" y="{(top + bottom) / 2}" text-anchor="middle" '
              f'transform="rotate(-90 12 {(top + bottom) / 2})">{escape(labels[1])}</text>',
              f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>']
    for k, name in enumerate(names):
        points = [(px(row[x]), py(row[y]), f"{name}: {row[x]}, {row[y]}")
                  for row in rows if row["series"] == name and row[x] is not None]
        levels = [py(row[y]) for row in rows if row["series"] == name and row[x] is None]
        parts += _series(k, points, points) if points else []
        parts += [part for level in levels for part in _series(k, [(left, level), (right, level)], [])]
    return parts


def _legend(rows, names, top: int = HEIGHT) -> list[str]:
    """Draw a line per series below ``top``, with its mark where its points have one."""
    parts = []
    for k, name in enumerate(names):
        marked = any(row["series"] == name for row in rows)
        parts += _series(k, [(6, top - 4), (32, top - 4)], [(19, top - 4, name)] if marked else [])
        parts.append(_text(38, top, _short(name, 50)))
        top += 16
    return parts


def _series(k: int, points, marks) -> list[str]:
    """Draw the line of the k-th series through points (x, y, …), and its marks (x, y, what they are)."""
    colour, dash = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]
    fill = colour if k < len(COLOURS) else "#fff"  # beyond that many series they are hollow
    where = " ".join(f"{x:.2f},{y:.2f}" for x, y, *_ in points)
    return [f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}" points="{where}"/>',
            *(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" fill="{fill}" stroke="{colour}">'
              f'<title>{escape(about)}</title></circle>' for x, y, about in marks)]


def allocation(title: str, rows) -> str:
    """Draw Fig. 4: a line per kernel with a bar each for its bits and for its keep, the fraction of channels kept."""
    name, wide, high, most = 118, 84, 15, max(row["bits"] for row in rows)
    bars = (("bits", name + 8, most, "#0072B2"), ("keep", name + 8 + wide + 38, 1, "#D55E00"))
    parts = [_text(bars[0][1], 11, "bits"), _text(bars[1][1], 11, "channels kept")]
    for n, row in enumerate(rows):
        y = 16 + high * n
        parts.append(_text(name, y + 11, _short(row["kernel"], 19, end=True), "end"))
        for key, x, full, colour in bars:
            parts += [f'<rect x="{x}" y="{y + 2}" width="{wide}" height="{high - 4}" class="track"/>',
                      f'<rect x="{x}" y="{y + 2}" width="{wide * row[key] / full:.2f}" height="{high - 4}" '
                      f'fill="{colour}"><title>{escape(row["kernel"])}: {key} {row[key]}</title></rect>',
                      _text(x + wide + 4, y + 11, f"{row[key]:.2f}" if key == "keep" else row[key])]
    return _svg(title, 20 + high * len(rows), parts)


def _text(x, y, text, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text, most: int, end: bool = False) -> str:
    """Return a text with an ellipsis in place of what exceeds ``most`` letters: of its beginning where ``end``."""
    text = str(text)
    return text if len(text) <= most else "…" + text[1 - most:] if end else text[:most - 1] + "…"


def _svg(title: str, height: float, parts, width: float = WIDTH) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" '
            f'aria-label="{escape(title)}">\n' + "\n".join(parts) + "\n</svg>")
