"""Each format is opened in one place, where every failure becomes one line; nothing else opens it.

Who adds a reader calls the function of its format; a new opener is a decision, to be listed here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What opens a format, and who may. Files that only this project has written count as any other: they may be
# damaged. Those marked so read text that does not come from a file, or answer every failure themselves.
OPENERS: dict[str, dict[str, str]] = {
    "json.loads": {
        "clip_base/storage/files.py": "parse_json, read_log",
        "clip_base/storage/safetensors_files.py": "None for any damage",
        "clip_base/weights/native.py": "describe, of metadata that is shown",
        "clip_base/jobs/resume_log.py": "damage is an InputError, or the line that a kill cut off",
        "clip_base/jobs/schema.py": "what it has just written; its cache is made anew",
        "clip_base/storage/lock.py": "anything else is another process",
        "clip_base/storage/tars.py": "an index, which is made anew",
        "clip_base/evaluation/features.py": "features, which are made anew",
        "clip_base/storage/kinds.py": "what tells kinds apart: no fault is one",
        "clip_base/search/index.py": "damage is an InputError",
        "clip_base/synthetic/scenes.py": "parts of the run that has just drawn them",
        "clip_base/curation/sampling.py": "damage is an InputError",
        "regionclip/serve/server.py": "a request",
        "regionclip/training/region_text.py": "a vocabulary that was read",
        "regionclip/training/text_space.py": "a vocabulary that was read",
        "regionclip/checkpoints/interpolate.py": "sizes of detectors that were read",
        "regionclip/concepts/phrase_cache.py": "phrases, which are parsed anew",
    },
    "OmegaConf.create": {
        "clip_base/storage/tables.py": "read_yaml",
        "clip_base/jobs/config.py": "options that were typed, and dataclasses",
        "clip_base/jobs/run.py": "options of this run",
    },
    "OmegaConf.load": {},
    "yaml.safe_load": {},
    "csv.reader": {
        "clip_base/storage/tables.py": "open_table",
        "clip_base/storage/kinds.py": "64 KB without NUL, to count columns",
    },
    "csv.DictReader": {
        "clip_base/weights/fetching/hub.py": "a table that comes with the package",
        "clip_base/synthetic/splits.py": "the same",
    },
    "safe_open": {
        "clip_base/weights/native.py": "open_safetensors",
        "clip_base/weights/fetching/push.py": "without torch; damage is an InputError",
        "clip_base/curation/sampling.py": "into NumPy; damage is an InputError",
    },
    "load_file": {"clip_base/training/checkpoint.py": "whatever it raises is an InputError"},
    "torch.load": {
        "clip_base/weights/unpickle.py": "read_pickle",
        "clip_base/training/checkpoint.py": "whatever it raises is an InputError",
    },
    "pickle.load": {},
    "pickle.loads": {},
    "np.load": {
        "regionclip/concepts/vocabulary.py": "whatever it raises is an InputError",
        "clip_base/storage/tars.py": "an index, which is made anew",
        "clip_base/curation/curate.py": "what this process has just written",
    },
    "tarfile.open": {
        "clip_base/storage/tars.py": "scan and stream",
        "clip_base/synthetic/scenes.py": "a tar that it writes",
        "clip_base/curation/units.py": "a tar that it writes",
        "clip_base/benchmark/packing.py": "a tar that it writes",
    },
    "zipfile.ZipFile": {"clip_base/weights/unpickle.py": "archives of torch"},
    "gzip.decompress": {"clip_base/models/tokenizer.py": "the vocabulary that comes with the package"},
    "gzip.GzipFile": {
        "clip_base/storage/files.py": "read_json",
        "clip_base/storage/tars.py": "stream",
        "clip_base/storage/spool.py": "a copy of a tar, whose damage is an InputError",
    },
    "gzip.open": {},
    "Image.open": {"clip_base/images/headers.py": "open_image"},
    "ElementTree.parse": {"clip_base/data/formats/xml_files.py": "read_xml"},
    "ElementTree.iterparse": {"clip_base/data/formats/xml_files.py": "root_tag"},
    "ElementTree.fromstring": {"regionclip/reports/charts.py": "what it has just drawn"},
    "pq.ParquetFile": {"clip_base/storage/parquet_files.py": "open_parquet"},
    "pq.ParquetDataset": {},
    "pq.read_table": {},
    "pq.read_schema": {},
    "pq.read_metadata": {},
    "sqlite3.connect": {
        "regionclip/data/caption_index.py": "damage is an InputError",
        "regionclip/concepts/phrase_cache.py": "damage is an InputError, or is parsed anew",
    },
    "tarfile.TarInfo.frombuf": {"clip_base/storage/tars.py": "a member's own header, checked again"},
    "cv2.imdecode": {"clip_base/images/decode.py": "decode_data, behind the checks of sizes"},
    "cv2.imread": {},
    "cv2.VideoCapture": {
        "clip_base/images/video.py": "a video that cannot be read is an InputError",
        "clip_base/images/live.py": "a camera that cannot be opened is an InputError",
    },
    "json.load": {},
    "np.fromfile": {},
    "np.memmap": {},
    "torch.jit.load": {},
    "onnxruntime.InferenceSession": {"clip_base/export/graphs.py": "the graph that it has just written"},
    "safetensors.safe_open": {},
    "pa.ipc.open_file": {"regionclip/training/mined.py": "what this run has written of its shards"},
    "tomllib.load": {},
}


def calls() -> dict[str, set[str]]:
    """Returns which files of both packages call each opener."""
    found: dict[str, set[str]] = {name: set() for name in OPENERS}
    for package in ("clip_base", "regionclip"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    if name in found:
                        found[name].add(str(path.relative_to(ROOT)))
    return found


CALLS = calls()


@pytest.mark.parametrize("opener", OPENERS)
def test_a_format_has_no_other_opener(opener: str) -> None:
    assert CALLS[opener] == set(OPENERS[opener])
