"""Paths and devices from the command line, where Python Fire turns ``--dataset_dir 2024_01_15`` into a number."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle import run as bundle_run

from .errors import InputError

__all__ = ["as_typed", "check_options", "check_output_dir", "device", "paths"]


def as_typed(name: str) -> list[str]:
    """The words typed after ``--name`` on the command line; empty if the option is missing."""
    words = sys.argv[1:]
    for i, word in enumerate(words):
        if word == f"--{name}":
            rest = words[i + 1 :]
            end = next((n for n, other in enumerate(rest) if other.startswith("--")), len(rest))
            return rest[:end]
        if word.startswith(f"--{name}="):
            return [word.partition("=")[2]]
    return []


def paths(value: Any, name: str = "dataset_dir") -> list[str]:
    """The list of paths in an option's value.

    Fire turns a name like ``1.10``, ``12,13`` or ``None`` into a number, a tuple or ``None``. The typed name is used if a file or folder
    has that name.

    Args:
        value: a path, a sequence of paths, or what Fire made of them.
        name: name of the option.

    Raises:
        InputError: if the value is not a path. The message says what to type.
    """
    typed = as_typed(name)
    if len(typed) > 1:  # the shell replaced a pattern by file names
        return typed
    if typed and typed[0] != value and Path(typed[0]).exists():
        return typed
    if str(value) == "":
        raise InputError(f"{name} is empty: give a path, a pattern or a list of them")
    if isinstance(value, (str, Path)) and not (typed and typed[0] == "None"):
        return [str(value)]
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(isinstance(v, (str, Path)) for v in value):
        return [str(v) for v in value]
    if typed:
        raise _misread(name, typed[0])
    if type(value) in (int, float):
        return [str(value)]
    raise InputError(f"{name} must be a path, a pattern or a list of them, got {value!r}")


def check_options() -> None:
    """Refuse an option of ``python -m monai.bundle run`` that no config knows: MONAI would ignore a name that is mistyped.

    Raises:
        InputError: the message names the option, and similar ones.
    """
    program, *words = sys.argv
    if Path(program).parts[-2:] != ("bundle", "__main__.py") or words[:1] != ["run"] or not as_typed("config_file"):
        return
    config = ConfigParser.load_config_files(DefaultParseValue(as_typed("config_file")[0]))
    known = {*(key.replace("#", "::").partition("::")[0] for key in config), *inspect.signature(bundle_run).parameters}
    if as_typed("tracking"):
        known |= {"tracking_uri", "experiment_name", "run_name", "save_execute_config"}
    known |= set(re.findall(r"@(\w+)", json.dumps(config)))
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("#", "::").partition("::")[0].replace("-", "_")
        if word.startswith("--") and name not in known and not name.startswith("_"):
            near = difflib.get_close_matches(name, known, 3)
            raise InputError(f"there is no option --{name}" + (f"; similar: {', '.join(f'--{n}' for n in near)}" if near else ""))


def check_output_dir(value: Any) -> None:
    """Refuse an output folder whose name Fire did not read as text.

    Raises:
        InputError: the message says what to type.
    """
    typed = as_typed("output_dir")
    if typed and (not isinstance(value, (str, Path)) or typed[0] == "None"):
        raise _misread("output_dir", typed[0])
    if not isinstance(value, (str, Path)):
        raise InputError(f"output_dir must be a path, got {value!r}")


def device(name: str | torch.device) -> torch.device:
    """A device by its name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Raises:
        InputError: if this machine has no such device.
    """
    try:
        chosen = torch.device(name)
    except (RuntimeError, TypeError) as e:
        raise InputError(f"device {name!r}: unknown; use cpu, cuda, cuda:1 or mps") from e
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            found = "there is no CUDA GPU" if not count else f"there are {count} CUDA GPUs, cuda:0 to cuda:{count - 1}"
            raise InputError(f"device {name}: not available ({found}); use --device cpu" + (" or another GPU" if count else ""))
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {name}: not available (there is no Apple GPU); use --device cpu")
    elif chosen.type not in ("cpu", "mps"):
        try:
            torch.empty(1, device=chosen)
        except Exception as e:
            raise InputError(f"device {name}: not available here; use --device cpu") from e
    return chosen


def _misread(name: str, word: str) -> InputError:
    return InputError(f"--{name} {word}: this name would be read as a Python value; type --{name} ./{word}")
