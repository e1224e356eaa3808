"""`python -m softhooks`: the command line, for launchers that take a module."""

from softhooks.cli.app import main

if __name__ == "__main__":
    main()
