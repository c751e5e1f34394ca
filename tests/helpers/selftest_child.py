"""A child of the ladder whose rungs do what their names say: pass, fail, crash, hang, hang_with_children."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

asked = json.loads(Path(sys.argv[1]).read_text())
answers, folder = Path(asked["answers"]), Path(asked["folder"])


def tell(**said) -> None:
    with answers.open("a") as file:
        file.write(json.dumps(said) + "\n")


print("the log of", *asked["rungs"], flush=True)
(folder / f"pid-{asked['rungs'][0]}").write_text(str(os.getpid()))
for name in asked["rungs"]:
    what = name.partition("-")[0]
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        sys.exit(3)
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
        plain = subprocess.Popen(sleep)
        apart = subprocess.Popen(sleep, start_new_session=True)
        quiet = "start_new_session=True, stdout=-3, stderr=-3"
        orphan = f"import subprocess; print(subprocess.Popen({sleep!r}, {quiet}).pid)"
        left = subprocess.run([sys.executable, "-c", orphan], capture_output=True, text=True, check=True).stdout
        (folder / "children").write_text(f"{plain.pid} {apart.pid} {left}")
        time.sleep(300)
    status = {"fail": "failed", "skip": "not run"}.get(what, "passed")
    figures = {"device": "cpu", "devices": 1} if name == "environment" else {"pid": os.getpid()}
    tell(rung=name, event="end", status=status, seconds=0.0, figure="", figures=figures, why="")
    if status == "failed":
        break
