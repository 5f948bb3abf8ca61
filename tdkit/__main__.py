"""``python -m tdkit`` is the command line."""

from tdkit.cli import main

main()
