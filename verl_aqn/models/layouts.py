"""Decision about the layouts that a model supports: made once for a built model, from its structure and a test run.

A model can share prompts, or process several sequences in one row, if its tokens interact only in attention and all
attention uses transformers' attention interface. There are three checks:

- A layer that mixes tokens needs a cache during generation, so its `forward` has an argument for a cache. Each such
  layer must use the attention interface. Recurrent layers (linear attention, Mamba, convolutions) do not.
- No layer may count the tokens of a row instead of using the given positions.
- For a few tokens the model must give the same logits as for separate rows.

A model that fails a check gets separate rows, which are correct for every model.
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
from transformers.modeling_outputs import MoeModelOutputWithPast

from verl_aqn.errors import ModelError, first_line
from verl_aqn.models.attention import NAME, LayoutError, Rule, Watch, laid_out
from verl_aqn.models.shared_prompts import SharedPrompts, share_prompts

SHARED, PACKED, SEPARATE = "shared prompts", "packed rows", "separate rows"
# Largest allowed relative difference of logits to those of separate rows. If samples affect each other, it is 0.1 to 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDED = 0.08  # for 16-bit arithmetic
_REFUSED = 0.3  # rounding in 16 bits never gives such a difference, even if it sends a few tokens to other experts
_PROMPTS, _RESPONSES = (7, 7, 7, 4), (4, 3, 1, 3)  # lengths


@dataclass(frozen=True)
class Layout:
    """The layouts that a model supports.

    `together`: whether several sequences may be in one row; if not, `reason` says why. `rules`: the mask rules of the
    kinds of layers, on `device`. `keeps`: whether the model supports `logits_to_keep`. `bare`: whether the model
    returns what its head returns, one row for each kept token, without scaling or capping.
    """

    together: bool
    reason: str = ""
    rules: tuple[Rule, ...] = field(default=(), compare=False)
    keeps: bool = True
    bare: bool = False
    device: torch.device | str = "cpu"

    def full(self, length: int) -> bool:
        """Return whether the last of `length` tokens attends to all tokens in every layer, without window or chunk."""
        key = torch.arange(length, device=self.device)
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self.together and all(bool(rule(zero, zero, key[-1:], key).all()) for rule in self.rules)


def decide(model: PreTrainedModel) -> Layout | None:
    """Find the layouts that `model` supports; None if its weights are on meta, so that another rank must decide.

    The model has its own attention implementation before and after the call. This is changed to eager if sdpa ignores
    an argument of the layers (softcap or sinks) or gives other values for padded rows than for single rows.

    Raises:
        ModelError: the model gives other values for padded rows than for single rows.
    """
    found = _DECIDED.get(model)
    if found is None and not any(p.is_meta for p in model.parameters()):
        found = _DECIDED[model] = _decide(model)
    return found


_DECIDED: "weakref.WeakKeyDictionary[PreTrainedModel, Layout]" = weakref.WeakKeyDictionary()


def agreed(found: Layout | None) -> Layout:
    """Return the layout that all ranks support; ranks whose weights are on meta (None) follow the others."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        assert found
        return found
    told: list[tuple[bool, str, bool, bool] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, found and (found.together, found.reason, found.keeps, found.bare))
    together, reason, keeps, bare = min(answer for answer in told if answer)  # False before True
    return Layout(together, reason, found.rules if found else (), keeps, bare)


def agree_on_attention(model: PreTrainedModel, decided: bool) -> None:
    """Set the attention of a model on meta to the one that `decide` chose on the other ranks: their own, or eager.

    `decided` says whether `decide` returned a result on this rank. All ranks must call this.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    told: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, attention_of(model) if decided else None)
    name = next(one for one in told if one)
    if not decided and attention_of(model) != name:
        use_attention(model, name)


def use_attention(model: PreTrainedModel, name: str) -> bool:
    """Set the attention of the language model; return False if it does not use transformers' attention interface."""
    parts = [key for key in model.config.sub_configs if getattr(model.config, key) is model.config.get_text_config()]
    if model.config.get_text_config() is model.config or not parts:
        model.set_attn_implementation(name)
    else:
        model.set_attn_implementation({parts[0]: name})
    return attention_of(model) == name


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the language model's attention implementation."""
    return model.config.get_text_config()._attn_implementation or "eager"


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that mix tokens: their `forward` has an argument for a cache, and no module inside has one."""
    taking = {name: module for name, module in model.named_modules() if _takes_cache(module)}
    return {n: m for n, m in taking.items() if not any(other.startswith(n + ".") for other in taking if n) and n}


def _takes_cache(module: nn.Module) -> bool:
    try:
        names = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):  # compiled code has no signature
        return False
    return any("cache" in name or "past" in name or name == "state" for name in names)


def _decide(model: PreTrainedModel) -> Layout:
    told = attention_of(model)
    samples, watch = _probe_inputs(model), Watch()
    reason, shared, bare = "", None, False
    with _evaluating(model):
        try:
            if use_attention(model, NAME):
                shared, bare = _shared_logits(model, samples, watch)
            else:
                reason = f"{type(model).__name__} does not use transformers' attention interface"
        except LayoutError as error:
            reason = str(error)
        except Exception as error:  # the code of a model may raise any error: it does not support this layout
            reason = f"a forward with shared prompts fails ({type(error).__name__}: {first_line(error)})"
        seen = set(map(id, watch.modules))
        left = [(name, module) for name, module in mixers(model).items() if id(module) not in seen]
        if left and seen and not reason:
            name, module = left[0]
            reason = f"{name} ({type(module).__name__}) mixes tokens outside of transformers' attention interface"
        if watch.arguments and told == "sdpa":
            told = "eager"  # sdpa silently ignores softcap and sinks
        use_attention(model, told)
        if not reason and not seen:
            reason = f"no layer of {type(model).__name__} uses transformers' attention interface"
        if not reason:
            assert shared is not None
            reason = _difference(model, samples, shared, told)
        if reason and told == "sdpa":
            use_attention(model, _faithful(model, samples, told))
    return Layout(not reason, reason, tuple(watch.rules), _keeps(model), bare, samples[0][0].device)


def _keeps(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def has_bare_head(model: PreTrainedModel) -> bool:
    """Return whether a model, which may be on meta, returns what its head returns, and for the kept tokens alone.

    Only the model's own `forward` runs here, on hidden states that its decoder did not compute.
    """
    head, decoder, said = model.get_output_embeddings(), model.get_decoder(), []
    if head is None or decoder is model or not _keeps(model):
        return False
    states = torch.zeros(1, 4, model.config.get_text_config().hidden_size, device="meta", dtype=model.dtype)

    def speak(hidden: Tensor) -> Tensor:
        said.append(hidden.new_zeros(*hidden.shape[:-1], 1))
        return said[-1]

    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states)
    head.forward = speak
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        result = model(input_ids=tokens, use_cache=False, logits_to_keep=2).logits
    except Exception:  # the code of a model may raise any error
        return False
    finally:
        del decoder.forward, head.forward
    return len(said) == 1 and said[0] is result and result.shape[1] == 2


def shared_inputs(layout: SharedPrompts, keeps: bool) -> dict[str, Tensor]:
    """Return the inputs of a model for a row with each prompt once; with `keeps` only logits of response tokens."""
    # Without a mask transformers would treat each decrease of the position ids as the start of another sequence.
    inputs = {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": torch.ones_like(layout.input_ids),
    }
    return inputs | ({"logits_to_keep": layout.column} if keeps else {})


def _probe_inputs(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Return a group of three samples and a group of one. Token ids are low, where no id stands for an image."""
    generator = torch.Generator().manual_seed(0)
    size = min(getattr(model.config.get_text_config(), "vocab_size", None) or 256, 256)
    device = next(model.parameters()).device

    def tokens(length: int) -> Tensor:
        return torch.randint(size // 2, size, (length,), generator=generator).to(device)

    first, last = tokens(_PROMPTS[0]), tokens(_PROMPTS[-1])
    return [first, first, first, last], [tokens(length) for length in _RESPONSES]


def _shared_logits(
    model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]], watch: Watch
) -> tuple[Tensor, bool]:
    """Compute the logits [N, V] of the response tokens in one row, and whether they are what the head returned."""
    layout = share_prompts(*samples)
    head, said = model.get_output_embeddings(), []
    with laid_out(layout, watch), _NoSlots(model, layout.input_ids.shape[1]):
        hook = head and head.register_forward_hook(lambda _, __, result: said.append(result))
        try:
            result = model(**shared_inputs(layout, _keeps(model)), use_cache=False).logits
        finally:
            if hook:
                hook.remove()
    logits = result[0]
    if not _keeps(model):
        logits = logits[layout.column]
    if len(logits) != len(layout.column):
        raise LayoutError(f"{type(model).__name__} gives {len(logits)} logits, but {len(layout.column)} were requested")
    return logits, _keeps(model) and len(said) == 1 and said[0] is result


def _difference(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]], shared: Tensor, told: str) -> str:
    """Return a message with the difference of the logits to those of separate rows, or an empty string if equal."""
    if told.startswith(("flash", "paged", "flex")):  # these are not available on every device
        use_attention(model, "eager")
    logits = _padded(model, samples)
    use_attention(model, told)
    # Only logits that an earlier sample of the group, or another group, could change.
    found = _off(shared[_RESPONSES[0] + 1 :], logits[_RESPONSES[0] + 1 :])
    return f"its logits differ by {found:.1%} from those of separate rows" if found else ""


def _faithful(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]], told: str) -> str:
    """Return the attention that gives padded rows the logits of single rows with eager attention: `told` or eager.

    Raises:
        ModelError: neither does.
    """
    # Only the shortest row, for few forwards, because some recurrent layers are slow on a CPU.
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
            f"{type(model).__name__} gives other logits for padded rows than for single rows ({off:.1%} apart): it "
            "cannot be trained in batches"
        )
    return "eager"


def _padded(model: PreTrainedModel, samples: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Compute the logits [N, V] of the response tokens, with one row per sample."""
    rows = [torch.cat(pair) for pair in zip(*samples, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.cat([x[len(p) - 1 : len(p) + len(r) - 1] for x, p, r in zip(logits, *samples, strict=True)])


def _off(some: Tensor, others: Tensor) -> float:
    """Return the relative difference of logits; 0 if it is within rounding."""
    a, b = (x.float() - x.float().mean(-1, keepdim=True) for x in (some, others))
    off = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)  # [N]
    # In 16 bits rounding may send a token to another expert, so the median is used there.
    exact = others.dtype in _TOLERANCE
    found = float(off.max() if exact else off.median())
    return 0.0 if found <= _TOLERANCE.get(others.dtype, _ROUNDED) else found


class _NoSlots(TorchFunctionMode):
    """A mode that raises LayoutError if a layer with attention, or a parent of it, counts `size` tokens of a row.

    Such a layer must use the positions that it is given.
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.size, self.model = size, model
        self.stack = [""]  # names of the modules that are running
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
            raise LayoutError(f"{where} counts the tokens of a row instead of using their positions")
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
