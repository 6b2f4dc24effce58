"""The expert browser as one self-contained HTML page; cards are rendered when they scroll into view."""

from __future__ import annotations

from mumoe_tensor.browser.view import View
from mumoe_tensor.pages import render


def page(*views: View) -> str:
    """Make a page of experts.

    Parameters
    ----------
    *views : View
        One model, or several to compare side by side.

    Returns
    -------
    str
        Self-contained HTML. The URL fragment ``#expert=37&layer=blocks.0.mlp&level=1`` opens an expert.

    Raises
    ------
    ValueError
        If there are no views.
    """
    if not views:
        raise ValueError("a page must have at least one view, got none.")
    return render("experts.html", views=views, data=[view.plain() for view in views])
