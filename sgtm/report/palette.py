"""Colours of the report, in light for the PNGs and as CSS variables for the page, where they follow the reader's mode.

A label, the group it trains and the removal of that group have one colour everywhere.
"""

from __future__ import annotations

INK, MUTED, GRID, PAPER = "ink", "muted", "grid", "paper"
RETAIN, UNLABELED = "retain", "unlabeled"
DOMAINS = 6

LIGHT = {
    INK: "#1b1d21",
    MUTED: "#6a6f78",
    GRID: "#e4e5e8",
    PAPER: "#fefefe",
    RETAIN: "#2f66a9",
    UNLABELED: "#8d939d",
    "domain-0": "#c8502d",
    "domain-1": "#1d8a72",
    "domain-2": "#7d55b8",
    "domain-3": "#b5840f",
    "domain-4": "#b23d76",
    "domain-5": "#4d7f1f",
}
DARK = {
    INK: "#e7e8ea",
    MUTED: "#9aa0aa",
    GRID: "#2e3238",
    PAPER: "#15171a",
    RETAIN: "#6ea6e8",
    UNLABELED: "#7c828c",
    "domain-0": "#ef8560",
    "domain-1": "#4fbfa4",
    "domain-2": "#ae8be6",
    "domain-3": "#dcb04a",
    "domain-4": "#e27fae",
    "domain-5": "#93c464",
}


def of_label(label: str, domains: tuple[str, ...]) -> str:
    """Colour name of a label (`retain`, `forget:es`) or of a group (`es`)."""
    domain = label.removeprefix("forget:")
    if domain in domains:
        return f"domain-{domains.index(domain) % DOMAINS}"
    return RETAIN if label == RETAIN else UNLABELED


def of_removal(removed: tuple[str, ...], domains: tuple[str, ...]) -> str:
    """Colour name of the removal of these domains: a single domain's own, ink for several together."""
    return of_label(removed[0], domains) if len(removed) == 1 else INK


def css(colours: dict[str, str]) -> str:
    """Declarations of the colours as CSS variables."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def themed(svg: str) -> str:
    """The figure with its light colours replaced by the variables."""
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg
