"""Support for multimodal model folders; only the text part is trained and served."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cache import cache_dir

# Files that make verl build an image processor, which would turn every prompt into a multimodal one.
_OF_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_MODEL, _VLLM = "actor_rollout_ref.model", "actor_rollout_ref.rollout.engine_kwargs.vllm"


def use_text_alone(config: DictConfig, folder: Path) -> None:
    """Configure verl and vLLM for text only if ``folder`` holds a multimodal model.

    verl reads the tokenizer and the processor from ``tokenizer_path``. Unless the recipe sets this path, it is set to a
    folder without a processor. vLLM builds the whole model but loads only its language model.

    Raises:
        ModelError: transformers does not know the folder's config.
    """
    from verl_aqn.checkpoints.building import is_multimodal

    if not is_multimodal(folder):
        return
    if not OmegaConf.select(config, f"{_MODEL}.tokenizer_path"):
        made = text_tokenizer(folder, cache_dir() / "tokenizers")
        OmegaConf.update(config, f"{_MODEL}.tokenizer_path", str(made), force_add=True)
    if OmegaConf.select(config, f"{_VLLM}.language_model_only") is None:
        OmegaConf.update(config, f"{_VLLM}.language_model_only", True, force_add=True)


def text_tokenizer(folder: Path, cache: Path) -> Path:
    """Return a folder with the tokenizer of ``folder`` and the config of its text part; create the folder if needed."""
    from verl_aqn.checkpoints.building import config_of
    from verl_aqn.checkpoints.storage import companions

    files = {file.name: file.read_bytes() for file in companions(folder) if file.name not in _OF_PROCESSORS}
    if "tokenizer_config.json" in files:
        settings = json.loads(files["tokenizer_config.json"])
        settings.pop("processor_class", None)
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    files["config.json"] = config_of(folder).get_text_config().to_json_string().encode()
    key = hashlib.sha256()
    for name, content in sorted(files.items()):
        key.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    target = cache / key.hexdigest()[:16]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(temporary, ignore_errors=True)
    return target
