"""Command-line options for the whole test suite."""


def pytest_addoption(parser):
    parser.addoption("--all-kills", action="store_true", help="test_faults.py: every process, every phase")
    parser.addoption("--all-memory", action="store_true", help="test_memory.py: every model with every batch")
