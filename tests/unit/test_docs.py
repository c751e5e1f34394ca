"""README and docs/: short, complete, and true where a program can tell."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_aqn.cli.main import app
from verl_aqn.config.compose import load_recipe, recipe_names
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.stock_settings import StockSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = PAGES | {"README.md": README}
# Keys of a config block that is called like the package.
SETTINGS = {f"verl_aqn.{field.name}" for field in fields(StockSettings)}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_names_every_page_that_a_reader_starts_from():
    missing = {name for name in PAGES if f"docs/{name}" not in README}
    # These are reached from the pages above them.
    assert missing <= {"causes.md", "config_keys.md", "environment.md", "metrics.md", "scale.md"}


def test_the_quick_start_of_the_readme_is_a_part_of_the_whole_output():
    (output,) = re.findall(r"```\n(  \d+:\d\d .*?)```", README, re.DOTALL)
    lines = output.splitlines()
    assert len(lines) == 8
    assert [line for line in lines if line not in PAGES["index.md"].splitlines()] == []
    for text in (README, PAGES["index.md"]):
        for script in ("test_mxfp4_e12_aggressive_1ep.sh", "run_tests.sh"):
            assert f"bash scripts/{script} " in text
            assert (ROOT / "scripts" / script).is_file()


def test_the_readme_names_every_recipe_and_command():
    assert [name for name in recipe_names() if f"`{name}`" not in README] == []
    told = CliRunner().invoke(app, ["--help"], terminal_width=200, env={"COLUMNS": "200"}).output
    commands = re.findall(r"^\W*(\w+)  ", told.partition("Commands")[2], re.MULTILINE)
    assert "train" in commands
    rows = README.partition("## Commands")[2].partition("## Recipes")[0]
    assert [name for name in commands if not re.search(rf"`{name}\b", rows)] == []


def test_the_reference_of_the_configuration_is_up_to_date():
    check = [sys.executable, "scripts/config_reference.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_the_configuration_page_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["configuration.md"], re.DOTALL)
    (file := tmp_path / "mine.yaml").write_text(text)
    config = load_recipe(str(file), ["profile=cpu"])
    assert parse_aqn(config).noise.unit == "rms"
    assert config.data.train_files == "/data/train.jsonl"


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    files = [*(ROOT / "verl_aqn").rglob("*.py"), *(ROOT / "scripts").glob("*.sh")]
    # The parts of a long message are strings on lines of their own.
    code = "".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in files)
    symptoms = re.findall(r"^\| (.*?) \|", PAGES["troubleshooting.md"], re.MULTILINE)
    messages = re.findall(r"`([^`]*…[^`]*)`|\"([^\"]*)\"", "\n".join(symptoms))
    parts = [part.strip() for pair in messages for part in "".join(pair).split("…")]
    known = [part for part in parts if len(part) > 7]
    assert len(known) > 10
    assert [part for part in known if part not in code] == []


def names_in(text: str) -> set[str]:
    """Dotted names of verl_aqn's in `text`."""
    return {name.rstrip(".") for name in re.findall(r"\bverl_aqn(?:\.\w+)+", text)} - SETTINGS


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines; nothing is imported."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        file = next((one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()), None)
        if file or (place.is_dir() and length == len(parts)):
            return defines(ast.parse(file.read_text(encoding="utf-8")) if file else None, parts[length:])
    return False


def defines(node: ast.AST | None, names: list[str]) -> bool:
    if not names:
        return True
    for child in getattr(node, "body", []):
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        if getattr(child, "name", None) == names[0]:
            return defines(child, names[1:])
        if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
            return len(names) == 1
    return False


@pytest.mark.parametrize("page", TEXTS)
def test_every_module_that_a_page_names_exists(page):
    assert [name for name in sorted(names_in(TEXTS[page])) if not exists(name)] == []
    paths = re.findall(r"`((?:verl_aqn|recipes|scripts|tests)/[\w./]+\.(?:py|sh|yaml|json|cpp))`", TEXTS[page])
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_test_of_names_can_fail():
    assert exists("verl_aqn.noise.schedule.SigmaSchedule.sigma")
    assert not exists("verl_aqn.noise.schedule.SigmaSchedule.tau")
    assert not exists("verl_aqn.no_such_module")


def test_twenty_questions_are_answered_by_name():
    section = PAGES["architecture.md"].partition("## Twenty questions")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 20
    assert [row for row in rows if not names_in(row)] == []


def test_the_site_builds_and_its_links_hold(tmp_path):
    """With --strict a broken link, a missing anchor, and a page that is not in the navigation are errors."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in PAGES:
        page = "index.html" if name == "index.md" else f"{name.removesuffix('.md')}/index.html"
        assert (tmp_path / "site" / page).is_file(), name
