"""What every test runs under."""

from hypothesis import settings

settings.register_profile("quick", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("quick")
