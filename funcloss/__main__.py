"""``python -m funcloss``: the same as the ``funcloss`` command."""

from funcloss.app.cli import main

if __name__ == "__main__":
    main()
