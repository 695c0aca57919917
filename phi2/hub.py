"""Where a model's files are: a folder here, a repository on the Hugging Face hub, or the tiny model in this package.

Downloads land in the hub's own cache and are shared with every other program that uses it. The token comes from the
environment (`HF_TOKEN` or a login), and `HF_HUB_OFFLINE=1` keeps everything to what the cache holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi2.files import one_line

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = ("nano", "nano-instruct")  # tiny models of this package: a base, and what its own recipe made of it
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
NEEDED_FILES = {
    "model": [
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "adapter_config.json",
        "adapter_model.safetensors",
    ],
    "dataset": ["*.parquet", "*.jsonl", "*.json", "*.json.gz", "*.jsonl.gz"],
}


def resolve(path_or_id: str | Path, revision: str | None = None, kind: str = "model") -> Path:
    """The folder that holds a model or a data set.

    Args:
        path_or_id: a folder; else "nano" or "nano-instruct", the tiny models of this package; else a hub id
            "owner/name".
        revision: branch, tag or commit of a hub repository.
        kind: "model" or "dataset".

    Raises:
        FileNotFoundError: when it is neither a folder nor written like a hub id.
        ValueError: when the hub cannot be reached or does not give this repository or revision; for a file, for a
            revision of a local folder, and for an unknown kind.
    """
    if kind not in NEEDED_FILES:
        raise ValueError(f"kind must be one of {', '.join(NEEDED_FILES)}, got {kind!r}")
    local = Path(path_or_id).expanduser()
    if str(path_or_id) in BUILT_IN and not local.exists():
        local = ASSETS / str(path_or_id)
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} needs a hub id, and {path_or_id} is a folder here")
        return local
    if local.exists():
        raise ValueError(f"{path_or_id}: must be a folder, and is a file")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise FileNotFoundError(f"{path_or_id}: no such folder, and not a hub id (owner/name)")
    return _download(str(path_or_id), revision, kind)


def of_a_run(folder: Path) -> str:
    """For an error about a folder that lacks a file: where it is, when the folder is that of a run."""
    return next((f"; did you mean {folder / name}?" for name in ("adapter", "model") if (folder / name).is_dir()), "")


def _download(repo_id: str, revision: str | None, kind: str) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors_in_one_line(f"{repo_id}: no such folder, and", revision):
        folder = snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=NEEDED_FILES[kind])
    return Path(folder)


@contextmanager
def _hub_errors_in_one_line(prefix: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    reasons = {  # the first that matches counts: a gated repository is also "not found"
        errors.GatedRepoError: "its hub repository is gated: accept the terms on its page, and set HF_TOKEN",
        errors.RepositoryNotFoundError: "the hub has no such repository, or HF_TOKEN does not open it",
        errors.RevisionNotFoundError: f"the hub has no revision {revision or 'main'!r} of it",
        errors.LocalEntryNotFoundError: "the hub is out of reach (or HF_HUB_OFFLINE is set), the cache incomplete",
        errors.OfflineModeIsEnabled: "the hub is out of reach: HF_HUB_OFFLINE is set",
    }
    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), one_line(error))
        raise ValueError(f"{prefix} {reason}") from error
