"""A panel of bars, tokens/s of each way: what bench.train and bench.decode make their plots of."""

from collections.abc import Sequence
from typing import Any


def draw_rates(axis: Any, ways: Sequence[str], rates: Sequence[float], title: str, color: Any = None) -> None:
    """Draws them into a matplotlib axis, the first on top, each with its figure.

    Args:
        rates: tokens/s.
        color: of all bars, or one of each.
    """
    bars = axis.barh(ways, rates, color=color)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3)
    axis.margins(x=0.16)  # room for the figures
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.invert_yaxis()
    axis.set_title(title, fontsize="medium")
