"""The command `bridge-stg`, also as `python -m bridge_stg`: says in one sentence which extra a command lacks."""

from __future__ import annotations

import sys

# Modules that come with an extra, by the name they are imported by.
_EXTRAS = {
    "train": ("accelerate", "omegaconf", "peft", "tensorboard"),
    "app": (
        *("PIL", "av", "cv2", "huggingface_hub", "jinja2", "markupsafe", "matplotlib", "rich", "safetensors"),
        *("tokenizers", "torchvision", "transformers", "typer"),
    ),
}


def main() -> None:
    """Run the command line; exit code 1 and a sentence where a package of an extra is not installed."""
    try:
        from .cli.main import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in _EXTRAS.items() if module in modules), None)
        if extra is None or "--debug" in sys.argv:
            raise
        sys.exit(
            f"error: this command needs {module}, which is not installed; it comes with the extra {extra!r}: "
            f"pip install 'bridge-stg[{extra}]'."
        )


if __name__ == "__main__":
    main()
