"""Options of the unit tests."""

import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import DictConfig

from verl_aqn.config import compose

SHIPPED = (Path(compose.__file__).parent, *compose.recipe_dirs())


@pytest.fixture(autouse=True)
def hosts_are_not_asked(monkeypatch) -> None:
    """Skip the checks of vLLM and verl, ten seconds each; contract/test_vllm_ask.py and test_verl_ask.py have them."""
    monkeypatch.setattr("verl_aqn.preflight.vllm_says.vllm_version", lambda: None)
    monkeypatch.setattr("verl_aqn.preflight.verl_says.verl_version", lambda: None)
    monkeypatch.setattr("verl_aqn.preflight.data_rows.is_here", lambda: False)
    monkeypatch.setattr("verl_aqn.launch.train.ahead_of", lambda config: nullcontext())  # so nobody needs its imports


@pytest.fixture(autouse=True, scope="session")
def composed_once() -> Iterator[None]:
    """Compose a shipped recipe with the same overrides once: Hydra reads forty files each time."""
    real, known = compose._compose, {}

    def remembered(path: Path, overrides: list[str]) -> DictConfig:
        if not any(path.is_relative_to(folder) for folder in SHIPPED):
            return real(path, overrides)
        key = (path, tuple(overrides), tuple(compose.recipe_dirs()))
        if key not in known:
            known[key] = pickle.dumps(real(path, overrides))
        return pickle.loads(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_compose", remembered)
        yield
