"""`scripts/run_tests.sh` ends with the result of the tests, and leaves nothing behind."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/run_tests.sh"


@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("small", ["true", "sleep 100"], ids=["small tests ended", "small tests run"])
def test_its_end_keeps_the_result(result, small, tmp_path):
    """bash runs a trap under `set -e`: a command that fails there replaces the exit status and skips the rest."""
    (trap,) = re.findall(r"^trap .*", SCRIPT.read_text(), re.M)
    (tmp_path / "outputs").mkdir()
    waits = 'wait "$session"' if small == "true" else "true"
    begin = f"set -euo pipefail; outputs={tmp_path}/outputs; setsid {small} & session=$!; sleep 0.3; {waits}"
    done = subprocess.run(
        ["bash", "-c", f"{begin}\n{trap}\nexit {result}"], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == result, done.stderr
    assert not (tmp_path / "outputs").exists()
