"""The type of JSON objects, as Python's `json` reads them."""

from typing import Any

Json = dict[str, Any]
