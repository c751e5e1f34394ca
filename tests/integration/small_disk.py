"""`python -m tests.integration.small_disk FOLDER COMMAND…`: a run whose disk fills up after its first step.

It needs a mount namespace of its own (`unshare --mount`), in which FOLDER becomes a small disk. The command runs until
it has ended on the full disk, and once more with room. The result is one JSON line.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

MEGABYTES = 256


def main(folder: Path, command: list[str]) -> list[dict]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m,mode=755", "none", str(folder)], check=True)
    filler = folder / "filler"
    told = []
    for fills in (True, False):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        filled = time.monotonic()
        while fills and process.poll() is None:
            if any('"kind": "step"' in file.read_text() for file in folder.glob("runs/*/metrics.jsonl")):
                fill(filler)
                filled, fills = time.monotonic(), False
            time.sleep(0.05)
        _, said = process.communicate(timeout=300)
        filler.unlink(missing_ok=True)
        assert (folder / "training.log").exists(), said
        run = (folder / "training.log").resolve().parent
        records = {
            name: [json.loads(line) for line in (run / name).read_text().splitlines() if line.endswith("}")]
            for name in ("metrics.jsonl", "evidence.jsonl")
        }
        state = json.loads((run / "state.json").read_text())
        one = {"code": process.returncode, "said": said, "seconds": time.monotonic() - filled, "state": state}
        told.append(one | {"run": str(run), "log": (run / "training.log").read_text()[-3000:], **records})
    return told


def fill(file: Path) -> None:
    """Write until there is no room for another byte."""
    with file.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        size = 1 << 20
        while size:
            try:
                handle.write(bytes(size))
            except OSError:
                size //= 2


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]), sys.argv[2:])), flush=True)
