"""Plots as SVG, written by hand: a few lines and numbers need no library."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 560, 300, 56
LINE, AXIS = "#0a6", "#999"


def rates_by_size(title: str, points: Sequence[tuple[int, float]]) -> str:
    """Sizes by powers of ten to the right, rates from zero upwards."""
    top = max(rate for _, rate in points) * 1.15
    step = (WIDTH - 2 * MARGIN) / max(1, len(points) - 1)
    floor = HEIGHT - MARGIN
    places = [(MARGIN + k * step, floor - rate / top * (floor - MARGIN)) for k, (_, rate) in enumerate(points)]
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{LINE}"/>'
        f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{rate:,.0f}</text>'
        f'<text x="{x:.1f}" y="{floor + 20}" text-anchor="middle">{size:,}</text>'
        for (x, y), (size, rate) in zip(places, points, strict=True)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
            ' font-size="12">',
            f'<rect width="100%" height="100%" fill="#fff"/><text x="{MARGIN}" y="24" font-size="15">{title}</text>',
            f'<line x1="{MARGIN}" y1="{floor}" x2="{WIDTH - MARGIN}" y2="{floor}" stroke="{AXIS}"/>',
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" fill="none" stroke="{LINE}"/>',
            *marks,
            "</svg>\n",
        ]
    )
