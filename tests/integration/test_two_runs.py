"""Two runs at the same time on one machine: each has its own cluster, sockets and records."""

from omegaconf import OmegaConf

from tests.integration.conftest import leftovers, lines, newest

SHORT = ["trainer.val_before_train=false", "trainer.save_freq=-1", "trainer.total_training_steps=2"]


def test_two_runs_at_once_end_well_and_do_not_mix(train, tmp_path):
    before = leftovers()
    bases = {seed: tmp_path / f"seed{seed}" for seed in (1, 2)}
    started = [train(base, *SHORT, "aqn.noise.num_stages=2", f"aqn.seed={seed}") for seed, base in bases.items()]
    for process in started:
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
    assert leftovers() == before
    noise = []
    for seed, base in bases.items():
        run = newest(base)
        assert OmegaConf.load(run / "config.yaml").aqn.seed == seed
        assert [record["step"] for record in lines(run / "metrics.jsonl", "step")] == [1, 2]
        (noisy,) = [record for record in lines(run / "evidence.jsonl", "noise") if record["sigma_target"]]
        noise.append(noisy["weights_digest"])
    assert noise[0] != noise[1]
