"""A pytest plugin that lets the package run with versions of verl, vLLM, torch and Ray that it does not admit yet."""

import os

os.environ.setdefault("VERL_PLATFORM", "cpu")


def pytest_configure() -> None:
    """Admit every version in this process."""
    from verl_aqn.integrations.verl import verl_plugin
    from verl_aqn.integrations.vllm import vllm_plugin

    verl_plugin.SUPPORTED = dict.fromkeys(verl_plugin.SUPPORTED, ("",))
    vllm_plugin.SUPPORTED_VLLM = ("",)
