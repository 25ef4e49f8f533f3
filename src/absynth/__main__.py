"""``python -m absynth``: the command line."""

from absynth.cli import main

main()
