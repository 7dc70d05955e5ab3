"""JSON as the page gets it."""

from typing import Any

from starlette.responses import JSONResponse as StarletteResponse

from tune_app.serve.views import to_json


class JSONResponse(StarletteResponse):
    """JSON in ASCII: the name of a study's folder may hold bytes that are no UTF-8, and nothing else could be sent."""

    def render(self, content: Any) -> bytes:
        return to_json(content)
