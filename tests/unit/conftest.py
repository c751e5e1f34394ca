"""Options of the unit tests."""

import pytest


@pytest.fixture(autouse=True)
def vllm_is_not_asked(monkeypatch) -> None:
    """Asking vLLM takes ten seconds a model; tests/contract/test_vllm_ask.py does."""
    monkeypatch.setattr("verl_aqn.preflight.vllm.vllm_version", lambda: None)
