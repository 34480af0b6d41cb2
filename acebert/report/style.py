"""How the report's pictures look: one panel a picture, so that panels stand side by side on a wide
screen and below each other on a phone, and a system has one colour everywhere."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from acebert.report import rows

WIDTH = 4.8  # of a panel [inches]
DPI = 200
SYSTEMS = {
    rows.TWINBERT.name: "#1f5fa8",
    rows.TWINBERT_MLM.name: "#6fa0d8",
    rows.FASHIONBERT.name: "#e08e2b",
    rows.ROI_PATCHES.name: "#b8860b",
    rows.CEBERT.name: "#d1495b",
    rows.HOT_QUERIES.name: "#7b4ea3",
    rows.ACEBERT.name: "#17807e",
    rows.PLUS.name: "#1c1c1c",
    rows.PLUS_CLICKS.name: "#c2527d",
    rows.RIVAL: "#8d5a3b",
    rows.ZERO_SHOT: "#c49a7d",
}
OTHERS = "#6b8fa3"  # variants of ACE-BERT
UNTRAINED = "#9a9a9a"
CATEGORIES = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7"),
    *("#d55e00", "#56b4e9", "#8b7d00", "#555555"),
)
"""told apart by colour-blind readers too (after Okabe and Ito, 2008)"""
LOOK: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "text.parse_math": False,  # a category with $ in its name is no formula
}


@dataclass(frozen=True)
class Panel:
    """A picture of the page.

    Attributes:
        name: of its file
        alt: what it shows, for those who cannot see it
        png: its bytes
    """

    name: str
    alt: str
    png: bytes

    @property
    def address(self) -> str:
        """As a data: address, so that the page stands alone."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def panel(name: str, alt: str, figure: Any) -> Panel:
    """The finished figure as a panel; the figure is closed."""
    out = io.BytesIO()
    figure.savefig(out, dpi=DPI, format="png")
    plt.close(figure)
    return Panel(name, alt, out.getvalue())


def colour(name: str) -> str:
    """Of a row, by its name."""
    if name in rows.UNTRAINED.values():
        return UNTRAINED
    return SYSTEMS.get(name, OTHERS)
