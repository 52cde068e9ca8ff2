"""Options as other programs spell them, so that a guess is answered with the command that works here."""

from __future__ import annotations

from collections.abc import Collection

# What spellings are called here: the first of these that the job has. One with `=` is what is typed, with the
# value for `{}`.
_SPELLINGS = {
    "conf conf_thres conf_threshold confidence confidence_threshold box_threshold score_thr threshold": (
        "score_threshold detector.min_score"
    ),
    "source input inputs image img img_path image_path path video folder": "images file mined",
    "imgsz img_size image_size input_size": ("resize.short={}&resize.long={} tower.vision.resolution size"),
    "classes class_names class_list names text_prompt prompt prompts texts labels custom_vocabulary": (
        "vocabulary classes names"
    ),
    "model checkpoint ckpt model_path pretrained weight weights": "weights file init",
    "output output_dir outdir out_dir save_dir output_folder project name": "out",
    "batch bs batch_size train_batch_size": "batch_size train.batch_size",
    "epochs epoch": "train.epochs",
    "steps iterations iters max_iter max_steps": "train.steps",
    "lr lr0 learning_rate": "train.lr",
    "wd weight_decay": "train.weight_decay",
    "warmup warmup_iters warmup_steps": "train.warmup_steps",
    "optimizer": "train.optimizer",
    "seed random_seed": "train.seed seed",
    "num_workers n_workers workers jobs": "workers train.workers",
    "gpu gpus cuda device": "device train.device",
    "half fp16 amp": "precision=bf16 train.precision=bf16",
    "iou iou_thres iou_threshold nms_threshold": "detector.nms nms network.nms",
    "max_det max_detections detections_per_image": "detector.max_detections",
    "vid_stride frame_interval skip_frames": "frame_stride",
    "topk k top": "top_k",
    "data dataset ann_file annotation": "annotations images train",
    "val val_data validation_data": "val_annotations evaluate.images",
    "save_txt": "format=yolo",
    "nosave no_save": "draw=false",
    "freeze": "freeze_stages",
}
_TEXTS = {
    "resume": "the same command resumes a stopped run by itself; omit it",
    "exist_ok": "the same command resumes a run, another one needs another out=; omit it",
}
HERE = {spelling: keys.split() for spellings, keys in _SPELLINGS.items() for spelling in spellings.split()}
HERE |= {spelling: [] for spelling in _TEXTS}


def hint(key: str, value: object, known: Collection[str]) -> str:
    """Returns what to type instead of an option that the job does not have; "" when nothing is known.

    Args:
        key: the option, with underscores.
        value: what it was given.
        known: the job's options, dotted.
    """
    spelled = key.lower()
    if spelled in _TEXTS:
        return _TEXTS[spelled]
    for here in HERE.get(spelled, ()):
        name, equals, _ = here.partition("=")
        if name in known:
            form = here.replace("&", " ") if equals else f"{name}={{}}"
            return f"it is called {name} here: {form.replace('{}', _typed(value))}"
    return ""


def _typed(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f'"{text}"' if " " in text else text
