"""`python -m verl_aqn.selftest`: the command for machines that have torch, but not the packages of `verl-aqn`."""

import argparse
import sys
from pathlib import Path

from verl_aqn.errors import AqnError, ConfigError
from verl_aqn.selftest.command import selftest
from verl_aqn.selftest.rung import DEVICES


def main() -> None:
    """Parse the command line, climb, and exit."""
    parser = argparse.ArgumentParser(prog="python -m verl_aqn.selftest", description=selftest.__doc__)
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--kernels-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        sys.exit(selftest(given.device, given.minutes, given.output, given.kernels_only, given.json))
    except AqnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
