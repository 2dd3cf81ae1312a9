"""What is in these files: headers, names, formats, and where models lie on the disk."""

from .checkpoint import Checkpoint
from .component import Component
from .source import ModelSource, open_model

__all__ = ["Checkpoint", "Component", "ModelSource", "open_model"]
