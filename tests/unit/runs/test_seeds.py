"""Names, order and seeds of prompts and responses: the same in every process, different for different things."""

import os
import random
import subprocess
import sys

from verl_aqn.runs.request_seeds import (
    StepPrompts,
    answer_name,
    digest_of,
    last_outputs,
    order_of_key,
    place_of,
    request_seed,
    seed_of,
    turn_seed,
)


def test_a_million_requests_have_a_million_seeds_of_63_bits():
    seeds = {
        request_seed(run, part, step, str(row), sample)
        for run in range(5)
        for part in ("train", "val")
        for step in range(25)
        for row in range(500)
        for sample in range(8)
    }
    assert len(seeds) == 5 * 2 * 25 * 500 * 8 == 1_000_000
    assert 0 <= min(seeds) < 1 << 48 < (1 << 63) - (1 << 48) < max(seeds) < 1 << 63


def test_a_seed_is_the_same_in_every_process_and_version():
    """The test has the number itself, because a change of the derivation would change every run."""
    wanted = request_seed(3, "train", 12, "417+1", 5)
    assert wanted == 576803837238611455
    code = "from verl_aqn.runs.request_seeds import request_seed; print(request_seed(3, 'train', 12, '417+1', 5))"
    for hash_seed in ("0", "1", "random"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert int(out) == wanted


def test_seeds_need_no_torch():
    code = "import sys, verl_aqn.runs.request_seeds; assert not {'torch', 'numpy', 'verl', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_part_of_a_seed_counts_and_none_runs_into_the_next():
    usual = request_seed(0, "train", 1, "2", 3)
    others = [
        request_seed(1, "train", 1, "2", 3),
        request_seed(0, "val", 1, "2", 3),
        request_seed(0, "train", 2, "2", 3),
        request_seed(0, "train", 1, "2+1", 3),
        request_seed(0, "train", 1, "2", 4),
    ]
    assert len({usual, *others}) == 6
    lists = [(1, 23), (12, 3), ("1", 23), ("1;int2:23",), (1, "23"), ("1", "23"), (-1, 23), (1, -23)]
    assert len({seed_of(*parts) for parts in lists}) == len(lists)
    assert len({turn_seed(usual, tokens) for tokens in range(1000)}) == 1000


def test_prompts_of_a_step_are_named_by_row_and_told_apart_where_a_row_comes_twice():
    prompts = StepPrompts()
    assert [prompts.name(7, row) for row in (417, 3, 417, 417)] == [
        ("417", "7-0-417"),
        ("3", "7-1-3"),
        ("417+1", "7-2-417+1"),
        ("417+2", "7-3-417+2"),
    ]
    assert prompts.after(1) == [417, 417]
    assert prompts.after(3) == []
    assert prompts.name(8, 417) == ("417", "8-0-417")
    assert prompts.after(0) == []
    assert place_of("7-12-417+1") == 12


def test_keys_are_in_the_order_of_prompts_sessions_and_outputs_as_numbers():
    keys = [f"1-{place}-{row}_{s}_{i}" for place, row in ((2, 9), (10, 4)) for s in (2, 11) for i in (0, 10)]
    shuffled = random.Random(0).sample(keys, len(keys))
    assert shuffled != keys
    assert sorted(shuffled, key=order_of_key) == keys


def test_the_last_output_of_a_session_is_its_answer():
    keys = ["u_0_0", "v_0_0", "u_0_10", "u_0_9", "u_1_0"]
    assert last_outputs(keys) == {("u", 0): 2, ("v", 0): 1, ("u", 1): 4}


def test_a_digest_is_of_keys_and_tokens_in_order_whatever_came_first():
    answers = {"1-0-5_0_0": [1, 23], "1-0-5_1_0": [12, 3], "1-1-2_0_0": [4]}
    whole, each = digest_of(answers)
    assert digest_of(dict(reversed(answers.items()))) == (whole, each)
    assert list(each) == ["5_0_0", "5_1_0", "2_0_0"] == [answer_name(key) for key in answers]
    assert len(set(each.values())) == 3
    changed, others = digest_of(answers | {"1-0-5_1_0": [12, 4]})
    assert changed != whole
    assert [name for name in each if each[name] != others[name]] == ["5_1_0"]
    assert digest_of({"1-0-6_0_0": [1, 23]})[0] != digest_of({"1-0-5_0_0": [1, 23]})[0]
