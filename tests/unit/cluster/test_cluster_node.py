"""The options of `ray start` on each kind of node, the token, and the environment variables sent with a job."""

import json
import os
import stat

import pytest

from verl_aqn.cluster import start as node
from verl_aqn.cluster.start import declared, node_environment, ray_start, token_environment
from verl_aqn.cluster.submit import run_job, variables
from verl_aqn.errors import ConfigError, EnvironmentFault


@pytest.fixture(autouse=True)
def token(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "ROOT", tmp_path)
    path = tmp_path / "ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    for name in ("RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "VLLM_HOST_IP", "HCCL_IF_IP"):
        monkeypatch.delenv(name, raising=False)
    return path


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_a_head_is_on_loopback_unless_an_address_is_asked_for():
    command, _ = ray_start(None, None, 6379, "cpu", None, [])
    assert option(command, "--node-ip-address") == option(command, "--dashboard-host") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"--address 192\.0\.2\.1 is not an address of this machine"):
        ray_start(None, "192.0.2.1", 6379, "cpu", None, [])


def test_rays_folder_on_a_node_is_the_users_alone(tmp_path):
    """Ray creates files in it that everybody may write to."""
    command, _ = ray_start(None, None, 6379, "cpu", None, [])
    folder = tmp_path / f"ray-{os.geteuid()}"
    assert option(command, "--temp-dir") == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(EnvironmentFault, match=r"other users can access .*: chmod 700"):
        ray_start(None, None, 6379, "cpu", None, [])
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(EnvironmentFault, match="other users can access"):
        ray_start(None, None, 6379, "cpu", None, [])
    assert "--temp-dir" not in ray_start(None, None, 6379, "cpu", None, ["--temp-dir=/elsewhere"])[0]


def test_a_worker_takes_the_address_that_leads_to_its_head(token):
    token_environment(make=True)
    command, _ = ray_start("127.0.0.1:6379", None, 6379, "cpu", None, ["--temp-dir", "/elsewhere"])
    assert option(command, "--address") == "127.0.0.1:6379"
    assert option(command, "--node-ip-address") == "127.0.0.1"
    assert command[-2:] == ["--temp-dir", "/elsewhere"]
    with pytest.raises(ConfigError, match=r"'10\.0\.0\.1' does not have the form HEAD_IP:PORT"):
        ray_start("10.0.0.1", None, 6379, "cpu", None, [])


def test_devices_are_declared_as_verl_asks_for_them():
    assert declared("cpu", None) == ["--num-cpus", "32", "--num-gpus", "1"]
    assert declared("cpu", 2)[-2:] == ["--num-gpus", "2"]
    assert declared("cuda", None) == declared("npu", None) == []  # Ray finds them
    assert declared("cuda", 8) == ["--num-gpus", "8"]
    name, resources = declared("npu", 16)
    assert (name, json.loads(resources)) == ("--resources", {"NPU": 16})


def test_ray_finds_npus_under_the_name_that_verl_asks_for():
    from ray._private.accelerators import NPUAcceleratorManager

    assert NPUAcceleratorManager.get_resource_name() == "NPU"


@pytest.mark.parametrize(("profile", "library"), [("cpu", "GLOO"), ("cuda", "NCCL"), ("npu", "HCCL")])
def test_libraries_are_told_the_node_s_own_interface(profile, library, monkeypatch):
    monkeypatch.setenv("TP_SOCKET_IFNAME", "mine")
    monkeypatch.delenv("VERL_PLATFORM", raising=False)  # what a user has set stays
    env = node_environment("127.0.0.1", profile)
    assert env[f"{library}_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == "lo"
    assert (env["TP_SOCKET_IFNAME"], env["VLLM_HOST_IP"]) == ("mine", "127.0.0.1")
    assert (env.get("VERL_PLATFORM") == "cpu") == (profile == "cpu")
    assert ("HCCL_IF_IP" in env) == (profile == "npu")


def test_the_head_makes_a_token_that_its_user_alone_can_read(token):
    env = token_environment(make=True)
    assert env == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(made := token.read_text()) == 64
    assert token_environment(make=True) == env
    assert token.read_text() == made


def test_without_the_token_or_with_one_for_all_nothing_is_started(token):
    with pytest.raises(EnvironmentFault, match=f"no token in {token}: copy it from the head"):
        ray_start("127.0.0.1:6379", None, 6379, "cpu", None, [])
    token_environment(make=True)
    token.chmod(0o644)
    with pytest.raises(EnvironmentFault, match=f"chmod 600 {token}"):
        ray_start(None, None, 6379, "cpu", None, [])


def test_a_job_gets_what_steers_a_run_but_no_secret_and_nothing_of_one_node():
    environ = {"VLLM_CPU_KVCACHE_SPACE": "2", "VERL_AQN_CACHE": "/shared", "WANDB_MODE": "online", "WANDB_API_KEY": "x",
               "HF_TOKEN": "y", "VLLM_HOST_IP": "10.0.0.1", "NCCL_SOCKET_IFNAME": "eth0", "HOME": "/root"}  # fmt: skip
    sent, kept = variables(environ)
    assert sent == {"VLLM_CPU_KVCACHE_SPACE": "2", "VERL_AQN_CACHE": "/shared", "WANDB_MODE": "online"}
    assert kept == ["HF_TOKEN", "WANDB_API_KEY"]


def test_a_recipe_that_is_not_there_is_not_submitted():
    with pytest.raises(ConfigError, match="no recipe 'e13'"):
        run_job("http://127.0.0.1:1", ["e13"])


def test_no_cluster_is_told_in_a_line(token, monkeypatch):
    token_environment(make=True)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the token is set there for Ray
    with pytest.raises(
        EnvironmentFault, match=r"no Ray cluster answers at http://127\.0\.0\.1:1: run this on the head"
    ):
        run_job("http://127.0.0.1:1", ["e6a"])
