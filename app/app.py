"""
The page as a Space: `tnt-hf app` with the models in the folder `models` beside this file, if there are any.

Where flags cannot be given, as in a Space, they are read from the variable TNT_APP_FLAGS.
"""

import os
import shlex
import sys
from pathlib import Path

from tnt_hf.commands import run_command


if __name__ == "__main__":
    models = sorted(str(path.parent) for path in Path(__file__).parent.glob("models/*/config.json"))
    named = ["--model_name_or_path", *models] if models else []
    sys.argv[1:1] = [*named, *shlex.split(os.environ.get("TNT_APP_FLAGS", ""))]
    run_command("app")
