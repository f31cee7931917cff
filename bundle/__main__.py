"""``python -m bundle``: the commands and options of ``python -m monai.bundle``, started sooner.

MONAI imports every optional package that it finds. Those that no config here uses are hidden from it while it is imported; what wants
them later finds them.
"""

import runpy
import sys

UNUSED = ("mlflow", "pandas", "sklearn", "matplotlib")

if __name__ == "__main__":
    hidden = [name for name in UNUSED if name not in sys.modules and "--tracking" not in sys.argv]  # MONAI may track with mlflow
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # importing them fails, as if they were not installed
    import monai.bundle  # noqa: F401

    for name in hidden:
        del sys.modules[name]
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=False)
