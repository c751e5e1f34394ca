"""Options of the unit tests."""

import pytest


@pytest.fixture(autouse=True)
def hosts_are_not_asked(monkeypatch) -> None:
    """Skip the checks of vLLM and verl, ten seconds each; contract/test_vllm_ask.py and test_verl_ask.py have them."""
    monkeypatch.setattr("verl_aqn.preflight.vllm_says.vllm_version", lambda: None)
    monkeypatch.setattr("verl_aqn.preflight.verl_says.verl_version", lambda: None)
    monkeypatch.setattr("verl_aqn.preflight.data_rows.is_here", lambda: False)
