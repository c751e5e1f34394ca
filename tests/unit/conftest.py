"""Options of the unit tests."""

import pytest


@pytest.fixture(autouse=True)
def vllm_is_not_asked(monkeypatch) -> None:
    """Asking vLLM takes ten seconds a model; tests/contract/test_vllm_ask.py does."""
    monkeypatch.setattr("verl_aqn.preflight.vllm.vllm_version", lambda: None)


@pytest.fixture(autouse=True)
def verl_is_not_asked(monkeypatch) -> None:
    """Asking verl for the first rows of the data takes six seconds; tests/contract/test_verl_first_rows.py does."""
    monkeypatch.setattr("verl_aqn.preflight.rows.is_here", lambda: False)
