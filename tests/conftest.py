"""What all tests share: made-up examples may take their time, which depends on what else runs."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "unhurried", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")
