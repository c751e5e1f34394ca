"""Rungs of noise and adapter under graphs (CUDA or ACL graphs) and under fusion passes.

`python -m verl_aqn.selftest.graph_rungs PASS REQUEST RESULT` is one engine in which PASS alone is on.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl_aqn.integrations.verl.engine_probe import EngineProbe
from verl_aqn.selftest.engine_rungs import lora_figures, noise_figures, reference_of, send, served_of
from verl_aqn.selftest.rung import Broken, Context, NotApplicable, Reading
from verl_aqn.selftest.setting_up import start


def noise(context: Context) -> Reading:
    """Start an engine with graphs, and check adapter and noise with it as without graphs."""
    engine = start(context, served_of(context), enforce_eager=False)
    compiled = engine.compiled()
    check_graphs(compiled)
    figures = {**compiled, **use(context, engine), "start_s": engine.start_s}
    return Reading(
        f"{compiled['captured']} graphs captured ({compiled['graphs']}); noise on each of {figures['norms']} norms is "
        f"used (error {figures['largest_error']:.3f}), log-probs {figures['decoding_nats']:.4f} nats a token from "
        f"PEFT; fusion passes: {', '.join(compiled['passes']) or 'none'}",
        figures,
    )


def check_graphs(compiled: dict[str, Any]) -> None:
    """Raise Broken unless the engine has captured graphs."""
    if compiled["eager"] or compiled["graphs"] in ("NONE", "None") or not compiled["captured"]:
        raise Broken(
            f"the engine has no graphs: eager {compiled['eager']}, mode {compiled['graphs']}, "
            f"{compiled['captured']} captured"
        )


def use(context: Context, engine: EngineProbe) -> dict[str, Any]:
    """Return the figures of adapter and noise in this engine."""
    reference = reference_of(context)
    send(context, engine, reference.adapter)
    return {**lora_figures(engine, reference), **noise_figures(engine, reference)}


def fusions(context: Context) -> Reading:
    """Check the noise in an engine for each fusion pass that is on in a run, with that pass alone."""
    passes = [name for name in context.done["graph-noise"]["passes"] if "noop" not in name]
    if not passes:
        raise NotApplicable("no fusion pass is on in a run's engine (vLLM's pass_config)")
    found = {name: _trial(context, name) for name in passes}
    if failed := {name: one["fault"] for name, one in found.items() if "fault" in one}:
        first = next(iter(failed))
        raise Broken(f"{len(failed)} of {len(passes)} passes: {first}: {failed[first]}")
    worst = max(one["largest_error"] for one in found.values())
    return Reading(f"{', '.join(passes)}: noise is used, largest error {worst:.3f}", found)


def _trial(context: Context, name: str) -> dict[str, Any]:
    """Run one engine in a new process, because a process can set up only one."""
    request, result = (context.folder / f"{name}.{end}" for end in ("request", "result"))
    result.unlink(missing_ok=True)
    request.write_text(
        json.dumps(
            {
                "device": context.device,
                "count": context.count,
                "folder": str(context.folder),
                "passes": context.done["graph-noise"]["passes"],
            }
        )
    )
    done = subprocess.run([sys.executable, "-m", "verl_aqn.selftest.graph_rungs", name, request, result], check=False)
    return json.loads(result.read_text()) if result.is_file() else {"fault": f"exit code {done.returncode}"}


def options(context: Context, alone: str) -> dict[str, Any]:
    """Return the run's `compilation_config` with only the pass `alone` on, beside the removal of no-ops."""
    config = served_of(context).config
    given: Any = OmegaConf.select(config, "actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config") or {}
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else dict(given)
    others = {name: False for name in context.done["passes"] if name != alone and "noop" not in name}
    return {"compilation_config": given | {"pass_config": (given.get("pass_config") or {}) | others | {alone: True}}}


def main(name: str, request: Path, result: Path) -> None:
    """Run one trial, and write its figures or its fault."""
    asked = json.loads(request.read_text())
    context = Context(asked["device"], asked["count"], Path(asked["folder"]))
    context.done["passes"] = dict.fromkeys(asked.get("passes", ()))
    try:
        engine = start(context, served_of(context), enforce_eager=False, **options(context, name))
        compiled = engine.compiled()
        check_graphs(compiled)
        if name not in compiled["passes"]:
            raise Broken(f"vLLM turned {name} off again")
        found = use(context, engine)
    except Exception as fault:
        traceback.print_exc()
        found = {"fault": (str(fault).strip() or type(fault).__name__).splitlines()[0]}
    result.write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
