"""A run on data as users have them: two files with different forms and data sources, and another prompt key."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.integration.conftest import finish
from verl_aqn.runs.folder import RunFolder


def rows(source, count):
    """Return rows without `extra_info`."""
    return [
        {
            "data_source": source,
            "chat": [{"role": "user", "content": f"What is {number} + {number}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * number)},
        }
        for number in range(count)
    ]


def test_json_lines_and_parquet_of_two_sources_with_accuracy_by_source(train, tmp_path):
    sums, words, val = tmp_path / "sums.jsonl", tmp_path / "words.parquet", tmp_path / "val.parquet"
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows("sums", 8)), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows("words", 8)), words)
    table = pa.Table.from_pylist(rows("sums", 3) + rows("words", 1))
    large = pa.large_list(table.schema.field("chat").type.value_type)  # as polars writes
    pq.write_table(table.set_column(1, "chat", table["chat"].cast(large)), val)
    process = train(
        tmp_path / "runs", f"data.train_files=[{sums},{words}]", f"data.val_files={val}", "data.prompt_key=chat",
        "trainer.total_training_steps=2", "aqn.noise.num_stages=2", "trainer.save_freq=-1", "aqn.noise.probe=true",
    )  # fmt: skip
    path, _ = finish(process, tmp_path / "runs")
    run = RunFolder(path)
    *_, last = run.by_step("metrics.jsonl", "validation").values()
    assert {source: found["items"] for source, found in last["by_source"].items()} == {"sums": 3, "words": 1}
    right = sum(found["items"] * found["accuracy"] for found in last["by_source"].values())
    assert right == 4 * last["accuracy"]
    told = {record["set"]: record for record in run.read("events.jsonl") if record["kind"] == "rows"}
    assert (told["train"]["files"], told["train"]["kept"], told["val"]["kept"]) == (16, 16, 4)
    assert set(run.block("versions.json")["data"]) == {"sums.jsonl", "words.parquet", "val.parquet"}
