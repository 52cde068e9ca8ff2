"""The page that a repository of weights opens with: what they are, how they are used, how they came to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clip_base.storage.files import read_json
from clip_base.storage.tables import read_yaml

_DETECTOR = """```sh
pip install 'regionclip[hub]'
regionclip detect photo.jpg weights={address} vocabulary="cat, red umbrella"
```

```python
import regionclip

predictor = regionclip.load("{address}", vocabulary=["cat", "red umbrella"])
```"""
_CLIP = """```sh
pip install 'regionclip[hub]'
clip-base classify images=photos classes="cat, dog" weights={address}
```

```python
import clip_base

model, preprocess = clip_base.load("{address}")
```"""
_OTHER = "With [this package](https://pypi.org/project/regionclip) installed, give `{address}` as weights."


def model_card(
    address: str, form: str, config: Path | None, metrics: Mapping[str, Path], license: str
) -> str:
    """Returns the card as Markdown with a head in YAML, as the hub reads it.

    Args:
        address: where the weights go.
        form: as their metadata name it, PACKAGE.KIND/VERSION; "" for files without metadata of ours.
        config: the `config.yaml` of the training, when there is one. Folders of its paths are left out.
        metrics: files of figures, by what the card calls them.
        license: of the weights; "" when it is not stated.
    """
    kind = form.partition("/")[0].rpartition(".")[2]
    tags = {"detector": "zero-shot-object-detection", "clip": "zero-shot-image-classification"}
    head: dict[str, Any] = {"license": license} if license else {}
    head |= {"library_name": "regionclip", "tags": ["clip", "open-vocabulary"]}
    head |= {"pipeline_tag": tags[kind]} if kind in tags else {}
    usage = {"detector": _DETECTOR, "clip": _CLIP}.get(kind, _OTHER)
    what = {"detector": "An open-vocabulary object detector: it takes any list of names.", "clip": "A CLIP."}
    parts = [
        f"---\n{OmegaConf.to_yaml(head)}---",
        f"# {address.rpartition('/')[2].partition('@')[0]}",
        what.get(kind, f"Weights of the form `{form}`." if form else "Weights."),
        "## Use",
        usage.format(address=address),
    ]
    tables = [(title, list(_figures(read_json(path, "metrics")))) for title, path in metrics.items()]
    if any(rows for _, rows in tables):
        parts.append("## Figures")
    for title, rows in tables:
        if rows:
            lines = [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
            parts.append("\n".join(lines))
    if config is not None:
        told = read_yaml(config, "config file")
        job = config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        plain = OmegaConf.to_container(told) if isinstance(told, DictConfig) else {}
        parts += [f"## Training\n\nThe options of `{job}`; of paths the last part:" if job else "## Training"]
        parts.append(f"```yaml\n{OmegaConf.to_yaml(_without_folders(plain))}```")
    return "\n\n".join(parts) + "\n"


def _figures(metrics: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the single numbers of a file of metrics, those of groups as `group.name`."""
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _without_folders(value: Any) -> Any:
    """Returns a config whose absolute paths are cut to their last part: they say nothing to others."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~", "../")) and " " not in value:
        return Path(value).name
    return value
