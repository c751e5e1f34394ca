"""Run the command: `verl-aqn`, or `python -m verl_aqn.cli`."""

from typing import NoReturn

from verl_aqn.cli.main import main
from verl_aqn.environment import leave


def command() -> NoReturn:
    """Run the command and end the process at once."""
    try:
        main()
    except SystemExit as end:
        leave(end.code)
    leave(0)


if __name__ == "__main__":
    command()
