"""Errors that are the input's fault, told in one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType

__all__ = ["InputError", "PassedOver", "check_overlays", "full_disk", "passed_over", "reason", "report_in_one_line", "switch"]


class InputError(ValueError):
    """Something given by the user cannot be used; the message names it and says why."""


class PassedOver(InputError):
    """Nothing is to be done for a volume; the message names it and says why. This is no failure."""


def reason(error: BaseException) -> str:
    """One line for an error: that of the :class:`InputError` behind it, where there is one."""
    cause = _input_error(error)
    if cause is not None:
        return str(cause)
    while error.__cause__ is not None:  # what MONAI wrapped as "applying transform ..."
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def full_disk(error: BaseException) -> OSError | None:
    """The error in a chain that says that nothing more can be written: no space, no quota, read-only."""
    return next((e for e in _chain(error) if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)), None)


def passed_over(error: BaseException) -> bool:
    """Whether an error says that nothing is to be done for a volume."""
    return isinstance(_input_error(error), PassedOver)


def switch(name: str, value: bool | str) -> bool:
    """An option that is on or off; the command line gives ``--overwrite false`` as text.

    Raises:
        InputError: for anything but true and false.
    """
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise InputError(f"{name} must be true or false, got {value!r}")
    return known[str(value).lower()]


def check_overlays(**chosen: Mapping[str, bool]) -> None:
    """Refuse two overlays that choose the same thing: which one counted would depend on their order.

    Args:
        chosen: what is chosen, in the plural, and the names of the overlays that choose it, such as ``networks={"fast": True}``.

    Raises:
        InputError: naming the overlays.
    """
    for what, names in chosen.items():
        if len(names) > 1:
            raise InputError(f"{' and '.join(sorted(names))} are overlays for different {what}: give one of them")


def report_in_one_line() -> None:
    """End the program with one line, instead of a traceback through the engines, where an :class:`InputError` is the cause."""
    sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if _input_error(error) is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        sys.stderr.write(f"error: {reason(error)}\n")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it: MONAI wraps what a transform or a component raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _input_error(error: BaseException) -> InputError | None:
    """The innermost :class:`InputError` of the chain."""
    return next((e for e in reversed(list(_chain(error))) if isinstance(e, InputError)), None)
