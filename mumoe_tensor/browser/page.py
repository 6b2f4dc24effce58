"""Experts on one page that needs no network; cards are drawn as they come into sight."""

from __future__ import annotations

from mumoe_tensor.browser.view import View
from mumoe_tensor.pages import render


def page(*views: View) -> str:
    """Make a page of experts.

    Parameters
    ----------
    *views : View
        Of one model, or of several to compare, side by side.

    Returns
    -------
    str
        HTML with everything in it. ``#expert=37&layer=blocks.0.mlp&level=1`` after its address opens an
        expert.

    Raises
    ------
    ValueError
        If there is no view.
    """
    if not views:
        raise ValueError("a page must show the experts of a model, got none.")
    return render("experts.html", views=views, data=[view.plain() for view in views])
