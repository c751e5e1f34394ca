"""How a shell would expand a script, computed without running it."""

import shutil
import subprocess

import pytest

from verl_aqn.config.convert.launch_script import Script
from verl_aqn.errors import ConfigError

# Each script ends with a command `say`; bash itself gives the expected words.
SAME_AS_BASH = [
    "A=1; B=$A$A; say k=$B ${A}x '$A' \"$A b\" \\$A",
    'A=${NOPE:-"x y"}; say "k=$A" k=$A k=${NOPE:-d}${A:+z}${NOPE:+z}',
    "N=$((1024 * 2)); say a=$(((N + 1) * 3)) b=$((N / 3 - -7 % 4))",
    'X=(a=1 "b=2 3"\n  # no\n  c=4\n); X+=(d=5); say "${X[@]}" "${X[1]}" ${X[@]//a/z}',
    "common='a=1 b=2'; say $common c=3 \\\n  d=4 # e=5",
    "say first \\\n  # a comment ends it\nsay second",
    'say "$@" ${1:-none} ${3:-none} k=${@:2}',
    "export A=1 B=2\nsay $A $B | tee log; say third 2>&1 > file",
    "cat <<EOF\nsay no $(nothing)\nEOF\nsay $'' l=['a','b'] m='[\"c\",\"d\"]'",
    "A=x; A+=y; say ${A/x/z} ${A:=q} ${B:=q} $B",
    "say \"a'b\" 'a\"b' a\\ b \"\" ''",
]


@pytest.mark.parametrize("text", SAME_AS_BASH)
def test_words_are_those_of_bash(text, tmp_path):
    bash = shutil.which("bash")
    assert bash
    told = "say() { printf '<%s>' \"$@\" >> words; echo >> words; }\n"
    subprocess.run([bash, "-c", told + text, "bash", "one", "two"], cwd=tmp_path, check=True, capture_output=True)
    expected = (tmp_path / "words").read_text().splitlines()
    said = [one for one in Script(text, ["one", "two"], {}).commands if one.words[0].text == "say"]
    assert ["".join(f"<{word.text}>" for word in one.words[1:]) for one in said] == expected
    assert not any(word.problem for one in said for word in one.words)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("say k=$NOPE", "line 1: NOPE is set neither in the script nor in the environment"),
        ("A=$(date)\nsay k=$A", "line 2: the output of `date`, which is not run"),
        ("say k=`date`", "line 1: the output of a command, which is not run"),
        ("if true; then\n  A=1\nfi\nsay k=$A", "line 4: A is set at line 2 inside a branch, a loop or a function"),
        ("for A in 1 2; do B=$A; done\nsay k=$B", "line 2: B is set at line 1 inside"),
        ("f() {\n  A=1\n}\nsay k=$A", "line 4: A is set at line 2 inside"),
        ("say k=$1", "line 1: the script's argument 1 was not given"),
        ("A=ab\nsay k=${A%%b*}", "line 2: ${A%%b*} is a form that is not supported"),
        ("say k=$((NOPE + 1))", "line 1: NOPE is set neither"),
        ("say k=${NOPE:?give it}", "line 1: NOPE is set neither"),
    ],
)
def test_what_only_a_shell_could_tell_is_said_by_line_and_not_guessed(text, problem):
    (command,) = [one for one in Script(text, (), {}).commands if one.words[0].text == "say"]
    assert command.words[1].problem.startswith(problem)


def test_nothing_of_a_script_is_run(tmp_path):
    text = f"touch {tmp_path}/a; A=$(touch {tmp_path}/b); B=`touch {tmp_path}/c`; say $A $B <(touch {tmp_path}/d)"
    Script(text)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_counts_and_home_stays_home():
    (command,) = Script("say $HOME/x ${DIR:-y}", (), {"HOME": "/home/me", "DIR": "z"}).commands
    assert [word.text for word in command.words] == ["say", "~/x", "z"]


def test_a_branch_that_was_left_is_left():
    branches = "if a; then\n  if b; then c; fi\nfi\ncase $x in\n a) A=1 ;;\n *) A=2 ;;\nesac\n"
    script = Script(f"{branches}say 1\n(\n say 2\n)\nsay 3")
    said = {one.words[1].text: one.within for one in script.commands if one.words[0].text == "say"}
    assert said == {"1": False, "2": True, "3": False}


@pytest.mark.parametrize("text", ["say 'a", 'say "a', "say ${a", "A=(a"])
def test_a_script_that_is_cut_off_is_refused(text):
    with pytest.raises(ConfigError, match="not closed"):
        Script(text)
