"""What all tests share: made-up examples may take their time, which depends on what else runs."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from server.logs import access_logger

settings.register_profile(
    "unhurried", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def no_log_is_left() -> Iterator[None]:
    """A command that a test calls logs to the standard output of then, which closes with the test."""
    before = list(access_logger.handlers)
    yield
    access_logger.handlers[:] = before
