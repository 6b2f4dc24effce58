"""The expert browser: a page that shows when experts are active, how much they are used, and their effect."""

from mumoe_tensor.browser.collect import ExpertLevel, collect
from mumoe_tensor.browser.elsewhere import browse_built
from mumoe_tensor.browser.models import browse_language_model, browse_model
from mumoe_tensor.browser.run import browse
from mumoe_tensor.browser.samples import Images, Texts
from mumoe_tensor.browser.view import Sample, View, page
from mumoe_tensor.configs.page import PageConfig

__all__ = [
    "ExpertLevel",
    "Images",
    "PageConfig",
    "Sample",
    "Texts",
    "View",
    "browse",
    "browse_built",
    "browse_language_model",
    "browse_model",
    "collect",
    "page",
]
