"""Fixtures of all tests."""

import sys

import pytest


@pytest.fixture(autouse=True)
def excepthook(monkeypatch):
    """A run of a config replaces ``sys.excepthook``, in this process too; it is restored after each test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
