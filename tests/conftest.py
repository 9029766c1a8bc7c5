"""Settings of all tests: the same examples on every run of continuous integration, new ones on a developer's."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A busy machine may hold any example up; examples that share a directory make paths of their own in it.
unhurried = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("dev", unhurried)
settings.register_profile("ci", unhurried, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
