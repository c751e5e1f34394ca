"""Plots for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from verl_aqn.errors import ConfigError, EnvironmentFault, reason, remedy
from verl_aqn.noise.spec import layer_and_kind

if TYPE_CHECKING:
    from verl_aqn.checkpoints.error_report import ModuleReport
    from verl_aqn.mxfp4.error_split import ErrorSplit
    from verl_aqn.preflight.probe import Strength

# Blue, orange, grey and so on can be distinguished with most kinds of colour blindness (after Okabe and Ito).
_PARTS = {
    "grid_noise": ("grid noise", "#9aa5b1"),
    "scale_bias": ("scale bias", "#0072b2"),
    "deadzone": ("deadzone", "#e69f00"),
    "clipped": ("clipped", "#d55e00"),
}
_KINDS = ("#0072b2", "#56b4e9", "#009e73", "#000000", "#e69f00", "#d55e00", "#cc79a7", "#999999")
_MARKERS = "os^Dv<>P"


def check_picture(path: Path) -> None:
    """Raise ConfigError, before any work is done, if no picture can be written to ``path``."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"cannot write a picture to {path}: the name must end in .png, .svg or .pdf, in a folder that exists"
        )


def plot_schedule(table: list[dict], title: str, path: Path) -> None:
    """Plot σ against step on a logarithmic axis; steps with σ = 0 are marked on the lower edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    steps = [row["step"] for row in table]
    sigma = [row["sigma"] or float("nan") for row in table]
    axis.step(steps, sigma, where="mid", color="#1f5fa8", linewidth=2)
    axis.plot(steps, sigma, "o", color="#1f5fa8", markersize=3)
    clean = [step for step, row in zip(steps, table, strict=True) if row["sigma"] == 0]
    if any(row["sigma"] for row in table):
        axis.set_yscale("log")
    if clean:
        axis.plot(clean, [0.02] * len(clean), "s", transform=axis.get_xaxis_transform(), color="#888888", markersize=4)
        axis.text(clean[-1] + 0.7, 0.02, "σ = 0", transform=axis.get_xaxis_transform(), va="center", color="#666666")
    axis.set(xlabel="RL step", ylabel="σ", title=title)
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_quantization(modules: list[ModuleReport], title: str, path: Path) -> None:
    """Plot by layer the parts of the error as stacked shares of the signal, and the SQNR of each kind of projection."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from verl_aqn.checkpoints.error_report import pool_experts
    from verl_aqn.mxfp4.error_split import ErrorSplit

    layers: dict[int, list[ModuleReport]] = {}
    kinds: dict[str, dict[int, ErrorSplit]] = {}
    for module in pool_experts(modules):
        layer, kind = layer_and_kind(module.name)
        if layer is not None:
            layers.setdefault(layer, []).append(module)
            kinds.setdefault(kind, {})[layer] = module.error
    if not layers:
        raise ConfigError(f"cannot draw {path}: no module name contains a layer number")
    errors = {layer: ErrorSplit.pooled(m.error for m in layers[layer]) for layer in sorted(layers)}

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    above = dict.fromkeys(errors, 0.0)
    below = dict.fromkeys(errors, 0.0)
    for part, (label, color) in _PARTS.items():
        # An ideal scale can be worse than the power of two: then that part is drawn downwards from zero.
        heights = [100 * getattr(error, part) / error.signal for error in errors.values()]
        starts = [above if height >= 0 else below for height in heights]
        bottoms = [side[layer] for side, layer in zip(starts, errors, strict=True)]
        top.bar(list(errors), heights, 0.8, bottom=bottoms, color=color, label=label)
        for side, layer, height in zip(starts, errors, heights, strict=True):
            side[layer] += height
    top.set(ylabel="squared error, % of Σw²", title=title)
    # The legend is outside the axes: inside, it would cover bars or lines of some models.
    handles, labels = top.get_legend_handles_labels()
    top.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)

    for number, (kind, of_layer) in enumerate(kinds.items()):
        # A MoE with shared experts has more kinds than colours: colours that are used again have dashed lines and
        # hollow markers.
        again = number >= len(_KINDS)
        color = _KINDS[number % len(_KINDS)]
        at = sorted(of_layer)
        bottom.plot(
            at,
            [of_layer[layer].sqnr_db for layer in at],
            "--" if again else "-",
            marker=_MARKERS[number % len(_MARKERS)],
            color=color,
            markerfacecolor="white" if again else color,
            markersize=4.5,
            linewidth=1.2,
            label=kind,
        )
    bottom.set(xlabel="layer", ylabel="SQNR, dB")
    bottom.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axis in (top, bottom):
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    _save(figure, path)


def plot_strength(rows: list[Strength], sigma_start: float, title: str, label: str, path: Path) -> None:
    """Plot KL (above) and entropy (below) against σ on logarithmic axes, with 95 % intervals.

    The clean policy's entropy is a band.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    clean, noisy = rows[0], rows[1:]
    sigma = [row.sigma for row in noisy]
    for axis, name, color in zip(axes, ("kl", "entropy"), ("#0072b2", "#d55e00"), strict=True):
        middle, low, high = zip(*(getattr(row, name) for row in noisy), strict=True)
        ends = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axis.errorbar(sigma, middle, ends, fmt="o-", color=color, capsize=3, linewidth=1.5, label="with noise, 95 %")
        axis.axvline(sigma_start, color="#666666", linestyle=":", label="σ_start")
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[1].axhspan(*clean.entropy[1:], color="#999999", alpha=0.25, linewidth=0)
    axes[1].axhline(clean.entropy[0], color="#666666", linewidth=1, label="clean policy, 95 %")
    axes[0].set(ylabel="KL(clean || noisy), nats a token")
    axes[0].set_title(title.replace(": ", "\n"), fontsize="medium")
    axes[1].set(xlabel=label, ylabel="entropy, nats a token")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
    for axis in axes:
        axis.legend(frameon=False)
    _save(figure, path)


def plot_growth(result: dict, path: Path) -> None:
    """Plot the seconds of each phase against what was varied, both logarithmic, with the exponent of the whole step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    phases = ("generation", "log-probs", "update", "sync", "step")
    series = result["series"]
    figure = pyplot.figure(figsize=(4 * len(series), 3.8), layout="constrained")
    axes = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for axis, (what, indices) in zip(axes, series.items(), strict=True):
        rows = [result["rows"][index] for index in indices]
        for name, colour, marker in zip(phases, _KINDS, _MARKERS, strict=False):
            values = [row[name] for row in rows]
            axis.plot([row[what] for row in rows], values, f"{marker}-", color=colour, label=name, markersize=4)
        exponent = result["exponents"].get(what, {}).get("step")
        axis.set(
            xscale="log", yscale="log", xlabel=what, title=f"step ~ {what}^{exponent[0]:.2f}" if exponent else what
        )
        labels = [row["model"] if what == "parameters" else str(row[what]) for row in rows]
        axis.set_xticks([row[what] for row in rows], labels)
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        advice = remedy(error) or "give another file"
        raise EnvironmentFault(f"cannot write a picture to {path} ({reason(error)}): {advice}") from error
    except ValueError as error:
        raise ConfigError(f"cannot write a picture to {path}: {error}") from error
    finally:
        pyplot.close(figure)
