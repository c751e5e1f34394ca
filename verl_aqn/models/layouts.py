"""Which layouts a model can take: decided once from the built model, by its structure and by trying it.

A model can share prompts, or have several sequences in one row, if its tokens meet in attention alone and all of that
goes through transformers' attention interface. Three things are asked:

- A layer that mixes tokens needs a cache when it generates, so its `forward` takes one. Each such layer must have gone
  through the interface. Layers that carry a state (linear attention, Mamba, convolutions) do not.
- No layer may count the slots of a row in place of positions.
- The model must give what it gives for separate rows, on a few tokens.

Whatever does not pass takes separate rows, which are right for every model.
"""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from verl_aqn.errors import ModelError, first_line
from verl_aqn.models.attention import NAME, LayoutError, Rule, Watch, laid_out
from verl_aqn.models.shared_prompts import SharedPrompts, share_prompts

SHARED, PACKED, SEPARATE = "shared prompts", "packed rows", "separate rows"
# Largest difference of logits to those of separate rows, as a part of their size. Siblings that leak make it 0.1 to 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDED = 0.08  # for 16-bit arithmetic
_REFUSED = 0.3  # so far apart is no rounding in 16 bits, not even of a few tokens through other experts
_PROMPTS, _RESPONSES = (7, 7, 7, 4), (4, 3, 1, 3)  # lengths


@dataclass(frozen=True)
class Layout:
    """What a model can take. `together`: several sequences may stand in one row; otherwise `reason` says why not.

    `rules`: masks of its kinds of layers, on `device`; `keeps`: the model takes `logits_to_keep`.
    """

    together: bool
    reason: str = ""
    rules: tuple[Rule, ...] = field(default=(), compare=False)
    keeps: bool = True
    device: torch.device | str = "cpu"

    def full(self, length: int) -> bool:
        """Whether the last of `length` tokens sees all of them in every layer: no window and no chunk ends before."""
        key = torch.arange(length, device=self.device)
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self.together and all(bool(rule(zero, zero, key[-1:], key).all()) for rule in self.rules)


def decide(model: PreTrainedModel) -> Layout | None:
    """Find what `model` can take; None where its weights are on meta, so that another rank must say.

    The model has its own attention before and after. That becomes eager where sdpa would leave out what its layers ask
    for (a cap or sinks), or give other values in separate rows.

    Raises ModelError where the model gives padded rows other values than rows alone.
    """
    found = _DECIDED.get(model)
    if found is None and not any(p.is_meta for p in model.parameters()):
        found = _DECIDED[model] = _decide(model)
    return found


_DECIDED: "weakref.WeakKeyDictionary[PreTrainedModel, Layout]" = weakref.WeakKeyDictionary()


def agreed(found: Layout | None) -> Layout:
    """What all ranks can take: those whose weights are on meta (None) do as the others."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        assert found
        return found
    told: list[tuple[bool, str, bool] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, found and (found.together, found.reason, found.keeps))
    together, reason, keeps = min(answer for answer in told if answer)  # False before True
    return Layout(together, reason, found.rules if found else (), keeps)


def agree_on_attention(model: PreTrainedModel, decided: bool) -> None:
    """Give a model on meta the attention that `decide` left the others with; it is their own, or eager.

    `decided`: whether this rank's own `decide` said something. All ranks must call it.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    told: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, attention_of(model) if decided else None)
    name = next(one for one in told if one)
    if not decided and attention_of(model) != name:
        use_attention(model, name)


def use_attention(model: PreTrainedModel, name: str) -> bool:
    """Set the attention of the language model; False where it does not use transformers' attention interface."""
    parts = [key for key in model.config.sub_configs if getattr(model.config, key) is model.config.get_text_config()]
    if model.config.get_text_config() is model.config or not parts:
        model.set_attn_implementation(name)
    else:
        model.set_attn_implementation({parts[0]: name})
    return attention_of(model) == name


def attention_of(model: PreTrainedModel) -> str:
    """Name of the language model's attention implementation."""
    return model.config.get_text_config()._attn_implementation or "eager"


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that mix tokens: their `forward` takes a cache, and nothing inside of them does."""
    taking = {name: module for name, module in model.named_modules() if _takes_cache(module)}
    return {n: m for n, m in taking.items() if not any(other.startswith(n + ".") for other in taking if n) and n}


def _takes_cache(module: nn.Module) -> bool:
    try:
        names = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):  # compiled code tells none
        return False
    return any("cache" in name or "past" in name or name == "state" for name in names)


def _decide(model: PreTrainedModel) -> Layout:
    told = attention_of(model)
    samples, watch = _probe_inputs(model), Watch()
    reason, shared = "", None
    with _evaluating(model):
        try:
            if use_attention(model, NAME):
                shared = _shared_logits(model, samples, watch)
            else:
                reason = f"{type(model).__name__} does not use transformers' attention interface"
        except LayoutError as error:
            reason = str(error)
        except Exception as error:  # of any kind, from code of any model: this layout is not for this model
            reason = f"a forward with shared prompts fails ({type(error).__name__}: {first_line(error)})"
        seen = set(map(id, watch.modules))
        left = [(name, module) for name, module in mixers(model).items() if id(module) not in seen]
        if left and seen and not reason:
            name, module = left[0]
            reason = f"{name} ({type(module).__name__}) mixes tokens outside of transformers' attention interface"
        if watch.arguments and told == "sdpa":
            told = "eager"  # sdpa leaves a cap and sinks out without a word
        use_attention(model, told)
        if not reason and not seen:
            reason = f"no layer of {type(model).__name__} uses transformers' attention interface"
        if not reason:
            assert shared is not None
            reason = _difference(model, samples, shared, told)
        if reason and told == "sdpa":
            use_attention(model, _faithful(model, samples, told))
    return Layout(not reason, reason, tuple(watch.rules), _keeps(model), samples[0][0].device)


def _keeps(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def shared_inputs(layout: SharedPrompts, keeps: bool) -> dict[str, Tensor]:
    """Inputs of a model for a row that holds each prompt once; where `keeps`, logits for its response tokens alone."""
    # Without a mask transformers would take each step back of the position ids for the start of another sequence.
    inputs = {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": torch.ones_like(layout.input_ids),
    }
    return inputs | ({"logits_to_keep": layout.column} if keeps else {})


def _probe_inputs(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """A group of three and one of one. Ids of tokens are low, where none stands for an image."""
    generator = torch.Generator().manual_seed(0)
    size = min(getattr(model.config.get_text_config(), "vocab_size", None) or 256, 256)
    device = next(model.parameters()).device

    def tokens(length: int) -> Tensor:
        return torch.randint(size // 2, size, (length,), generator=generator).to(device)

    first, last = tokens(_PROMPTS[0]), tokens(_PROMPTS[-1])
    return [first, first, first, last], [tokens(length) for length in _RESPONSES]


def _shared_logits(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]], watch: Watch) -> Tensor:
    """Logits [N, V] of the response tokens in one row."""
    layout = share_prompts(*samples)
    with laid_out(layout, watch), _NoSlots(model, layout.input_ids.shape[1]):
        logits = model(**shared_inputs(layout, _keeps(model)), use_cache=False).logits[0]
    if not _keeps(model):
        logits = logits[layout.column]
    if len(logits) != len(layout.column):
        raise LayoutError(f"{type(model).__name__} gives {len(logits)} logits where {len(layout.column)} are kept")
    return logits


def _difference(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]], shared: Tensor, told: str) -> str:
    """Say by how much the logits differ from those of separate rows; nothing where they are equal."""
    if told.startswith(("flash", "paged", "flex")):  # not on every device
        use_attention(model, "eager")
    logits = _padded(model, samples)
    use_attention(model, told)
    # Those that a sibling before them, or another group, could change.
    found = _off(shared[_RESPONSES[0] + 1 :], logits[_RESPONSES[0] + 1 :])
    return f"its logits differ by {found:.1%} from those of separate rows" if found else ""


def _faithful(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]], told: str) -> str:
    """Name the attention that gives padded rows what each row gives alone by eager attention: `told`, or eager.

    Raises ModelError where neither does.
    """
    # Of the shortest row: few forwards, because some layers that carry a state are slow on a CPU.
    short = samples[0][-1:], samples[1][-1:]
    count = len(short[1][0])
    use_attention(model, "eager")
    alone = _padded(model, short)
    use_attention(model, told)
    if not _off(_padded(model, short), alone) and not _off(_padded(model, samples)[-count:], alone):
        return told
    use_attention(model, "eager")
    off = _off(_padded(model, samples)[-count:], alone)
    if off > (0 if alone.dtype in _TOLERANCE else _REFUSED):
        raise ModelError(
            f"{type(model).__name__} gives padded rows other logits than the same rows alone ({off:.1%} apart): it "
            "cannot be trained in batches"
        )
    return "eager"


def _padded(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Logits [N, V] of the response tokens, one row a sample."""
    rows = [torch.cat(pair) for pair in zip(*samples, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.cat([x[len(p) - 1 : len(p) + len(r) - 1] for x, p, r in zip(logits, *samples, strict=True)])


def _off(some: Tensor, others: Tensor) -> float:
    """How far logits are apart, as a part of their size; 0 where that is rounding."""
    a, b = (x.float() - x.float().mean(-1, keepdim=True) for x in (some, others))
    off = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)  # [N]
    # In 16 bits a token may go to another expert by rounding: there the middle one counts.
    exact = others.dtype in _TOLERANCE
    found = float(off.max() if exact else off.median())
    return 0.0 if found <= _TOLERANCE.get(others.dtype, _ROUNDED) else found


class _NoSlots(TorchFunctionMode):
    """Raise LayoutError if a layer that attends, or what holds it, counts `size` slots: positions are given to it."""

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.size, self.model = size, model
        self.stack = [""]  # names of the modules that run now
        self.hooks: list[Any] = []
        self.holders = {""} | {".".join(n.split(".")[:i]) for n in mixers(model) for i in range(n.count(".") + 2)}

    def __enter__(self):
        for name, module in self.model.named_modules():
            self.hooks += [
                module.register_forward_pre_hook(lambda _, __, name=name: self.stack.append(name)),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def _leave(self, *_) -> None:
        self.stack.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.arange and len(result) == self.size and self.stack[-1] in self.holders:
            where = self.stack[-1] or "the model"
            raise LayoutError(f"{where} counts the tokens of a row, where it is given their positions")
        return result


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
