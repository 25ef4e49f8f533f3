"""The program ``absynth``, and ``python -m absynth``: the command line, whose import takes a moment itself."""

from __future__ import annotations

import sys


def main() -> None:
    """``absynth.cli.main``; Ctrl-C while that is being imported is no traceback either."""
    try:
        from absynth.cli import main as run
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
