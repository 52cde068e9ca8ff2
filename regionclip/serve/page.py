"""The page itself, in Gradio. It is imported only where the page is shown, for Gradio is an extra."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from clip_base.runtime.errors import InputError
from clip_base.runtime.files import write_text
from regionclip.serve.desk import TYPED, Desk, Thresholds, View

COLUMNS = {"#": "9%", "name": "29%", "score": "14%", "x": "12%", "y": "12%", "w": "12%", "h": "12%"}
PRIVATE = {"api_visibility": "private"}
MOST_BOXES = 50  # shown at first
HINT = "Click a box, or a line of the table, for its nearest names."
STYLE = """
.gradio-container {max-width: min(1500px, 100vw) !important; margin: auto}
.gradio-container main, .gradio-container main :is(.column, .row) {min-width: 0; max-width: 100%}
.message [role=alert] {border-left: 4px solid #dc2626; padding: .5em .8em; font-weight: 600}
.result img {cursor: pointer; max-height: 75vh}
"""
INTRODUCTION = (
    "# regionclip\n"
    "Drop a picture and say what to look for. Everything stays on the machine that runs this page."
)


@dataclass(frozen=True)
class Panel:
    """What the page shows of one checkpoint; `chosen` is the row that was clicked."""

    picture: Any
    summary: Any
    table: Any
    file: Any
    chosen: Any
    caption: Any
    nearest: Any

    @property
    def parts(self) -> list[Any]:
        """Everything, in the order that `_shown` answers in."""
        return [
            self.picture, self.summary, self.table, self.file, self.chosen, self.caption, self.nearest
        ]  # fmt: skip


def looks() -> dict[str, Any]:
    """Returns the page's theme, in fonts that every machine has, and its style."""
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="teal"
    )
    return {"theme": theme, "css": STYLE}


def build(desk: Desk, folder: Path, examples: Sequence[Path], names: str, score: float) -> Any:
    """Returns the page as Gradio's Blocks.

    Args:
        desk: what answers it.
        folder: where the files to download are written.
        examples: pictures to begin with; the first is shown.
        names: what to look for at first.
        score: score that boxes need at first.
    """
    with gr.Blocks(title="regionclip", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        view = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs, button, among = _controls(desk, examples, names, score)
            with gr.Column(scale=3, min_width=260):
                message = gr.HTML(elem_classes="message", visible=False)
                with gr.Row():
                    panels = [_panel(desk, which) for which in range(len(desk.checkpoints))]

        def update(shown: View | None, path: str | None, text: str, *limits: float) -> list[Any]:
            asked = path, text, Thresholds(limits[0], limits[1], int(limits[2]))
            return _answer(desk, folder, shown, *asked) or [gr.skip()] * len(outputs)

        outputs = [view, message, *(part for panel in panels for part in panel.parts)]
        path, typed, *sliders = inputs
        asking = [blocks.load, path.change, typed.submit, button.click, *(one.change for one in sliders)]
        # One at a time and the last in any case, so that what is shown is what stands in the fields.
        gr.on(
            asking,
            update,
            [view, *inputs],
            outputs,
            trigger_mode="always_last",
            show_progress="minimal",
            show_progress_on=[panel.picture for panel in panels],
            **PRIVATE,
        )
        for which, panel in enumerate(panels):
            _connect(desk, which, panel, view, among)
    blocks.queue(default_concurrency_limit=4, max_size=64)
    return blocks


def _controls(desk: Desk, examples: Sequence[Path], names: str, score: float) -> tuple[list[Any], Any, Any]:
    """Makes what asks: [path of the picture, names, thresholds …], the button, and the choice of lists."""
    picture = gr.Image(
        str(examples[0]),
        label="Picture",
        type="filepath",
        sources=["upload", "clipboard"],
        height=260,
        buttons=[],
        elem_id="picture",
    )
    # Its path, as it comes: Gradio would refuse a file that is no picture in words that help nobody.
    path = gr.State(str(examples[0]))
    picture.change(_path_of, picture, path, preprocess=False, trigger_mode="always_last", **PRIVATE)
    gr.Examples([[str(example)] for example in examples], picture, label="Examples", elem_id="examples")
    typed = gr.Textbox(
        names,
        label="Look for",
        info="Names with commas between them, or a list: coco, lvis",
        lines=1,
        max_lines=8,
        elem_id="names",
    )
    button = gr.Button("Detect", variant="primary", elem_id="detect")
    overlap = "IoU of two boxes of a name; 1 drops none"
    sliders = [
        gr.Slider(0, 1, score, step=0.01, label="Score at least", elem_id="score"),
        gr.Slider(0, 1, 1, step=0.05, label="Overlap at most", info=overlap, elem_id="overlap"),
        gr.Slider(1, 100, MOST_BOXES, step=1, label="Boxes at most", elem_id="most"),
    ]
    among = gr.Radio([TYPED, *desk.lists], value=TYPED, label="Nearest names come from", elem_id="among")
    return [path, typed, *sliders], button, among


def _path_of(picture: dict[str, Any] | None) -> str | None:
    return str(picture["path"]) if picture else None


def _panel(desk: Desk, which: int) -> Panel:
    with gr.Column(min_width=260):
        if len(desk.checkpoints) > 1:
            gr.Markdown(f"### {html.escape(desk.checkpoints[which].title)}")
        chosen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                picture = gr.Image(
                    label="Boxes",
                    interactive=False,
                    format="png",
                    buttons=["fullscreen"],
                    elem_id=f"boxes-{which}",
                    elem_classes="result",
                )
                summary = gr.Markdown(elem_id=f"summary-{which}")
            with gr.Column(scale=1, min_width=220):
                caption = gr.Markdown(HINT, elem_id=f"caption-{which}")
                nearest = gr.Label(
                    label="Nearest names", show_heading=False, visible=False, elem_id=f"nearest-{which}"
                )
        table = gr.Dataframe(
            headers=list(COLUMNS),
            interactive=False,
            max_height=320,
            show_label=False,
            column_widths=list(COLUMNS.values()),
            buttons=[],
            elem_id=f"table-{which}",
        )
        file = gr.DownloadButton("Download JSON (COCO results)", size="sm", elem_id=f"download-{which}")
    return Panel(picture, summary, table, file, chosen, caption, nearest)


def _connect(desk: Desk, which: int, panel: Panel, view: Any, among: Any) -> None:
    """Lets clicks on a panel's picture and table choose a box."""
    outputs = [panel.chosen, panel.picture, panel.caption, panel.nearest]

    def on_picture(shown: View | None, title: str, event: gr.SelectData) -> list[Any]:
        row = None if shown is None else desk.row_at(shown, which, *event.index)
        return _choose(desk, which, shown, title, row)

    def on_table(shown: View | None, title: str, event: gr.SelectData) -> list[Any]:
        # The table may have been sorted: the line's own number says which box it is.
        row = None if shown is None else desk.rows(shown, which)[int(event.row_value[0]) - 1]
        return _choose(desk, which, shown, title, row)

    def on_list(shown: View | None, title: str, row: int | None) -> list[Any]:
        return _choose(desk, which, shown, title, row)

    panel.picture.select(on_picture, [view, among], outputs, **PRIVATE)
    panel.table.select(on_table, [view, among], outputs, **PRIVATE)
    among.change(on_list, [view, among, panel.chosen], outputs, **PRIVATE)


def _answer(
    desk: Desk, folder: Path, shown: View | None, path: str | None, text: str, thresholds: Thresholds
) -> list[Any] | None:
    """Returns what the whole page shows: the view, the message, and each panel's parts.

    None when that is there already: a box that was clicked since then stays chosen.
    """
    try:
        view = desk.view(path, text, thresholds)
        if view == shown:
            return None
        panels = [_shown(desk, folder, view, which) for which in range(len(desk.checkpoints))]
    except InputError as error:
        message = gr.HTML(f'<div role="alert">{html.escape(str(error))}</div>', visible=True)
        empty = [None, "", None, gr.DownloadButton(visible=False), None, "", _hidden()]
        return [None, message, *(empty * len(desk.checkpoints))]
    return [view, gr.HTML("", visible=False), *(part for panel in panels for part in panel)]


def _shown(desk: Desk, folder: Path, view: View, which: int) -> list[Any]:
    """Returns a panel's parts."""
    content = json.dumps(desk.results(view, which), indent=1)
    name = hashlib.sha256(content.encode()).hexdigest()
    file = folder / "results" / name / f"{Path(view.path).stem}.json"
    write_text(file, content)
    return [
        desk.picture(view, which), desk.summary(view, which), desk.table(view, which),
        gr.DownloadButton(value=str(file), visible=True), None, HINT, _hidden(),
    ]  # fmt: skip


def _choose(desk: Desk, which: int, view: View | None, title: str, row: int | None) -> list[Any]:
    """Returns the row, the picture with its box, a line on it, and its nearest names."""
    if view is None:
        return [None, None, "", _hidden()]
    picture = desk.picture(view, which, row)
    if row is None:
        return [None, picture, HINT, _hidden()]
    line, nearest = desk.nearest(view, which, row, title)
    return [row, picture, html.escape(line), gr.Label(nearest, visible=True)]


def _hidden() -> Any:
    return gr.Label(None, visible=False)
