"""Fixtures of all tests."""

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def excepthook(monkeypatch):
    """A run of a config replaces ``sys.excepthook``, in this process too; it is restored after each test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
