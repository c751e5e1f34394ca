"""Check whether verl can load agent loops and tools: `python -m verl_aqn.integrations.verl.ask_tools QUESTION_JSON`.

The last line of standard output is {"fault": "", "tools": [name, …]} as JSON, which `verl_aqn.preflight.agent_tools`
reads.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from verl_aqn.errors import first_line


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Load what `question` names as verl's workers do. A fault begins with the key of the wrong setting."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.agent_loop.tool_parser import ToolParser
    from verl.tools.tool_registry import load_all_tools

    names = []
    paths = {key: question[key] for key in ("tool_config_path", "function_tool_path")}
    try:
        names = sorted(tool.name for tool in load_all_tools(**paths))
    except (Exception, SystemExit) as error:  # the user's file may raise any error during its import
        key = next(key for key, path in paths.items() if path)
        return {"fault": f"multi_turn.{key}={paths[key]} cannot be loaded: {type(error).__name__}: {first_line(error)}"}
    known = set(_agent_loop_registry)
    if own := question["own"]:
        try:
            known |= {str(loop["name"]) for loop in yaml.safe_load(Path(own).read_text(encoding="utf-8"))}
        except Exception as error:
            return {"fault": f"agent.agent_loop_config_path={own} cannot be read: {first_line(error)}"}
    if unknown := [loop for loop in question["loops"] if loop not in known]:
        return {"fault": f"agent: there is no agent loop {unknown[0]!r}: verl has {', '.join(sorted(known))}"}
    if question["format"] not in ToolParser._registry:
        formats = ", ".join(sorted(ToolParser._registry))
        return {"fault": f"multi_turn.format={question['format']} is not known: verl knows {formats}"}
    if not names and any(paths.values()):
        key = next(key for key, path in paths.items() if path)
        return {"fault": f"multi_turn.{key}={paths[key]} has no tool: put @function_tool before a function"}
    return {"fault": "", "tools": names}


if __name__ == "__main__":
    import verl.experimental.agent_loop  # noqa: F401  registers verl's own loops

    print(json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
