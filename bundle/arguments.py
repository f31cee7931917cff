"""Options from the command line, where Python Fire turns ``--dataset_dir 2024_01_15`` into a number, and MONAI ``#`` into ``::``."""

from __future__ import annotations

import difflib
import glob
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle import run as bundle_run

from .errors import InputError

__all__ = ["as_typed", "check_options", "check_output_dir", "check_processes", "device", "paths", "share"]

# names of options, what their values must be, and a test of the value that Fire reads
VALUES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("patch_size", "batch_size", "max_epochs", "val_interval"), "a whole number from 1", lambda value: _is_whole(value, 1)),
    (("patches_per_volume", "slices_per_volume", "patches_per_slice"), "a whole number from 1", lambda value: _is_whole(value, 1)),
    (("evaluated_slices",), "a whole number from 1", lambda value: _is_whole(value, 1)),
    (("warmup_iterations", "seed", "num_workers"), "a whole number from 0", lambda value: _is_whole(value, 0)),
    (("learning_rate", "largest_gradient"), "a number above 0", lambda value: _is_number(value) and value > 0),
    (("weight_decay", "tv_weight", "largest_noise", "slice_gap"), "a number from 0", lambda value: _is_number(value) and value >= 0),
    (("usual_fraction", "thick_fraction", "average_decay"), "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    (("evaluated_factors", "lr_milestones"), "a list of numbers from 1", lambda value: _are_numbers(value, 1)),
    (("evaluated_thicknesses", "thicknesses"), "a list of numbers from 0.1", lambda value: _are_numbers(value, 0.1)),
    (("load_weights", "tell_noise"), "true or false", lambda value: str(value).lower() in ("true", "false")),
    (("positions", "facts", "distributed"), "True or False", lambda value: type(value) is bool),
)


def as_typed(name: str) -> list[str]:
    """The words typed after the last ``--name`` on the command line; empty if the option is missing."""
    words, typed = sys.argv[1:], []
    for i, word in enumerate(words):
        if word == f"--{name}":
            rest = words[i + 1 :]
            end = next((n for n, other in enumerate(rest) if other.startswith("--")), len(rest))
            typed = rest[:end]
        elif word.startswith(f"--{name}="):
            typed = [word.partition("=")[2]]
    return typed


def paths(value: Any, name: str = "dataset_dir") -> list[str]:
    """The list of paths in an option's value.

    Fire turns a name like ``1.10``, ``12,13`` or ``None`` into a number, a tuple or ``None``, and takes what follows a ``#`` for a comment.
    MONAI turns ``#`` into ``::``. The typed name is used if a file or folder has that name, or if it contains a ``#``.

    Args:
        value: a path, a sequence of paths, or what Fire made of them.
        name: name of the option.

    Raises:
        InputError: if the value is not a path. The message says what to type.
    """
    typed = as_typed(name)
    if len(typed) > 1:  # the shell replaced a pattern by file names
        return typed
    if typed and typed[0] != value and (Path(typed[0]).exists() or ("#" in typed[0] and typed[0][0] not in "[(")):
        return typed
    if str(value) == "":
        raise InputError(f"{name} is empty: give a path, a pattern or a list of them")
    if isinstance(value, (str, Path)) and not (typed and typed[0] == "None"):
        return [_with_hash(str(value))]
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(isinstance(v, (str, Path)) for v in value):
        return [_with_hash(str(v)) for v in value]
    if typed:
        raise _misread(name, typed[0])
    if type(value) in (int, float):
        return [str(value)]
    raise InputError(f"{name} must be a path, a pattern or a list of them, got {value!r}")


def _with_hash(path: str) -> str:
    """A path with ``#`` where MONAI has put ``::``, unless there is a file with the latter."""
    return path if os.path.lexists(path) or glob.glob(path) else path.replace("::", "#")


def check_options() -> None:
    """Refuse an option of ``python -m monai.bundle run`` that no config knows, because MONAI would ignore a name that is mistyped, and a
    number outside the range that makes sense.

    Raises:
        InputError: the message names the option, and similar ones or the range.
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
    for names, what, fits in VALUES:
        for name in names:
            _check_value(name, what, fits)


def _check_value(name: str, what: str, fits: Callable[[Any], bool]) -> None:
    typed = as_typed(name)
    value = DefaultParseValue(typed[0]) if typed else None
    if value is not None and not fits(value) and not str(value).startswith(("@", "$", "%")):
        raise InputError(f"{name} must be {what}, got {typed[0]!r}")


def _is_whole(value: Any, smallest: int) -> bool:
    return type(value) is int and value >= smallest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(values: Any, smallest: float) -> bool:
    return isinstance(values, (list, tuple)) and all(_is_number(value) and value >= smallest for value in values)


def check_output_dir(value: Any) -> None:
    """Refuse an output folder whose name is empty, or was not read as it was typed.

    Raises:
        InputError: the message says what to type.
    """
    typed = as_typed("output_dir")
    if str(value) == "" or (typed and typed[0] == ""):
        raise InputError("output_dir is empty: give a folder")
    if Path(str(value)).is_file():
        raise InputError(f"output_dir {value} is a file: give a folder")
    if "::" in str(value) or (typed and "#" in typed[0]):
        raise InputError(f"output_dir {typed[0] if typed else value}: MONAI cannot write to a path with '#' or '::': choose another folder")
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


def check_processes() -> None:
    """Refuse to start several processes without ``torchrun``.

    Raises:
        InputError: the message says what to type.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise InputError("configs/multi_gpu_*.json need several processes: start with torchrun --nproc_per_node=2 -m monai.bundle run ...")


def share(batch_size: int) -> int:
    """The part of a batch that one of several processes takes.

    Raises:
        InputError: if it is not a whole number.
    """
    processes = int(os.environ["WORLD_SIZE"])
    if batch_size % processes:
        raise InputError(f"batch_size {batch_size} cannot be divided among {processes} processes")
    return batch_size // processes


def _misread(name: str, word: str) -> InputError:
    return InputError(f"--{name} {word}: this name would be read as a Python value; type --{name} ./{word}")
