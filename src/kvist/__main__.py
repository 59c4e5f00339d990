"""The command line: `kvist` and `python -m kvist`."""

from kvist.cli.app import main

if __name__ == "__main__":
    main()
