"""The steps of our Dockerfiles as `tests.helpers.image_steps` carries them out, without carrying them out."""

import json
from pathlib import Path

import pytest

from tests.helpers import clean_root, image_steps
from tests.helpers.clean_root import Root, temporary_folder
from tests.helpers.dockerfiles import SYSTEM_PATH, Step, Unknown, steps

FOLDER = image_steps.ROOT / "scripts" / "containers"
TEXT = """\
# a comment
ARG BASE=debian:12.1
FROM ${BASE}
RUN apt-get update \\
    # a comment between the lines
    && useradd aqn
USER 1001
WORKDIR /home/aqn
WORKDIR src
ARG COMMIT=""
ENV PATH=/home/aqn/bin:$PATH NOTE="two words"
COPY --chown=aqn:aqn . .
RUN echo $HOME $COMMIT
USER root
RUN true
ENTRYPOINT ["a"]
CMD ["b", "c d"]
"""


def test_each_step_has_the_user_the_folder_and_the_environment_in_force():
    first, update, user, _, work, arg, _, copy, echo, _, last, _, _, start = steps(TEXT)[1:]
    assert (first.name, first.text) == ("FROM", "debian:12.1")
    assert (update.line, update.text) == (4, "apt-get update && useradd aqn")
    assert (update.user, update.folder, dict(update.environment)) == ("root", "/", {"PATH": SYSTEM_PATH})
    assert user.user == arg.user == copy.user == echo.user == "1001"
    assert work.folder == copy.folder == "/home/aqn/src"
    assert (copy.owner, copy.text) == ("aqn:aqn", ". .")
    assert echo.text == "echo $HOME $COMMIT"  # the shell replaces these
    assert dict(echo.environment) == {"PATH": f"/home/aqn/bin:{SYSTEM_PATH}", "NOTE": "two words", "COMMIT": ""}
    assert last.user == start.user == "root"
    assert start.command == ("a", "b", "c d")
    assert "COMMIT" not in dict(start.environment)  # an ARG ends with the build


def test_a_build_argument_replaces_the_default():
    assert steps(TEXT, {"BASE": "debian:13"})[1].text == "debian:13"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ADD . /x", "line 2: ADD is not one of"),
        ("run true", "line 2: run is not one of"),
        ("RUN --mount=type=cache,target=/x true", "RUN with flags"),
        ('RUN ["true"]', "RUN with flags, as a list"),
        ("RUN <<END", "here-document"),
        ("COPY --from=build /a /b", "COPY --from is not known"),
        ("COPY *.py /b", "plain sources"),
        ("USER a:b", "USER with a group"),
        ("ENV A B", "ENV without ="),
        ("ENV A=${B:-c}", "has no value here"),
        ("WORKDIR $NOWHERE", r"\\$NOWHERE has no value here"),
        ("ARG A", "needs one name and a value"),
        ("CMD verl-aqn doctor", "must be a list of strings"),
        ("FROM debian AS two", "more than one stage"),
        ("RUN true \\", "the file ends inside"),
        ("# escape=`", "a parser directive"),
    ],
)
def test_what_is_not_known_is_refused(line, why):
    with pytest.raises(Unknown, match=why.replace("\\\\", "\\")):
        steps(f"FROM debian:12.1\n{line}\n")


def test_nothing_comes_before_from():
    for text in ("RUN true\nFROM debian:12.1", "USER a", ""):
        with pytest.raises(Unknown, match=r"before FROM|no FROM"):
            steps(text)


@pytest.mark.parametrize("image", image_steps.IMAGES)
def test_our_images_are_understood_and_end_as_a_user_without_rights(image):
    found = steps((FOLDER / f"Dockerfile.{image}").read_text())
    assert found[-1].name == "START"
    assert found[-1].user == "1001"
    assert found[-1].command == ("verl-aqn", "doctor")
    made = [step for step in found if step.name == "RUN" and "useradd" in step.text]
    assert made[0].user == "root"
    assert all(step.owner == "aqn:aqn" for step in found if step.name == "COPY")


def test_a_folder_that_the_user_builds_in_is_made_by_root_for_that_user():
    """Some builders give WORKDIR's folder to root: `python -m venv .venv` was refused there."""
    found = steps((FOLDER / "Dockerfile.cpu").read_text())
    (build,) = [step for step in found if "setup.sh" in step.text]
    assert any(f"install -d -o aqn -g aqn {build.folder}" in step.text for step in found if step.user == "root")


class FakeRoot(Root):
    """A root folder without mounts, in which commands only print what they are."""

    def __init__(self, path: Path, codes: dict[str, int]):
        self.path, self.codes, self.ran = path, codes, []
        (path / "etc").mkdir(parents=True)
        (path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\naqn:x:1001:1002::/home/aqn:/bin/sh\n")
        (path / "etc/group").write_text("root:x:0:\naqn:x:1002:\nHwHiAiUser:x:1000:aqn\n")

    def run(self, command, user, folder, environment, seconds):
        self.ran.append((command[-1], user, folder))
        code = self.codes.get(command[-1], 0)
        return clean_root.subprocess.CompletedProcess(command, code, f"said by {command[-1]}\n")

    def stand_in(self, packages):
        self.packages = packages

    def installed(self, names):
        return {name: self.packages[name] for name in names}


def carried_out(tmp_path: Path, text: str, image: str = "cpu", **codes: int) -> tuple[list[image_steps.Row], FakeRoot]:
    context = tmp_path / "context"
    (context / "scripts/containers").mkdir(parents=True)
    (context / f"scripts/containers/Dockerfile.{image}").write_text(text)
    root = FakeRoot(tmp_path / "root", codes)
    return list(image_steps.carry_out(image, root, context)), root


def test_commands_run_in_order_as_the_user_and_where_docker_runs_them(tmp_path):
    text = 'FROM a:1.1\nRUN one\nUSER 1001\nWORKDIR /home/aqn\nRUN two\nCMD ["three"]\n'
    rows, root = carried_out(tmp_path, text)
    assert root.ran == [("one", "root", "/"), ("two", "1001", "/home/aqn"), ("three", "1001", "/home/aqn")]
    assert [row.result for row in rows] == ["in part", "ran", "ran", "ran", "ran", "ran", "ran"]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6, 0]


def test_a_failed_step_is_the_last_and_says_why(tmp_path):
    rows, root = carried_out(tmp_path, 'FROM a:1.1\nRUN one\nRUN two\nCMD ["three"]\n', one=3)
    assert (rows[-1].step, rows[-1].result, rows[-1].note) == ("RUN one", "failed", "exit code 3: said by one")
    assert len(root.ran) == 1
    assert "| failed | 0 | exit code 3: said by one |" in image_steps.table(rows)
    assert json.loads(json.dumps([vars(row) for row in rows]))[-1]["line"] == 2


def test_what_needs_the_base_image_is_tried_in_part(tmp_path, monkeypatch):
    text = 'FROM a:1.1\nRUN pip install x\nCMD ["verl-aqn", "doctor"]\n'
    rows, root = carried_out(tmp_path / "one", text, "npu")
    assert [row.result for row in rows] == ["in part", "in part", "ran", "in part"]
    assert "empty torch 2.10.0, torch_npu" in rows[0].note
    assert "verl-aqn --help ran" in rows[-1].note
    assert root.ran[-1][0] == "--help"
    monkeypatch.setattr(FakeRoot, "installed", lambda root, names: {"torch": "9"})
    rows, _ = carried_out(tmp_path / "two", text, "npu")
    assert (rows[-1].result, rows[-1].note) == ("failed", "the base image's packages were replaced: {'torch': '9'}")


def test_a_user_has_the_groups_that_the_image_gives_it(tmp_path):
    root = FakeRoot(tmp_path / "root", {})
    assert root.identity("1001") == root.identity("aqn") == (1001, [1002, 1000], "/home/aqn")
    assert root.identity("7") == (7, [0], "/")
    assert root.group("HwHiAiUser") == 1000
    with pytest.raises(RuntimeError, match="no user other"):
        root.identity("other")


def test_the_base_images_packages_have_the_locked_versions():
    assert image_steps.pinned("requirements-npu.lock", ("torch_npu", "vllm")) == {
        "torch_npu": "2.10.0.post4",
        "vllm": "0.23.0",
    }


def test_the_folder_is_removed_after_a_failure():
    made = []

    def fail() -> None:
        with temporary_folder() as folder:
            made.append(folder)
            (folder / "file").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not made[0].exists()


def test_a_folder_with_a_mount_is_never_removed(monkeypatch):
    kept = temporary_folder()
    folder = kept.__enter__()
    with monkeypatch.context() as change:
        change.setattr(Path, "read_text", lambda path: f"1 2 3:4 / {folder}/opt rw - ext4 disk rw\n")
        with pytest.raises(RuntimeError, match="something is mounted"):
            kept.__exit__(None, None, None)
    folder.rmdir()


def test_without_its_namespace_nothing_is_mounted(tmp_path, monkeypatch):
    monkeypatch.delenv(clean_root.INSIDE, raising=False)
    with pytest.raises(AssertionError, match="would mount on the machine itself"):
        Root(tmp_path)


def test_a_copy_belongs_to_whom_the_step_says(tmp_path, monkeypatch):
    owners = []
    real = image_steps.subprocess.run

    def run(command, **options):
        if command[0] == "chown":
            owners.append(command[2])
            return None
        return real(command, **options)

    monkeypatch.setattr(image_steps.subprocess, "run", run)
    (tmp_path / "context/a").mkdir(parents=True)
    (tmp_path / "context/a/file").write_text("1")
    root = FakeRoot(tmp_path / "root", {})
    for owner in ("aqn:aqn", ""):
        image_steps._copy(Step(1, "COPY", "a sub/", "1001", "/home", owner=owner), root, tmp_path / "context")
    assert (tmp_path / "root/home/sub/file").read_text() == "1"
    assert owners == ["1001:1002", "0:0"]
