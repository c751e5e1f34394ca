"""Messages of errors that other packages raise."""

import pytest

from verl_aqn.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"), [(OSError("no disk\nat all"), "no disk"), (EOFError(), "EOFError"), (OSError("\n"), "OSError")]
)
def test_first_line(error, line):
    assert first_line(error) == line
