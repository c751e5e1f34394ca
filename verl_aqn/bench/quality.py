"""What MXFP4 costs a model by scale rule, and what GPTQ wins back: next-token loss and answers, with intervals.

Each variant is a checkpoint as an engine would load it, measured in bfloat16 on the values that its codes represent.
All variants see the same texts and problems, so differences are taken per text and per problem. Their intervals are
much narrower than those of the values themselves.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from verl_aqn.checkpoints.calibrate import calibration_ids, conversations, read_texts
from verl_aqn.checkpoints.gptq import gptq_quantizer
from verl_aqn.checkpoints.keeping import worst
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import EXCLUDE, quantize_checkpoint
from verl_aqn.checkpoints.storage import Weights, read_config
from verl_aqn.errors import ConfigError, DataError, ModelError
from verl_aqn.models.generate import generate, greedy
from verl_aqn.mxfp4.dense import dequantize_linears
from verl_aqn.runs.stats.intervals import ratio_interval, wilson
from verl_aqn.runs.stats.paired import of_items
from verl_aqn.tasks.gsm8k import score
from verl_aqn.tasks.word_problems import Problem, problems, prompt
from verl_aqn.terminal import print_wide

LENGTH = 256  # tokens of a text
KEPT = 0.05  # share of the weights
NEW_TOKENS = 24
_BATCH, _ANSWERS = 8, 96  # texts, and prompts, that run together


class Setting(NamedTuple):
    """The sources of a variant: bf16 folder, calibration texts and tokens int64 [S, L], and a folder to write to."""

    src: Path
    texts: list[str]
    ids: Tensor
    folder: Path


class Measured(NamedTuple):
    """Measurements of a variant.

    Per text: NLL and KL(bf16 || variant) in nats, summed over tokens, float64 [S]. Per problem: whether the response is
    right, bool [I].
    """

    nll: np.ndarray
    kl: np.ndarray
    right: np.ndarray


class Variant(NamedTuple):
    """A way of rounding. `keep`: the measure by which the worst layers are chosen that stay in bf16; "" for none."""

    what: str
    scale_rule: str
    gptq: bool = False
    keep: str = ""


VARIANTS = {
    "mse": Variant("plain, best of two exponents", "mse"),
    "even": Variant("plain", "even"),
    "floor": Variant("plain", "floor"),
    "rceil": Variant("plain", "rceil"),
    "gptq": Variant("error-compensated, mse", "mse", gptq=True),
    "gptq-even": Variant("error-compensated, even", "even", gptq=True),
    "keep-sqnr": Variant("mse, worst 5 % by SQNR in bf16", "mse", keep="sqnr"),
    "keep-loss": Variant("mse, worst 5 % by loss in bf16", "mse", keep="loss"),
    "keep-loss-even": Variant("even, worst 5 % by loss in bf16", "even", keep="loss"),
    "gptq-even-keep-loss": Variant(
        "error-compensated, even, worst 5 % by loss in bf16", "even", gptq=True, keep="loss"
    ),
}


def make(variant: Variant, setting: Setting) -> tuple[PreTrainedModel, int]:
    """Return the model of a variant, and the bytes of its weights."""

    def pack(name: str, exclude: tuple[str, ...]) -> int:
        rule = variant.scale_rule
        quantizer = gptq_quantizer(setting.src, setting.ids, rule, exclude) if variant.gptq else None
        report = quantize_checkpoint(setting.src, setting.folder / name, rule, exclude, quantizer=quantizer)
        return report.bytes_after

    exclude: tuple[str, ...] = EXCLUDE
    if variant.keep:
        pack("rounded", exclude)
        rounded = setting.folder / "rounded"
        exclude = (*exclude, *worst(setting.src, rounded, KEPT, variant.keep, exclude, setting.texts))
    size = pack("packed", exclude)
    return load_model(setting.folder / "packed"), size


def measure(
    src: str | Path, items: int, sequences: int, only: list[str], text: str, calibrate: list[str]
) -> list[dict[str, Any]]:
    """Return one row each for bf16, ``mse`` and every variant of ``only``, with 95 % intervals.

    ``src`` is a bf16 folder. ``text`` and ``calibrate`` name JSONL files or ``embedded``. The test split of
    ``embedded`` is measured; its training split is for calibration. Without ``items`` no response is generated, as for
    a model without a chat template. Progress goes to stderr.

    Raises:
        ConfigError: an unknown variant, or the measured file is among the calibration texts.
        DataError: a file that cannot be read or is too short.
        ModelError: ``src`` is not a model folder, or has no chat template although one is needed.
    """
    for name in only:
        if name not in VARIANTS:
            raise ConfigError(f"unknown variant {name!r}: use some of {', '.join(VARIANTS)}")
    if text != "embedded" and Path(text).resolve() in [Path(source).resolve() for source in calibrate]:
        raise ConfigError(f"{text} is used for calibration and for measurement: give two different files")
    src = Path(src)
    read_config(src)  # for a missing folder transformers would ask the hub
    tokenizer = AutoTokenizer.from_pretrained(src)
    if tokenizer.chat_template is None and (items or "embedded" in (text, *calibrate)):
        raise ModelError(
            f"the tokenizer of {src} has no chat template: set --items 0, and JSONL files for --text and --calibrate"
        )
    texts = conversations(tokenizer, sequences, "test", 0) if text == "embedded" else read_texts(text)
    if len(texts) < sequences:
        raise DataError(f"{text} has {len(texts)} texts, but {sequences} are needed: lower --sequences")
    tokens = [tokenizer(t, add_special_tokens=False)["input_ids"][:LENGTH] for t in texts[:sequences]]
    counts = np.array([len(t) - 1 for t in tokens], dtype=float)
    questions = problems(items, "test", 0) if items else []
    ids = calibration_ids(src, calibrate)

    def run(name: str, model: PreTrainedModel, started: float) -> tuple[Measured, list[Tensor]]:
        nll, kl, hidden = _losses(model, tokens, reference)
        right = _answers(model, tokenizer, questions) if questions else np.zeros(0, dtype=bool)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return Measured(nll, kl, right), hidden

    reference: list[Tensor] = []
    started = time.monotonic()
    bf16, reference = run("bf16", _original(src), started)
    size = sum(spec.nbytes for spec in Weights(src).specs.values())
    found = {"bf16": (bf16, size)}
    for name in ["mse", *(name for name in VARIANTS if name in only and name != "mse")]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="verl-aqn-quality-") as folder:
            model, size = make(VARIANTS[name], Setting(src, calibrate, ids, Path(folder)))
        found[name] = (run(name, dequantize_linears(model), started)[0], size)
    return [_row(name, found[name][1], found[name][0], bf16, found["mse"][0], counts) for name in found]


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    view = Table(title=title, title_justify="left")
    for column in ("variant", "MB", "loss", "− bf16", "− mse", "KL", "responses", "− mse, points", "p"):
        view.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        view.add_row(
            row["variant"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['loss']:.3f}",
            _interval(row["loss_minus_bf16"], 3),
            _interval(row["loss_minus_mse"], 3),
            _interval(row["kl"], 3),
            *_answer_cells(row),
        )
    print_wide(view)


def _answer_cells(row: dict[str, Any]) -> list[str]:
    if row["accuracy"] is None:
        return ["–"] * 3
    shares = [_interval([100 * x for x in row[key]], 1) for key in ("accuracy", "accuracy_minus_mse")]
    return [*shares, f"{row['mcnemar_p']:.1g}"]


def _row(name: str, size: int, it: Measured, bf16: Measured, mse: Measured, counts: np.ndarray) -> dict[str, Any]:
    answers: dict[str, Any] = {"accuracy": None, "accuracy_minus_mse": None, "mcnemar_p": None}
    if n := len(it.right):
        change = of_items(it.right.astype(float) - mse.right)
        answers = {
            "accuracy": (int(it.right.sum()) / n, *wilson(int(it.right.sum()), n)),
            "accuracy_minus_mse": (change.value, *change.interval()),
            "mcnemar_p": change.p_value,
        }
    return {
        "variant": name,
        "what": VARIANTS[name].what if name in VARIANTS else "not quantised",
        "bytes": size,
        "loss": float(it.nll.sum() / counts.sum()),
        "loss_minus_bf16": ratio_interval(it.nll - bf16.nll, counts),
        "loss_minus_mse": ratio_interval(it.nll - mse.nll, counts),
        "kl": ratio_interval(it.kl, counts),
        **answers,
    }


def _interval(values: Any, digits: int) -> str:
    middle, low, high = values
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _original(src: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def _losses(
    model: PreTrainedModel, tokens: list[list[int]], reference: list[Tensor]
) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
    """Return NLL [S], KL [S] and the last hidden states, one [L, D] per text; KL is zero without ``reference``.

    The output head is never quantised, so the reference's hidden states are kept instead of its logits, which are 85
    times larger.
    """
    nll, kl = np.zeros(len(tokens)), np.zeros(len(tokens))
    hidden: list[Tensor] = [torch.empty(0)] * len(tokens)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        longest = len(tokens[batch[-1]])
        # Padding comes after the text, so a causal model does not attend to it.
        padded = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in batch])
        for i, states in zip(batch, decoder(input_ids=padded, use_cache=False).last_hidden_state, strict=True):
            hidden[i] = states[: len(tokens[i])].clone()
            scores = head(hidden[i][:-1]).float().log_softmax(-1)
            nll[i] = -scores.gather(1, torch.tensor(tokens[i][1:])[:, None]).double().sum().item()
            if reference:
                original = head(reference[i][:-1]).float().log_softmax(-1)
                kl[i] = (original.exp() * (original - scores)).double().sum().item()
    return nll, kl, hidden


def _answers(model: PreTrainedModel, tokenizer: Any, questions: list[Problem]) -> np.ndarray:
    """Return whether each greedy response is right by the strict rule: bool [I]."""
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(prompt(q.question), tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for q in questions
    ]
    answers = generate(model, prompts, greedy, {tokenizer.eos_token_id}, NEW_TOKENS, together=_ANSWERS)
    texts = tokenizer.batch_decode([answer for (answer,) in answers], skip_special_tokens=True)
    return np.array([score(text, q.truth) == 1 for text, q in zip(texts, questions, strict=True)])
