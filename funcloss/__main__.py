"""``python -m funcloss``: the same as the ``funcloss`` command."""

from funcloss.cli import main

if __name__ == "__main__":
    main()
