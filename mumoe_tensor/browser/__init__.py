"""A page of experts: what they are active for, how much they are used, what is lost without them."""

from mumoe_tensor.browser.collect import ExpertLevel, collect
from mumoe_tensor.browser.page import page
from mumoe_tensor.browser.plain import Sample
from mumoe_tensor.browser.run import browse, browse_head, browse_language_model
from mumoe_tensor.browser.samples import Images, Texts

__all__ = [
    "ExpertLevel",
    "Images",
    "Sample",
    "Texts",
    "browse",
    "browse_head",
    "browse_language_model",
    "collect",
    "page",
]
