"""What each linear layer's inputs look like on a calibration set: the second moments that `gptq` needs.

The model is never whole in memory: one decoder layer is there at a time, beside the activations of the whole set.
Calibration is sequential: the inputs of a layer come from the quantised layers before it, so that later layers also
make up for the errors of earlier ones.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from verl_aqn.data import word_problems
from verl_aqn.errors import DataError, ModelError, first_line
from verl_aqn.mxfp4.experts import is_fused
from verl_aqn.mxfp4.model import empty_model
from verl_aqn.mxfp4.storage import Weights, read_config

_BATCH = 8  # sequences a forward pass
_TURNS = 24  # problems in one conversation: more than any sequence length in use can hold


class Calibration:
    """The inputs of every linear layer of the Hugging Face folder ``src`` while it is being quantised, layer by layer.

    ``ids`` int64 [S, L] are the calibration tokens, without padding. For each linear layer, in the model's order, call
    `second_moment` and, once its codes are known, `replace`. The decoder is of Llama's form: a list of layers that all
    get the same mask and rotary embedding.

    Raises:
        ModelError: ``src`` is no Hugging Face folder that transformers can build, its decoder has another form, or it
            is a mixture of experts.
    """

    def __init__(self, src: str | Path, ids: Tensor, dtype: torch.dtype = torch.bfloat16):
        self._weights = Weights(Path(src))
        self._dtype = dtype
        model = empty_model(Path(src), dtype, "sdpa")
        if any(is_fused(module) for module in model.modules()):
            raise ModelError(f"cannot calibrate {type(model).__name__}: experts are rounded plainly only")
        decoder = model.get_decoder()
        self._layers: nn.ModuleList | None = getattr(decoder, "layers", None)
        if self._layers is None:
            raise ModelError(f"cannot calibrate {type(model).__name__}: its decoder has no list named layers")
        self._prefix = next(name for name, module in model.named_modules() if module is self._layers)
        embedding = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embedding)
        self._load(embedding, name)
        self._hidden: list[Tensor] = []
        self._arguments: list[dict[str, Any]] = []
        for batch in ids.split(_BATCH):
            hidden, arguments = _first_inputs(decoder, self._layers[0], batch)
            self._hidden.append(hidden)
            self._arguments.append(arguments)
        self._at = -1
        self._moments: dict[str, Tensor] = {}

    def second_moment(self, name: str) -> Tensor:
        """X^T X, float32 [K, K], over the inputs X of linear layer ``name``; zero where it never ran.

        Layers with the same input (q, k, v; gate, up) get the same tensor. Asking for a layer of the next decoder layer
        ends the current one: what was not replaced until then stays as it was.

        Raises:
            ModelError: ``name`` is not in the decoder's layers.
        """
        assert self._layers is not None
        if not name.startswith(self._prefix + "."):
            raise ModelError(f"cannot calibrate {name}, which is outside {self._prefix}: exclude it")
        index = int(name.removeprefix(self._prefix + ".").split(".")[0])
        assert index >= self._at, "layers are asked for in the model's order"
        while self._at < index:
            self._advance()
        if name not in self._moments:
            k = self._layer_module(name).in_features
            self._moments[name] = torch.zeros(k, k)
        return self._moments[name]

    def replace(self, name: str, weight: Tensor) -> None:
        """From here on linear layer ``name`` multiplies by ``weight`` [N, K]."""
        self._layer_module(name).weight.data = weight.to(self._dtype)

    def _layer_module(self, name: str) -> nn.Linear:
        assert self._layers is not None
        module = self._layers.get_submodule(name.removeprefix(self._prefix + "."))
        assert isinstance(module, nn.Linear), name
        return module

    @torch.no_grad()
    def _advance(self) -> None:
        """Pass the inputs through the current layer, drop it, load the next one, and record its linears' inputs."""
        assert self._layers is not None
        if self._at >= 0:
            layer = self._layers[self._at]
            for i, arguments in enumerate(self._arguments):
                self._hidden[i] = _output(layer, self._hidden[i], arguments)
            layer.to("meta")
        self._at += 1
        layer, prefix = self._layers[self._at], f"{self._prefix}.{self._at}"
        self._load(layer, prefix)
        self._moments = {}
        linears = {
            f"{prefix}.{name}": module for name, module in layer.named_modules() if isinstance(module, nn.Linear)
        }
        seen: list[tuple[Tensor, str]] = []  # inputs of this forward pass, each with the first layer that it went into

        def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0]
                for other, first in seen:
                    if other is x:
                        self._moments[name] = self._moments[first]
                        return
                seen.append((x, name))
                x = x.flatten(0, -2).float()
                if name not in self._moments:
                    self._moments[name] = torch.zeros(x.shape[1], x.shape[1])
                self._moments[name].addmm_(x.T, x)

            return hook

        handles = [module.register_forward_pre_hook(record(name)) for name, module in linears.items()]
        for hidden, arguments in zip(self._hidden, self._arguments, strict=True):
            _output(layer, hidden, arguments)
            seen.clear()
        for handle in handles:
            handle.remove()

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {name: self._weights.read(f"{prefix}.{name}").to(self._dtype) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)


def calibration_ids(
    src: str | Path, sources: list[str], sequences: int = 48, length: int = 256, seed: int = 0
) -> Tensor:
    """Tokens int64 [S, L] of texts drawn by ``seed`` from ``sources``, which take turns.

    A source is ``embedded`` (the training side of the word problems, as conversations) or a JSONL file whose lines hold
    ``text`` or, as GSM8K's do, ``question`` and ``answer``. A sequence is whole texts in a row, the last one cut.

    Raises:
        DataError: a file cannot be read, lacks these keys, or holds too little text.
        ModelError: ``src`` has no tokenizer.
    """
    from transformers import AutoTokenizer

    read_config(Path(src))  # transformers would look for a missing folder on the hub
    try:
        tokenizer = AutoTokenizer.from_pretrained(src)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot calibrate {src} without its tokenizer: {first_line(error)}") from error
    streams = []
    for source in sources:
        texts = conversations(tokenizer, sequences, "train", seed) if source == "embedded" else read_texts(source)
        random.Random(seed).shuffle(texts)
        streams.append((source, iter(texts)))
    rows = []
    for i in range(sequences):
        source, texts_left = streams[i % len(streams)]
        rows.append(_fill(tokenizer, texts_left, length, source))
    return torch.tensor(rows)


def read_texts(file: str | Path) -> list[str]:
    """Each line's ``text``, or its ``question`` and ``answer`` on two lines. DataError where a line has neither."""
    try:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines() if line.strip()]
        return [row["text"] if "text" in row else f"{row['question']}\n{row['answer']}" for row in rows]
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror}): give a JSONL file or 'embedded'") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not JSONL with `text`, or `question` and `answer`, in every line") from error


def _fill(tokenizer: Any, texts: Iterator[str], length: int, source: str) -> list[int]:
    row: list[int] = []
    while len(row) < length:
        text = next(texts, None)
        if text is None:
            raise DataError(f"{source} holds too little text for the calibration set: add lines")
        row += tokenizer(text, add_special_tokens=False)["input_ids"]
    return row[:length]


def conversations(tokenizer: Any, n: int, split: str, seed: int) -> list[str]:
    """``n`` chats of many problems each: chats of one problem would mostly repeat the worked examples."""
    problems = word_problems.problems(n * _TURNS, split, seed)
    texts = []
    for i in range(n):
        first, *others = problems[i * _TURNS : (i + 1) * _TURNS]
        messages = word_problems.prompt(first.question)
        for problem, after in zip([first, *others], [*others, None], strict=True):
            messages.append({"role": "assistant", "content": problem.answer})
            if after is not None:
                messages.append({"role": "user", "content": after.question})
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    return texts


class _Stop(Exception):
    pass


@torch.no_grad()
def _first_inputs(decoder: nn.Module, first: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """(hidden states, keyword arguments) with which ``decoder`` calls its ``first`` layer."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        caught.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Stop

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        decoder(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return caught[0]


def _output(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    result = layer(hidden, **arguments)
    return result[0] if isinstance(result, tuple) else result
