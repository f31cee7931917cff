"""Values from the command line: Python Fire reads ``--dataset_dir 2024_01_15`` as a number, and a device comes as text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

__all__ = ["as_typed", "check_output_dir", "device", "paths"]


def as_typed(name: str) -> list[str]:
    """The words after ``--name`` on the command line, as they were typed; none where the option was not given there."""
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
    """Paths that a value stands for: one, or a list of them.

    Fire turns a name like ``1.10``, ``12,13`` or ``None`` into a number, a tuple or nothing at all. The name that was typed is used where
    something of that name exists.

    Args:
        value: a path, a sequence of paths, or what Fire made of them.
        name: option that the value was given with.

    Raises:
        InputError: for a value that stands for no path. The message says what to type.
    """
    typed = as_typed(name)
    if len(typed) > 1:  # the shell replaced a pattern by file names
        return typed
    if typed and typed[0] != value and Path(typed[0]).exists():
        return typed
    if isinstance(value, (str, Path)) and not (typed and typed[0] == "None"):
        return [str(value)]
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(isinstance(v, (str, Path)) for v in value):
        return [str(v) for v in value]
    if typed:
        raise _misread(name, typed[0])
    if type(value) in (int, float):
        return [str(value)]
    raise InputError(f"{name} must be a path, a pattern or a list of them, got {value!r}")


def check_output_dir(value: Any) -> None:
    """Refuse a folder for results whose name Fire read as something else than a text.

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
        InputError: when there is no such device here.
    """
    try:
        wanted = torch.device(name)
    except (RuntimeError, TypeError) as e:
        raise InputError(f"device {name!r}: unknown; use cpu, cuda, cuda:1 or mps") from e
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= count:
            there = "there is no CUDA GPU" if not count else f"there are {count} CUDA GPUs, cuda:0 to cuda:{count - 1}"
            raise InputError(f"device {name}: not available ({there}); use --device cpu" + (" or another GPU" if count else ""))
    elif wanted.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {name}: not available (there is no Apple GPU); use --device cpu")
    elif wanted.type not in ("cpu", "mps"):
        try:
            torch.empty(1, device=wanted)
        except Exception as e:
            raise InputError(f"device {name}: not available here; use --device cpu") from e
    return wanted


def _misread(name: str, word: str) -> InputError:
    return InputError(f"--{name} {word}: this name would be read as a Python value; type --{name} ./{word}")
