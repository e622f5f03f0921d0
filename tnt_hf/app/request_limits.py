"""What no request may do, before Gradio sees it."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestLimits:
    """
    ASGI middleware: no request body is longer than `max_bytes`, no file is sent that is not in Gradio's folder, no
    address is fetched, and what visitors leave in that folder is deleted: when it is old, and the oldest first where
    it is more than the folder may hold. Both are looked at before each request that sends something.

    Args:
        app: The app behind it.
        folder (`str` or `Path`): Where Gradio stores uploads and pictures; files that are there already stay.
        max_bytes (`int`): Longest body.
        max_stored_bytes, max_stored_files (`int`): What the folder may hold.
        max_stored_seconds (`int`): How old a file may be.
    """

    # what fetches, stores or runs something that the page has no use for, or passes by its queue
    refused_paths: ClassVar = ("/proxy=", "/file/", "/deep_link", "/process_recording", "/run/", "/api/", "/call/")

    def __init__(
        self,
        app: ASGIApp,
        *,
        folder: str | Path,
        max_bytes: int,
        max_stored_bytes: int,
        max_stored_files: int,
        max_stored_seconds: int,
    ):
        self.app, self.folder, self.max_bytes = app, Path(folder).resolve(), max_bytes
        self.max_stored_bytes, self.max_stored_files = max_stored_bytes, max_stored_files
        self.max_stored_seconds = max_stored_seconds
        self.kept = set(self._files())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_refused(scope.get("path", "")):
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

    def _is_refused(self, path: str) -> bool:
        before, is_file, file = path.partition("/file=")
        if is_file and not is_stored(file, self.folder):
            return True
        return any(refused in f"{before}/" for refused in self.refused_paths)

    def _files(self) -> list[Path]:
        return [Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names]

    def _make_room(self) -> None:
        stored = []
        for path in set(self._files()) - self.kept:
            with suppress(FileNotFoundError):  # Gradio, or another request, was faster
                status = path.stat()
                stored.append((status.st_mtime, status.st_size, path))
        oldest, num_bytes = time.time() - self.max_stored_seconds, 0
        for num_files, (written, size, path) in enumerate(sorted(stored, reverse=True), start=1):
            num_bytes += size
            if num_bytes > self.max_stored_bytes or num_files > self.max_stored_files or written < oldest:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # it holds others
                    path.parent.rmdir()


def is_stored(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, which a visitor may have made up, is that of a file in a folder."""
    try:
        file = Path(path).resolve()
        return file.is_relative_to(Path(folder).resolve()) and file.is_file()
    except (OSError, ValueError):  # too long, or not a path at all
        return False


__all__ = ["RequestLimits", "is_stored"]
