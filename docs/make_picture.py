"""Draw the README's picture: run a real command, keep what it printed as an SVG.

python docs/make_picture.py docs/demo.svg tdkit compress garipov --budget 0.25 ...
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main() -> None:
    picture, *command = sys.argv[1:]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ " + shlex.join(command), style="bold green"))
    console.print(Text.from_ansi(done.stdout))
    svg = console.export_svg(title="tdkit")
    Path(picture).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
