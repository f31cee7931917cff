"""Super-resolution of brain MRI: the Python code that the configs of the bundle use."""

import json
import sys
from pathlib import Path


def root() -> str:
    """Folder with ``configs`` and ``models``: the repository, or the copy that ``pip install .`` made.

    Raises:
        FileNotFoundError: if there is neither.
    """
    folders = [Path(__file__).parents[1], Path(sys.prefix) / "share" / "brain_mri_super_resolution"]
    for folder in folders:
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"no configs of the bundle in {' or '.join(map(str, folders))}: install it with pip, or run it from its repository"
    )


def version() -> str:
    """Version of the bundle, from its metadata."""
    return json.loads((Path(root()) / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
