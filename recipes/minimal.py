"""The whole algorithm on one page: GRPO with LoRA on a packed MXFP4 base, and annealed noise while the policy explores.

    python recipes/minimal.py            # a random tiny model learns to prefer the letters a to m, in half a minute
    python recipes/minimal.py embedded   # SmolLM2-135M-Instruct and word problems; a step takes minutes on one core

The two rules that matter: the base is frozen, so its packed bytes never change; and noise is a function of (seed, step,
parameter name), written as clean + noise for the rollout and taken away again for the update and for validation.
`verl-aqn train` does the same with verl, vLLM and Ray, on many devices, and checks each of these claims.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_aqn.bench import letters
from verl_aqn.cache import cache_dir
from verl_aqn.mxfp4 import Mxfp4Linear
from verl_aqn.noise import NoiseInjector, NoiseSpec
from verl_aqn.noise.schedule import SigmaSchedule
from verl_aqn.tasks import gsm8k
from verl_aqn.tasks.smollm2 import embedded_model, tiny_model
from verl_aqn.tasks.word_problems import problems, prompt

PROMPTS, RESPONSES, UPDATES = 4, 8, 2  # prompts a step, responses to a prompt (a group), updates with one batch
CLIP_LOW, CLIP_HIGH = 0.2, 0.25  # how far the policy may move from the one that is updated first


class Trainer:
    """A policy (packed base, LoRA adapter), its noise, its reward, and the steps of GRPO that train it."""

    def __init__(self, folder: Path, reward, *, steps: int, lr: float, max_tokens: int, seed: int = 0):
        torch.manual_seed(seed)
        self.reward, self.max_tokens, self.seed = reward, max_tokens, seed
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):  # embedding and head stay as they are
                model.model.set_submodule(name, Mxfp4Linear.from_linear(layer))
        self.noise = NoiseInjector(model)  # keeps a copy of the clean norm weights
        self.schedule = SigmaSchedule(sigma_start=0.05, sigma_end=1e-5, num_stages=10, total_steps=steps)
        self.model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        self.adapter = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.adapter, lr=lr)

    def step(self, step: int, batch: list) -> tuple[float, float]:
        """Explore with noise, then learn without it; return σ and the mean reward of the responses."""
        sigma = self.schedule.sigma(step)
        self.noise.apply(NoiseSpec(step=step, seed=self.seed, sigma=sigma, unit="rms"))
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": RESPONSES}
        groups = [self.respond(problem, **sampling) for problem in batch]
        self.noise.restore()  # the update sees the clean policy
        rewards = torch.stack([rewards for _, _, rewards in groups])  # [prompts, responses]
        # GRPO: a response is as good as it is better than the others to its prompt.
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
        tokens = sum(int(mask.sum()) for _, mask, _ in groups)
        with torch.no_grad():
            old = [self.log_probs(ids, mask) for ids, mask, _ in groups]
        for _ in range(UPDATES):
            for (ids, mask, _), advantage, before in zip(groups, advantages, old, strict=True):
                ratio = (self.log_probs(ids, mask) - before).exp()  # [responses, T]
                clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
                gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
                (-(gain * mask).sum() / tokens).backward()  # the mean over all tokens of the batch
            nn.utils.clip_grad_norm_(self.adapter, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return sigma, rewards.mean().item()

    def validate(self, items: list) -> float:
        """Return the mean reward of one greedy response to each problem. Its norm weights are the clean ones."""
        self.noise.restore()
        return torch.cat([self.respond(problem, do_sample=False)[2] for problem in items]).mean().item()

    @torch.no_grad()
    def respond(self, problem, **how) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids [N, P + T], the mask [N, T] of the response's tokens up to the first EOS, and the rewards [N]."""
        turns = prompt(problem.question)
        form = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        asked = self.tokenizer.apply_chat_template(turns, **form)
        ids = self.model.generate(**asked, max_new_tokens=self.max_tokens, **how)
        response = ids[:, asked["input_ids"].shape[1] :]
        ends = (response == self.tokenizer.eos_token_id).int()
        mask = (ends.cumsum(1) - ends == 0).float()  # what follows the first EOS is padding
        texts = self.tokenizer.batch_decode(response, skip_special_tokens=True)
        return ids, mask, torch.tensor([self.reward(text, problem.truth) for text in texts])

    def log_probs(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probability [N, T] of each token of the responses, at temperature 1."""
        length = mask.shape[1]
        logits = self.model(input_ids=ids, logits_to_keep=length + 1).logits[:, :-1]  # [N, T, V]
        return logits.log_softmax(-1).gather(-1, ids[:, -length:, None]).squeeze(-1)


def make_trainer(task: str, folder: Path, steps: int) -> Trainer:
    """Return the trainer of `task`: "embedded", or "tiny" with a model that is written to `folder`."""
    if task == "embedded":
        return Trainer(embedded_model(cache_dir()), gsm8k.score, steps=steps, lr=1e-4, max_tokens=16)

    def share_of_letters(text: str, truth: str) -> float:
        return letters.compute_score("letters", text, truth)["score"]

    return Trainer(tiny_model(folder / "tiny"), share_of_letters, steps=steps, lr=2e-2, max_tokens=8)


def train(trainer: Trainer, steps: int) -> list[float]:
    """Train, print a line a step, and return the mean reward of each step."""
    items, stream = problems(16, "test", seed=0), itertools.cycle(problems(512, "train", seed=0))
    print(f"validation before: reward {trainer.validate(items):.3f}", flush=True)
    rewards = []
    for step in range(steps):
        sigma, reward = trainer.step(step, list(itertools.islice(stream, PROMPTS)))
        rewards.append(reward)
        print(f"step {step + 1:2}/{steps}  σ {sigma:.2e}  reward {reward:.3f}", flush=True)
    print(f"validation after:  reward {trainer.validate(items):.3f}")
    return rewards


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        train(make_trainer(sys.argv[1] if len(sys.argv) > 1 else "tiny", Path(scratch), steps=20), steps=20)
