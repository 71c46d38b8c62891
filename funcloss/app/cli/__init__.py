"""The commands: ``funcloss`` and its short form ``funcloss-train``."""

from funcloss.app.cli.app import main, main_train

__all__ = ["main", "main_train"]
