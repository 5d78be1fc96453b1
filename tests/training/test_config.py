"""Typed YAML: shipped configurations load, mistakes are one sentence."""

import pytest

from bridge_stg.errors import ConfigError
from bridge_stg.training import load_config, shipped_configs
from bridge_stg.training.config import check_config, loss_weights_at, refuse_unused


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
        ("seed: 1", ["model.kep=0.5"], r"unknown field 'model\.kep'; the nearest is model\.keep\."),
        ("seed: 1", ["model.gate=maybe"], r"model\.gate must be true or false, got 'maybe'"),
        ("seed: 1", ["model.keep=high"], r"model\.keep must be a number > 0 and <= 1, got 'high'"),
        ("processor: {fps: x}", [], r"processor\.fps must be a number > 0, got 'x'"),
        ("processor: {image_mean: [1, 2, .nan]}", [], r"processor\.image_mean\[2\] must be a number, got nan"),
        ("processor: {max_frame: 3}", [], r"the nearest is processor\.max_frames"),
        ("losses: {box: .nan}", [], r"losses\.box must be a number >= 0, got nan"),
        ("losses: {box: -1}", [], r"losses\.box must be a number >= 0, got -1\.0"),
        ("schedule: {learning_rate: .inf}", [], r"schedule\.learning_rate must be a number >= 0, got inf"),
        ("schedule: {decay_share: 2}", [], r"schedule\.decay_share must be a number >= 0 and <= 1, got 2\.0"),
        ("schedule: {adam_beta2: 1}", [], r"schedule\.adam_beta2 must be a number >= 0 and < 1"),
        ("schedule: {steps: 0}", [], r"schedule\.steps must be an integer >= 1"),
        ("schedule: {steps: 1.5}", [], r"schedule\.steps must be an integer >= 1"),
        ("schedule: {steps: yes}", [], r"schedule\.steps must be an integer >= 1 .*, got True"),
        ("schedule: {warmup_steps: -1}", [], r"schedule\.warmup_steps must be an integer >= 0"),
        ("schedule: 3", [], "schedule must be a mapping, got 3"),
        ("data: {answer_dropout: 2}", [], r"data\.answer_dropout must be a number >= 0 and <= 1"),
        ("data: {spatial_frames: 0}", [], r"data\.spatial_frames must be an integer >= 1"),
        ("data: {negatives: near}", [], r"data\.negatives must be one of uniform, boundary, got 'near'"),
        ("data: {workers: -1}", [], r"data\.workers must be an integer >= 0"),
        ("data: {sources: {a: {weight: 1}}}", [], r"data\.sources\.a\.path is missing"),
        ("data: {sources: {a: {path: p, weight: 0}}}", [], r"data\.sources\.a\.weight must be a number > 0 or null"),
        ("data: {phases: [{steps: 1}]}", [], r"data\.phases\[0\]\.mix is missing"),
        (
            "data: {phases: [{steps: 1, mix: {image: .nan}}]}",
            [],
            r"data\.phases\[0\]\.mix\.image must be a number >= 0",
        ),
        ("lora: {rank: -1}", [], r"lora\.rank must be an integer >= 0, got -1"),
        ("lora: {dropout: 1}", [], r"lora\.dropout must be a number >= 0 and < 1"),
        ("backbone: {dtype: float7}", [], r"backbone\.dtype must be one of auto, .*, got 'float7'"),
        ("scale: {gradient_checkpointing: perhaps}", [], r"scale\.gradient_checkpointing must be true or false"),
        ("[1, 2]", [], "must be a mapping of fields"),
        ("{1: 2}", [], "unknown field '1'"),
        ("seed: %s" % ("9" * 5000), [], "mine.yaml"),
        ("seed: %s" % ("[" * 5000), [], "mine.yaml"),
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
    with pytest.raises(ConfigError, match=r"unknown field 'data\.phases\[0\]\.losses\.colour'; there are alignment"):
        load_config("demo", ["data.phases=[{steps: 2, mix: {image: 1}, losses: {colour: 9}}]"])


@pytest.mark.parametrize("text", ["False", "off", "no", "false"])
def test_a_switch_is_off_by_every_word_for_it(text):
    assert load_config("tiny", [f"model.gate={text}"]).model["gate"] is False
    assert load_config("tiny", [f"model.gate='{text}'"]).model["gate"] is False


@pytest.mark.parametrize("pair", ["seed", "=1", " =1"])
def test_an_override_is_key_and_value(pair):
    with pytest.raises(ConfigError, match="--set takes key=value"):
        load_config("tiny", [pair])


def test_a_configuration_made_by_hand_is_checked_as_a_file_is():
    config = load_config("tiny")
    assert check_config(config) == config
    config.schedule.learning_rate = float("nan")
    with pytest.raises(ConfigError, match=r"the configuration: schedule\.learning_rate must be a number >= 0, got nan"):
        check_config(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("backbone.dtype=bfloat16", r"backbone\.dtype is for a pretrained backbone.*got 'bfloat16'"),
        ("backbone.attn_implementation=sdpa", r"backbone\.attn_implementation is for a pretrained backbone"),
        ("data.max_tokens=100", r"data\.max_tokens bounds batches of data\.sources.*got 100"),
    ],
)
def test_a_setting_that_a_run_has_no_use_for_is_refused(setting, message):
    refuse_unused(load_config("tiny"))
    with pytest.raises(ConfigError, match=message):
        refuse_unused(load_config("tiny", [setting]))
