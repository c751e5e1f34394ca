"""The command as a user types it: output, exit codes, and a one-line message for every mistake."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.command import one_line, run, run_all
from tests.helpers.run_folders import write_run
from verl_aqn.cli import main as cli
from verl_aqn.errors import ConfigError, DataError, ModelError
from verl_aqn.noise.schedule import KINDS
from verl_aqn.tasks.parquet import row, write_parquet


def test_schedule_as_json():
    result = run("schedule", "e12_aggressive_1ep", "--json")
    table = json.loads(result.stdout)
    assert table[0] == {"step": 0, "stage": 0, "sigma": 0.0}
    assert (len(table), table[3]["sigma"], table[28]["sigma"]) == (29, 0.05, 1e-5)


def test_schedule_as_table_and_picture(tmp_path):
    result = run("schedule", "e12_2ep", "profile=cpu", "--plot", str(tmp_path / "s.png"))
    assert "σ of e12_2ep over 58 steps" in result.stdout
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_of_every_kind_as_json_table_and_picture(kind, tmp_path, capsys):
    from verl_aqn.cli.main import schedule

    schedule("e12_aggressive_1ep", ["profile=cpu", f"aqn.noise.kind={kind}"], None, True, tmp_path / f"{kind}.svg")
    table = json.loads(capsys.readouterr().out)
    assert (table[3]["sigma"], len(table)) == (0.05, 29)
    assert table[28]["sigma"] == (0.05 if kind == "constant" else 1e-5)
    assert (tmp_path / f"{kind}.svg").stat().st_size > 1000
    schedule("e12_aggressive_1ep", ["profile=cpu", f"aqn.noise.kind={kind}"], None, False, None)
    assert "over 29 steps" in capsys.readouterr().out


def test_schedule_takes_the_steps_from_the_data_where_the_recipe_does_not_say(tmp_path):
    null = "trainer.total_training_steps=null"
    file = tmp_path / "train.parquet"
    prompts = [row("x", [{"role": "user", "content": "y"}], "1", split="train", index=i, question="y", answer="1")
               for i in range(20)]  # fmt: skip
    write_parquet(prompts, file)
    embedded, own, missing, told = run_all(
        ["schedule", "e12", "profile=cpu", null, "data.train_max_samples=60", "--json"],
        ["schedule", "e12_2ep", "profile=cpu", null, f"data.train_files={file}", "--json"],
        ["schedule", "e12", "profile=cpu", null, "data.train_files=/nowhere.parquet"],
        ["schedule", "e12", null, "profile=cpu", "--steps", "7", "--json"],
    )
    assert len(json.loads(embedded.stdout)) == 10  # 60 rows at batch 6
    assert len(json.loads(own.stdout)) == 6  # 20 rows at batch 6, two epochs
    assert "give --steps N" in one_line(missing, 2)
    assert len(json.loads(told.stdout)) == 7


def test_exit_code_of_a_command_that_failed_without_an_exception(monkeypatch):
    from verl_aqn.preflight import doctor
    from verl_aqn.preflight.findings import Finding

    found = doctor.Report([Finding("vllm", "missing", "bash scripts/setup.sh")])
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: found)
    monkeypatch.setattr(sys, "argv", ["verl-aqn", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1


def test_dry_run_prints_the_resolved_config_and_starts_nothing(tmp_path):
    result = run("train", "e6a", "profile=cpu", f"aqn.run.dir={tmp_path / 'r'}", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "enabled: false" in result.stdout
    assert not (tmp_path / "r").exists()


MISTAKES = [
    (["train", "e12_agressive"], 2, "no recipe 'e12_agressive'"),
    (["train", "missing.yaml"], 2, "no recipe file missing.yaml"),
    (["train", "e12", "profile=cpu", "aqn.noise.sgima_end=0"], 2, "unknown key aqn.noise.sgima_end"),
    (["train", "e12", "profile=cpu", "aqn.noise.sigma_end=1"], 2, "sigma"),
    (["train", "e12", "profile=cpu", "actor_rollout_ref.model.path=/nowhere"], 1, "model folder /nowhere does"),
    (["train", "e12", "profile=cpu", "data.train_files=/nowhere.parquet"], 1, "/nowhere.parquet"),
    (["train", "e12", "profile=cpu", "data.train_max_samples=16"], 2, "give 2 steps"),
    (["train", "e12", "profile=cpu", "data.train_batch_size=9"], 2, "not a multiple"),
    (["train", "e12", "profile=cpu", "data.gen_batch_size=4"], 2, "not a multiple of data.gen_batch_size"),
    (["train", "e12", "profile=cpu", "aqn.noise.off_from_step=29"], 2, "takes 29 steps"),
    (["schedule", "e12", "profile=cpu", "--plot", "/nowhere/s.png"], 2, "/nowhere/s.png"),
    (["schedule"], 2, "recipe"),
    (["trian"], 2, "trian"),
    (["quantize", "/nowhere", "/tmp/verl-aqn-never"], 1, "/nowhere"),
]


@pytest.fixture(scope="module")
def mistaken() -> list[subprocess.CompletedProcess]:
    return run_all(*(arguments for arguments, _, _ in MISTAKES))


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(arguments) for arguments, _, _ in MISTAKES])
def test_mistakes_are_one_line(mistaken, number):
    _, code, words = MISTAKES[number]
    assert words in one_line(mistaken[number], code)


@pytest.fixture
def told(monkeypatch, capsys):
    """`told(*arguments)` → the one-line error of a command that runs in this process."""

    def run(*arguments, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["verl-aqn", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (code, "", 1), err
        return err

    return run


@pytest.mark.parametrize("command", ["train", "submit"])
def test_a_misspelled_option_is_no_override(told, command):
    assert told(command, "e12", "--quickly") == "error: no option --quickly\n"
    assert "no option --restart: did you mean --restarts?" in told(command, "e12", "--restart", "3")


def test_submit_passes_options_on(monkeypatch):
    jobs = []
    monkeypatch.setattr("verl_aqn.cluster.submit.run_job", lambda address, arguments: jobs.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["verl-aqn", "submit", "e12", "data.seed=1", "--restarts", "3", "--dry-run"])
    with pytest.raises(SystemExit):
        cli.main()
    assert jobs == [["e12", "data.seed=1", "aqn.run.restarts=3", "--dry-run"]]


def test_steps_begin_at_one(told):
    assert "--steps" in told("schedule", "e12", "--steps", "0")


def test_model_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    result = run("train", "e12", "profile=cpu", f"actor_rollout_ref.model.path={tmp_path}")
    assert str(tmp_path) in one_line(result, 1)


def test_data_file_without_a_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"data_source": ["x"], "prompt": [[{"role": "user", "content": "y"}]]}), file
    )
    line = one_line(run("train", "e12", "profile=cpu", f"data.train_files={file}"), 1)
    assert "reward_model" in line
    assert str(file) in line


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("train", "e12", "profile=cpu", f"+ray_kwargs.ray_init.dashboard_port={port}")
        assert f"port {port}" in one_line(result, 1)


def test_too_little_memory(monkeypatch):
    from verl_aqn.config.compose import load_recipe
    from verl_aqn.errors import EnvironmentFault
    from verl_aqn.preflight import recipe_checks as checks
    from verl_aqn.runs import host

    monkeypatch.setattr(host, "memory", lambda: host.Memory(2 * 10**9, 10**9))
    with pytest.raises(EnvironmentFault, match=r"GB of memory are free, the run of embedded needs \d\.\d GB"):
        checks.check_machine(load_recipe("e12", ["profile=cpu"]))


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("data.train_batch_size=9", ConfigError, "not a multiple of actor.ppo_mini_batch_size"),
        ("data.gen_batch_size=4", ConfigError, "not a multiple of data.gen_batch_size"),
        ("data.train_max_samples=16", ConfigError, "give 2 steps"),
        ("aqn.noise.off_from_step=29", ConfigError, "takes 29 steps"),
        ("data.val_files=/nowhere.parquet", DataError, "/nowhere.parquet: no such file"),
        ("actor_rollout_ref.model.path=/nowhere", ModelError, "model folder /nowhere does not exist"),
    ],
)
def test_faults_of_a_recipe_come_before_those_of_the_moment(override, error, words, monkeypatch, tmp_path):
    from verl_aqn.launch import train
    from verl_aqn.runs import host

    monkeypatch.setattr(host, "memory", lambda: host.Memory(2 * 10**9, 10**9))
    with pytest.raises(error, match=words):
        train.train("e12", ["profile=cpu", override, f"aqn.run.dir={tmp_path}"])


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("train", "e12", "profile=cpu", f"aqn.run.dir={tmp_path / 'file' / 'below'}")
    assert "aqn.run.dir" in one_line(result, 1)


def test_quantize_prints_sqnr_and_size(tmp_path):
    from verl_aqn.tasks.smollm2 import tiny_model

    source = tiny_model(tmp_path / "tiny")
    command = ["quantize", str(source), str(tmp_path / "packed")]
    first, again = run_all([*command, "--json"], command)
    report = json.loads(first.stdout)
    assert report["modules"][0]["sqnr_db"] > 15
    assert report["bytes_after"] < report["bytes_before"]
    assert "exists" in one_line(again, 1)


def test_gsm8k_from_a_local_folder(tmp_path):
    rows = [{"question": "What is 40 + 2?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"}] * 3
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("data", "gsm8k", "--source", str(tmp_path), "--dst", str(tmp_path / "out"), "--json")
    report = json.loads(result.stdout)
    assert report["train"]["rows"] == report["test"]["rows"] == 3
    assert Path(report["train"]["file"]).is_file()


ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("test_mxfp4_*.sh")))
def test_every_script_names_a_recipe_and_a_folder_of_its_own(script):
    from verl_aqn.config.compose import recipe_names

    text = (ROOT / "scripts" / script).read_text()
    assert re.search(r"^RECIPE=(\S+)$", text, re.M)[1] in recipe_names()
    assert f"/tmp/{script.removesuffix('.sh').removeprefix('test_')}}}" in text


def test_script_takes_devices_toggles_and_overrides(tmp_path):
    folder = tmp_path / "lr=1,it's [x] (2)"  # Hydra names folders like this, and would split such a value
    result = subprocess.run(
        ["bash", "scripts/test_mxfp4_e6a.sh", "2", "data.seed=7", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PROFILE": "cpu", "RUN_DIR": str(folder)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert (config["trainer"]["n_gpus_per_node"], config["data"]["seed"]) == (2, 7)
    assert config["aqn"]["run"]["dir"] == str(folder)
    assert config["ray_kwargs"]["ray_init"]["num_gpus"] == 2


def test_a_script_s_paths_begin_in_the_user_s_folder(tmp_path):
    for name in ("scripts", ".venv/bin", "my data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("experiment.sh", "test_mxfp4_e6a.sh"):
        (tmp_path / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    (tmp_path / "scripts/setup.sh").touch()
    (command := tmp_path / ".venv/bin/verl-aqn").write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"')
    command.chmod(0o755)
    env = {**os.environ, "TRAIN_DATA": "train.jsonl", "MODEL_PATH": "", "VAL_DATA": ""}
    script = ["bash", "../scripts/test_mxfp4_e6a.sh", "2"]
    done = subprocess.run(script, cwd=tmp_path / "my data", env=env, capture_output=True, text=True, check=True)
    place, *arguments = done.stdout.splitlines()
    assert place == str(tmp_path / "my data")
    assert arguments[:2] == ["train", "e6a"]
    assert arguments[-2:] == ["data.train_files='train.jsonl'", "trainer.n_gpus_per_node=2"]


def test_wrong_arguments_do_not_wait_for_heavy_packages(tmp_path):
    taken = write_run(tmp_path / "base").path
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    mistakes = {
        f"export {tmp_path}/nothere {tmp_path}/dst": "nothere contains no run",
        f"export {taken} {taken}": "already exists",
        f"quantize {tmp_path}/nothere {tmp_path}/dst": "nothere is not a Hugging Face model folder",
        f"quantize {tmp_path}/model {tmp_path}/dst --plot x.doc": "cannot write a picture to x.doc",
        "bench update --shape foo": "--shape foo is not known",
        "bench growth --plot x.doc": "cannot write a picture to x.doc",
        "probe nope": "no recipe 'nope'",
    }
    code = (
        "import sys, verl_aqn.cli.main\n"
        "class Heavy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'scipy', 'pyarrow'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Heavy())\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    sys.argv = ['verl-aqn', *line.split()]\n"
        "    try: verl_aqn.cli.main.main()\n"
        "    except SystemExit: pass\n"
    )
    found = subprocess.run([sys.executable, "-c", code], input="\n".join(mistakes), capture_output=True, text=True)
    lines = found.stderr.splitlines()
    assert len(lines) == len(mistakes), found.stderr
    for line, words in zip(lines, mistakes.values(), strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [(["--model", "nothere"], "model folder nothere does not exist", 1), (["data.sed=1"], "unknown key data.sed", 2)],
)
def test_bench_step_refuses_before_the_first_arm(told, monkeypatch, arguments, words, code):
    from verl_aqn.bench import step

    monkeypatch.setattr(step, "run_arm", lambda *_: pytest.fail("an arm was started"))
    assert words in told("bench", "step", *arguments, code=code)


def test_help_does_not_wait_for_heavy_packages():
    heavy = {"torch", "numpy", "scipy", "hydra", "omegaconf", "transformers", "pyarrow", "ray", "vllm", "verl"}
    code = "import sys, verl_aqn.cli.main; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)
