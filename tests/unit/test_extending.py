"""The worked examples of docs/extending.md: their changes are made in a copy of the package, and their code is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.preflight.reward_function import reward_of, settle_reward
from verl_aqn.preflight.run_data import prepare_data

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
WITH_CHANGES = [name for name, text in SECTIONS.items() if "```diff" in text]
FAIL = """
import runpy, sys
for script in sys.argv[1:]:
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        print(script, "failed", flush=True)
"""


def file_of(title: str, root: Path) -> Path:
    """The file of a block's title: a module's dotted name, or a path."""
    return root / (title if "/" in title else title.replace(".", "/") + ".py")


def changed(text: str, diff: str) -> str:
    """`text` with a block's change: its lines with a blank or minus, found once, become those with a blank or plus."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "-", "+") for line in lines), diff
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
    assert text.count(before) == 1, f"not there once:\n{before}"
    return text.replace(before, after)


def test_a_change_is_made_once_or_not_at_all():
    assert changed("a\nb\n", "-a\n+c\n b\n") == "c\nb\n"
    assert changed("a\n\nb\n", " a\n\n+c\n b\n") == "a\n\nc\nb\n"
    for text in ("b\n", "a\na\n"):
        with pytest.raises(AssertionError):
            changed(text, "-a\n+c\n")


def test_there_is_an_example_of_everything():
    assert list(SECTIONS) == ["A unit of σ", "A noise target", "A scale rule", "A model family", "A task"]
    assert list(SECTIONS)[:-1] == WITH_CHANGES


@pytest.mark.parametrize("section", WITH_CHANGES)
def test_the_example_works(section, tmp_path):
    copy, script = tmp_path / "copy", tmp_path / "check.py"
    shutil.copytree(ROOT / "verl_aqn", copy / "verl_aqn")
    (copy / "recipes").symlink_to(ROOT / "recipes")
    blocks = BLOCK.findall(SECTIONS[section])
    for kind, title, text in blocks:
        if kind == "diff":
            file = file_of(title, copy)
            file.write_text(changed(file.read_text(encoding="utf-8"), text), encoding="utf-8")
    (code,) = [text for kind, title, text in blocks if (kind, title) == ("python", "")]
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"VERL_AQN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_examples_fail_without_their_changes(tmp_path):
    """In one process, which imports torch only once."""
    for number, section in enumerate(WITH_CHANGES):
        (code,) = [text for kind, title, text in BLOCK.findall(SECTIONS[section]) if (kind, title) == ("python", "")]
        (tmp_path / f"{number}.py").write_text(code, encoding="utf-8")
    environment = os.environ | {"VERL_AQN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FAIL, *(f"{number}.py" for number in range(len(WITH_CHANGES)))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{number}.py failed" for number in range(len(WITH_CHANGES))], done.stderr


def test_the_task_is_taken_and_scores_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, title, text in BLOCK.findall(SECTIONS["A task"]):
        if title:
            Path(title).write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "make_data.py"], check=True)
    config = load_recipe("./sort_digits.yaml", ["profile=cpu"])
    assert parse_aqn(config).noise.unit == "rms"
    settle_reward(config)
    assert prepare_data(config).rows == {"train": 64, "test": 16}
    score = reward_of(config)
    for text, expected, right in (("1 2 3", 1.0, 1), ("[1, 3, 2]", 1 / 3, 0), ("none", 0.0, 0)):
        found = score(data_source="a", solution_str=text, ground_truth="123", extra_info={})
        assert found == {"score": pytest.approx(expected), "acc": right}
