"""The tables that `verl-aqn doctor` prints."""

from typing import Any

from rich.table import Table

from verl_aqn.preflight.findings import Finding, gb


def findings_table(findings: list[Finding], recipe: str | None) -> Table:
    """Tabulate every check, with the fix of each fault."""
    view = Table(title=f"verl-aqn doctor{f' {recipe}' if recipe else ''}", title_justify="left")
    for column in ("what", "found", "fix"):
        view.add_column(column, overflow="fold")
    for finding in findings:
        view.add_row(finding.what, finding.found, finding.fix)
    return view


def memory_table(memory: dict[str, Any]) -> Table:
    """Tabulate the estimate by part, largest first."""
    size = memory["parameters"]
    view = Table(title=f"Memory, estimated from config.json ({size / 1e6:,.0f} M parameters)", title_justify="left")
    for column in ("of", "GB", "process", "phase of the peak"):
        view.add_column(column, justify="right" if column == "GB" else "left")
    for name in ("actor", "rollout", "machine"):
        if name in memory:
            found = memory[name]
            what = name if name == "machine" else f"a rank of the {name}"
            view.add_row(what, f"{found['bytes'] / 1e9:.2f}", found.get("phase", ""), _parts(found["parts"]))
    return view


def plan_table(rows: list[dict[str, Any]], recipe: str) -> Table:
    """Tabulate the fewest devices of each size."""
    view = Table(
        title=f"Devices that {recipe} needs, by formulas that have not yet been tested on accelerators",
        title_justify="left",
    )
    for column in ("GB", "devices", "tensor-parallel", "update tokens", "actor", "rollout", "KV cache", "sequences"):
        view.add_column(column, justify="right")
    for row in rows:
        size = f"{row['device_bytes'] / 1e9:.0f}"
        if row["fault"]:
            view.add_row(size, "too small", "", "", "", "", "", row["fault"])
            continue
        without_cache = row["rollout"]["bytes"] - row["kv_cache_bytes"]
        view.add_row(
            size, str(row["devices"]), str(row["tensor_parallel"]), f"{row['update_tokens']:,}",
            gb(row["actor"]["bytes"]), gb(without_cache), gb(row["kv_cache_bytes"]), f"{row['sequences']:,}",
        )  # fmt: skip
    return view


def _parts(parts: dict[str, int]) -> str:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in ordered if size >= 5_000_000)
