"""SAEs on the Hugging Face hub: a repository holds one at its top, or several in subfolders."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastsae.disk import local_path
from fastsae.errors import FastsaeError
from fastsae.sae import files
from fastsae.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from fastsae.sae.storage import StoredModule

CARD_FILE = "README.md"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name; no path that begins with a dot, a slash or a tilde


def located(name: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None) -> Path:
    """The local folder of an SAE, downloaded where `name` is no folder but can be a repository of the hub.

    Raises:
        FileNotFoundError: The repository, the revision or the SAE in it does not exist.
        FastsaeError: The hub could not be reached, or huggingface_hub is not installed.
    """
    path = local_path(name)
    if path.exists() or not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        return path / (subfolder or "")
    return _downloaded(name, subfolder, revision) / (subfolder or "")


def _downloaded(repo_id: str, subfolder: str | None, revision: str | None) -> Path:
    """The snapshot of a repository, of which the two files of the SAE are fetched, both of one commit."""
    hub = _huggingface_hub(f"{repo_id}: there is no such folder, and reading it from the hub")
    names = [_inside(subfolder, name) for name in (files.CONFIG_FILE, files.WEIGHTS_FILE)]
    try:
        snapshot = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=names))
        is_there = (snapshot / names[0]).is_file()
        others = [] if is_there else list(hub.HfApi().list_repo_files(repo_id, revision=revision))
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, hub.errors.RevisionNotFoundError) else "repository"
        raise FileNotFoundError(
            f"{repo_id}: there is no such folder, and no such {what} on the Hugging Face hub that you can read. "
            "Check the spelling; a private or gated one needs `hf auth login` first"
        ) from error
    except Exception as error:  # what the network and its libraries raise
        raise FastsaeError(
            f"{repo_id}: there is no such folder, and it could not be read from the Hugging Face hub "
            f"({_short(error)}). What was downloaded before is kept"
        ) from error
    if not is_there:
        raise FileNotFoundError(f"{repo_id}: expected {names[0]} in this repository; {_saes_in(others)}")
    return snapshot


def _saes_in(names: list[str]) -> str:
    """What a repository holds instead of the SAE that was asked for."""
    places = (name.rpartition("/") for name in names)
    folders = sorted(folder or "its top" for folder, _, name in places if name == files.CONFIG_FILE)
    if not folders:
        return f"none of its {len(names)} files is a {files.CONFIG_FILE}"
    more = "" if len(folders) <= 8 else f" and {len(folders) - 8} more"
    return f"subfolder: expected one of {', '.join(folders[:8])}{more}"


def push(
    sae: StoredModule,
    repo_id: str,
    subfolder: str | None,
    *,
    private: bool | None,
    token: str | None,
    message: str,
    log_sparsity: Tensor | None,
) -> str:
    """Uploads an SAE in one commit; returns the address of the commit.

    Raises:
        ValueError: The SAE cannot be saved; nothing was uploaded.
        FastsaeError: The hub refused or could not be reached, or huggingface_hub is not installed.
    """
    if getattr(sae, "sharding", None) is not None:
        raise ValueError("push_to_hub: expected an SAE of one process; save it, load it in one, and push that")
    hub = _huggingface_hub("pushing to the hub")
    api = hub.HfApi(token=token)
    with TemporaryDirectory() as folder:
        sae.save(Path(folder, subfolder or ""))
        if log_sparsity is not None:
            files.save_sparsity(log_sparsity, sae.d_sae, Path(folder, subfolder or ""))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if not api.file_exists(repo_id, CARD_FILE):
                Path(folder, CARD_FILE).write_text(model_card(sae, repo_id, subfolder), encoding="utf-8")
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except Exception as error:  # what the network and its libraries raise
            raise FastsaeError(
                f"{repo_id}: the Hugging Face hub took no upload ({_short(error)}). Uploading needs `hf auth login` "
                "with a token that may write there"
            ) from error
    return str(commit.commit_url)


def model_card(sae: StoredModule, repo_id: str, subfolder: str | None = None) -> str:
    """The text of `README.md`: what the SAE is, what it was trained on, how to load it."""
    known = sae.metadata
    model = known.get("model_name")
    header = ["library_name: fastsae", "tags:", "- sparse-autoencoder", "- saelens"]
    if isinstance(model, str) and _REPOSITORY.fullmatch(model):
        header += [f"base_model: {json.dumps(model)}"]
    rows = {
        "architecture": sae.architecture,
        "features (d_sae)": f"{sae.d_sae:,}",
        "width of the activations (d_in)": f"{sae.d_in:,}",
        "dtype": str(sae.dtype).removeprefix("torch."),
        **{label: known[name] for name, label in _ROWS.items() if known.get(name) is not None},
    }
    place = "" if subfolder is None else f", subfolder={subfolder!r}"
    saelens = "" if subfolder is None else _SAELENS.format(repo_id=repo_id, subfolder=subfolder)
    table = "\n".join(f"| {label} | {_cell(value)} |" for label, value in rows.items())
    return _CARD.format(
        header="\n".join(header),
        title=repo_id.rpartition("/")[2],
        table=table,
        load=f'sae = SparseAutoencoder.load("{repo_id}"{place})',
        saelens=saelens,
        version=__version__,
    )


_ROWS = {
    "model_name": "language model",
    "hook_name": "activations",
    "dataset_path": "dataset",
    "context_size": "longest context in tokens",
    "l0": "active features per token (L0)",
}
_CARD = """---
{header}
---

# {title}

A sparse autoencoder: it writes activations of a language model as sums of few features.

| | |
|---|---|
{table}

```python
from fastsae import SparseAutoencoder  # pip install fastsae-kernels

{load}
feature_acts = sae.encode(x)
sae_out = sae.decode(feature_acts)
```
{saelens}
The files are in SAELens' format, written by fastsae {version}.
"""
_SAELENS = """
```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{subfolder}")
```
"""


def _cell(value: Any) -> str:
    """A value in a table of Markdown."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _inside(subfolder: str | None, name: str) -> str:
    return name if not subfolder else f"{subfolder.strip('/')}/{name}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _huggingface_hub(what: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise FastsaeError(
            f"{what} needs `huggingface_hub`, which is not installed: pip install huggingface_hub"
        ) from error
    return huggingface_hub
