"""The tables of docs/convert.md are what `verl-aqn convert` does today."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import convert_table
from tests.helpers.convert_table import ENVIRONMENT, PAGE, converted, rows
from verl_aqn.config.convert.recipe import STATUSES, convert

LAUNCHES = Path(__file__).parents[2] / "launches"
LAUNCH = "python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=some/model"
WORDS = {"verl's default": "default", "not expanded": "unknown"}
KINDS = re.findall(
    r"^\| `([^|]*…[^|]*?)`(?:, with the argument `([^`]+)`)? \| `([^`]+)` \| (.+) \|$", PAGE.read_text(), re.M
)


def test_the_page_has_both_tables():
    text = PAGE.read_text()
    assert len(KINDS) == sum("…" in line and line.startswith("| `") for line in text.splitlines()) == 29
    assert len(rows(text)) == text.count(".sh` (") == 17
    told = {WORDS.get(word, word) for word in (re.split(r":| to ", result)[0] for *_, result in KINDS)}
    assert told == set(STATUSES)


@pytest.mark.parametrize(("script", "argument", "key", "result"), KINDS, ids=[kind[0] for kind in KINDS])
def test_each_kind_becomes_what_the_page_says(script, argument, key, result, tmp_path):
    (file := tmp_path / "run.sh").write_text(script.replace("; ", "\n").replace("…", LAUNCH) + "\n")
    made = convert([str(file), *filter(None, [argument])], ENVIRONMENT)
    (one,) = [setting for setting in made.settings if setting.key == key]
    said = re.fullmatch(r"([\w' ]+?)(?: to `(.+?)`)?: (.+)", result)
    assert said
    word, to, rest = said.groups()
    assert (one.status, one.to) == (WORDS.get(word, word), to or one.to)
    if one.status in ("kept", "renamed", "default"):
        value = rest.strip("`")
        assert json.dumps(one.value).strip('"') == (value if value != "3.0e-06" else "3e-06")
    else:
        assert one.why.startswith(rest)


@pytest.mark.parametrize(
    ("launch", "counts", "refused", "notes"),
    [
        ("plain_grpo.sh", (7, 0, 5, 19, 0, 0), [], ["the launch trains all"]),
        ("npu_ppo.sh", (5, 3, 4, 24, 2, 0), ["actor.ppo_micro_batch_size_per_gpu", "log_prob_micro_batch_size_per_gpu"],
         ["the launch trains all"]),
        ("dapo_overlong.sh", (6, 2, 6, 14, 1, 2), ["max_position_embeddings"], ["the launch trains all"]),
        ("sglang_multiturn.sh", (6, 0, 3, 20, 3, 1), ["rollout.name", "multi_stage_wake_up", "over_sample_rate"],
         ["line 5: the settings of", "the launch trains all"]),
        ("ppo_megatron.sh", (9, 1, 4, 21, 3, 0), ["use_pf_ppo", "megatron.tensor_model_parallel_size", "rollout.name"],
         ["line 3: the settings of", "the launch trains all"]),
        ("grpo_lora.sh", (15, 6, 10, 10, 3, 2), ["model_dtype", "model.use_liger", "trainer.no_such_key"], []),
    ],
)  # fmt: skip
def test_a_launch_in_the_manner_of_verl_s_is_counted(launch, counts, refused, notes):
    made = converted((LAUNCHES / launch).read_text(), launch)
    assert tuple(len(made.having(status)) for status in STATUSES) == counts
    assert all(one.key.endswith(end) for one, end in zip(made.having("refused"), refused, strict=True))
    assert [note[: len(start)] for note, start in zip(made.notes, notes, strict=True)] == notes


@pytest.fixture
def clone(tmp_path):
    """A repository with one script, and a page whose row has wrong counts."""
    (tmp_path / "run.sh").write_text((LAUNCHES / "plain_grpo.sh").read_text())
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "run.sh"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    page = tmp_path / "page.md"
    page.write_text(f"text\n| `run.sh` (plain) | `{commit}` | 8 | 0 | 5 | 19 | 0 | 0 | passes |\nmore\n")
    return tmp_path


def test_a_wrong_count_is_shown_and_corrected(clone, monkeypatch, capsys):
    monkeypatch.setattr(convert_table, "PAGE", page := clone / "page.md")
    before = page.read_text()
    assert convert_table.main([str(clone)]) == 1
    wrong, right = capsys.readouterr().out.splitlines()
    assert " | 8 | 0 | 5 | 19 | 0 | 0 | passes |" in wrong
    assert " | 7 | 0 | 5 | 19 | 0 | 0 | passes |" in right
    assert page.read_text() == before
    assert convert_table.main([str(clone), "--write"]) == 0
    assert page.read_text() == before.replace("| 8 |", "| 7 |")
    assert convert_table.main([str(clone)]) == 0
    with pytest.raises(subprocess.CalledProcessError):
        convert_table.from_clone(clone)(rows(before.replace("run.sh", "other.sh"))[0])
