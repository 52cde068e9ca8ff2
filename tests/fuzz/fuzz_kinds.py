"""The kinds of files that jobs read, each with whole files to start from and the reader that jobs use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz_makers import (
    NAMES,
    arrays,
    as_image,
    boxes_xml,
    coco,
    cvat,
    detections,
    detector,
    hugging_face,
    index,
    journal,
    label_studio,
    mined,
    network,
    open_clip,
    parquet,
    phrases,
    pickles,
    proposals,
    skipped_before,
    tars,
    texts,
    tiny_clip,
    torchscript,
    train,
    video,
    vocabulary,
    yolo,
)
from fuzz_readers import (
    Read,
    detected,
    drain,
    from_table,
    images_listed,
    images_of_list,
    mine_options,
    propose,
    read_image,
    read_journal,
    read_mined,
    read_reasons,
    read_tars,
    read_teacher,
    read_video,
    read_where_it_says,
    resume,
    search,
    see_finished,
    source,
    weights_of,
)

from clip_base.data.coco import read_captions
from clip_base.evaluation.datasets import coco_images
from clip_base.evaluation.prompts import read_templates
from clip_base.weights.native import save_clip
from clip_base.weights.unpickle import read_arrays, read_pickle, read_torchscript
from regionclip.concepts.phrase_cache import StoredPhrases
from regionclip.concepts.phrases import read_stop_words
from regionclip.concepts.pool import read_concepts
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.annotations import CocoDetection
from regionclip.data.captions import read_texts
from regionclip.data.categories import load_split, parse_names
from regionclip.data.results import read_results
from regionclip.proposals.rpn.proposer import load_network


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: as the table has it.
        target: the file that is mutated, in the folder.
        form: which mutator changes it.
        read: reads the folder as jobs do.
        make: writes whole files into a folder.
        weight: its share of a campaign.
    """

    name: str
    target: str
    form: str
    read: Read
    make: Callable[[Path], object]
    weight: float = 1.0


CONFIG = (
    "# region-mine\nimages: images\ncaptions: a.json\nweights: w.safetensors\nconcepts: pool.jsonl\nout: x\n"
    "proposer: {name: grid, sizes: [0.5, 1.0]}\nmatcher:\n  name: caption\n  min_probability: 0.1\n"
    "resize: {short: [64], long: 64}\nbatch_size: 4\nprecision: fp32\n"
)


CSV = 'image,caption\n1.jpg,a red cup\n2.jpg,"a dog, é"\n3.jpg,x\n'


TSV = "caption\timage\na red cup\t1.jpg\na dog\t2.jpg\n"


LINES = "".join(json.dumps({"image": f"{n}.jpg", "caption": ["a cup", "é"]}) + "\n" for n in range(1, 5))


DOCUMENT = "images:\n- a\nnames: {0: cup, 1: dog}\nnc: 2\n"


KINDS = (
    Kind("JSON: captions", "a.json", "json", lambda f: read_captions(f / "a.json"), coco),
    Kind("JSON: captions to mine", "a.json", "json", images_listed, coco),
    Kind("JSON: annotations", "a.json", "json", lambda f: CocoDetection(f / "a.json", f / "images"), coco, 2),
    Kind(
        "JSON: boxes to classify",
        "a.json",
        "json",
        lambda f: coco_images(str(f / "a.json"), str(f / "images")),
        coco,
    ),
    Kind(
        "JSON: results",
        "r.json",
        "json",
        lambda f: read_results(f / "r.json", {n: f"{n}.jpg" for n in range(1, 5)}, "x", {"cup": 1, "dog": 2}),
        detections,
        2,
    ),
    Kind("JSON: proposals", "p.json", "json", propose, proposals("json")),
    Kind(
        "JSON: split",
        "s.json",
        "json",
        lambda f: load_split(f / "s.json", ["cup", "dog"]),
        texts("s.json", '{"base": ["cup"], "novel": ["dog"]}'),
    ),
    Kind(
        "JSON: class list",
        "n.json",
        "json",
        lambda f: parse_names(str(f / "n.json")),
        texts(
            "n.json", '{"categories": [{"id": 2, "name": "a", "synonyms": ["b"]}, {"id": 1, "name": "c"}]}'
        ),
    ),
    Kind(
        "JSON: texts",
        "t.json",
        "json",
        lambda f: list(read_texts(f / "t.json")),
        texts("t.json", '["a", {"caption": "b"}]'),
    ),
    Kind(
        "JSON Lines: pairs",
        "t.jsonl",
        "json lines",
        lambda f: from_table(f, "jsonl"),
        texts("t.jsonl", LINES),
    ),
    Kind("JSON Lines: pool", "pool.jsonl", "json lines", lambda f: read_concepts(f / "pool.jsonl"), mined),
    Kind("YAML: config", "c.yaml", "yaml", mine_options, texts("c.yaml", CONFIG), 2),
    Kind(
        "YAML: class list",
        "n.yaml",
        "yaml",
        lambda f: parse_names(str(f / "n.yaml")),
        texts("n.yaml", DOCUMENT),
    ),
    Kind("CSV: pairs", "t.csv", "csv", lambda f: from_table(f, "csv"), texts("t.csv", CSV)),
    Kind("TSV: pairs", "t.tsv", "csv", lambda f: from_table(f, "csv"), texts("t.tsv", TSV)),
    Kind(
        "CSV: class list",
        "n.csv",
        "csv",
        lambda f: parse_names(str(f / "n.csv")),
        texts("n.csv", "id,name\n1,cup\n2,dog\n"),
    ),
    Kind(
        "text: class list",
        "n.txt",
        "text",
        lambda f: parse_names(str(f / "n.txt")),
        texts("n.txt", "cup, mug\ndog # x\n"),
    ),
    Kind(
        "text: templates",
        "n.txt",
        "text",
        lambda f: read_templates(str(f / "n.txt")),
        texts("n.txt", "a {}\n{} é\n"),
    ),
    Kind(
        "text: stop words",
        "n.txt",
        "text",
        lambda f: read_stop_words(str(f / "n.txt")),
        texts("n.txt", "a\nthe\n"),
    ),
    Kind(
        "text: captions beside images",
        "images/1.txt",
        "text",
        lambda f: drain(source(name="folder", folder=str(f / "images"))),
        texts("images/1.txt", "a cup\né\n"),
    ),
    Kind(
        "Parquet: paths",
        "a.parquet",
        "parquet",
        lambda f: drain(source(name="parquet", file=str(f / "a.parquet"), images=str(f / "images")), True),
        parquet(["1.jpg", "2.jpg"]),
    ),
    Kind(
        "Parquet: images",
        "a.parquet",
        "parquet",
        lambda f: drain(source(name="parquet", file=str(f / "a.parquet")), True),
        parquet([b"abc", None]),
    ),
    Kind("Parquet: mined shard", "mined/shard-00000.parquet", "parquet", read_mined, mined, 2),
    Kind("Parquet: mined images", "mined/images/shard-00000.parquet", "parquet", read_mined, mined),
    Kind("Parquet: proposals", "p.parquet", "parquet", propose, proposals("parquet")),
    Kind("manifest of mined pairs", "mined/manifest.json", "json", read_where_it_says, mined, 2),
    Kind("manifest, for a teacher", "mined/manifest.json", "json", read_teacher, mined),
    Kind("list of skipped images", "mined/skipped.jsonl", "json lines", read_reasons, mined),
    Kind("tar: pairs and classes", "test/0.tar", "tar", read_tars, tars, 2),
    Kind(
        "safetensors: CLIP",
        "w.safetensors",
        "safetensors",
        weights_of("w.safetensors"),
        lambda f: save_clip(tiny_clip(), f / "w.safetensors"),
        2,
    ),
    Kind("safetensors: detector", "w.safetensors", "safetensors", detected, detector),
    Kind(
        "safetensors: proposal network",
        "w.safetensors",
        "safetensors",
        lambda f: load_network(f / "w.safetensors"),
        network,
    ),
    Kind(
        "safetensors: vocabulary",
        "v.safetensors",
        "safetensors",
        lambda f: Vocabulary.load(f / "v.safetensors"),
        vocabulary,
        2,
    ),
    Kind("safetensors: Hugging Face", "hf/model.safetensors", "safetensors", weights_of("hf"), hugging_face),
    Kind("config of Hugging Face", "hf/config.json", "json", weights_of("hf"), hugging_face, 2),
    Kind("config of open_clip", "hub/open_clip_config.json", "json", weights_of("hub"), open_clip),
    Kind("torch: state dict", "w.pt", "zip", lambda f: read_pickle(f / "w.pt"), pickles),
    Kind("torch: CLIP", "clip.pt", "zip", weights_of("clip.pt"), pickles),
    Kind("torch: TorchScript", "w.pt", "zip", lambda f: read_torchscript(f / "w.pt"), torchscript),
    Kind(
        "torch: vocabulary", "v.pth", "zip", lambda f: Vocabulary.load(f / "v.pth", list(NAMES)), vocabulary
    ),
    Kind("pickle of arrays", "w.pkl", "bytes", lambda f: read_arrays(f / "w.pkl"), arrays, 2),
    Kind(
        "NumPy: vocabulary", "v.npy", "npy", lambda f: Vocabulary.load(f / "v.npy", list(NAMES)), vocabulary
    ),
    Kind("image: JPEG", "a.img", "bytes", read_image, as_image("JPEG"), 3),
    Kind("image: PNG", "a.img", "bytes", read_image, as_image("PNG"), 3),
    Kind("image: PNG, palette", "a.img", "bytes", read_image, as_image("PNG", mode="P")),
    Kind("image: WebP", "a.img", "bytes", read_image, as_image("WEBP"), 2),
    Kind("image: GIF", "a.img", "bytes", read_image, as_image("GIF"), 2),
    Kind("image: TIFF", "a.img", "bytes", read_image, as_image("TIFF"), 3),
    Kind("image: BMP", "a.img", "bytes", read_image, as_image("BMP"), 2),
    Kind("image: PPM", "a.img", "bytes", read_image, as_image("PPM")),
    Kind("video", "a.mp4", "bytes", read_video, video, 0.5),
    Kind("run: config", "run/config.yaml", "yaml", see_finished, train),
    Kind("run: metrics", "run/metrics.json", "json", see_finished, train),
    Kind("run: record of inputs", "run/.inputs.json", "json", see_finished, train),
    Kind("run: log", "run/log.jsonl", "json lines", resume, train),
    Kind("run: skipped samples", "run/skipped.jsonl", "json lines", resume, skipped_before),
    Kind("run: training.pt", "run/checkpoints/00000002/training.pt", "zip", resume, train, 2),
    Kind("run: weights", "run/checkpoints/00000002/model.safetensors", "safetensors", resume, train),
    Kind("journal of a stopped run", "log.jsonl", "json lines", read_journal, journal, 2),
    Kind(
        "SQLite: phrases",
        "a.phrases.db",
        "bytes",
        lambda f: StoredPhrases(f / "a.phrases.db", "parser").find(["a red cup 3"]),
        phrases,
    ),
    Kind("SQLite: list of images", "list.db", "bytes", images_of_list, lambda f: (coco(f), images_listed(f))),
    Kind(
        "labels: VOC",
        "Annotations/2.xml",
        "text",
        lambda f: CocoDetection(f / "Annotations", f / "images"),
        boxes_xml,
    ),
    Kind("labels: CVAT", "a.xml", "text", lambda f: CocoDetection(f / "a.xml", f / "images"), cvat),
    Kind(
        "labels: YOLO",
        "labels/val/2.txt",
        "text",
        lambda f: CocoDetection(f / "labels" / "val", f / "images" / "val"),
        yolo,
    ),
    Kind(
        "labels: YOLO's data.yaml",
        "data.yaml",
        "yaml",
        lambda f: CocoDetection(f / "data.yaml", f / "images" / "val"),
        yolo,
    ),
    Kind(
        "labels: Label Studio",
        "a.json",
        "json",
        lambda f: CocoDetection(f / "a.json", f / "images"),
        label_studio,
    ),
    Kind("search index: about", "my.index/index.json", "json", search, index),
    Kind("search index: shard", "my.index/shard-000000.safetensors", "safetensors", search, index),
)
