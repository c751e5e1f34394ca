"""Preparing GSM8K from a folder, and the check of a parquet file, on our own rows in GSM8K's form."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_aqn.cache import cache_dir
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError, DataError, EnvironmentFault
from verl_aqn.preflight.prepare import find_model
from verl_aqn.preflight.run_data import prepare_data, steps_in_data
from verl_aqn.tasks import gsm8k
from verl_aqn.tasks.data_files import check_truths, count_rows
from verl_aqn.tasks.gsm8k_data import INSTRUCTION, ground_truth, prepare_gsm8k
from verl_aqn.tasks.parquet import write_parquet

ROWS = [
    {"question": "Ida has 3 hens and buys 4. How many?", "answer": "She has 3+4 = <<3+4=7>>7.\n#### 7"},
    {"question": "A barn costs $1,200. Two?", "answer": "2*1200 = <<2*1200=2400>>2400.\n#### 2,400"},
    {"question": "It was 2 below zero. How warm was it?", "answer": "#### -2"},
]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return folder


def test_rows_from_jsonl(source, tmp_path):
    paths = prepare_gsm8k(tmp_path / "out", source)
    assert {split: count_rows(path) for split, path in paths.items()} == {"train": 3, "test": 3}
    rows = pq.read_table(paths["test"]).to_pylist()
    assert [r["reward_model"]["ground_truth"] for r in rows] == ["7", "2400", "-2"]
    assert rows[0] == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{ROWS[0]['question']} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"split": "test", "index": 0, **ROWS[0]},
    }
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["test.parquet", "train.parquet"]


def test_a_recipe_takes_what_was_prepared_and_asks_no_hub(source, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_recipe("e12", ["profile=cuda"])
    with pytest.raises(DataError, match="verl-aqn data gsm8k --source"):
        prepare_data(config)
    paths = prepare_gsm8k(tmp_path / "cache/data/gsm8k", source)
    config = load_recipe("e12", ["profile=cuda"])
    assert prepare_data(config).rows == {"train": 3, "test": 3}
    assert [config.data.train_files, config.data.val_files] == [str(paths["train"]), str(paths["test"])]


def test_paths_are_on_record_as_any_other_process_would_find_them(source, tmp_path, monkeypatch):
    prepare_gsm8k(tmp_path / "data", source)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = ["profile=cpu", "actor_rollout_ref.model.path=model", "data.val_files=[data/test.parquet]"]
    config = load_recipe("e12", [*overrides, "data.train_files=data/train.parquet"])
    prepare_data(config)
    assert config.data.train_files == str(tmp_path / "data/train.parquet")
    assert list(config.data.val_files) == [str(tmp_path / "data/test.parquet")]
    assert find_model(config) == tmp_path / "model"
    monkeypatch.setenv("VERL_AQN_CACHE", "cache")
    assert cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize("key", ["train_files", "val_files"])
@pytest.mark.parametrize("value", ["null", "[]", "[null]"])
def test_no_files_are_told_by_their_key(key, value):
    config = load_recipe("e12", ["profile=cpu", f"data.{key}={value}"])
    with pytest.raises(ConfigError, match=rf"^data\.{key}=.*: give a file"):
        prepare_data(config)
    if key == "train_files":
        with pytest.raises(ConfigError, match=r"^data\.train_files="):
            steps_in_data(config)


def test_a_file_in_the_way_is_told(source, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(EnvironmentFault, match="choose another folder"):
        prepare_gsm8k(tmp_path / "taken", source)


def test_rows_from_a_hub_snapshot(tmp_path):
    (tmp_path / "main").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    assert count_rows(prepare_gsm8k(tmp_path / "out", tmp_path)["train"]) == 3


def test_a_source_that_cannot_be_used(source, tmp_path):
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        prepare_gsm8k(tmp_path / "out", tmp_path)
    (source / "train.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"train\.jsonl: not readable"):
        prepare_gsm8k(tmp_path / "out", source)
    (source / "train.jsonl").write_text(json.dumps({"question": "q"}) + "\n")
    with pytest.raises(DataError, match="GSM8K train row 0"):
        prepare_gsm8k(tmp_path / "out", source)


@pytest.mark.parametrize("content", ['[{"question": "q"}]', "", "\n"])
def test_a_source_of_another_form_is_told_before_anything_is_written(source, tmp_path, content):
    (source / "train.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"GSM8K train row 0: .* is missing|train\.jsonl.*: no rows") as caught:
        prepare_gsm8k(tmp_path / "out", source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_line_is_no_row(source, tmp_path):
    (source / "train.jsonl").write_text((source / "train.jsonl").read_text() + "\n\n")
    assert count_rows(prepare_gsm8k(tmp_path / "out", source)["train"]) == 3


@pytest.mark.parametrize("answer", ["7", "#### seven", "####7", "", "#### NaN", "#### 1/2", "#### 1_000", "#### ٧"])
def test_ground_truth_must_be_marked(answer):
    with pytest.raises(DataError, match="row 5"):
        ground_truth(answer, "row 5")


def test_check_names_what_is_wrong(source, tmp_path):
    good = prepare_gsm8k(tmp_path / "out", source)["train"]
    table, bad = pq.read_table(good), tmp_path / "bad.parquet"

    def refused(match):
        with pytest.raises(DataError, match=match) as caught:
            count_rows(bad)
        assert "\n" not in str(caught.value)

    refused("no such file")
    bad.write_bytes(b"PAR1 and then nothing")
    refused("not a readable parquet")
    pq.write_table(table.slice(0, 0), bad)
    refused("no rows")


def test_no_rows_leave_the_old_file(source, tmp_path):
    good = prepare_gsm8k(tmp_path / "out", source)["train"]
    with pytest.raises(DataError, match="no rows"):
        write_parquet([], good)
    assert count_rows(good) == 3


def with_truths(path, truths):
    """Write a copy of the good file next to `path`, with `truths` (an Arrow array) in its rows."""
    table, bad = pq.read_table(path), path.with_name("bad.parquet")
    table = pa.concat_tables([table] * len(truths)).slice(0, len(truths))
    structs = pa.StructArray.from_arrays([pa.array(["rule"] * len(truths)), truths], ["style", "ground_truth"])
    pq.write_table(table.set_column(table.schema.get_field_index("reward_model"), "reward_model", structs), bad)
    return bad


@pytest.mark.parametrize(
    "truths",
    [pa.array([1, 2, 3]), pa.array([1.5, 1e-05, 3.0]), pa.array(["1", "1e-05", "-1,234.5", "$5", "1 000"]),
     pa.array([1.0, 2.0], pa.float32()), pa.array(["1", "2"], pa.large_string()),
     pa.array(["1", "2"]).dictionary_encode()],
    ids=lambda truths: str(truths.type),
)  # fmt: skip
def test_truths_that_the_rule_can_judge(source, tmp_path, truths):
    check_truths(with_truths(prepare_gsm8k(tmp_path, source)["train"], truths))


@pytest.mark.parametrize(
    "truth", ["3/4", "7:30", "(3, 4)", "\\frac{3}{4}", "\\boxed{7}", "72 clips", "", "2 1/2", None]
)
def test_a_truth_that_the_rule_cannot_judge_is_refused_with_its_row_and_a_way(source, tmp_path, truth):
    bad = with_truths(prepare_gsm8k(tmp_path, source)["train"], pa.array(["7", "8", "7", truth, "9", truth]))
    with pytest.raises(DataError, match=r"bad\.parquet: row 3 .*math-verify") as caught:
        check_truths(bad)
    assert ("null" if truth is None else repr(truth)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "truths",
    [pa.array([1, None]), pa.array([1.0, float("nan")]), pa.array([1.0, float("inf")]), pa.array([True, False]),
     pa.array([7.0, 0.1], pa.float32()), pa.array([[1], [2]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"1", b"2"])],
    ids=lambda truths: str(truths.type),
)  # fmt: skip
def test_columns_that_hold_something_else(source, tmp_path, truths):
    with pytest.raises(DataError, match="which the rule"):
        check_truths(with_truths(prepare_gsm8k(tmp_path, source)["train"], truths))


def test_every_row_of_both_sets_is_checked_before_a_run_and_only_for_our_rule(source, tmp_path):
    good = prepare_gsm8k(tmp_path, source)["train"]
    bad = with_truths(good, pa.array(["7", "1/2"]))
    reward = tmp_path / "reward.py"
    reward.write_text("def compute_score(**told):\n    return {'score': 0.5, 'acc': 0}\n")
    ours = gsm8k.__file__
    for train, test in ((good, bad), (bad, good)):
        files = ["profile=cpu", f"data.train_files={train}", f"data.val_files={test}"]
        for same in ([], [f"reward.custom_reward_function.path={ours}"]):
            with pytest.raises(DataError, match=r"bad\.parquet: row 1"):
                prepare_data(load_recipe("e6a", [*files, *same]))
        prepare_data(load_recipe("e6a", [*files, f"reward.custom_reward_function.path={reward}"]))
