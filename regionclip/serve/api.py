"""The HTTP endpoint beside the demo page: an image and names in, detections as JSON out.

curl --data-binary @photo.jpg 'http://127.0.0.1:7860/api/detect?names=cat,dog'
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations of what answers requests.
import tempfile
from pathlib import Path
from typing import Annotated, Any

from clip_base.runtime.errors import InputError
from regionclip.serve.image_search import FULL, ImageSearch
from regionclip.serve.session import DemoSession

DETECT, OPENAPI = "/api/detect", "/api/openapi.json"
DESCRIPTION = (
    "Finds things by name in one image. The request's body is the image file itself (JPEG, PNG, WebP and "
    "others). Boxes are in pixels of the image, rotated by its EXIF orientation, best first."
)


def add_to(app: Any, session: DemoSession, folder: Path, score: float) -> None:
    """Adds the endpoint to a FastAPI application; its description is at `OPENAPI`.

    Args:
        app: takes the route.
        session: answers.
        folder: where an image is kept while it is looked at.
        score: the lowest score of a request that names none.
    """
    from fastapi import HTTPException, Query, Request
    from fastapi.concurrency import run_in_threadpool
    from pydantic import BaseModel

    class Detection(BaseModel):
        """A box with a name."""

        name: str
        score: float
        box: tuple[float, float, float, float]  # x1, y1, x2, y2

    class Answer(BaseModel):
        """What was found in an image."""

        model: str
        width: int
        height: int
        detections: list[Detection]

    body = {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"description": "the image does not decode or is too large, or names are missing"},
        411: {"description": "the request does not say how long it is"},
        413: {"description": "the file is larger than allowed"},
        429: {"description": "too many uploads within an hour"},
    }

    async def detect(
        request: Request,
        names: Annotated[str, Query(description='"cat, red umbrella", or a list: coco, coco65, lvis')],
        score: Annotated[float, Query(ge=0, le=1, description="lowest score")] = score,
        overlap: Annotated[float, Query(ge=0, le=1, description="largest IoU of boxes of one name")] = 1.0,
        max_boxes: Annotated[int, Query(ge=1, le=1000, description="most boxes, the best ones")] = 100,
        model: Annotated[int, Query(ge=0, description="0, or 1 with compare=")] = 0,
    ) -> Answer:
        if model >= len(session.models):
            raise HTTPException(400, f"there are {len(session.models)} models, counted from 0")
        image = await request.body()
        try:
            return Answer(**await run_in_threadpool(answer, image, names, score, overlap, max_boxes, model))
        except InputError as error:
            raise HTTPException(400, str(error)) from None

    def answer(
        image: bytes, names: str, score: float, overlap: float, max_boxes: int, model: int
    ) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="image-") as file:
            file.write(image)
            file.flush()
            found = session.answer(session.query(file.name, names, score, overlap, max_boxes), model)
        shown = found.shown
        rows = zip(shown.class_names, shown.scores.tolist(), shown.boxes.tolist(), strict=True)
        return {
            "model": session.models[model].title,
            "width": shown.size[1],
            "height": shown.size[0],
            "detections": [{"name": name, "score": value, "box": box} for name, value, box in rows],
        }

    app.add_api_route(
        DETECT,
        detect,
        methods=["POST"],
        summary="Detect",
        description=DESCRIPTION,
        responses=refusals,
        openapi_extra={"requestBody": body},
    )


def add_found_images(app: Any, search: ImageSearch) -> None:
    """Adds the addresses at which found images are shown at their own size."""
    from fastapi import HTTPException, Response

    def full(link: str) -> Response:
        try:
            return Response(search.full(link), media_type="image/jpeg")
        except (KeyError, InputError):
            raise HTTPException(404, "this image is not among those found last; search again") from None

    app.add_api_route(f"{FULL}/{{link}}", full, response_class=Response, include_in_schema=False)
