"""What people build on keeps its name: Python names, op schemas, commands and options, saved folders, checkpoint keys.

`public_names.json` holds what stood at the last release. A name may be added here freely, and is removed only with an
entry under "Removed" in the CHANGELOG.
"""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors import safe_open

from bridge_stg.models import load_model, shipped_model

NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text())


@pytest.mark.parametrize("module", NAMES["modules"])
def test_python_names(module):
    imported = import_module(module)
    missing = [name for name in NAMES["modules"][module] if not hasattr(imported, name)]
    assert not missing
    assert not set(NAMES["modules"][module]) - set(imported.__all__)


@pytest.mark.parametrize("op", NAMES["schemas"])
def test_op_schemas(op):
    import bridge_stg.ops  # noqa: F401 - registers them

    assert str(getattr(torch.ops.bridge_stg, op).default._schema) == NAMES["schemas"][op]


def options_by_command(command, path=()):
    """{"data check": ["--format", ...]} of a click command and of all below it; arguments without dashes."""
    if hasattr(command, "commands"):
        return {
            k: v for name, sub in command.commands.items() for k, v in options_by_command(sub, (*path, name)).items()
        }
    return {" ".join(path): sorted(opt for p in command.params for opt in (*p.opts, *p.secondary_opts))}


def test_commands_and_options():
    from bridge_stg.cli.main import app

    found = options_by_command(typer.main.get_command(app))
    for command, options in NAMES["commands"].items():
        assert not set(options) - set(found[command]), command


def test_saved_folder_and_checkpoint_keys(tmp_path):
    model = load_model()
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert set(NAMES["saved_files"]) <= {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BridgeSTGForVideoGrounding"] and config["model_type"] == NAMES["model_type"]
    assert set(NAMES["config_fields"]) <= set(config)
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["processor_class"] == "BridgeSTGProcessor" and set(NAMES["processor_fields"]) <= set(processor)
    keys = [set(safe_open(folder / "model.safetensors", "pt").keys()) for folder in (shipped_model(), tmp_path)]
    assert keys[0] == keys[1]
