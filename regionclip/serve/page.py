"""The page in Gradio, an optional package, which is imported only where a page is made."""

# Without `from __future__ import annotations`: Gradio reads the annotations of event handlers.
import html
import tempfile
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_json
from regionclip.serve.image_search import MOST, ImageSearch, as_html
from regionclip.serve.server import KEPT
from regionclip.serve.session import TYPED, Answer, DemoSession, Query

COLUMNS = {"#": "9%", "name": "29%", "score": "14%", "x": "12%", "y": "12%", "w": "12%", "h": "12%"}
PRIVATE = {"api_visibility": "private"}
INTRODUCTION = "Drop an image and say what to look for. Nothing leaves the machine that runs this page."
HINT = "Click a box, or a row of the table, for its nearest names."
STYLE = """
.gradio-container {max-width: min(2200px, 100vw) !important; margin: auto; width: 100%}
.gradio-container main, .gradio-container main :is(.column, .row) {min-width: 0; max-width: 100%}
.message [role=alert] {border-left: 4px solid #dc2626; padding: .5em .8em; font-weight: 600}
.result img {cursor: pointer; max-height: 75vh}
.found {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); gap: 14px}
.found figure {margin: 0}
.found a {display: flex; align-items: center; justify-content: center; height: 200px}
.found img {max-width: 100%; max-height: 100%}
.found figcaption {font-size: .85em; overflow-wrap: anywhere}
@media (max-width: 640px) {.table .cell-wrap {padding-inline: 3px !important; font-size: 12px}}
"""


def theme() -> dict[str, Any]:
    """Returns the page's theme, in fonts that every machine has, and its style."""
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {"theme": gr.themes.Default(**fonts, primary_hue="teal"), "css": STYLE}


def build(
    session: DemoSession,
    folder: Path,
    examples: list[Path],
    names: list[str],
    score: float,
    search: ImageSearch | None = None,
) -> Any:
    """Returns the page as Gradio's Blocks; `folder` takes the files to download.

    It begins with the first of the examples, looks for `names`, and shows boxes of at least `score`. With
    `search`, a second tab finds images of its index.
    """
    import gradio as gr

    # Once a minute, files that it took or made longer than `KEPT` seconds ago are deleted.
    with gr.Blocks(title="regionclip", analytics_enabled=False, delete_cache=(60, KEPT)) as blocks:
        gr.Markdown(f"# regionclip\n{INTRODUCTION}")
        asked = gr.State(None)
        with gr.Tab("Detect") if search else nullcontext(), gr.Row():
            with gr.Column(scale=1, min_width=300):
                image, typed, button, among = _controls(session, examples, names)
            with gr.Column(scale=4, min_width=260):
                with gr.Row():
                    sliders = _sliders(score)
                message = gr.HTML(elem_classes="message", visible=False)
                with gr.Row():
                    panels = [_panel(session, which, asked, among) for which in range(len(session.models))]
        if search is not None:
            with gr.Tab("Find images"):
                _search_tab(search)

        def update(last: Query | None, image: dict[str, Any] | None, text: str, *limits: float) -> list[Any]:
            try:
                query = session.query(image["path"] if image else "", text, *limits)
                if query == last:  # what is shown stays, and with it the box that was clicked
                    return [gr.skip()] * len(outputs)
                parts = [_parts(session.answer(query, which), folder) for which in range(len(panels))]
            except InputError as error:
                alert = gr.HTML(f'<div role="alert">{html.escape(str(error))}</div>', visible=True)
                return [None, alert, *_parts(None, folder) * len(panels)]
            return [query, gr.HTML("", visible=False), *chain(*parts)]

        inputs = [image, typed, *sliders]
        outputs = [asked, message, *chain(*panels)]
        # One at a time and the last in any case, so that what is shown is what the fields say. Unprocessed:
        # Gradio's own message about a file that is not an image does not help.
        gr.on(
            [blocks.load, image.change, typed.submit, button.click, *(one.change for one in sliders)],
            update, [asked, *inputs], outputs, preprocess=False, trigger_mode="always_last",
            show_progress="minimal", show_progress_on=[panel[0] for panel in panels], **PRIVATE,
        )  # fmt: skip
        for which, panel in enumerate(panels):
            chosen, look = panel[4], panel[7]
            name = partial(_region_name, session, which)
            pressed = look.click(name, [asked, chosen, typed], typed, **PRIVATE)
            pressed.then(update, [asked, *inputs], outputs, preprocess=False, **PRIVATE)
    blocks.queue(default_concurrency_limit=4, max_size=64, api_open=False)
    return blocks


def _controls(session: DemoSession, examples: list[Path], names: list[str]) -> tuple[Any, ...]:
    """Makes what asks: the image, the names, the button, and the choice of lists."""
    import gradio as gr

    first, sources = str(examples[0]), ["upload", "clipboard"]
    image = gr.Image(first, label="Image", sources=sources, height=260, buttons=[], elem_id="image")
    gr.Examples([[str(example)] for example in examples], image, elem_id="examples", **PRIVATE)
    info = "Names separated by commas, or a list: coco, lvis"
    typed = gr.Textbox(", ".join(names), label="Look for", info=info, max_lines=8, elem_id="names")
    button = gr.Button("Detect", variant="primary", elem_id="detect")
    among = gr.Radio([TYPED, *session.lists], value=TYPED, label="Nearest names from", elem_id="among")
    return image, typed, button, among


def _sliders(score: float) -> list[Any]:
    """Makes the thresholds above the result, where they are in view: score, overlap, number of boxes."""
    import gradio as gr

    info = "IoU of two boxes of one name; 1 drops none"
    return [
        gr.Slider(0, 1, score, step=0.01, label="Minimum score", elem_id="score"),
        gr.Slider(0, 1, 1, step=0.05, label="Maximum overlap", info=info, elem_id="overlap"),
        gr.Slider(1, 100, 50, step=1, label="Maximum number of boxes", elem_id="most"),
    ]


def _panel(session: DemoSession, which: int, asked: Any, among: Any) -> list[Any]:
    """Makes what shows one model's answer, in the order of `_parts`; a click on it chooses a box."""
    import gradio as gr

    with gr.Column(min_width=260):
        if len(session.models) > 1:
            gr.Markdown(f"### {html.escape(session.models[which].title)}")
        chosen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                drawn = gr.Image(
                    label="Boxes", interactive=False, format="png", buttons=["fullscreen"],
                    elem_id=f"boxes-{which}", elem_classes="result",
                )  # fmt: skip
                summary = gr.Markdown(elem_id=f"summary-{which}")
            with gr.Column(scale=1, min_width=220):
                caption = gr.Markdown(HINT, elem_id=f"caption-{which}")
                nearest = gr.Label(
                    label="Nearest names", show_heading=False, visible=False, elem_id=f"nearest-{which}"
                )
                look = gr.Button(
                    "Look for what this box shows", size="sm", visible=False, elem_id=f"look-{which}"
                )
        table = gr.Dataframe(
            headers=list(COLUMNS), column_widths=list(COLUMNS.values()), max_height=320, interactive=False,
            show_label=False, buttons=[], elem_id=f"table-{which}", elem_classes="table",
        )  # fmt: skip
        file = gr.DownloadButton("Download JSON (COCO results)", size="sm", elem_id=f"download-{which}")

    def choose(query: Query | None, title: str, box: int | None) -> list[Any]:
        if query is None:
            return [None, None, "", gr.Label(visible=False), gr.Button(visible=False)]
        answer = session.answer(query, which)
        if box is None or box not in answer.boxes:
            return [None, answer.drawn(), HINT, gr.Label(visible=False), gr.Button(visible=False)]
        line, names = session.nearest(query, which, box, title)
        shown = gr.Label(names, visible=True), gr.Button(visible=True)
        return [box, answer.drawn(box), html.escape(line), *shown]

    def on_image(query: Query | None, title: str, event: gr.SelectData) -> list[Any]:
        return choose(query, title, session.answer(query, which).box_at(*event.index) if query else None)

    def on_table(query: Query | None, title: str, event: gr.SelectData) -> list[Any]:
        return choose(query, title, int(event.row_value[0]) - 1)  # its own number: the table may be sorted

    outputs = [chosen, drawn, caption, nearest, look]
    drawn.select(on_image, [asked, among], outputs, **PRIVATE)
    table.select(on_table, [asked, among], outputs, **PRIVATE)
    among.change(choose, [asked, among, chosen], outputs, **PRIVATE)
    return [drawn, summary, table, file, chosen, caption, nearest, look]


def _region_name(session: DemoSession, which: int, query: Query | None, box: int | None, typed: str) -> str:
    """Returns what the field of names holds after a box was chosen to be looked for."""
    if query is None or box is None:
        return typed
    return session.region_name(query, which, box)


def _search_tab(search: ImageSearch) -> None:
    """Makes the tab that finds images of an index; a found image leads to itself at its own size."""
    import gradio as gr

    with gr.Row():
        words = gr.Textbox(label="Find", placeholder="a dog on a beach", scale=4, elem_id="find")
        count = gr.Slider(1, MOST, 24, step=1, label="Images", scale=1, min_width=260, elem_id="count")
    message = gr.HTML(elem_classes="message", visible=False)
    gallery = gr.HTML(elem_id="found")

    def find(text: str, most: float) -> list[Any]:
        try:
            return [gr.HTML("", visible=False), as_html(search(text, int(most)))]
        except InputError as error:
            return [gr.HTML(f'<div role="alert">{html.escape(str(error))}</div>', visible=True), ""]

    words.submit(find, [words, count], [message, gallery], **PRIVATE)
    count.release(find, [words, count], [message, gallery], **PRIVATE)


def _parts(answer: Answer | None, folder: Path) -> list[Any]:
    """Returns what a panel shows: image, summary, table, file, chosen box, caption, names of the box."""
    import gradio as gr

    if answer is None:
        hidden = gr.Label(visible=False), gr.Button(visible=False)
        return [None, "", None, gr.DownloadButton(visible=False), None, "", *hidden]
    file = Path(tempfile.mkdtemp(dir=folder)) / f"{Path(answer.query.path).stem}.json"
    write_json(file, answer.results(), indent=1)
    download = gr.DownloadButton(value=str(file), visible=True)
    hidden = gr.Label(visible=False), gr.Button(visible=False)
    return [answer.drawn(), answer.summary(), answer.table(), download, None, HINT, *hidden]
