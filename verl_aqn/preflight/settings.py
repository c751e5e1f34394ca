"""Find settings of a recipe that contradict each other, which verl or vLLM would report only in a running process.

`verl_aqn.preflight.verl_says` asks verl itself; this module checks what verl finds late or never.
"""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from verl_aqn.preflight.engine_settings import check_engine
from verl_aqn.preflight.findings import Finding

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PROMPT, RESPONSE = "data.max_prompt_length", "data.max_response_length"
GROUPED = ("grpo", "grpo_vectorized", "gdpo", "gpg", "opo", "rloo", "rloo_vectorized")
"""verl's estimators that subtract the mean reward of the responses to one prompt; `grpo_passk` raises for one."""


def check_settings(config: DictConfig, positions: int | None) -> Iterator[Finding]:
    """Check the recipe's settings against each other.

    Args:
        positions: the maximum number of tokens of the model (`prepare.positions_of`), if it is known.
    """
    yield _context(config, positions)
    yield _batched_tokens(config)
    yield from _critic(config)
    yield _micro_batches(config)
    yield _sampling(config)
    yield _shares(config)
    yield _overlong(config)
    yield _checkpoints(config)
    yield from check_engine(config)


def uses_critic(config: DictConfig) -> bool:
    """Return whether verl trains a critic (its `need_critic`)."""
    enabled = config.critic.enable
    return config.algorithm.adv_estimator == "gae" if enabled is None else bool(enabled)


def _critic(config: DictConfig) -> Iterator[Finding]:
    """Check that there is a critic exactly if its values are read: verl gives them to the estimator gae alone."""
    estimator, enabled = config.algorithm.adv_estimator, str(config.critic.enable).lower()
    reads, fix = estimator == "gae", ""
    if uses_critic(config) and not reads:
        fix = (
            f"algorithm.adv_estimator={estimator} reads no values: set critic.enable=null, or "
            "algorithm.adv_estimator=gae"
        )
    elif reads and not uses_critic(config):
        fix = "algorithm.adv_estimator=gae reads a critic's values: set critic.enable=null, or choose another estimator"
    if reads or fix:
        yield Finding("critic", f"critic.enable={enabled}", fix)


def _context(config: DictConfig, positions: int | None) -> Finding:
    rollout = config.actor_rollout_ref.rollout
    prompt, response = int(config.data.max_prompt_length), int(config.data.max_response_length)
    need, fix = prompt + response, ""
    for key, other in ((f"{ROLLOUT}.prompt_length", PROMPT), (f"{ROLLOUT}.response_length", RESPONSE)):
        if OmegaConf.select(config, key) != OmegaConf.select(config, other):
            fix = f"{key}={OmegaConf.select(config, key)} differs from {other}: set only {other}"
    length = rollout.max_model_len
    if positions is not None and need > positions:
        fix = f"the model supports at most {positions:,} tokens: lower {PROMPT} or {RESPONSE}"
    elif positions is not None and length is not None and length > positions:
        fix = f"{ROLLOUT}.max_model_len={length} is above the {positions:,} tokens that the model supports: lower it"
    elif length is not None and length < need:
        fix = (
            f"{ROLLOUT}.max_model_len={length} would cut responses: set it to {need} or null, or lower {PROMPT} or "
            f"{RESPONSE}"
        )
    return Finding("context", f"{PROMPT} {prompt:,} + {RESPONSE} {response:,} tokens", fix)


def _batched_tokens(config: DictConfig) -> Finding:
    """Check that a batch of vLLM has a token for each sequence.

    Without chunked prefill verl raises the limit itself.
    """
    rollout = config.actor_rollout_ref.rollout
    tokens, sequences = int(rollout.max_num_batched_tokens), int(rollout.max_num_seqs)
    key, other = f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.max_num_seqs"
    fix = f"vLLM needs at least {other}={sequences}: set {key} to {sequences} or more" if tokens < sequences else ""
    return Finding("rollout's batches", f"{key}={tokens}", fix)


def _micro_batches(config: DictConfig) -> Finding:
    """Check that each micro-batch can hold one whole sequence (verl's `prepare_micro_batches`)."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    what, found = "micro-batches", f"sequences of {config.data.max_prompt_length + config.data.max_response_length:,}"
    found += f" tokens ({PROMPT} + {RESPONSE})"
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        flag = f"{ROLLOUT}.log_prob_use_dynamic_bsz={str(rollout.log_prob_use_dynamic_bsz).lower()}"
        return Finding(
            what, flag, f"set it to the value of {ACTOR}.use_dynamic_bsz: {str(actor.use_dynamic_bsz).lower()}"
        )
    batch = int(config.data.train_batch_size) * int(rollout.n)
    mini = int(actor.ppo_mini_batch_size) * int(rollout.n)
    parts = [
        (actor.use_dynamic_bsz, f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ACTOR}.ppo_micro_batch_size_per_gpu", mini),
        (
            actor.use_dynamic_bsz, f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
            f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", batch,
        ),
    ]  # fmt: skip
    if uses_critic(config):
        dynamic, tokens = config.critic.use_dynamic_bsz, "critic.ppo_max_token_len_per_gpu"
        answers = int(config.critic.ppo_mini_batch_size) * int(rollout.n)
        parts.append((dynamic, tokens, "critic.ppo_micro_batch_size_per_gpu", answers))
        parts.append((dynamic, tokens, "critic.forward_micro_batch_size_per_gpu", batch))
    for dynamic, tokens_key, size_key, answers in parts:
        if fix := _micro_batch_fault(config, dynamic, tokens_key, size_key, answers):
            return Finding(what, found, fix)
    return Finding(what, found)


def _micro_batch_fault(config: DictConfig, dynamic: bool, tokens_key: str, size_key: str, answers: int) -> str:
    parallel = int(config.actor_rollout_ref.actor.ulysses_sequence_parallel_size)
    if dynamic:
        longest = int(config.data.max_prompt_length) + int(config.data.max_response_length)
        limit = OmegaConf.select(config, tokens_key)
        if limit is None or int(limit) * parallel < longest:
            return f"{tokens_key}={limit} is less than one sequence: set it to {-(-longest // parallel)} or more"
        return ""
    size, ranks = OmegaConf.select(config, size_key), _ranks(config) // parallel
    if size is None:
        return f"set {size_key}, or use_dynamic_bsz=true in that block"
    if int(size) < 1 or answers // max(ranks, 1) % int(size):
        return f"{size_key}={size} does not divide the {answers // max(ranks, 1)} responses of a rank: set a divisor"
    return ""


def _sampling(config: DictConfig) -> Finding:
    """Check that responses to a prompt can differ, and that there are several if the estimator compares them."""
    temperature, estimator = config.actor_rollout_ref.rollout.temperature, config.algorithm.adv_estimator
    key = f"{ROLLOUT}.temperature"
    fix = (
        ""
        if temperature > 0
        else f"set {key} above 0: otherwise all responses to a prompt are the same, and verl divides by the temperature"
    )
    if config.actor_rollout_ref.rollout.n == 1 and estimator in GROUPED and not config.trainer.val_only:
        # verl then takes the reward itself as the advantage, or with rloo_vectorized 0.
        fix = fix or (
            f"algorithm.adv_estimator={estimator} compares the responses to a prompt: set {ROLLOUT}.n to 2 or more, or "
            "algorithm.adv_estimator=reinforce_plus_plus"
        )
    return Finding("sampling", f"{key}={temperature:g}, {ROLLOUT}.n={config.actor_rollout_ref.rollout.n}", fix)


def _shares(config: DictConfig) -> Finding:
    """Check how ranks divide the work on a sequence, and the model."""
    actor, ranks, fix = config.actor_rollout_ref.actor, _ranks(config), ""
    sequence, shard = int(actor.ulysses_sequence_parallel_size), int(actor.fsdp_config.fsdp_size)
    if sequence < 1 or ranks % sequence:
        fix = f"set {ACTOR}.ulysses_sequence_parallel_size to a divisor of {ranks}, not {sequence}"
    elif (0 < shard < ranks and ranks % shard) or shard == 0:
        fix = f"set {ACTOR}.fsdp_config.fsdp_size to a divisor of {ranks} or -1, not {shard}"
    return Finding("actor's ranks", f"{ranks} (trainer.n_gpus_per_node × trainer.nnodes)", fix)


def _ranks(config: DictConfig) -> int:
    return int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)


def _overlong(config: DictConfig) -> Finding:
    """Check the reward manager's penalty for long responses, which verl's worker asserts when it starts."""
    key = "reward.reward_kwargs.overlong_buffer_cfg"
    buffer = OmegaConf.select(config, key)
    manager = config.reward.reward_manager
    if manager.name != "dapo" or manager.source != "register" or not buffer or not buffer.get("enable"):
        return Finding("overlong penalty", "none")
    length, limit = buffer.get("len"), OmegaConf.select(config, "reward.reward_kwargs.max_resp_len")
    response, fix = int(config.data.max_response_length), ""
    if type(length) is not int or not 0 < length <= response:
        fix = f"set {key}.len to 1 to {response} ({RESPONSE}), or {key}.enable=false"
    elif limit != response:
        fix = (
            f"reward.reward_kwargs.max_resp_len={limit} differs from {RESPONSE}={response}: set both to the same value"
        )
    return Finding("overlong penalty", f"{key}.len={length}, {RESPONSE}={response}", fix)


def _checkpoints(config: DictConfig) -> Finding:
    """Check that a run resumes with all that its checkpoints must hold: without a word, verl begins the rest anew."""
    saves, fix = int(config.trainer.save_freq) > 0, ""
    blocks = {ACTOR: config.actor_rollout_ref.actor, **({"critic": config.critic} if uses_critic(config) else {})}
    for key, block in blocks.items():
        for what in ("save_contents", "load_contents"):
            left_out = [part for part in ("model", "optimizer", "extra") if part not in block.checkpoint[what]]
            if saves and left_out and config.trainer.resume_mode != "disable":
                fix = fix or (
                    f"{key}.checkpoint.{what} lacks {', '.join(left_out)}, so a run that resumes would begin these "
                    "anew: add them, or set trainer.save_freq=-1"
                )
    return Finding("checkpoints", f"every {config.trainer.save_freq} steps" if saves else "none", fix)
