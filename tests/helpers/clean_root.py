"""A folder with a new Debian, in which commands run as in a container: `chroot` in a mount and process namespace.

The packages come from the mirror that this machine's apt uses, and pip inside is configured like pip here. All mounts
are made in the namespace and end with its last process, so the folder can be removed afterwards.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PASSED = re.compile(r"(PIP|UV)_\w+|\w+_proxy|\w+_PROXY|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_PYTHON = ("ca-certificates", "netbase", "tzdata", "python3", "python3-pip", "python3-venv", "libpython3-dev")
INSIDE = "VERL_AQN_CLEAN_ROOT"  # the temporary folder, set inside the namespace


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder and remove it afterwards, also after a failure.

    Raises RuntimeError instead if something is mounted in the folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="verl-aqn-root-"))
    try:
        yield folder
    finally:
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        if inside := [place for place in mounted if Path(place).is_relative_to(folder)]:
            raise RuntimeError(f"{folder} is not removed, because something is mounted in it: {inside}")
        shutil.rmtree(folder)


def in_namespace(folder: Path, module: str, *arguments: str) -> subprocess.Popen:
    """Start `python -m module` with its own mounts and processes. When it ends, both end with it."""
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    command += [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=os.environ | {INSIDE: str(folder)}, stdout=subprocess.PIPE, text=True)


def mirror() -> str:
    """Return the address of the Debian mirror that apt uses here."""
    targets = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"]
    found = [line.split()[1] for line in _output(targets).splitlines() if line.startswith("Debian ")]
    if not found:
        raise RuntimeError("apt here knows no Debian mirror: run apt-get update on a Debian machine")
    return found[0]


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_debian(root: Path, release: str) -> None:
    """Install Debian with its Python 3 in `root`. Python is set up like the one of a Python image."""
    include = f"--include={','.join(_PYTHON)}"
    command = ["debootstrap", "--variant=minbase", include, release, str(root), mirror()]
    subprocess.run(command, check=True, stdout=sys.stderr)
    settings = _output(["apt-config", "dump", "Acquire"])
    (root / "etc/apt/apt.conf.d/90machine").write_text(settings)
    for marker in root.glob("usr/lib/python3.*/EXTERNALLY-MANAGED"):
        marker.unlink()  # Debian's refusal to let pip install; the images' own Python has none
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for path in (root / "var/cache/apt/archives").glob("*.deb"):
        path.unlink()
    shutil.rmtree(root / "var/lib/apt/lists")
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)


class Root:
    """A prepared root folder with its mounts, in which commands run. Only for use inside the namespace."""

    def __init__(self, path: Path):
        assert INSIDE in os.environ, "this process would mount on the machine itself"
        self.path = path
        self.passed = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", path / "etc" / name)
        self._mount("-t", "proc", "proc", to="proc")
        self._mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", to="dev")
        for name in _DEVICES:
            self._bind(Path("/dev") / name, read_only=False)
        for name, target in {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
            (path / "dev" / name).symlink_to(f"/proc/self/{target}")
        (path / "dev/shm").mkdir()
        self._mount("-t", "tmpfs", "-o", "mode=1777,size=64m", "tmpfs", to="dev/shm")  # the size that Docker gives
        self._configure_pip()

    def _mount(self, *arguments: str, to: str) -> None:
        subprocess.run(["mount", *arguments, str(self.path / to)], check=True)

    def _bind(self, source: Path, *, read_only: bool = True) -> None:
        target = self.path / source.relative_to("/")
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        subprocess.run(["mount", "--bind", str(source), str(target)], check=True)
        if read_only:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)

    def _configure_pip(self) -> None:
        """Give pip and uv this machine's settings, and the files and folders that these name."""
        listed = _output([sys.executable, "-m", "pip", "config", "list"])
        settings = dict(re.findall(r"^global\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
        text = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (self.path / "etc/pip.conf").write_text(f"[global]\n{text}")
        named = [word for value in (*settings.values(), *self.passed.values()) for word in value.split()]
        places = set()
        for word in named:
            if word.startswith("file://"):
                places.add(Path(word.removeprefix("file://")).parent)  # an index names files beside its own folder
            elif word.startswith("/") and Path(word) != Path("/etc/ssl/certs"):
                places.add(Path(word))
        for place in sorted(one for one in places if one.exists()):
            self._bind(place)

    def _entries(self, file: str) -> list[list[str]]:
        return [line.split(":") for line in (self.path / "etc" / file).read_text().splitlines()]

    def identity(self, user: str) -> tuple[int, list[int], str]:
        """Return user id, group ids and home folder of a user of this root, as Docker finds them."""
        for name, _, uid, gid, _, home, _ in self._entries("passwd"):
            if user in (name, uid):
                more = [int(group[2]) for group in self._entries("group") if name in group[3].split(",")]
                return int(uid), [int(gid), *more], home
        if user.isdigit():
            return int(user), [0], "/"
        raise RuntimeError(f"no user {user} in {self.path}/etc/passwd")

    def group(self, name: str) -> int:
        """Return the id of a group of this root."""
        (found,) = [int(group[2]) for group in self._entries("group") if name in (group[0], group[2])]
        return found

    def run(
        self, command: list[str], user: str, folder: str, environment: dict[str, str], seconds: int
    ) -> subprocess.CompletedProcess:
        """Run a command in the root as `user`. The result holds its output, stderr included."""
        uid, groups, home = self.identity(user)
        settings = {"HOME": home, "HOSTNAME": "build", **self.passed, **environment}
        inside = ["env", "-i", "-C", folder, *(f"{key}={value}" for key, value in settings.items()), *command]
        enter = [
            "chroot",
            f"--userspec={uid}:{groups[0]}",
            f"--groups={','.join(map(str, groups))}",
            str(self.path),
            *inside,
        ]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        try:
            return subprocess.run(enter, check=False, text=True, errors="replace", timeout=seconds, **pipes)
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            return subprocess.CompletedProcess(enter, 124, f"{said}\nstopped after {seconds} s")

    def stand_in(self, packages: dict[str, str]) -> None:
        """Register packages without files, so that pip takes them as installed."""
        (site,) = [
            Path(one)
            for one in json.loads(self._python("import json, site; print(json.dumps(site.getsitepackages()[:1]))"))
        ]
        for name, version in packages.items():
            folder = self.path / site.relative_to("/") / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (folder / "INSTALLER").write_text("the base image\n")
            (folder / "RECORD").write_text("")

    def installed(self, names: list[str]) -> dict[str, str]:
        """Return the versions of these packages in the root's Python."""
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
        return json.loads(self._python(code))

    def _python(self, code: str) -> str:
        done = self.run(["python3", "-c", code], "root", "/", {"PATH": os.defpath}, 60)
        assert done.returncode == 0, done.stdout
        return done.stdout
