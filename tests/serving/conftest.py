"""A server that logs an error has failed, whatever its clients got."""

import logging

import pytest


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture):
    """A test that wants errors clears them."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors, caplog.text
