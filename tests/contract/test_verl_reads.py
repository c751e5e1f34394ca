"""A key that is passed on to verl is read in a run, by verl or by this package; see tests/helpers/verl_reads.py."""

import pytest

from tests.helpers.verl_reads import KeyReads
from verl_aqn.config.compose import compose_verl
from verl_aqn.config.verl_keys import leaves, rules, rules_of

ACTOR, ROLLOUT, ENGINE = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.fsdp_config"
TREE = [key for key, _ in leaves(compose_verl()) if not key.endswith("._target_")]
BEYOND = [rule.key for rule in rules() if rule.beyond]
# Keys that are refused as unread, although verl's code mentions them, and why the value still has no effect.
NO_EFFECT = {
    "fsdp_config.forward_only": "a worker that trains stops if it is set",
    "fsdp.forward_only": "a worker that trains stops if it is set",
    f"{ENGINE}.strategy": "FSDPActorConfig overwrites it",
    "critic.fsdp.strategy": "FSDPCriticConfig overwrites it",
    "actor_rollout_ref.model.mtp.enable": "decides only which metrics are logged",
    "actor_rollout_ref.model.mtp.enable_rollout": "decides only which metrics are logged",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "copied to ppo_micro_batch_size, which nothing reads",
    "precision_debugger.steps": "verl logs that it ignores it",
    "data.return_raw_chat": "copied to an attribute that nothing reads",
    "data.return_full_prompt": "copied to an attribute that nothing reads",
    "reward.reward_model.rollout.disaggregation.enabled": "read only with the checkpoint engine delta_sharded",
}

# What no run reads, most of it invented.
UNREAD = [
    "trainer.fake",
    # a name that other blocks have
    "data.enable",
    f"{ACTOR}.name",
    f"{ROLLOUT}.path",
    "critic.kl_loss_coef",
    "critic.optim.temperature",
    # read only by an engine or a trainer that no run uses
    f"{ACTOR}.megatron.tensor_model_parallel_size",
    "trainer.v1.colocate_async.num_warmup_batches",
    "trainer.balance_batch",  # RayPPOTrainer
    # only checked, or only a field of a dataclass
    f"{ACTOR}.ppo_micro_batch_size",
    f"{ACTOR}.grad_clip",
    # read by verl's function, which ours replaces
    "critic.forward_max_token_len_per_gpu",
    f"{ACTOR}.policy_loss.fake_ratio",
]


@pytest.fixture(scope="module")
def reads():
    return KeyReads([*TREE, *BEYOND, *UNREAD])


def passed_on(key):
    """Return whether a user's value goes to verl without a check of our own."""
    return any(rule.kind == "passed" and not rule.by for rule in rules_of(key))


def test_every_key_that_is_passed_on_is_read(reads):
    keys = [key for key in (*TREE, *BEYOND) if passed_on(key)]
    assert len(keys) > 400
    assert [key for key in keys if not reads.of(key)] == [], "refuse these keys in verl_keys.yaml"


def test_what_is_refused_as_unread_is_not_read(reads):
    """A new verl may begin to read such a key; then it can be passed on."""
    claimed = [
        key
        for key in TREE
        for rule in rules_of(key)
        if rule.kind == "refused" and not rule.conditions and "does not read it" in rule.reason
        if not rule.reason.startswith("verl 0.9")  # an older version's name, which another block may have today
    ]
    assert len(claimed) > 60
    known = [key for key in claimed if any(key == end or key.endswith(f".{end}") for end in NO_EFFECT)]
    assert [key for key in claimed if reads.of(key) and key not in known] == []
    assert [key for key in known if not reads.of(key)] == [], "no longer mentioned: remove it from NO_EFFECT"


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_no_run_reads_is_found(reads, key):
    assert not reads.of(key)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("data.truncation", "verl.utils.dataset.rl_dataset"),  # self.config.get("…")
        ("algorithm.gamma", "verl.trainer.ppo.v1.trainer_base"),  # self.config.algorithm.…
        (f"{ACTOR}.optim.lr", "verl.workers.config.optimizer"),  # a dataclass in a function's argument
        (f"{ENGINE}.param_offload", "verl.workers.engine.fsdp.transformer_impl"),
        (f"{ACTOR}.ulysses_sequence_parallel_size", "verl.workers.config.actor"),  # copied by __post_init__
        (f"{ACTOR}.entropy_checkpointing", "verl.workers.engine.fsdp.transformer_impl"),  # copied by an interpolation
        (f"{ROLLOUT}.engine_kwargs.vllm", "verl.workers.rollout.vllm_rollout.vllm_async_server"),  # as a whole
        ("critic.use_dynamic_bsz", "verl_aqn.integrations.verl.micro_batches"),  # this package
        ("transfer_queue.metrics.port", "transfer_queue.interface"),
    ],
)
def test_every_way_to_read_a_key_is_known(reads, key, module):
    assert module in {place.partition(":")[0] for place in reads.of(key)}


def test_a_new_key_in_a_block_that_is_passed_on_fails(reads):
    """The first test would list it: the table of keys passes on the whole block."""
    assert passed_on(UNREAD[-1])
    assert not reads.of(UNREAD[-1])
