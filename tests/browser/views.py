"""The values in a page of experts."""

from __future__ import annotations

import json
import re
from typing import Any


def views_of(html: str) -> list[Any]:
    """The values of each of its models, which the script of the page reads."""
    (values,) = re.findall(r'application/json">(.*?)</script>', html, re.DOTALL)
    return json.loads(values)
