"""Rows that verl leaves out of the data, and responses that fail within its worker, as we report them."""

import asyncio
import json

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import create_rl_dataset
from verl.utils.dataset.rl_dataset import RLHFDataset

from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import DataError, ProcessFault, RewardError
from verl_aqn.integrations.verl.failures import FILE, NotingFailures, answered, failure_text, refuse_failures
from verl_aqn.integrations.verl.left_out_rows import Rows, ToldDataset, rows_of, told_rows
from verl_aqn.runs.folder import RunFolder
from verl_aqn.tasks.parquet import write_parquet
from verl_aqn.tasks.smollm2 import tiny_model
from verl_aqn.tasks.word_problems import SOURCE, prompt, row

N = 40
LONG, BROKEN = (7, 11, 23), (5, 31)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    # As in templates that require alternating turns.
    found.chat_template = (
        "{%- if messages[-1]['content'] == 'broken' -%}{{ raise_exception('no such turn') }}{%- endif -%}"
        + found.chat_template
    )
    return found


def write(path, long=LONG, broken=BROKEN, n=N):
    rows = []
    for number in range(n):
        text = "broken" if number in broken else "word " * 900 if number in long else f"{number} + 1?"
        rows.append(row(SOURCE, prompt(text), "1", split="train", index=number, question=text, answer="#### 1"))
    return str(write_parquet(rows, path))


def made(tokenizer, files, cache, max_samples=-1, **settings):
    data = {"cache_dir": str(cache), "max_prompt_length": 512, "filter_overlong_prompts_workers": 1, "seed": 3}
    config = OmegaConf.create({"data": data | {"custom_cls": {"path": None, "name": None}} | settings})
    before = OmegaConf.to_container(config)
    with told_rows(config):
        dataset = create_rl_dataset(files, config.data, tokenizer, None, max_samples=max_samples)
    assert OmegaConf.to_container(config) == before, "a class of ours is nobody else's business"
    return dataset


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_that_verl_leaves_out_are_counted_by_reason_with_an_example_in_one_pass(
    tokenizer, tmp_path, workers, capfd
):
    file = write(tmp_path / "train.parquet")
    dataset = made(tokenizer, file, tmp_path, filter_overlong_prompts_workers=workers)
    rows = dataset.rows
    assert (rows.files, rows.drawn, rows.kept, rows.too_long, rows.failed) == (N, N, N - 5, 3, 2)
    assert rows.failed_example.startswith("row 5: TemplateError: no such turn")
    assert rows.too_long_example.startswith("row 7: ")
    assert rows.too_long_example.endswith("tokens of at most 512")
    assert capfd.readouterr().out.count("Error processing one of the samples") == 2
    # verl itself keeps the same rows.
    stock = RLHFDataset(file, tokenizer, dataset.config)
    assert [one["index"] for one in dataset.dataframe["extra_info"]] == [
        one["index"] for one in stock.dataframe["extra_info"]
    ]
    assert dataset.max_prompt_length == 512
    assert type(dataset.max_prompt_length) is int
    assert "3 too long (row 7: " in rows.text
    assert "2 that cannot be rendered (row 5: TemplateError: no such turn" in rows.text


def test_a_row_is_named_by_file_and_number_or_as_drawn(tokenizer, tmp_path):
    files = [write(tmp_path / "a.parquet", (), (), 10), write(tmp_path / "b.parquet", (3,), (4,), 10)]
    rows = made(tokenizer, files, tmp_path).rows
    assert rows.too_long_example.startswith(f"row 3 of {files[1]}: ")
    assert rows.failed_example.startswith(f"row 4 of {files[1]}: ")
    some = made(tokenizer, files, tmp_path, max_samples=14).rows
    assert (some.files, some.drawn, some.kept, some.too_long) == (20, 14, 13, 1)
    assert "14 drawn (max_samples)" in some.text
    drawn = made(tokenizer, files, tmp_path, max_samples=19, shuffle=True).rows
    assert "of those drawn: " in drawn.too_long_example + drawn.failed_example


def test_a_row_of_exactly_the_limit_is_kept_and_nothing_is_left_out_unasked(tokenizer, tmp_path):
    file = write(tmp_path / "a.parquet", (), (), 4)
    length = len(tokenizer.apply_chat_template(prompt("0 + 1?"), add_generation_prompt=True, return_dict=False))
    assert made(tokenizer, file, tmp_path, max_prompt_length=length).rows.kept == 4
    assert made(tokenizer, file, tmp_path, max_prompt_length=length - 1).rows == Rows(
        4, 4, 0, 4, 0, f"row 0: {length} tokens of at most {length - 1}"
    )
    unfiltered = {"filter_overlong_prompts": False, "truncation": "left"}
    whole = made(tokenizer, write(tmp_path / "b.parquet"), tmp_path, **unfiltered)
    assert (len(whole), whole.rows) == (N, Rows(N, N, N))


def test_a_prompt_that_is_too_long_is_an_error_where_it_is_neither_left_out_nor_cut_on_purpose(tokenizer, tmp_path):
    """verl would cut off the beginning of it, whatever data.truncation says."""
    asked = {"filter_overlong_prompts": False, "truncation": "error"}
    file = write(tmp_path / "a.parquet", LONG, ())
    with pytest.raises(DataError) as caught:
        made(tokenizer, file, tmp_path, **asked)
    assert str(caught.value).startswith(f"{file}: {N} rows, 3 too long (row 7: ")
    assert "tokens of at most 512): set data.filter_overlong_prompts=true to leave such rows out" in str(caught.value)
    short = made(tokenizer, write(tmp_path / "b.parquet", (), ()), tmp_path, **asked)
    assert (len(short), short.rows, short.filter_overlong_prompts) == (N, Rows(N, N, N), False)


def test_a_resumed_loader_reads_the_same_rows(tokenizer, tmp_path):
    dataset = made(tokenizer, write(tmp_path / "a.parquet"), tmp_path)
    before = dataset.rows
    dataset.resume_dataset_state()
    assert (dataset.rows, len(dataset)) == (before, N - 5)


def test_a_data_set_of_the_user_s_own_is_left_alone(tokenizer, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n\n\nclass Own(RLHFDataset):\n"
        "    def maybe_filter_out_long_prompts(self, dataframe=None):\n        return dataframe.select(range(9))\n"
    )
    file = write(tmp_path / "a.parquet")
    dataset = made(tokenizer, file, tmp_path, custom_cls={"path": str(own), "name": "Own"})
    assert not isinstance(dataset, ToldDataset)
    rows = rows_of(dataset, [file])
    assert rows == Rows(N, N, 9)
    assert rows.text == "40 rows, 31 left out by the data set's class, 9 kept"


def test_the_trainer_tells_of_both_sets_and_warns_of_rows_that_cannot_be_rendered(tokenizer, tmp_path):
    from verl_aqn.integrations.verl.trainer import AqnTrainer

    trainer = AqnTrainer.__new__(AqnTrainer)
    files = {"train_files": write(tmp_path / "a.parquet", LONG, ()), "val_files": write(tmp_path / "b.parquet")}
    trainer.config, trainer.folder = OmegaConf.create({"data": files}), RunFolder(tmp_path)
    trainer.train_dataset, trainer.val_dataset = (made(tokenizer, file, tmp_path) for file in files.values())
    trainer.tell_rows()
    train, said, val, warned = trainer.folder.read("events.jsonl")
    assert (train["kind"], train["set"], train["kept"], train["too_long"]) == ("rows", "train", N - 3, 3)
    assert (val["set"], val["kept"], val["failed"]) == ("val", N - 5, 2)
    assert said["kind"] == "phase"
    assert said["text"].startswith("training data: 40 rows, 3 too long (row 7: ")
    assert warned["kind"] == "warning"
    assert "validation data: 40 rows, 3 too long" in warned["text"]


def test_the_reason_of_a_session_that_fails_is_on_record_and_told(tmp_path):
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    plain = AgentLoopWorkerTQ.__ray_actor_class__
    assert "_run_agent_loop" in dir(plain), "verl's seam"

    class Failing:
        async def _run_agent_loop(self, sampling_params, trajectory, *, agent_name, trace=True, **kwargs):
            if kwargs["session_id"] == 2:
                return "fine"
            raise ValueError(f"no float: {kwargs['uid'][:1]}\nand more")

    class Both(NotingFailures, Failing):
        config = load_recipe("e6a", ["profile=cpu"])

    Both.config.trainer.default_local_dir = str(tmp_path / "checkpoints")
    worker = Both()

    def run(uid, session, validate, step=3):
        return asyncio.run(
            worker._run_agent_loop(
                {},
                {"step": step, "validate": validate},
                agent_name="a",
                uid=uid,
                session_id=session,
                aqn_prompt="17+1",
                raw_prompt=[{"role": "user", "content": "How\n many?"}],
            )
        )

    assert run("a-1", 2, True) == "fine"
    for uid, session, validate in (("a-1", 0, True), ("a-2", 1, True), ("b-1", 0, True), ("c-1", 0, False)):
        with pytest.raises(ValueError, match="no float"):
            run(uid, session, validate)
    records = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert records[0] == {
        "set": "val", "step": 3, "attempt": 1, "uid": "a-1", "session": 0, "item": 17, "stage": "generation",
        "prompt": "How many?", "reason": "ValueError: no float: a",
    }  # fmt: skip
    folder = RunFolder(tmp_path)
    text = failure_text(folder, "val", 3, 16, 3)
    assert text == (
        "validation after step 3: 3 of 16 responses failed: the generation of validation item 17 ('How many?'): "
        "ValueError: no float: a (2 times, and 1 other reason(s))"
    )
    assert "training.log" in failure_text(folder, "val", 4, 16, 3)
    assert "step 3: 1 of 64 responses failed: the generation of training item 17" in failure_text(
        folder, "train", 3, 64, 1
    )


def record(folder, session, stage="reward", attempt=1):
    folder.append(FILE, {"set": "val", "step": 3, "attempt": attempt, "uid": "u", "session": session, "item": 2,
                         "prompt": "", "stage": stage, "reason": f"/r.py:3: KeyError: {session}"})  # fmt: skip


def test_failures_stop_a_run_by_their_share_of_this_attempt_s_answers(tmp_path):
    folder = RunFolder(tmp_path)
    refuse_failures(folder, "val", 3, 16, 0.0)
    record(folder, 0, "generation")
    with pytest.raises(ProcessFault, match=r"1 of 16 responses failed: the generation of validation item 2: /r\.py:3"):
        refuse_failures(folder, "val", 3, 16, 0.0)
    record(folder, 1)
    with pytest.raises(RewardError, match=r"2 of 16 .*fix the reward function.*allow_failed=0\.1 allows 1"):
        refuse_failures(folder, "val", 3, 16, 0.1)
    refuse_failures(folder, "val", 3, 16, 0.125)
    refuse_failures(folder, "train", 3, 16, 0.0)
    refuse_failures(folder, "val", 4, 16, 0.0)
    # Failures that stopped one attempt do not count in the next one, because the reward may have been fixed.
    (tmp_path / "state.json").write_text(
        json.dumps({"status": "running", "created": "", "config_digest": "", "attempt": 2})
    )
    refuse_failures(folder, "val", 3, 16, 0.0)
    record(folder, 0, attempt=2)
    with pytest.raises(RewardError):
        refuse_failures(folder, "val", 3, 16, 0.0)


def test_a_run_folder_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    class Failing:
        async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
            raise KeyError("mine")

    class Both(NotingFailures, Failing):
        config = load_recipe("e6a", ["profile=cpu"])

    Both.config.trainer.default_local_dir = str(tmp_path / "none/checkpoints")
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(Both()._run_agent_loop({}, {"step": 1, "validate": True}, uid="u", session_id=0))


def test_sessions_with_several_outputs_are_one_answer():
    assert answered(["a-1_0_0", "a-1_0_1", "a-1_1_0", "b_0_0"]) == 3
    assert answered([]) == 0
