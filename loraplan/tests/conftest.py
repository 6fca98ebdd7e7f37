"""What tests share."""

from __future__ import annotations

import secrets
import signal

import pytest
from hypothesis import settings

# No limit on the time of one example: the machine may be busy. Where runs draw the same examples,
# as under CI, one must find what others find in several.
_FEW = 25 if settings().derandomize else 8
settings.register_profile("few", deadline=None, max_examples=_FEW, print_blob=True)
settings.register_profile("many", settings.get_profile("few"), max_examples=300)
settings.load_profile("few")

# What runs in the background ignores interrupts, and so would all that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw other examples in every run, all of which one number brings back."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = secrets.randbelow(2**32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"these examples again: --hypothesis-seed={config.option.hypothesis_seed}"
