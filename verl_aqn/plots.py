"""Pictures for the command line."""

from pathlib import Path

from verl_aqn.errors import ConfigError


def plot_schedule(table: list[dict], title: str, path: Path) -> None:
    """σ against step on a logarithmic axis; steps with σ = 0 are marked on the lower edge."""
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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write a picture to {path}: {error}") from error
    finally:
        pyplot.close(figure)
