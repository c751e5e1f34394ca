"""A process without the plugin, or with other versions, stops with one line that says so."""

import os
import subprocess
import sys

import pytest

CODE = "from verl_aqn.integrations.verl.verl_plugin import assert_loaded; assert_loaded('actor')"


def last_line(code: str, **env: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    return result.returncode, (result.stderr.strip().splitlines() or [""])[-1]


def test_all_is_well_on_the_cpu_platform():
    assert last_line(CODE, VERL_PLATFORM="cpu")[0] == 0


def test_plugin_switched_off():
    code, line = last_line(CODE, VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_PLUGINS="none")
    assert code == 1
    assert "actor: VERL_USE_EXTERNAL_PLUGINS=none excludes verl-aqn" in line


def test_entry_point_not_installed():
    code = (
        "import importlib.metadata as m; old = m.entry_points;"
        "m.entry_points = lambda **k: m.EntryPoints() if k.get('group') == 'verl.plugins' else old(**k);" + CODE
    )
    assert "entry points are not installed" in last_line(code, VERL_PLATFORM="cpu")[1]


@pytest.mark.parametrize("package", ["verl", "torch", "ray"])
def test_version_whose_seams_were_not_checked(package):
    patch = (
        "import importlib.metadata as m; old = m.version;"
        f"m.version = lambda name: '0.0.7' if name == {package!r} else old(name);"
        "from verl_aqn.integrations.verl import verl_plugin; verl_plugin.check_versions()"
    )
    code, line = last_line(patch, VERL_PLATFORM="cpu")
    assert code == 1
    assert f"{package} 0.0.7 is not supported" in line


def test_vllm_version_whose_seams_were_not_checked(monkeypatch):
    from verl_aqn.errors import EnvironmentFault
    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda _name: "0.99.0")
    with pytest.raises(EnvironmentFault, match=r"vLLM 0\.99\.0 is not supported \(supported: "):
        plugin.check_version()
