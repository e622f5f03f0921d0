"""What no request may do, before Gradio sees it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestLimits:
    """
    ASGI middleware: no request body is longer than `max_bytes`, Gradio neither fetches addresses for visitors nor does
    what this page has no use for, and what visitors leave in its folder takes bounded room: the oldest files go first.

    Args:
        app: The app behind it.
        folder (`str` or `Path`): Where Gradio stores uploads and pictures; files that are there already stay.
        max_bytes (`int`): Longest body.
        max_stored_bytes, max_stored_files (`int`): What the folder may hold before a request that sends something.
    """

    refused_paths: ClassVar = ("/file=http:", "/file=https:", "/proxy=", "/deep_link", "/process_recording")

    def __init__(
        self, app: ASGIApp, *, folder: str | Path, max_bytes: int, max_stored_bytes: int, max_stored_files: int
    ):
        self.app, self.folder, self.max_bytes = app, Path(folder), max_bytes
        self.max_stored_bytes, self.max_stored_files = max_stored_bytes, max_stored_files
        self.kept = set(self._files())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(path in scope.get("path", "") for path in self.refused_paths):
            await PlainTextResponse("Not on this page.", status_code=403)(scope, receive, send)
            return
        if scope.get("method") == "POST":
            await run_in_threadpool(self._make_room)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, f"A request may have at most {self.max_bytes} bytes.")
            return message

        await self.app(scope, receive_limited, send)

    def _files(self) -> list[Path]:
        return [Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names]

    def _make_room(self) -> None:
        stored = []
        for path in set(self._files()) - self.kept:
            with suppress(FileNotFoundError):  # Gradio, or another request, was faster
                status = path.stat()
                stored.append((status.st_mtime_ns, status.st_size, path))
        num_bytes = 0
        for num_files, (_, size, path) in enumerate(sorted(stored, reverse=True), start=1):
            num_bytes += size
            if num_bytes > self.max_stored_bytes or num_files > self.max_stored_files:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # it holds others
                    path.parent.rmdir()


__all__ = ["RequestLimits"]
