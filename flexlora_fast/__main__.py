"""``python -m flexlora_fast``: the command line."""

from __future__ import annotations

from flexlora_fast.cli import main

if __name__ == "__main__":
    main()
