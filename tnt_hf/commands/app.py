"""
Serve a page on which token pruning can be tried: an image, a budget, the patches that are kept, the answer, the time.

    tnt-hf app
    tnt-hf app --model_name_or_path runs/demo runs/deit-small --port 7861

Without a model it takes the two bundled backbones.
"""

import errno
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ..app import Classifier, build_page, bundled_examples, launch
from ..command_line import clear_errors, parse_flags
from ..examples import EXAMPLES_DIR


@dataclass
class AppArguments:
    """What the operator chooses."""

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Folders of the models that visitors choose from."}
    )
    host: str | None = field(
        default=None,
        metadata={"help": "Address to listen at, 0.0.0.0 for every one; this machine alone if not given."},
    )
    port: int | None = field(default=None, metadata={"help": "Port; the first free one from 7860 on if not given."})
    allow_hub_ids: bool = field(
        default=False,
        metadata={"help": "Let visitors name any public ViT or distilled DeiT of the Hub; its code is never run."},
    )

    def __post_init__(self):
        if self.port is not None:
            if not 1 <= self.port <= 65535:
                raise ValueError(f"--port must be from 1 to 65535, got {self.port}.")
            check_free(self.port)


def check_free(port: int) -> None:
    """
    Raises:
        ValueError: If no server can listen at the port of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise ValueError(f"Port {port} {reason}: pass another --port, or none for the first free one.") from error


def main() -> None:
    with clear_errors():
        (arguments,) = parse_flags((AppArguments,), sys.argv[1:], __doc__)
    for name in ("SIGTERM", "SIGHUP"):  # so that what is stored is deleted then too
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), lambda *_: sys.exit())
    with clear_errors(), TemporaryDirectory() as stored:
        os.environ["GRADIO_TEMP_DIR"] = stored  # a folder of its own: what is deleted is of nobody else
        folders = [Path(folder) for folder in arguments.model_name_or_path]
        folders = folders or [EXAMPLES_DIR / "backbone", EXAMPLES_DIR / "cluttered_backbone"]
        for folder in folders:
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"--model_name_or_path must name folders of models, got {folder}, without config.json."
                )
            if not any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"--model_name_or_path must name folders of models, got {folder}, without safetensors weights. An "
                    "exported folder has none: pass that of the model which was exported."
                )
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):
            raise ValueError(f"The folders of the models must have different names, got {', '.join(names)}.")
        classifiers = dict(zip(names, map(Classifier, folders)))
        labels = [classifier.model.config.id2label.values() for classifier in classifiers.values()]
        examples = bundled_examples([*labels, ()] if arguments.allow_hub_ids else labels)
        page = build_page(classifiers, examples, arguments.allow_hub_ids)
        _, address, _ = launch(
            page, server_name=arguments.host, server_port=arguments.port, prevent_thread_lock=True, quiet=True
        )
        print(f"The page is at {address}", flush=True)
        page.block_thread()
