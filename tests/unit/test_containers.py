"""Containers and manifests checked by linters and schemas. Nothing is built or applied."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "containers"
PROFILES = ("cpu", "cuda", "npu")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def lint(tool: str, *arguments: str) -> str:
    """Return the linter's output, empty if there is no complaint."""
    command = [Path(sys.executable).parent / tool, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def job() -> dict:
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


def check_job(manifest: dict) -> None:
    jsonschema.validate(manifest, json.loads((ROOT / "tests" / "helpers" / "kuberay_rayjob.json").read_text()))
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, **group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_dockerfiles_have_no_fault(profile):
    assert lint("hadolint", f"scripts/containers/Dockerfile.{profile}") == ""


def test_the_linter_would_have_said_so(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp && sudo ls\n")
    assert {"DL3007", "DL3004"} <= set(re.findall(r"DL\d+", lint("hadolint", str(tmp_path / "Dockerfile"))))


@pytest.mark.parametrize("profile", PROFILES)
def test_images_are_pinned_run_without_root_and_hold_no_secret(profile):
    text = (FOLDER / f"Dockerfile.{profile}").read_text()
    for image in re.findall(r"^(?:FROM|ARG BASE=)\s*(\S+)", text, re.MULTILINE):
        assert image == "${BASE}" or re.search(r":v?\d+\.\d+", image), image
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] != "root"
    assert not re.search(r"(TOKEN|KEY|SECRET|PASSWORD)", text)


def versions(pins: list[str]) -> dict[str, str]:
    """Return the version of each package that `pins` name with ==."""
    return {name: version for name, found, version in (pin.partition("==") for pin in pins) if found}


def test_images_have_the_versions_of_their_profile():
    vllm = versions(EXTRAS["cuda"])["vllm"]
    assert f"vllm/vllm-openai:v{vllm}\n" in (FOLDER / "Dockerfile.cuda").read_text()
    npu = (FOLDER / "Dockerfile.npu").read_text()
    ascend = versions((ROOT / "scripts/requirements-npu.lock").read_text().splitlines())["vllm-ascend"]
    assert f"vllm-ascend:v{ascend}\n" in npu
    installed = [pin for pin in EXTRAS["npu"] if not pin.startswith("torch==")]  # torch is the image's own
    assert installed
    assert [pin for pin in installed if pin not in npu] == []


def test_scripts_have_no_fault():
    # SC2034: experiment.sh, which these scripts source, reads their options.
    scripts = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "scripts").glob("*.sh"))]
    assert lint("shellcheck", "--severity=warning", "--exclude=SC2034", *scripts) == ""


def test_the_manifest_is_a_ray_job_of_kuberay():
    assert lint("yamllint", "-d", "{extends: relaxed, rules: {line-length: {max: 120}}}", "scripts/containers") == ""
    check_job(job())


@pytest.mark.parametrize("path", ["headGroupSpecs", "headGroupSpec.template.spec.volume"])
def test_a_misspelt_field_would_have_been_found(path):
    manifest = job()
    *parents, name = path.split(".")
    place = manifest["spec"]["rayClusterSpec"]
    for parent in parents:
        place = place[parent]
    place[name] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_job(manifest)


def test_the_job_asks_for_the_token_and_runs_without_rights():
    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == next(p for p in EXTRAS["cuda"] if p.startswith("ray")).partition("==")[2]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["image"].endswith(":latest")
