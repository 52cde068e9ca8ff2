"""The quickstart's table over several seeds, and whether region pretraining wins in every column of each.

regionclip quickstart out=quickstart-0 seed=0
regionclip quickstart out=quickstart-1 seed=1
python benchmarks/quickstart.py quickstart-0 quickstart-1 --write docs/results.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from results_tables import spread
from rounds import put

from clip_base.storage.files import read_json
from regionclip.quickstart.report import GROUPS, KEYS, MODELS, PARTS, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of the quickstart, one of each seed")
    parser.add_argument("--write", type=Path, help="Markdown page whose `quickstart` section takes the table")
    options = parser.parse_args()
    print(text := table(options.folders))
    if options.write:
        put(options.write, "quickstart", text)


def table(folders: Sequence[Path]) -> str:
    """Returns percentages of both models as mean ± standard deviation, and the columns that one seed lost."""
    found = [results(folder) for folder in folders]
    sizes = {str(read_json(folder / "pace.json")["size"]) for folder in folders}
    if len(sizes) > 1:
        raise SystemExit(f"the folders are of different sizes: {', '.join(sorted(sizes))}")
    header = ["", *(f"{group.title} {' / '.join(PARTS)}" for group in GROUPS)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for model, title in MODELS.items():
        cells = [
            " / ".join(spread([100 * one[model][f"{group.key}_{part}"] for one in found]) for part in PARTS)
            for group in GROUPS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lost = [
        f"{folder.name}: {key}"
        for folder, one in zip(folders, found, strict=True)
        for key in KEYS
        if one["regionclip"][key] <= one["clip"][key]
    ]
    won = "RegionCLIP is better than CLIP in every column of every seed."
    return "\n".join(
        [
            f"{'1 seed' if len(folders) == 1 else f'{len(folders)} seeds'}, size {sizes.pop()}; percent, "
            "mean ± standard deviation.",
            "",
            *lines,
            "",
            f"Not better than CLIP: {', '.join(lost)}." if lost else won,
        ]
    )


if __name__ == "__main__":
    main()
