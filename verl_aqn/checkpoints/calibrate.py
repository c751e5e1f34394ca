"""Second moments of the inputs of each linear layer on a calibration set, for `gptq`.

The whole model is never in memory: only one decoder layer at a time, and the activations of the whole set. Calibration
is sequential: the inputs of a layer come from the quantised layers before it, so that later layers also compensate for
the errors of earlier ones.
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl_aqn.checkpoints.layer_calls import Call, check_decoder, record_calls
from verl_aqn.checkpoints.loading import check_names, empty_model
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.storage import Weights, read_config
from verl_aqn.errors import DataError, ModelError, first_line
from verl_aqn.mxfp4.experts import is_fused
from verl_aqn.tasks import word_problems

_BATCH = 8  # sequences per forward pass
_TURNS = 24  # problems in one conversation: more than fit into any sequence length in use


class Calibration:
    """The inputs of every linear layer of the Hugging Face folder ``src`` during its quantisation, layer by layer.

    ``ids`` int64 [S, L] are the calibration tokens, without padding. For each linear layer, in the order of the model,
    call `second_moment` and then, when its codes are known, `replace`. Each layer runs with the arguments that its
    decoder gives it: its mask, position embeddings and per-layer inputs.

    Raises:
        ModelError: transformers cannot build the model in ``src``, the decoder is not a list of layers that run in
            sequence, or the model is a mixture of experts.
    """

    def __init__(self, src: str | Path, ids: Tensor, dtype: torch.dtype = torch.bfloat16):
        self._weights = Weights(Path(src))
        self._dtype = dtype
        model = _attending(Path(src), dtype)
        if any(is_fused(module) for module in model.modules()):
            raise ModelError(
                f"cannot calibrate {type(model).__name__}: experts are not supported: quantise without calibration"
            )
        naming = Naming.of_folder(src)
        self._sources = naming.sources(self._weights.specs)
        self._converted = naming.converters.keys()
        check_names(model, naming, self._sources, Path(src))
        self._modules = {
            naming.in_checkpoint(name): name for name, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        self._prefix, self._layers = _find_layers(model)
        parent = self._prefix.rpartition(".")[0]
        decoder = model.get_submodule(parent)
        for name, module in decoder.named_children():
            if module is not self._layers:
                self._load(module, f"{parent}.{name}")
        check_decoder(decoder, self._layers, ids[:1])
        self._hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        for batch in ids.split(_BATCH):
            hidden, calls = record_calls(decoder, self._layers, batch)
            self._hidden.append(hidden)
            self._calls.append(calls)
        for module in decoder.children():
            if isinstance(module, nn.Embedding):
                module.to("meta")
        self._at = -1
        self._moments: dict[str, Tensor] = {}

    def check(self, names: Iterable[str]) -> None:
        """Check that all linear layers ``names`` of the checkpoint are in the decoder's layers.

        Raises:
            ModelError: a linear layer is elsewhere.
        """
        for name in names:
            if not self._modules.get(name, name).startswith(self._prefix + "."):
                raise ModelError(f"cannot calibrate {name}, which is outside {self._prefix}: exclude it")

    def second_moment(self, name: str) -> Tensor:
        """Return X^T X, float32 [K, K], over the inputs X of linear layer ``name``; zero if the layer never ran.

        Layers with the same input (q, k, v; gate, up) get the same tensor. The first call for the next decoder layer
        ends the current one: linear layers that were not replaced by then keep their weights.

        Raises:
            ModelError: ``name`` is not in the decoder's layers.
        """
        self.check([name])
        name = self._modules[name]
        index = int(name.removeprefix(self._prefix + ".").split(".")[0])
        assert index >= self._at, "request layers in the order of the model"
        while self._at < index:
            self._advance()
        if name not in self._moments:
            k = self._linear(name).in_features
            self._moments[name] = torch.zeros(k, k)
        return self._moments[name]

    def replace(self, name: str, weight: Tensor) -> None:
        """Replace the weight of linear layer ``name`` by ``weight`` [N, K] for all later computations."""
        self._linear(self._modules[name]).weight.data = weight.to(self._dtype)

    def _linear(self, name: str) -> nn.Linear:
        module = self._layers.get_submodule(name.removeprefix(self._prefix + "."))
        assert isinstance(module, nn.Linear), name
        return module

    @torch.no_grad()
    def _advance(self) -> None:
        """Run the current layer on the inputs, free it, load the next one, and record the inputs of its linears."""
        if self._at >= 0:
            layer = self._layers[self._at]
            for i, calls in enumerate(self._calls):
                self._hidden[i] = _output(layer, self._hidden[i], calls[self._at])
            layer.to("meta")
        self._at += 1
        layer, prefix = self._layers[self._at], f"{self._prefix}.{self._at}"
        self._load(layer, prefix)
        self._moments = {}
        linears = {name: m for name, m in layer.named_modules(prefix=prefix) if isinstance(m, nn.Linear)}
        leaders = self._leaders(layer, linears)

        def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2).float()
                if name not in self._moments:
                    self._moments[name] = torch.zeros(x.shape[1], x.shape[1])
                self._moments[name].addmm_(x.T, x)

            return hook

        with contextlib.ExitStack() as hooks:
            for name in set(leaders.values()):
                hooks.callback(linears[name].register_forward_pre_hook(record(name)).remove)
            for hidden, calls in zip(self._hidden, self._calls, strict=True):
                _output(layer, hidden, calls[self._at])
        self._moments |= {name: self._moments[leader] for name, leader in leaders.items()}

    def _leaders(self, layer: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, str]:
        """Return for each of the ``linears`` of ``layer`` that runs the first one with exactly the same inputs."""
        seen: dict[str, list[tuple[Tensor, int]]] = {}  # references to the tensors keep their ids unique

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: seen.setdefault(name, []).append((inputs[0], inputs[0]._version))

        with contextlib.ExitStack() as hooks:
            for name, module in linears.items():
                hooks.callback(module.register_forward_pre_hook(note(name)).remove)
            _output(layer, self._hidden[-1], self._calls[-1][self._at])
        first: dict[tuple[tuple[int, int], ...], str] = {}
        return {
            name: first.setdefault(tuple((id(x), version) for x, version in inputs), name)
            for name, inputs in seen.items()
        }

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {}
        for name in module.state_dict():
            sources = self._sources[f"{prefix}.{name}"]
            if len(sources) != 1 or f"{prefix}.{name}" in self._converted:
                raise ModelError(f"cannot calibrate {prefix}: the checkpoint stores {name} in another layout")
            tensor = self._weights.read(sources[0])
            state[name] = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        module.load_state_dict(state, assign=True)


def calibration_ids(
    src: str | Path, sources: list[str], sequences: int = 48, length: int = 256, seed: int = 0
) -> Tensor:
    """Return tokens int64 [S, L] of texts drawn with ``seed`` from ``sources`` in turn.

    A source is ``embedded`` (the training split of the word problems, as conversations) or a JSONL file whose lines
    have ``text`` or, as in GSM8K, ``question`` and ``answer``. A sequence consists of whole texts, except that the last
    one is cut.

    Raises:
        DataError: a file cannot be read, lacks these keys, or has too little text.
        ModelError: ``src`` has no tokenizer.
    """
    from transformers import AutoTokenizer

    read_config(Path(src))  # for a missing folder transformers would ask the hub
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
    """Read ``text`` of each line, or ``question`` and ``answer`` joined by a newline.

    Raises:
        DataError: the file cannot be read, or a line has neither.
    """
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
            raise DataError(f"{source} has too little text for the calibration set: add lines")
        row += tokenizer(text, add_special_tokens=False)["input_ids"]
    return row[:length]


def conversations(tokenizer: Any, n: int, split: str, seed: int) -> list[str]:
    """Return ``n`` chats of many problems each; chats of one problem would mostly repeat the worked examples."""
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


def _attending(src: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the empty model without dropout, with SDPA, or with eager attention if the architecture has no SDPA."""
    try:
        return empty_model(src, dtype, "sdpa").eval()
    except ModelError:
        return empty_model(src, dtype, "eager").eval()


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return (name, list) of the decoder's layers.

    Raises:
        ModelError: the model does not have exactly one list of that length.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if len(outer) != 1:
        raise ModelError(f"cannot calibrate {type(model).__name__}: {len(outer)} lists of {count} layers, not one")
    return next(iter(outer.items()))


def _output(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    result = layer(hidden, *call.args, **call.kwargs)
    return result[0] if isinstance(result, tuple) else result
