"""Errors caused by the input, reported in one line."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

__all__ = ["InputError", "PassedOver", "check_overlays", "full_disk", "passed_over", "reason", "report_in_one_line", "switch"]


class InputError(ValueError):
    """An input or option cannot be used; the message names it and says why."""


class PassedOver(InputError):
    """A volume needs no processing; the message names it and says why. This is not a failure."""


def reason(error: BaseException) -> str:
    """One line for an error: the message of the :class:`InputError` that caused it, if there is one."""
    cause = _input_error(error)
    if cause is not None:
        return str(cause)
    while error.__cause__ is not None:  # MONAI wraps it as "applying transform ..."
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def full_disk(error: BaseException) -> OSError | None:
    """The error in a chain that says that the disk cannot be written to: no space, no quota, read-only."""
    return next((e for e in _chain(error) if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)), None)


def passed_over(error: BaseException) -> bool:
    """Whether an error says that a volume needs no processing."""
    return isinstance(_input_error(error), PassedOver)


def switch(name: str, value: bool | str) -> bool:
    """Boolean value of an option, which the command line passes as text (``--overwrite false``).

    Raises:
        InputError: for any value except true and false.
    """
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise InputError(f"{name} must be true or false, got {value!r}")
    return known[str(value).lower()]


def check_overlays(**chosen: Mapping[str, bool]) -> None:
    """Refuse two overlays that choose the same thing, because their order would decide which one applies.

    Args:
        chosen: what is chosen, in the plural, with the names of the overlays that choose it, such as ``networks={"fast": True}``.

    Raises:
        InputError: if there are two; the message names them.
    """
    for what, names in chosen.items():
        if len(names) > 1:
            raise InputError(f"{' and '.join(sorted(names))} are overlays for different {what}: use only one of them")


def report_in_one_line() -> None:
    """End the program with one line instead of a traceback if an :class:`InputError` is the cause, and log none: MONAI's engines log
    every error."""
    sys.excepthook = _excepthook
    logging.setLogRecordFactory(_without_traceback)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if _input_error(error) is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        sys.stderr.write(f"error: {reason(error)}\n")


def _without_traceback(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """A record without the traceback of an :class:`InputError`."""
    record = logging.LogRecord(*args, **kwargs)
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and _input_error(error) is not None:
        record.exc_info = None
    return record


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes: MONAI wraps the errors of transforms and components."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _input_error(error: BaseException) -> InputError | None:
    """The outermost :class:`InputError` of the chain: it may name the file of an inner one."""
    return next((e for e in _chain(error) if isinstance(e, InputError)), None)
