"""Typed YAML: shipped configurations load, mistakes are one sentence."""

import pytest

from bridge_stg.errors import ConfigError
from bridge_stg.training import load_config, shipped_configs
from bridge_stg.training.config import loss_weights_at


def test_every_shipped_configuration_loads():
    names = [path.stem for path in shipped_configs()]
    assert set(names) == {"demo", "hcstvg-7b", "multitask-7b", "tiny", "vidstg-7b"}
    for name in names:
        config = load_config(name)
        assert config.schedule.steps > 0 and bool(config.data.phases) != bool(config.data.sources)


def test_overrides_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: {steps: 7}\nmodel: {keep: 0.5}\n")
    config = load_config(path, ["schedule.steps=9", "losses.token=0", "model.gate=false"])
    assert config.schedule.steps == 9
    assert config.losses.token == 0
    assert config.model == {"keep": 0.5, "gate": False}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("schedul: {steps: 7}", [], "schedul"),
        ("schedule: {steps: many}", [], "many"),
        ("schedule: [", [], "not valid YAML"),
        ("seed: 1", ["losses.colour=1"], "colour"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path, text, overrides, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, overrides)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"neither a file nor a shipped configuration .*tiny"):
        load_config("huge")


def test_a_phase_weighs_losses_its_own_way():
    phases = "data.phases=[{steps: 2, mix: {image: 1}, losses: {token: 9}}, {steps: 1, mix: {single: 1}}]"
    config = load_config("demo", [phases, "losses.box=4"])
    weights = [loss_weights_at(config, step) for step in range(5)]
    assert [w.token for w in weights] == [9.0, 9.0, 2.0, 2.0, 2.0]
    assert {w.box for w in weights} == {4.0}
    wrong = load_config("demo", ["data.phases=[{steps: 2, mix: {image: 1}, losses: {colour: 9}}]"])
    with pytest.raises(ConfigError, match="'colour' is no loss weight"):
        loss_weights_at(wrong, 0)
