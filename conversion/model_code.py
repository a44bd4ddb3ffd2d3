"""Copies the Python files that a SARM's `auto_map` names, from which transformers builds the model.

They are data here: they are copied with a model and never imported. An entry is `module.Class` for
a file beside config.json, or `owner/name--module.Class` for a file in that repository.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from conversion.containment import contained

AUTO_CLASS = "AutoModelForSequenceClassification"
PUBLISHED = "Schrieffer/Llama-SARM-4B--modeling_sarm_llama.LlamaSARM"
_REFERENCE = re.compile(
    r"(?:(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)--)?(?P<module>\w+)\.(?P<name>\w+)"
)
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))\b", re.MULTILINE)


def copy_model_code(
    auto_map: Any, src: Path | None, dst: Path, model_type: str = "llama"
) -> dict[str, str]:
    """Copies the files of `auto_map` and returns the entries that can be loaded.

    An entry whose file is missing is left out. The entry of the SARM itself then names the
    published class if the trunk is a Llama, which is all that class computes.

    Args:
        auto_map: the field of config.json.
        src: the directory of the files; None if there is none.
        dst: the directory to copy them to.
        model_type: that of the trunk.

    Raises:
        InputError: a file is a link that leads out of `src`.
    """
    result: dict[str, str] = {}
    for auto_class, entry in (auto_map if isinstance(auto_map, dict) else {}).items():
        match = _REFERENCE.fullmatch(entry) if isinstance(entry, str) else None
        if match is None:
            continue
        files = [] if match["repository"] or src is None else _files(src, match["module"])
        if match["repository"] or files:
            result[auto_class] = entry
        for file in files:
            shutil.copyfile(file, dst / file.name)
    published = {AUTO_CLASS: PUBLISHED} if model_type == "llama" else {}
    return published | result


def name_repository(auto_map: Any, repository: str) -> Any:
    """Adds the repository to the entries of a downloaded config.json, as transformers does."""
    if not isinstance(auto_map, dict):
        return auto_map
    return {
        auto_class: f"{repository}--{entry}"
        if isinstance(entry, str) and "--" not in entry
        else entry
        for auto_class, entry in auto_map.items()
    }


def _files(directory: Path, module: str) -> list[Path]:
    """Lists the files of a module and of its relative imports; [] if one of them is missing."""
    paths: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in paths:
            continue
        path = contained(directory, f"{name}.py")
        if not path.is_file():
            return []
        paths[name] = path
        text = path.read_text(encoding="utf-8", errors="replace")
        pending += [a or b for a, b in _RELATIVE_IMPORT.findall(text)]
    return list(paths.values())
