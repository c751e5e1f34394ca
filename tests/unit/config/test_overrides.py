"""Overrides as a user types them: for those that Hydra cannot read, the message shows the needed quotes."""

import shlex

import pytest

from verl_aqn.config import compose as config
from verl_aqn.config.compose import find_recipe, load_recipe, read_yaml
from verl_aqn.config.overrides import check_overrides
from verl_aqn.errors import ConfigError

RECIPE = "defaults: [base, _self_]\naqn:\n  seed: 3\ntrainer:\n  project_name: grün σ\n"


@pytest.mark.parametrize("value", ["/tmp/a=b", "/tmp/a b (c)", "é", "x{1}", "a#b", "~/runs", "it's", 'say "so"'])
def test_a_value_that_wants_quotes_is_shown_with_them(value):
    with pytest.raises(ConfigError) as error:
        check_overrides(["data.seed=1", f"aqn.run.dir={value}"])
    text = str(error.value)
    assert text.startswith(f"aqn.run.dir={value}")
    assert "\n" not in text
    (written,) = shlex.split(text.rpartition("write ")[2])
    check_overrides([written])
    assert load_recipe("e12", ["profile=cpu", written]).aqn.run.dir == value


def test_several_values_are_a_list_or_want_quotes():
    with pytest.raises(ConfigError) as error:
        check_overrides(["aqn.run.dir=a,b"])
    text = "aqn.run.dir=a,b contains several values: write 'aqn.run.dir=[a,b]' for a list, or 'aqn.run.dir=\"a,b\"'"
    assert str(error.value) == text


@pytest.mark.parametrize("override", ["a=/tmp/x y", "a=b:c", "+a=[1,2]", "a=null", "~a", "a=10%", "a='b=c'", "a="])
def test_what_hydra_reads_is_left_to_it(override):
    check_overrides([override])


@pytest.mark.parametrize(
    ("start", "ending"), [(b"\xef\xbb\xbf", "\n"), (b"\xef\xbb\xbf# a comment\n", "\r\n"), (b"", "\r\n")]
)
def test_a_recipe_of_an_editor_that_marks_utf_8(tmp_path, start, ending):
    file = tmp_path / "a=b (c),[d] ü.yaml"
    file.write_bytes(start + RECIPE.replace("\n", ending).encode())
    loaded = load_recipe(str(file), ["profile=cpu"])
    assert (loaded.aqn.seed, loaded.trainer.project_name) == (3, "grün σ")


@pytest.mark.parametrize("encoding", ["utf-16", "iso8859-7"])
def test_a_recipe_in_another_encoding_is_told_so(tmp_path, encoding):
    (tmp_path / "r.yaml").write_bytes(RECIPE.replace("ü", "u").encode(encoding))
    with pytest.raises(ConfigError, match=r"is not UTF-8 .*: save it as UTF-8"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_the_locale_does_not_say_how_a_recipe_is_read(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1")
    assert read_yaml(tmp_path / "r.yaml")["trainer"]["project_name"] == "grün σ"


def test_an_installation_in_a_folder_with_a_difficult_name(tmp_path, monkeypatch):
    folder = tmp_path / 'a, b=[c] "d" (e)' / "recipes"
    folder.mkdir(parents=True)
    for name in ("base", "e12"):
        (folder / f"{name}.yaml").write_bytes(find_recipe(name).read_bytes())
    monkeypatch.setattr(config, "recipe_dirs", lambda: [folder])
    assert find_recipe("e12").parent == folder
    assert load_recipe("e12", ["profile=cpu"]).aqn.noise.enabled
