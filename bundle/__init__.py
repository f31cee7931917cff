"""Super-resolution of brain MRI: the Python that the configs of the bundle point at."""

from pathlib import Path


def root() -> str:
    """Folder of the bundle, which holds ``configs`` and ``models``."""
    return str(Path(__file__).parents[1])
