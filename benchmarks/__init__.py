"""Benchmarks: `python -m benchmarks --help`."""

import handler  # noqa: F401  sets what torch's libraries read when they are loaded, as it does where a model is served
