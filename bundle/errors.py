"""Errors that are the input's fault, told in one line."""

from __future__ import annotations

import sys
from types import TracebackType

__all__ = ["InputError", "reason", "report_in_one_line"]


class InputError(ValueError):
    """Something given by the user cannot be used; the message names it and says why."""


def reason(error: BaseException) -> str:
    """One line for an error: that of the :class:`InputError` behind it, where there is one."""
    cause = _input_error(error)
    if cause is not None:
        return str(cause)
    while error.__cause__ is not None:  # what MONAI wrapped as "applying transform ..."
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def report_in_one_line() -> None:
    """End the program with one line, instead of a traceback through the engines, where an :class:`InputError` is the cause."""
    sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if _input_error(error) is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        sys.stderr.write(f"error: {reason(error)}\n")


def _input_error(error: BaseException | None) -> InputError | None:
    """The innermost :class:`InputError` of the chain: MONAI wraps what a transform or a component raises."""
    found = None
    while error is not None:
        if isinstance(error, InputError):
            found = error
        error = error.__cause__ or error.__context__
    return found
