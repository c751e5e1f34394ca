"""Find where a key of verl's config is read on the path of a run.

A key is read where an expression that ends with the key's last name has the key's block before it:
`config.actor_rollout_ref.rollout.n`, `rollout["n"]`, `getattr(self.config.rollout, "n")`, or a local name for these.
`NAMES` says which other names stand for a block. A key whose default is copied by another key (`${oc.select:…}`) is
read where that key is read.

`python -m tests.helpers.verl_reads [KEY …]` prints the places.
"""

import re
import sys
from collections.abc import Iterable

from tests.helpers.source_reads import Chain, Read, Reads
from verl_aqn.config.compose import compose_base
from verl_aqn.config.verl_keys import leaves

# Where another name than the block's own stands for a block: {part of "module:Class.function": {name: blocks}}.
_BOTH = ("actor_rollout_ref.actor", "critic")
_FSDP = ("actor_rollout_ref.actor.fsdp_config", "critic.fsdp")
_OPTIM = tuple(f"{one}.optim" for one in _BOTH)
_MODEL = ("actor_rollout_ref.model", "critic.model")
_ROLLOUT = ("actor_rollout_ref.rollout", "reward.reward_model.rollout")
_PROFILER = (*(f"{one}.profiler" for one in (*_BOTH, _ROLLOUT[0])), "global_profiler")
_TOOLS = tuple(f"{one}.tool_config" for one in _PROFILER[:-1])


def _tools(name: str) -> tuple[str, ...]:
    return *(f"{one}.{name}" for one in _TOOLS), f"global_profiler.global_tool_config.{name}"


NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        "rollout_config": _ROLLOUT[:1], "actor_config": _BOTH[:1], "critic_config": _BOTH[1:], "data_config": ("data",),
        "rollout_correction": ("algorithm.rollout_correction",),
        "rollout_corr_config": ("algorithm.rollout_correction",),
    },
    ".reward_loop.": {"rollout_config": _ROLLOUT[1:], "config": ("reward.reward_model",)},
    "verl.workers.engine_workers:": {"engine_config": _FSDP, "model_config": _MODEL},
    ".engine.fsdp.": {
        "engine_config": _FSDP, "optimizer_config": _OPTIM, "model_config": _MODEL,
        "checkpoint_config": tuple(f"{one}.checkpoint" for one in _BOTH),
    },
    "verl_aqn.integrations.verl.packed_base:": {"engine_config": _FSDP, "model_config": _MODEL},
    "verl_aqn.integrations.verl.left_out_rows:": {"config": ("data",)},
    "verl_aqn.integrations.verl.checkpointing:": {"was": ("trainer",)},
    "checkpoint.checkpoint_manager:": {"checkpoint_config": tuple(f"{one}.checkpoint" for one in _BOTH)},
    "fsdp_utils:.apply_fsdp2": {"config": _FSDP},
    "fsdp_utils:.get_fsdp_wrap_policy": {"config": tuple(f"{one}.wrap_policy" for one in _FSDP)},
    "workers.config.optimizer:.build_optimizer": {"config": _OPTIM},
    "config.actor:FSDPActorConfig.": {"self": _BOTH[:1]},
    "config.actor:ActorConfig.": {"self": _BOTH[:1]},
    "config.critic:FSDPCriticConfig.": {"self": _BOTH[1:]},
    "config.model:HFModelConfig.": {"self": _MODEL},
    "core_algos:": {"config": _BOTH[:1]},
    "utils.losses:.ppo_loss": {"config": _BOTH[:1]},
    "utils.losses:.value_loss": {"config": _BOTH[1:]},
    "dataset.rl_dataset:": {"config": ("data",)},
    "vllm_async_server:": {"config": _ROLLOUT},
    "rollout.utils:": {"config": ("actor_rollout_ref.rollout.prometheus",)},
    "utils.profiler.": {"config": _PROFILER[:-1], "profiler_config": _PROFILER[:-1]},
    "profiler.config:.build_": {"tool_config": (*_tools("torch"), *_tools("npu"))},
    "profiler.torch_profile:": {"tool_config": _tools("torch")},
    "profiler.nvtx_profile:": {"tool_config": _tools("nsys")},
    "profiler.mstx_profile:": {"tool_config": _tools("npu")},
    "profiler.torch_memory_profile:": {"tool_config": _tools("torch_memory")},
    "profiler.precision_debugger_profile:": {"precision_cfg": _tools("precision_debugger")},
    "transfer_queue.": {"conf": ("transfer_queue",)},
    "mooncake_client:": {"config": ("transfer_queue.backend.MooncakeStore",)},
    "transfer_queue.storage.simple_storage:": {"config": ("transfer_queue.backend.SimpleStorage",)},
}  # fmt: skip
# Blocks that go on as a whole, and the expression that must be read for that.
_NSYS = "global_profiler.global_tool_config.nsys"
WHOLE = {
    "actor_rollout_ref.rollout.engine_kwargs.vllm": "actor_rollout_ref.rollout.engine_kwargs",  # arguments of vLLM
    "ray_kwargs.ray_init": "ray_kwargs.ray_init",  # arguments of ray.init
    f"{_NSYS}.controller_nsight_options": f"{_NSYS}.controller_nsight_options",
    f"{_NSYS}.worker_nsight_options": f"{_NSYS}.worker_nsight_options",
    "trainer.v1.sync": "trainer.v1",  # .get(self.trainer_mode)
}


_COPIED = re.compile(r"\$\{(?:oc\.select:)?(\.*[\w.]+)")


class KeyReads:
    """Where each key of verl's config is read: `of(key)`."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """`keys`: keys to look for beside those of `base`."""
        values = dict.fromkeys(keys) | dict(leaves(compose_base(None)))
        parts = [key.split(".") for key in values]
        self.blocks = frozenset(".".join(one[:count]) for one in parts for count in range(1, len(one) + 1))
        self.places: dict[str, set[str]] = {}
        built = {value.split(".")[-1] for key, value in values.items() if key.endswith("._target_")}
        for read in Reads(built).reads:
            for block in self._stands_for(read, read.chain[:-1]):
                self.places.setdefault(f"{block}.{read.chain[-1]}", set()).add(read.place)
        self.copies: dict[str, set[str]] = {}
        for key, value in values.items():
            for other in _COPIED.findall(value) if isinstance(value, str) else ():
                self.copies.setdefault(_absolute(other, key), set()).add(key)

    def of(self, key: str) -> set[str]:
        """Return the places that read `key`, or a key that copies it."""
        found = set(self.places.get(key, ()))
        for block, read in WHOLE.items():
            if key == block or key.startswith(f"{block}."):
                found |= self.places.get(read, set())
        return found.union(*(self.of(other) for other in self.copies.get(key, ())))

    def _stands_for(self, read: Read, chain: Chain) -> set[str]:
        """Return the blocks that a chain may stand for. Parents that are known rule out blocks of other parents."""
        where = f"{read.module}:{read.scope}"
        given = {one for part, names in NAMES.items() if part in where for one in names.get(chain[-1], ())}
        own = {one for one in self.blocks if one.rpartition(".")[2] == chain[-1]}
        above = self._stands_for(read, chain[:-1]) if len(chain) > 1 else set()
        if above:
            own = {one for one in own if one.rpartition(".")[0] in above} or own
        elif len(chain) == 1 or chain[-2] != "reward_model":
            own = {one for one in own if not one.startswith("reward.reward_model.")}
        return given | own


def _absolute(key: str, of: str) -> str:
    """Return the whole key of an interpolation in the value of the key `of`."""
    dots = len(key) - len(key.lstrip("."))
    return ".".join([*of.split(".")[:-dots], key.lstrip(".")]) if dots else key


def main(keys: list[str]) -> None:
    reads = KeyReads(keys)
    for key in keys or [key for key, _ in leaves(compose_base(None))]:
        print(key, *sorted(reads.of(key)) or ["-"])


if __name__ == "__main__":
    main(sys.argv[1:])
