"""Does it work? The paper's tables in small, on generated worlds: one resumable command, several seeds.

    python benchmarks/results.py --seeds 0 1 2 --out results --write docs/results.md

Every row of a seed shares what it can: one world, one CLIP, one proposal network, one set of proposals.
The rows of the main tables are made for all seeds, the ablations for those of `--ablations`, by default the
first. A run that was stopped goes on with the same command; `--tables` only reads what is there. The options
of the jobs stand in configs/*/results.yaml.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from results_rows import (
    ABLATIONS,
    ALPHAS,
    BACKGROUND_WEIGHTS,
    CURVE,
    DETECTORS,
    SIDE,
    STUDENTS,
    ablation_stages,
    first_stages,
    main_stages,
    model,
)
from rounds import command, machine, put, versions

import regionclip
from clip_base.data.coco import read_captions
from clip_base.evaluation.retrieval import embed_texts, recall_at
from clip_base.models.clip import CLIP
from clip_base.runtime.progress import track
from clip_base.storage.files import read_json, write_json
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip
from regionclip.quickstart.stages import run_stages
from regionclip.structures.transforms import ResizeConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--ablations", type=int, nargs="*", help="seeds whose ablations are run (default: the first)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder; each seed has one in it")
    parser.add_argument("--preset", default="results", help="which of configs/*/PRESET.yaml the jobs use")
    parser.add_argument("--tables", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--write", type=Path, help="Markdown page whose results section takes the tables")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    ablated = options.seeds[:1] if options.ablations is None else options.ablations
    for seed in [] if options.tables else options.seeds:
        folder = options.out / f"seed-{seed}"
        print(f"seed {seed}: {folder}", flush=True)
        run_stages(first_stages(folder, seed), options.preset, folder / "timings.json")
        forget_vision(folder, seed)
        run_stages(main_stages(folder, seed), options.preset, folder / "timings.json")
    for seed in [] if options.tables else ablated:
        folder = options.out / f"seed-{seed}"
        print(f"seed {seed}, ablations: {folder}", flush=True)
        run_stages(ablation_stages(folder, seed), options.preset, folder / "timings.json")
    for seed in [] if options.tables else options.seeds:
        retrieve_at_region_scale(options.out / f"seed-{seed}")
    text = tables([options.out / f"seed-{seed}" for seed in options.seeds])
    print(text)
    if options.write:
        facts = f"Machine: {machine(torch.get_num_threads())}.\nVersions: {versions('torch')}."
        put(options.write, "results", f"{facts}\n\n    {command()}\n\n{text}")


def forget_vision(folder: Path, seed: int) -> None:
    """Writes `random/model.safetensors`: the CLIP's text tower, its vision tower with random weights."""
    path = model(folder, "random")
    if path.exists():
        return
    trained = load_clip(str(model(folder, "clip")))
    torch.manual_seed(seed)
    fresh = CLIP(trained.config)
    trained.visual.load_state_dict(fresh.visual.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_clip(trained, path)


def retrieve_at_region_scale(folder: Path) -> None:
    """Writes each model's retrieval figures with whole scenes seen as the region stages see them.

    `clip-base retrieval` sees a scene at the size that CLIP was pretrained on, here half of that.
    """
    captions, files = read_captions(str(folder / "world" / "captions_val.json"))
    names = ["clip", *(f"student-{name}" for name in STUDENTS | ABLATIONS)]
    places = {name: model(folder, name) for name in names}
    places |= {f"student-{alpha}": folder / "curve-student" / f"alpha-{alpha}.safetensors" for alpha in CURVE}
    for name, path in places.items():
        metrics = folder / f"{name}-retrieval-{SIDE}" / "metrics.json"
        if metrics.exists() or not path.exists():
            continue
        predictor = regionclip.load(path, resize=ResizeConfig(short=[SIDE], long=SIDE))
        pictures = [folder / "world" / "images" / files[key] for key in captions]
        batches = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
        features = [predictor.image_features(batch) for batch in track(batches, f"{name}, retrieval")]
        texts = embed_texts(load_clip(str(path)).eval(), [own[0] for own in captions.values()], 128)
        metrics.parent.mkdir(exist_ok=True)
        write_json(metrics, recall_at(torch.cat(features), texts, torch.arange(len(pictures))), indent=2)


TOP1 = ("top1_base", "top1_novel", "top1")
AP50 = ("AP50_base", "AP50_novel", "AP50_all")
RETRIEVAL = ("image_to_text_R@1", "text_to_image_R@1")


def tables(folders: Sequence[Path]) -> str:
    """Returns all tables as Markdown: percent, mean and standard deviation over the seeds that have a row."""
    main = {"clip": "CLIP", "clip-as-trained": "CLIP, images at its training resolution"}
    main |= {f"student-{name}": student.title for name, student in STUDENTS.items()}
    varied = {f"student-{name}": student.title for name, student in ABLATIONS.items()}
    mixed = {f"student-{alpha}": f"{alpha} of our best, the rest of CLIP" for alpha in CURVE}
    found = {f"detector-{name}": f"initialized from {title}" for name, title in DETECTORS.items()}
    changed = {f"detector-background-{w}": f"our best, background weight {w}" for w in BACKGROUND_WEIGHTS}
    changed |= {f"alpha-{alpha}": f"our best, α {alpha}" for alpha in ALPHAS}
    changed |= {f"detector-{alpha}": f"{alpha} of our best, the rest of its student" for alpha in CURVE}
    return "\n".join(
        [
            f"Seeds: {len(folders)}; percent, mean ± standard deviation.",
            *["", *zero_table(folders, main), "", *detector_table(folders, found)],
            *["", "Ablations, one change at a time:"],
            *["", *zero_table(folders, varied | mixed), "", *detector_table(folders, changed)],
        ]
    )


def zero_table(folders: Sequence[Path], rows: dict[str, str]) -> list[str]:
    """Returns a table of what models know without detector training; rows: title by folder's name."""
    lines = ["| | " + " | ".join(ZERO_HEADINGS) + " |", "|" + "---|" * (1 + len(ZERO_HEADINGS))]
    settings = {"truth": TOP1, "proposals": AP50, "retrieval": RETRIEVAL, f"retrieval-{SIDE}": RETRIEVAL}
    for key, title in rows.items():
        cells = [cell(folders, f"{key}-{setting}", names) for setting, names in settings.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def detector_table(folders: Sequence[Path], rows: dict[str, str]) -> list[str]:
    lines = ["| detector | AP50 base / novel / all | AP all |", "|---|---|---|"]
    for key, title in rows.items():
        figures = [cell(folders, f"{key}-evaluation", names) for names in (AP50, ("AP_all",))]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    return lines


ZERO_HEADINGS = (
    "zero-shot, ground-truth boxes: top-1 base / novel / all",
    "zero-shot, proposals: AP50 base / novel / all",
    "retrieval R@1 at 64 px: image to text / text to image",
    f"retrieval R@1 at {SIDE} px: image to text / text to image",
)


def cell(folders: Sequence[Path], run: str, names: Sequence[str]) -> str:
    """Returns figures of a run as "mean ± deviation / …" over the seeds that have them; "–" without any."""
    found = [folder / run / "metrics.json" for folder in folders]
    metrics = [read_json(path, "metrics") for path in found if path.exists()]
    return " / ".join(spread([100 * float(one[name]) for one in metrics]) for name in names)


def spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
