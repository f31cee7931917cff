"""Super-resolution of brain MRI: the Python that the configs of the bundle point at."""

import json
from pathlib import Path


def root() -> str:
    """Folder of the bundle, which holds ``configs`` and ``models``."""
    return str(Path(__file__).parents[1])


def version() -> str:
    """Version of the bundle, from its metadata."""
    return json.loads((Path(root()) / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
