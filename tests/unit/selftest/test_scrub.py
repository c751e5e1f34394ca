"""The page and the JSON file do not say whose machine they come from."""

import getpass
import json
import os
import platform
import re

import pytest

from verl_aqn.selftest.ladder import RUNGS
from verl_aqn.selftest.rung import FAILED, NOT_RUN, PASSED, Outcome
from verl_aqn.selftest.scrub import Owner, owner, scrub, scrub_all
from verl_aqn.selftest.selftest_page import document, markdown, write

ANN = Owner(("gpu-17.lab.example.org", "gpu-17"), ("ann.lee", "Ann Lee"), ("/home/ann.lee",))
SECRETS = ("ann.lee", "gpu-17", "Ann Lee", "/home", "/data", "192.168.", "fe80", "example.org", "02:42", "secret")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("File \"/home/ann.lee/code/verl_aqn/noise/rng.py\", line 7", 'File "<path>/rng.py", line 7'),
        ("~/models/secret-model is missing", "<path> is missing"),
        ("OSError: /data/projects/secret/x.bin: no space", "OSError: <path>: no space"),
        ("libtorch.so from /usr/lib/x86_64/libtorch.so.2", "libtorch.so from <path>/libtorch.so.2"),
        ("ANN.LEE@gpu-17 on GPU-17.lab.example.org", "<user>@<host> on <host>"),
        ("connect to 192.168.3.14:29500 failed", "connect to <ip>:29500 failed"),
        ("[fe80::1ff:fe23:4567:890a%eth0]:80 and ::1", "[<ip>]:80 and <ip>"),
        ("tcp://gpu-17:1234/x and http://10.0.0.1:8000/v1", "tcp://<host>/x and http://<host>/v1"),
        ("mac 02:42:ac:11:00:02", "mac <mac>"),
        ("mail ann@example.org now", "mail <mail> now"),
        ("GPU-5c1d2f64-90ab-4cde-8f01-23456789abcd", "GPU-<uuid>"),
        ("file:///home/ann.lee/meeting", "<path>"),
        ("key=/data/a,/data/b", "key=<path>,<path>"),
    ],
)  # fmt: skip
def test_what_is_removed(text, wanted):
    assert scrub(text, ANN) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "torch 2.10.0.post4, CANN 9.1.0, driver 570.133.20",
        "copy 115 GB/s; 1/2 of the bytes; even/nearest of bfloat16; 12:34:56",
        "see https://docs.pytorch.org/docs/stable/cuda.html and https://github.com/pytorch/pytorch/issues/177844",
        "4096 × 4096, 3.1e-05 of it, [N, K/32], aqn.noise.unit=rms, std::string",
        "Ascend910_9392 and NVIDIA H200",
    ],
)
def test_what_stays(text):
    assert scrub(text, ANN) == text


def test_a_short_name_inside_a_word_stays():
    assert scrub("an analysis by an", Owner((), ("an",), ())) == "<user> analysis by <user>"


def test_whole_documents_are_scrubbed_also_figures_keys_and_logs(tmp_path):
    dirty = "ann.lee Ann Lee gpu-17 /home/ann.lee/x /data/secret 192.168.0.7 fe80::1 02:42:ac:11:00:02 a@example.org"
    outcomes = [
        Outcome(
            rung.name, (PASSED, FAILED, NOT_RUN)[number % 3], 1.0, figure=dirty, why=dirty, tail=dirty,
            figures={dirty: [dirty, {"x": (dirty, 1)}]},
        )
        for number, rung in enumerate(RUNGS)
    ]  # fmt: skip
    found = document(RUNGS, outcomes, "cpu", 1.0, ANN)
    for file in write(tmp_path, found):
        text = file.read_text()
        assert [secret for secret in SECRETS if secret in text] == []
    assert json.loads((tmp_path / "selftest.json").read_text()) == json.loads(json.dumps(found))


def test_the_owner_of_this_machine_is_known():
    whose = owner()
    assert platform.node() in whose.hosts
    assert getpass.getuser() in whose.users
    assert os.path.expanduser("~") in whose.homes
    said = scrub(f"{platform.node()}:{os.path.expanduser('~')}/x of {getpass.getuser()}", whose)
    assert not re.search(rf"\b({re.escape(platform.node())}|{re.escape(getpass.getuser())})\b", said)


def test_numbers_and_truth_values_stay():
    assert scrub_all({"a": [1, 2.5, True, None]}, ANN) == {"a": [1, 2.5, True, None]}


def test_the_page_says_what_failed_why_and_what_to_send():
    outcomes = [Outcome(rung.name, PASSED, figure="fine") for rung in RUNGS]
    outcomes[1] = Outcome(RUNGS[1].name, FAILED, 2.0, why="bits | differ", tail="last line")
    outcomes[2] = Outcome(RUNGS[2].name, NOT_RUN, why="needs codec-bits")
    text = markdown(document(RUNGS, outcomes, "npu", 3.0, ANN))
    assert "| codec-bits | ✗ failed | 2 | bits \\| differ |" in text
    assert "## codec-bits failed" in text
    assert f"Please send also: {RUNGS[1].send}." in text
    assert "````text\nlast line\n````" in text
    assert "| codec-speed | – not run | 0 | needs codec-bits |" in text
