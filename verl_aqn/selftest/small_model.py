"""A small random Llama with a tokenizer of bytes, made here: nothing is downloaded, and no package has to carry it.

Its sizes suit every kernel that an engine may choose: heads of 128, and N and K that are multiples of 128.
"""

import math
from pathlib import Path

import torch

HIDDEN, INNER, LAYERS, HEADS, KEY_VALUE_HEADS = 512, 1024, 2, 4, 2
VOCABULARY = 320
# verl masks the logits of tokens that the tokenizer lacks in the rollout, but not in the actor. So it lacks none.
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<|unused_{number}|>" for number in range(VOCABULARY - 259)))
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(folder: Path, *, hidden: int = HIDDEN, inner: int = INNER, layers: int = LAYERS, heads: int = HEADS) -> Path:
    """Write the model in bf16 and its tokenizer to `folder`, unless it is there, and return `folder`.

    Weights have standard deviation 1/√K, so that activations keep their size; the head's are three times larger, so
    that a next token is neither certain nor uniform.
    """
    if (folder / "config.json").is_file():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(2, heads // 2), head_dim=hidden // heads,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            gain = 3.0 if name.startswith("lm_head") else 1.0
            parameter.data.normal_(std=gain / math.sqrt(parameter.shape[1]))
    _tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)  # last: config.json says that the folder is complete
    return folder


def _tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    fast.chat_template = CHAT
    return fast
