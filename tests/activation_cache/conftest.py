"""Fixtures of the cache's tests."""

import pytest

from smartfrz_hf.activation_cache.monitor import CacheMonitor


@pytest.fixture
def patient(monkeypatch):
    """
    Tiny models compute faster than anything can be looked up, in runs too short to follow a deeper front; keep their cache on, and
    follow, nevertheless.
    """
    monkeypatch.setattr(CacheMonitor, "loss", lambda self: None)
    monkeypatch.setattr(CacheMonitor, "pays", lambda self, *depths: True)
