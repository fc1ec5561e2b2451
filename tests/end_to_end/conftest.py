"""One workshop for the session, shared by the processes of pytest-xdist."""

import os

import pytest

from tests.end_to_end.workshop import Workshop


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Workshop:
    """Artefacts of the real commands, by name; see ``workshop.ARTEFACTS``."""
    base = tmp_path_factory.getbasetemp()
    return Workshop(base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base)
