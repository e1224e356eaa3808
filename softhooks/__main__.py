"""The entry point of `python -m softhooks`, for launchers that run a module instead of a command."""

from softhooks.cli.app import main

if __name__ == "__main__":
    main()
