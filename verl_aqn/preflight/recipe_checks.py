"""Check one by one what a recipe requires of the machines that it runs on.

`check_request` and `check_machine` raise the first fault that would stop a run; `verl-aqn doctor` shows all of them.
"""

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cache import cache_dir
from verl_aqn.config.noise_settings import schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import ADAPTER_RANKS, served_rank
from verl_aqn.environment import SECRET, cluster_address
from verl_aqn.errors import ConfigError, DataError, EnvironmentFault, ModelError
from verl_aqn.preflight.control_inputs import check_control
from verl_aqn.preflight.device_plan import fit
from verl_aqn.preflight.findings import Finding, gb
from verl_aqn.preflight.memory_plan import DEVICE, actor, cpu_costs, machine, rollout, sizes, whole_cache
from verl_aqn.preflight.node import PACKAGES, Node, devices_here, free_disk
from verl_aqn.preflight.prepare import find_model, positions_of, refuse_adapter_settings
from verl_aqn.preflight.reward_function import check_reward, settle_reward
from verl_aqn.preflight.run_data import KEYS, check_data, files_on_disk, first_items, sets_of, steps_in_data
from verl_aqn.preflight.settings import check_settings
from verl_aqn.preflight.shape import Shape
from verl_aqn.preflight.verl_says import check_verl
from verl_aqn.preflight.vllm_says import check_served
from verl_aqn.runs import host
from verl_aqn.runs.processes import memory_of_children
from verl_aqn.tasks.math_verify import check_installed

SETUP = "bash scripts/setup.sh"
SKEW_S = 1.0  # records of several nodes are sorted by their times


def check_recipe(config: DictConfig) -> Iterator[Finding]:
    """Check what the recipe alone shows."""
    given, actor = sizes(config), config.actor_rollout_ref.actor
    ranks, highest = given.ranks, ADAPTER_RANKS[-1]
    from_folder = config.actor_rollout_ref.model.lora_adapter_path  # an adapter folder has its own rank
    remedy = f"set actor_rollout_ref.model.lora_rank to 1 to {highest}"
    if given.rank <= 0 and not from_folder:
        # Full training is not supported: verl then sends all weights in each sync, the clean norms would differ from
        # those we keep, and there is no reference to compare the rollout's weights with.
        yield Finding(
            "LoRA rank", f"{given.rank} means full training, which noise and its evidence do not support", remedy
        )
    else:
        slots = f"{given.rank}, in vLLM slots of rank {served_rank(given.rank)}"
        yield Finding("LoRA rank", slots, "" if given.rank <= highest or from_folder else remedy)
    for what, mini in (("actor", actor.ppo_mini_batch_size), ("critic", config.critic.ppo_mini_batch_size)):
        if what == "critic" and not given.critic:
            continue
        # verl's workers assert this only after everything is loaded; incomplete batches are padded by verl.
        key = "actor_rollout_ref.actor" if what == "actor" else "critic"
        answers = int(mini) * given.samples
        yield Finding(
            f"{what}'s batches",
            f"{given.batch} prompts × {given.samples} responses, mini-batches of {answers} responses on {ranks} ranks",
            f"{answers} responses are not divisible by {ranks} ranks: change {key}.ppo_mini_batch_size or rollout.n"
            if answers % ranks
            else f"set {key}.ppo_mini_batch_size to at most {given.batch} (data.train_batch_size)"
            if mini > given.batch
            else "",
        )
    parts = given.tensor_parallel
    yield Finding(
        "rollout's ranks",
        f"{ranks // parts} engine(s) of {parts}",
        f"set rollout.tensor_model_parallel_size to a divisor of {ranks} (n_gpus_per_node × nnodes)" if ranks % parts
        else "",
    )  # fmt: skip
    yield check_validation(config)
    yield from check_control(config)
    yield from check_variables(config)


def check_variables(config: DictConfig) -> Iterator[Finding]:
    """Check that the variables for Ray's workers hold no secret: a run's records are readable by every user."""
    place = "ray_kwargs.ray_init.runtime_env.env_vars"
    for name in OmegaConf.select(config, place) or ():
        if SECRET.search(name.upper()):
            remedy = f"export {name} before the command, and remove {place}.{name}: recipes are written to run folders"
            yield Finding("workers' environment", f"{name} holds a secret", remedy)


def check_validation(config: DictConfig) -> Finding:
    """Check how many responses validation generates, and whether they can differ.

    verl's V1 trainer uses only the temperature: with do_sample=false and a temperature above 0 it would still sample.
    """
    block, val = "actor_rollout_ref.rollout.val_kwargs", config.actor_rollout_ref.rollout.val_kwargs
    samples, warm = bool(val.do_sample), val.temperature > 0
    fix = ""
    if samples != warm:
        fix = f"set {block}.do_sample=true to sample, or temperature=0 and do_sample=false for greedy decoding"
    elif val.n > 1 and not samples:
        fix = f"all responses would be the same: set {block}.do_sample=true and a temperature above 0, or {block}.n=1"
    how = f"do_sample={str(samples).lower()}, temperature {val.temperature:g}"
    return Finding("validation's responses", f"{val.n} to each problem, {how}", fix)


def check_reward_function(config: DictConfig) -> Finding:
    """Check the reward function on the first rows of the data, if the data are on disk."""
    path = config.reward.custom_reward_function.path
    found = f"{path or 'the rules of verl'}, by reward.reward_manager.name={config.reward.reward_manager.name}"
    try:
        settle_reward(config)
        there = _with_data_on_disk(config)
        if there is not None:
            for item, where in first_items(there, sets_of(there)):
                check_reward(there, item, where)
    except (ConfigError, DataError) as error:
        return Finding("reward", found, str(error))
    return Finding("reward", found if there is not None else f"{found} (not checked: the data are not on disk)")


def check_ports(config: DictConfig) -> Iterator[Finding]:
    """Check that the ports in the recipe are free on this machine."""
    for key in ("ray_kwargs.ray_init.dashboard_port", "transfer_queue.metrics.port"):
        port = OmegaConf.select(config, key)
        if port:
            with socket.socket() as probe:
                taken = probe.connect_ex(("127.0.0.1", int(port))) == 0
            yield Finding(f"port {port}", "in use" if taken else "free", f"choose another {key}" if taken else "")


def check_places(config: DictConfig, *, elsewhere: bool = False) -> Iterator[Finding]:
    """Check that the folders of a run can be written on this machine. No folder is created.

    `elsewhere`: the run will not be on this machine, which only prepares its model and data.
    """
    run = Path(parse_aqn(config).run.dir or "/tmp").expanduser()
    places = {"cache": (cache_dir(), "set VERL_AQN_CACHE to a folder that you can write")}
    if not elsewhere:
        places["run's folder"] = run, "set aqn.run.dir to a folder that you can write"
        places["temporary files"] = Path("/tmp"), "give this user write access to /tmp"
    for what, (folder, fix) in places.items():
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        fine = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        yield Finding(what, str(folder) if fine else f"{there} cannot be written", "" if fine else fix)


def check_storage(config: DictConfig, shape: Shape | None, shared: int, disk: int, where: str) -> Iterator[Finding]:
    """Check the space in /dev/shm for adapter syncs to the rollout, and the disk space for checkpoints.

    Each rank on a machine has a buffer in shared memory if device memory cannot be shared, that is on CPUs and NPUs. A
    checkpoint is the adapter and Adam's two moments in fp32. While a checkpoint is written, there is one more than the
    number that is kept.
    """
    given = sizes(config)
    if parse_aqn(config).profile != "cuda":
        bucket = int(config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes) << 20
        need = bucket * int(config.trainer.n_gpus_per_node)
        yield Finding(
            f"/dev/shm{where}",
            f"{gb(shared)} free, {gb(need)} needed",
            "make it larger (docker run --shm-size), or lower rollout.checkpoint_engine.update_weights_bucket_megabytes"
            if shared < need
            else "",
        )
    if shape is None:
        return
    one = 12 * given.rank * shape.adapted
    keep = int(config.trainer.max_actor_ckpt_to_keep or 0), int(config.trainer.max_critic_ckpt_to_keep or 0)
    saves = int(config.trainer.save_freq) > 0
    need = saves * one * (1 + keep[0] + (1 + keep[1]) * given.critic)
    yield Finding(
        f"disk{where}",
        f"{gb(disk)} free, {gb(need)} needed for checkpoints",
        ("free some space, set aqn.run.dir to another disk, or keep fewer checkpoints (trainer.max_actor_ckpt_to_keep)")
        if disk < need
        else "",
    )


def check_heads(config: DictConfig, shape: Shape) -> Iterator[Finding]:
    """Check that vLLM can divide the attention heads among the ranks.

    vLLM divides heads evenly; if there are fewer key and value heads than ranks, it copies them.
    """
    parts = sizes(config).tensor_parallel
    if not shape.divides_heads(parts):
        fits = ", ".join(str(n) for n in range(1, shape.heads + 1) if shape.divides_heads(n))
        fix = f"set rollout.tensor_model_parallel_size to one of {fits}, not {parts}"
        yield Finding("attention heads", f"{shape.heads}, {shape.key_value_heads} key and value heads", fix)


def check_experts(config: DictConfig, shape: Shape) -> Iterator[Finding]:
    """Check how the experts of a MoE model are divided among ranks, and report their format in the rollout."""
    aqn, rollout = parse_aqn(config), config.actor_rollout_ref.rollout
    tensor, expert = (int(rollout[f"{kind}_parallel_size"]) for kind in ("tensor_model", "expert"))
    fix = ""
    if expert > 1 and not shape.routed:
        fix = "set rollout.expert_parallel_size=1: this model has no experts"
    elif expert not in (1, tensor):
        fix = f"set rollout.expert_parallel_size to 1 or {tensor} (tensor_model_parallel_size)"
    elif shape.routed and max(tensor, expert) > shape.routed:
        fix = f"set rollout.tensor_model_parallel_size to at most {shape.routed}"
    elif shape.routed and OmegaConf.select(rollout, "engine_kwargs.vllm.enable_eplb"):
        fix = (
            "remove rollout.engine_kwargs.vllm.enable_eplb: it moves experts, so that they differ from those "
            "at the start"
        )
    bf16 = aqn.profile == "cpu" and aqn.mxfp4.enabled and shape.packed_experts
    form = ", in bf16 in the rollout (on a CPU vLLM has no kernel for packed experts)" if bf16 else ""
    shared = f", divided among {expert} ranks" if expert > 1 else ""
    if shape.routed or fix:
        yield Finding("experts", f"{shape.routed} per layer{shared}{form}", fix)


def check_adapter(config: DictConfig) -> Iterator[Finding]:
    """Check the recipe's settings for adapters, and that the initial adapter fits the base."""
    what = config.actor_rollout_ref.model.lora_adapter_path
    try:
        refuse_adapter_settings(config)
        if not what and config.actor_rollout_ref.model.target_modules == "all-linear":
            return
        from verl_aqn.preflight.adapter_folder import check_new_adapter, read_folder

        base = find_model(config, weights=False)
        if not what:
            return check_new_adapter(config, base)
        adapter = read_folder(Path(what).expanduser(), base)
    except (ConfigError, DataError, ModelError) as error:
        yield Finding("adapter", str(what or "a new one"), str(error))
    else:
        yield Finding("adapter", f"{what}: {len(adapter.matrices)} modules, rank {adapter.widest} at most")


def check_devices(config: DictConfig, count: int, where: str = "") -> Finding:
    """Check that a machine has as many accelerators as the recipe needs there; a CPU only simulates them."""
    profile, wanted = parse_aqn(config).profile, int(config.trainer.n_gpus_per_node)
    if profile == "cpu":
        pretended = int(OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus") or 0)
        fix = f"set ray_kwargs.ray_init.num_gpus={wanted}" if pretended < wanted else ""
        return Finding(f"devices{where}", f"{wanted} rank(s) on the CPU", fix)
    fix = (
        f"set trainer.n_gpus_per_node to at most {count}"
        if count
        else f"no {profile} device was found: check its driver"
    )
    return Finding(f"devices{where}", f"{count} {profile}, {wanted} needed", fix if count < wanted else "")


def check_schedule(config: DictConfig) -> Finding:
    """Check σ over the steps of the run, which are counted from the data if they are on disk."""
    noise = parse_aqn(config).noise
    try:
        steps = steps_in_data(config)
        stated = config.trainer.total_training_steps
        if steps is None and stated is None:
            return Finding("schedule", f"no steps: {config.data.train_files} is not on disk", "prepare the data")
        schedule_of(config, int(steps or stated))
    except (ConfigError, DataError) as error:
        return Finding("schedule", "does not fit", str(error))
    data = "" if steps else f" (from the recipe: {config.data.train_files} is not on disk)"
    sigma = f"σ {noise.sigma_start:g} → {noise.sigma_end:g} in {noise.num_stages} stages"
    if rule := noise.controller:
        sigma = f"σ {noise.sigma_start:g}, then by {rule.target} of {rule.ends(int(steps or stated))}"
    return Finding("schedule", f"{sigma if noise.enabled else 'no noise'}, {steps or stated} steps{data}")


def _with_data_on_disk(config: DictConfig) -> DictConfig | None:
    """Return a copy of the recipe with the files of both data sets, or None if some are not on disk."""
    there = config.copy()
    for key in KEYS.values():
        if (files := files_on_disk(config, key)) is None:
            return None
        there.data[key] = [str(file.absolute()) for file in files]
    return there


def check_rows(config: DictConfig) -> Finding:
    """Check that verl can read and render the first rows of the data, and that the reward can judge all rows.

    The data are only checked if they are on disk.
    """
    config = config.copy()
    try:
        for key in KEYS.values():
            files = files_on_disk(config, key)
            if files is None:
                return Finding("data", f"not checked: {config.data[key]} is not on disk yet")
            config.data[key] = [str(file.absolute()) for file in files]
        found = check_data(config)
    except (ConfigError, DataError, ModelError, EnvironmentFault) as error:
        return Finding("data", "cannot be used", str(error))
    rows = f"{found.rows['train']:,} rows for training, {found.rows['test']:,} for validation"
    return Finding("data", "; ".join([rows, *found.warnings]))


def check_node(node: Node, here: Node, where: str) -> Iterator[Finding]:
    """Check versions, plugins and clock of one node against those of the first node."""
    yield Finding(f"Python{where}", node.python, "" if node.python == here.python else f"{here.host} has {here.python}")
    yield Finding(f"memory{where}", f"{gb(node.memory)} free")
    for package in PACKAGES:
        version, wanted = node.versions.get(package, "missing"), here.versions.get(package, "missing")
        fix = SETUP if version == "missing" else f"{here.host} has {wanted}: {SETUP}" if version != wanted else ""
        yield Finding(f"{package}{where}", version, fix)
    for what, said in node.plugins.items():
        yield Finding(f"{what}{where}", said, SETUP if what in node.missing else "")
    if where:
        fix = "set its clock (chronyd or ntpd)" if abs(node.skew) - node.doubt > SKEW_S else ""
        yield Finding(f"clock{where}", f"{node.skew:+.3f} s (± {node.doubt:.3f})", fix)


def recipe_shape(config: DictConfig) -> Shape:
    """Return the shape of the recipe's model.

    Only config.json is read (and downloaded, if the model is on the hub).
    """
    from verl_aqn.checkpoints.storage import read_config
    from verl_aqn.preflight.sizing import shape_of

    mxfp4 = parse_aqn(config).mxfp4
    folder = find_model(config, weights=False)
    shape = shape_of(folder, mxfp4.exclude)
    # Which layers `keep` will choose is not known before they are rounded: at most this share, perhaps of one layer.
    chooses = mxfp4.enabled and not read_config(folder).get("quantization_config")
    moved = int(mxfp4.keep.worst * shape.linears) if chooses else 0
    in_layer = min(moved, shape.layer_linears)
    return replace(
        shape,
        linears=shape.linears - moved,
        kept=shape.kept + moved,
        layer_linears=shape.layer_linears - in_layer,
        layer_kept=shape.layer_kept + in_layer,
    )


def cpu_cache() -> int:
    """Return the bytes of KV cache that an engine rank on the CPU uses (see `supervise.engine_environment`)."""
    said = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "1"
    if not said.isdecimal():
        raise ConfigError(f"VLLM_CPU_KVCACHE_SPACE={said}: give a whole number of GiB, or unset it")
    return int(said) << 30


def memory_of(config: DictConfig, shape: Shape) -> dict[str, Any]:
    """Estimate the memory of actor and rollout, and on a CPU of the whole machine, in bytes."""
    given = sizes(config)
    if given.cpu:
        parts, costs = machine(config, shape, cpu_cache()), cpu_costs()
        estimates = actor(shape, given, costs), rollout(shape, given, costs, cpu_cache())
        whole = {"machine": {"bytes": sum(parts.values()), "parts": parts}}
    else:
        estimates = actor(shape, given, DEVICE), rollout(shape, given, DEVICE, whole_cache(shape, given))
        whole = {}
    return {"parameters": shape.parameters, "actor": estimates[0].to_dict(), "rollout": estimates[1].to_dict(), **whole}


def check_memory(config: DictConfig, shape: Shape, free: int, devices: list[int], where: str = "") -> Iterator[Finding]:
    """Check the estimate against the free memory on a CPU (`free`, bytes), or against the smallest of `devices`."""
    given = sizes(config)
    if given.cpu:
        parts = machine(config, shape, cpu_cache())
        need, model = sum(parts.values()), config.actor_rollout_ref.model.path
        largest = ", ".join(f"{name} {gb(parts[name])}" for name in sorted(parts, key=lambda p: -parts[p])[:3])
        yield Finding(
            f"memory{where} for this run",
            f"{gb(free)} of memory are free, the run of {model} needs {gb(need)} ({largest}, …)",
            "stop other work, or lower data.train_batch_size, rollout.n or rollout.max_num_seqs" if free < need else "",
        )
    elif devices:
        found = fit(shape, given, min(devices))
        yield Finding(
            f"device memory{where}",
            f"{gb(min(devices))}, of which the actor takes {gb(found.actor.total)}; KV cache {gb(found.cache)}, "
            f"{found.sequences} sequence(s) of {given.model_length} tokens",
            f"{found.fault}: see `verl-aqn doctor RECIPE --plan`" if found.fault else "",
        )


def check_request(config: DictConfig, *, elsewhere: bool = False) -> None:
    """Check what the recipe requires of any machine: `check_stated`, and then `check_model`.

    Raises:
        EnvironmentFault: the first fault, with what was found and what to do.
    """
    check_stated(config, elsewhere=elsewhere)
    check_model(config)


def check_stated(config: DictConfig, *, elsewhere: bool = False) -> None:
    """Check what the recipe alone shows, its folders, and the packages that validation scores with.

    `elsewhere`: the run is for another machine, so folders are not checked.

    Raises:
        EnvironmentFault: the first fault, with what was found and what to do.
    """
    check_installed()
    _raise_first(check_places(config, elsewhere=elsewhere))
    _raise_first(check_recipe(config))


def check_model(config: DictConfig) -> None:
    """Check the recipe with its model's config, with verl and with vLLM. This takes seconds.

    Raises:
        EnvironmentFault: the first fault, with what was found and what to do.
    """
    shape = recipe_shape(config)
    folder = find_model(config, weights=False)
    _raise_first([*check_settings(config, positions_of(folder)), *check_heads(config, shape)])
    _raise_first(check_experts(config, shape))
    settle_reward(config)
    _raise_first(check_verl(config))
    _raise_first(check_served(config, folder))


def check_machine(config: DictConfig) -> None:
    """Check that this machine has the ports, devices, disk and memory that the recipe needs now.

    On a cluster, only what can be checked from this machine is checked. This comes after `check_request` and after the
    data: a mistake in the recipe is reported even if other work uses the memory at this moment.

    Raises:
        EnvironmentFault: the first fault, with what to do.
    """
    profile, alone = parse_aqn(config).profile, cluster_address(config) is None
    shape = recipe_shape(config)
    devices = devices_here(profile) if alone else []
    folder = Path(parse_aqn(config).run.dir or "/tmp").expanduser()
    shared = shutil.disk_usage("/dev/shm").free
    free = host.memory().available + memory_of_children()  # of the fork server, which is part of the estimate
    _raise_first(
        [
            *check_ports(config),
            *([check_devices(config, len(devices))] if alone else []),
            *check_storage(config, shape, shared, free_disk(folder), ""),
            *(check_memory(config, shape, free, devices) if alone else ()),
        ]
    )


def _raise_first(findings: Iterable[Finding]) -> None:
    for finding in findings:
        if finding.fix:
            raise EnvironmentFault(f"{finding.what}: {finding.found}: {finding.fix}")
