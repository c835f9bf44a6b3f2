"""Figures of the report: rows of plain data in, one SVG out, which is well-formed XML without scripts or references.

A figure is drawn 360 units wide, so that its letters stay readable on a phone. Text and axes take the page's colour
(``currentColor``, so also in the dark); series have colours of Okabe and Ito and, for whoever cannot tell those apart,
a marker and a dash pattern each. Every mark carries the values of its row as ``data-series``, ``data-x`` and
``data-y``, as they stand in the CSV, and says them in its ``<title>``.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape as _escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "down")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")
STRATEGIES = {"pruning": ("P", "#0072B2", 0.45), "quantization": ("Q", "#E69F00", 0.55),
              "auto": ("A", "currentColor", 0.1)}
WIDTH = 360
LETTER = 6.1  # width of a letter of 11 units, on average


def clean(text) -> str:
    """Replace what XML cannot hold or a page should not show: controls, direction marks, lone surrogates."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def escape(text) -> str:
    """Return any text, safe between tags and in quoted attributes."""
    return _escape(clean(text), {'"': "&quot;", "'": "&#39;"})


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], at most ``most``."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(k for k in (1, 2, 5, 10, 20) if (high - low) / (step * k) <= most - 1)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def bounds(values, share: float = 0.06) -> tuple[float, float]:
    """Return the range of the values with a margin; a range around the value where there is only one."""
    low, high = min(values), max(values)
    room = (high - low) * share or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def number(value: float) -> str:
    """Format a number for an axis."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.4g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.10g}"


def xy(figure, rows, x_label, y_label, *, line=True, diagonal=False, whole=False, height=180) -> str:
    """Draw a plot of rows with the keys series, x, y and, for a whisker, low and high.

    ``figure``: (id, title, description). ``line``: join the points of a series, in their order. ``diagonal``: draw
    y = x, on equal ranges. ``whole``: ticks at whole x only.
    """
    names = list(dict.fromkeys(row["series"] for row in rows))
    xs = [row["x"] for row in rows]
    ys = [row[key] for row in rows for key in ("y", "low", "high") if row.get(key) is not None]
    (x0, x1), (y0, y1) = bounds(xs), bounds(ys)
    if diagonal:
        x0, x1 = y0, y1 = min(x0, y0), max(x1, y1)
    marks = [(tick, number(tick)) for tick in ticks(y0, y1)]
    left = max(36.0, 24 + LETTER * max(len(text) for _, text in marks))
    right, top, bottom = WIDTH - 10, 10, 10 + height
    px = lambda x: left + (x - x0) / (x1 - x0) * (right - left)  # noqa: E731
    py = lambda y: bottom - (y - y0) / (y1 - y0) * (bottom - top)  # noqa: E731
    parts = []
    for tick, text in marks:
        parts += [f'<line class="grid" x1="{left}" x2="{right}" y1="{py(tick):.2f}" y2="{py(tick):.2f}"/>',
                  f'<text class="y tick" x="{left - 5}" y="{py(tick) + 4:.2f}" text-anchor="end">{text}</text>']
    for tick in ticks(x0, x1):
        if not whole or tick == round(tick):
            parts += [f'<line class="grid" x1="{px(tick):.2f}" x2="{px(tick):.2f}" y1="{top}" y2="{bottom}"/>',
                      f'<text class="x tick" x="{px(tick):.2f}" y="{bottom + 14}" text-anchor="middle">{number(tick)}'
                      '</text>']
    parts += [f'<text x="{(left + right) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(x_label)}</text>',
              f'<text x="12" y="{(top + bottom) / 2}" text-anchor="middle" '
              f'transform="rotate(-90 12 {(top + bottom) / 2})">{escape(y_label)}</text>']
    if diagonal:
        parts.append(f'<line class="axis" stroke-dasharray="3 3" x1="{left}" y1="{bottom}" x2="{right}" y2="{top}"/>')
    for k, name in enumerate(names):
        points = [(px(row["x"]), py(row["y"]), row) for row in rows if row["series"] == name]
        colour, dash = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]
        if line and len(points) > 1:
            path = " ".join(f"{x:.2f},{y:.2f}" for x, y, _ in points)
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}" '
                         f'points="{path}"/>')
        for x, y, row in points:
            if row.get("low") is not None:
                parts.append(f'<line stroke="{colour}" x1="{x:.2f}" x2="{x:.2f}" y1="{py(row["low"]):.2f}" '
                             f'y2="{py(row["high"]):.2f}"/>')
            parts.append(_mark(k, x, y, 2.2 if len(points) > 30 else 4.8 - 0.4 * min(k, 6), row))
    parts.append(f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>')
    legend, below = _legend(names, bottom + 46, line)
    return _svg(figure, below, parts + legend)


def _mark(k, x, y, size, row=None) -> str:
    """Draw marker number ``k``; with a row, also its values."""
    turn = k // len(COLOURS)  # after a round of the colours, each has the next one's marker
    shape, colour = MARKERS[(k + turn) % len(MARKERS)], COLOURS[k % len(COLOURS)]
    s = round(size, 2)
    drawn = {
        "circle": f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{s:.2f}" fill="{colour}"',
        "square": f'<path d="M{x - s:.2f} {y - s:.2f}h{2 * s:.2f}v{2 * s:.2f}h-{2 * s:.2f}z" fill="{colour}"',
        "triangle": f'<path d="M{x:.2f} {y - s:.2f}l{s:.2f} {2 * s:.2f}h-{2 * s:.2f}z" fill="{colour}"',
        "diamond": f'<path d="M{x:.2f} {y - 1.3 * s:.2f}l{s:.2f} {1.3 * s:.2f}l-{s:.2f} {1.3 * s:.2f}'
                   f'l-{s:.2f} -{1.3 * s:.2f}z" fill="{colour}"',
        "cross": f'<path d="M{x - s:.2f} {y - s:.2f}l{2 * s:.2f} {2 * s:.2f}m0 -{2 * s:.2f}l-{2 * s:.2f} {2 * s:.2f}" '
                 f'stroke="{colour}" stroke-width="2" fill="none"',
        "plus": f'<path d="M{x - s:.2f} {y:.2f}h{2 * s:.2f}m-{s:.2f} -{s:.2f}v{2 * s:.2f}" stroke="{colour}" '
                'stroke-width="2" fill="none"',
        "down": f'<path d="M{x:.2f} {y + s:.2f}l{s:.2f} -{2 * s:.2f}h-{2 * s:.2f}z" fill="{colour}"'}[shape]
    if row is None:
        return drawn + "/>"
    return drawn + _data(row) + f' data-at="{x:.2f} {y:.2f}">' + _tooltip(row) + f"</{drawn[1:drawn.index(' ')]}>"


def _data(row) -> str:
    return "".join(f' data-{key}="{escape(row[key])}"' for key in ("series", "x", "y"))


def _tooltip(row) -> str:
    interval = f" [{row['low']:.5g}, {row['high']:.5g}]" if row.get("low") is not None else ""
    return f"<title>{escape(row['series'])}: {row['x']:.6g}, {row['y']:.6g}{interval}</title>"


def _legend(names, y, line) -> tuple[list[str], float]:
    """Draw entries from left to right, in as many lines as needed; returns them and the y below."""
    parts, x, sample = [], 6.0, 26 if line else 12
    for k, name in enumerate(names):
        text = _short(name, 48)
        width = sample + 6 + LETTER * len(text) + 10
        if x > 6 and x + width > WIDTH:
            x, y = 6.0, y + 16
        if line:
            parts.append(f'<line x1="{x:.1f}" x2="{x + sample:.1f}" y1="{y - 4}" y2="{y - 4}" stroke-width="1.5" '
                         f'stroke="{COLOURS[k % len(COLOURS)]}" stroke-dasharray="{DASHES[k % len(DASHES)]}"/>')
        parts.append(_mark(k, x + sample / 2, y - 4, 4))
        parts.append(f'<text x="{x + sample + 5:.1f}" y="{y}">{escape(text)}</text>')
        x += width
    return parts, y + 8


def _short(name, most) -> str:
    name = str(name)
    return name if len(name) <= most else name[:most - 1] + "…"


def _svg(figure, height, parts) -> str:
    key, title, description = figure
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
            f'aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{escape(title)}</title>'
            f'<desc id="{key}-d">{escape(description)}</desc>\n' + "\n".join(parts) + "\n</svg>")


def _kernel_label(kernel: str) -> str:
    """Shorten a kernel's name to its last parts, which fit a cell: blocks.0.attn.qkv → attn.qkv."""
    parts = kernel.split(".")
    if parts[-1] in ("weight", "0") and len(parts) > 1:
        parts = parts[:-1]
    two = ".".join(parts[-2:])
    return two if len(two) <= 11 else _short(parts[-1], 11)


def allocation(figure, rows) -> str:
    """Draw Fig. 4: a cell per kernel, one line per block, or more where a block has more than four kernels.

    ``rows``: block, kernel, bits, keep, keep_actual, qtype, granularity, retained. The deeper the colour, the more
    bits; the bar below is the kept share of the channels.
    """
    wide, high, left = 74.0, 46, 62
    parts, y, most = [], 4.0, max(row["bits"] for row in rows)
    for block in dict.fromkeys(row["block"] for row in rows):
        mine = [row for row in rows if row["block"] == block]
        parts.append(f'<text x="{left - 5}" y="{y + high / 2:.1f}" text-anchor="end">{escape(_short(block, 9))}</text>')
        for k, row in enumerate(mine):
            if k and k % 4 == 0:
                y += high
            x = left + wide * (k % 4)
            keep = row["keep"] if row["keep_actual"] is None else row["keep_actual"]
            say = (f"{row['kernel']}: {row['bits']} bits, {row['qtype']}, {row['granularity']}, channels kept "
                   f"{keep:.3f} (asked for {row['keep']:.3f}), retained {row['retained']:.4f}")
            data = "".join(f' data-{key.replace("_", "-")}="{escape(row[key])}"' for key in
                           ("block", "kernel", "bits", "keep", "qtype", "granularity", "retained"))
            parts.append(
                f'<g class="kernel"{data}><title>{escape(say)}</title>'
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 3}" height="{high - 4}" fill="#0072B2" '
                f'fill-opacity="{0.05 + 0.4 * row["bits"] / most:.3f}"/>'
                f'<text class="small" x="{x + 3:.1f}" y="{y + 11:.1f}">{escape(_kernel_label(row["kernel"]))}</text>'
                f'<text x="{x + 3:.1f}" y="{y + 23:.1f}">{row["bits"]} bit {escape(_short(row["qtype"], 5))}</text>'
                f'<text class="small" x="{x + 3:.1f}" y="{y + 34:.1f}">{keep:.2f} '
                f'{escape(_short(row["granularity"], 8))}</text>'
                f'<rect class="track" x="{x:.1f}" y="{y + high - 8:.1f}" width="{wide - 3}" height="4"/>'
                f'<rect x="{x:.1f}" y="{y + high - 8:.1f}" width="{(wide - 3) * min(max(keep, 0), 1):.2f}" height="4" '
                'fill="#D55E00"/></g>')
        y += high
    return _svg(figure, y + 2, parts)


def strategies(figure, rows) -> str:
    """Draw Fig. 5: strategy (letter and shade), budget and, for the best cycle, realised retained fraction of every
    block, one column per cycle.

    ``rows``: cycle, block, strategy, target, realised (or None).
    """
    cycles = sorted({row["cycle"] for row in rows})
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    left, high = 62, 20
    wide = min(95.0, (WIDTH - left - 2) / len(cycles))
    parts = [f'<text x="{left + wide * (k + 0.5):.1f}" y="12" text-anchor="middle">'
             f'{"cycle " if wide > 50 else ""}{cycle}</text>' for k, cycle in enumerate(cycles)]
    for i, block in enumerate(blocks):
        parts.append(f'<text x="{left - 5}" y="{18 + high * (i + 0.7):.1f}" text-anchor="end">'
                     f'{escape(_short(block, 9))}</text>')
    for row in rows:
        letter, colour, opacity = STRATEGIES.get(row["strategy"], ("?", "currentColor", 0.3))
        x, y = left + wide * cycles.index(row["cycle"]), 18 + high * blocks.index(row["block"])
        text = f"{letter} {row['target']:.2f}" if wide > 40 else letter
        realised = "" if row["realised"] is None else f"→{row['realised']:.2f}"
        text += realised * (wide > 70)
        data = "".join(f' data-{key}="{escape(row[key])}"' for key in ("cycle", "block", "strategy", "target"))
        parts.append(
            f'<g class="strategy"{data}><title>cycle {row["cycle"]}, {escape(row["block"])}: {escape(row["strategy"])}'
            f', budget {row["target"]:.4f} {realised}</title>'
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" height="{high - 2}" fill="{colour}" '
            f'fill-opacity="{opacity}"/>'
            f'<text x="{x + wide / 2 - 1:.1f}" y="{y + 13:.1f}" '
            f'text-anchor="middle">{text}</text></g>')
    y = 18 + high * len(blocks) + 14
    parts.append(f'<text x="4" y="{y}">P pruning, Q quantization, A auto; ρ*→realised ρ</text>')
    return _svg(figure, y + 6, parts)
