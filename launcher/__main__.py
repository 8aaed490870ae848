"""``python -m launcher``: the same as ``unlearn``."""

from launcher.cli import main

if __name__ == "__main__":
    main()
