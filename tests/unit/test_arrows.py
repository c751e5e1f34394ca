"""The order of the rooms (`[tool.importlinter]` in pyproject.toml), and what must be imported without torch."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = {
    one["id"]: one for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_every_contract_of_imports_holds(tmp_path):
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout


def test_every_module_is_in_a_room():
    layers = {name.strip() for layer in CONTRACTS["rooms"]["layers"] for name in layer.split("|")}
    for path in sorted((ROOT / "verl_aqn").rglob("*.py")):
        parts = path.relative_to(ROOT / "verl_aqn").with_suffix("").parts
        if parts[-1] != "__init__":
            assert {parts[0], ".".join(parts[:2])} & layers, path


def test_files_have_names_of_their_own():
    """Two files of one name with different jobs are hard to find. The hosts' plugins and packages are exempt."""
    names = [path.stem for path in (ROOT / "verl_aqn").rglob("*.py") if not path.stem.startswith("__")]
    twice = {name for name in names if names.count(name) > 1}
    # The public names of `verl_aqn.noise.schedule` and `verl_aqn.tasks.gsm8k` are those of the files behind them.
    assert twice <= {"schedule", "gsm8k"}


@pytest.mark.parametrize("module", ["schedule", "config.compose", "noise.spec", "runs.evidence", "runs.report.page",
                                    "cli.main", "launch.supervise"])  # fmt: skip
def test_what_reads_settings_and_records_needs_no_torch(module):
    code = f"import sys, verl_aqn.{module}; print(*{{'torch', 'verl', 'vllm', 'ray'}} & set(sys.modules))"
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
