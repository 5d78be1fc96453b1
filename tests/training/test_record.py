"""A run goes on with what it made itself, and with nothing else."""

import json

import pytest

from bridge_stg.errors import ModelError, OutputError
from bridge_stg.models.processing_bridge_stg import BridgeSTGProcessor
from bridge_stg.training import build_model, load_config, train
from bridge_stg.training.record import RECORD, save_or_check_processor

FEW = [
    "schedule.warmup_steps=0",
    "schedule.save_every=1",
    "data.batch_size=1",
    "data.images_per_clip=1",
    "data.workers=0",
    "data.phases=[{steps: 9, mix: {image: 1.0}}]",
]


def run(folder, *settings, **options):
    return train(load_config("tiny", [*FEW, "schedule.steps=1", *settings]), folder, tensorboard=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=1", r"is made with seed 0, not 1; name another folder, or remove this one"),
        ("schedule.learning_rate=0.5", r"made with schedule\.learning_rate 0\.001, not 0\.5"),
        ("losses.box=1", r"made with losses\.box 4\.0, not 1\.0"),
        ("model.keep=0.5", r"made with model\.keep null, not 0\.5"),
        ("data.phases=[{steps: 9, mix: {single: 1.0}}]", r"made with data\.phases "),
        ("start_from=tiny", r'made with start_from null, not "tiny"'),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(folder, setting, message):
    before = files(folder)
    with pytest.raises(OutputError, match=message):
        run(folder, setting)
    assert files(folder) == before


def test_another_kind_of_model_is_refused(folder):
    def other(config):
        return build_model(config)

    with pytest.raises(OutputError, match="made with build "):
        run(folder, build=other)


def test_steps_saving_and_logging_may_change(tmp_path):
    run(tmp_path)
    changed = ["schedule.steps=2", "schedule.log_every=3", "schedule.save_every=7", "schedule.keep_checkpoints=1"]
    assert run(tmp_path, *changed, "scale.device=cpu").state.global_step == 2


def test_a_model_that_nothing_tells_of_is_not_replaced(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"of somebody else")
    with pytest.raises(OutputError, match="nothing says what made it"):
        run(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"of somebody else"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made_with": 1}', "[" * 10**5])
def test_a_record_that_cannot_be_read_tells_nothing(folder, tmp_path, text):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(OutputError, match="nothing says what made it"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("length", [0, 100, None])
def test_a_processor_file_that_was_cut_off_is_written_again(folder, name, length, caplog):
    made = json.loads((folder / RECORD).read_text())["made_with"]
    whole = (folder / name).read_bytes()
    if length is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[:length])
    _, processor = build_model(load_config("tiny", FEW))
    save_or_check_processor(folder, processor, made, resumed=True)
    assert (folder / name).read_bytes() == whole and f"{name} was not as this run wrote it" in caplog.text
    BridgeSTGProcessor.from_pretrained(folder, local_files_only=True)


def test_a_processor_file_that_cannot_be_written_again_is_named(folder):
    made = json.loads((folder / RECORD).read_text())["made_with"]
    whole = (folder / "tokenizer.json").read_bytes()
    _, other = build_model(load_config("tiny", [*FEW, "model.bridge_tokens=7"]))
    try:
        (folder / "tokenizer.json").write_bytes(whole[:1000])
        with pytest.raises(ModelError, match=r"tokenizer\.json is not as this run wrote it"):
            save_or_check_processor(folder, other, made, resumed=True)
        assert (folder / "tokenizer.json").read_bytes() == whole[:1000]
    finally:
        (folder / "tokenizer.json").write_bytes(whole)


def test_torn_files_of_a_run_that_never_saved_are_written_anew(tmp_path):
    (tmp_path / "processor_config.json").write_text("")
    (tmp_path / "tokenizer.json").write_text('{"version"')
    assert run(tmp_path).state.global_step == 1


def test_a_checkpoint_that_cannot_be_saved_is_one_sentence(tmp_path, monkeypatch):
    import torch

    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"A checkpoint in .* cannot be saved: .*unexpected pos") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)
