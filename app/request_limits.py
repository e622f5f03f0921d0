"""What no request may do, before Gradio sees it."""

from typing import ClassVar

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestLimits:
    """
    ASGI middleware: no request body is longer than `max_bytes`, and Gradio fetches no address for a visitor.

    Args:
        app: The app behind it.
        max_bytes (`int`): Longest body.
    """

    fetching_paths: ClassVar = ("/file=http:", "/file=https:", "/proxy=")

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(path in scope.get("path", "") for path in self.fetching_paths):
            await PlainTextResponse("Addresses are not fetched.", status_code=403)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, f"A request may have at most {self.max_bytes} bytes.")
            return message

        await self.app(scope, receive_limited, send)


__all__ = ["RequestLimits"]
