"""Datasets as musubi-tuner describes them, and the caches that it reads instead of encoding."""

from .alone import VaeAlone
from .cache import Cache, cache_items, stale_files
from .config import Dataset, read_config
from .items import Item, list_items
from .sizes import bucket, control_size, fit

__all__ = [
    "Cache",
    "Dataset",
    "Item",
    "VaeAlone",
    "bucket",
    "cache_items",
    "control_size",
    "fit",
    "list_items",
    "read_config",
    "stale_files",
]
