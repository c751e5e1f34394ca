"""Run the command: `python -m verl_aqn.cli`."""

from verl_aqn.cli.main import main

main()
