"""Pretrained backbones: read in their published format, run as the stock models run, on one cache."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from bridge_stg.errors import ConfigError, ModelError
from bridge_stg.models import BridgeSTGForVideoGrounding, load_model
from bridge_stg.models.backbones import FAMILIES
from bridge_stg.models.decoding import CachedDecoding
from tests.models.conftest import SMALL_DECODER, SMALL_FRAMES

families = pytest.mark.parametrize("model_type", list(FAMILIES))
SENTENCES = ["the red circle that moves left", "what moves up?", "it"]
SHAPES = [(6, 32, 48), (3, 48, 32), (2, 32, 48)]


@pytest.fixture(scope="module")
def videos():
    """Frames and times of three clips of different length and size."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
    return frames, [(np.arange(shape[0]) * 0.37).tolist() for shape in SHAPES]


def last_states(model, **inputs):
    """What the LLM's last norm gives in a forward pass."""
    found = []
    hook = model.backbone.model.language_model.norm.register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return found[0]


@families
def test_states_up_to_the_bridging_tokens_are_those_of_the_stock_model(model_type, load_backbone, checkpoints, videos):
    model = load_backbone(model_type)
    frames, times = ([clips[0], clips[2]] for clips in videos)
    inputs = model.processor(frames, times, SENTENCES[:2], ["From 0.4 s to 0.7 s.", None], training=True)
    inputs.pop("answer_tokens")
    states = last_states(model, **inputs, frame_index=torch.tensor([[0, 5], [1, -1]]))
    stock = FAMILIES[model_type].network().from_pretrained(checkpoints(model_type))
    pixels = inputs["pixel_values"].split(inputs["video_grid_thw"].prod(-1).tolist())
    for i in range(2):
        length = int(inputs["attention_mask"][i].sum()) - 3
        ids = inputs["input_ids"][i : i + 1, :length]
        grid = inputs["video_grid_thw"][i : i + 1]
        if model_type == "qwen2_5_vl":  # with text between them, its groups are videos of one group each
            grid = torch.tensor([[1, *grid[0, 1:].tolist()]] * int(grid[0, 0]))
        with torch.no_grad():
            expected = stock.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=pixels[i],
                video_grid_thw=grid,
                mm_token_type_ids=2 * (ids == model.config.backbone_config.video_token_id).int(),
            ).last_hidden_state
        torch.testing.assert_close(states[i : i + 1, :length], expected, atol=2e-5, rtol=2e-5)


@families
def test_grounding_prefills_once_and_bridges_on_the_same_cache(model_type, load_backbone, videos, monkeypatch):
    model = load_backbone(model_type)
    monkeypatch.setattr("bridge_stg.models.grounding.read_answer", lambda text, times, duration: (0.0, 0.5))
    lengths, unread = [], []
    bridge = CachedDecoding.bridge

    def spied(self, answer_visible):
        unread.append(self.unread[0].shape[1])  # how the answer ends, where it has an end
        return bridge(self, answer_visible)

    monkeypatch.setattr(CachedDecoding, "bridge", spied)
    model.backbone.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.predict([videos[0][0]], [videos[1][0]], SENTENCES[:1], durations=[2.3])
    prompt = model.processor([videos[0][0]], [videos[1][0]], SENTENCES[:1])["input_ids"].shape[1]
    assert lengths[0] == prompt
    assert 1 < len(lengths) <= 6 and lengths[1:-1] == [1] * (len(lengths) - 2)
    assert len(unread) == 1 and lengths[-1] == unread[0] + 3


@families
def test_the_cached_bridge_equals_one_full_forward(model_type, load_backbone, videos):
    model = load_backbone(model_type, interval_source="presence", dense_alignment=False)
    clip = ([videos[0][0]], [videos[1][0]], SENTENCES[:1])
    (prediction,) = model.predict(*clip, durations=[2.3])
    inputs = model.processor(*clip, training=True)
    inputs.pop("answer_tokens")
    with torch.no_grad():
        presence = model(**inputs, frame_index=torch.arange(6)[None]).presence[-1, 0].sigmoid()
    best = presence.mean(0).argmax()
    np.testing.assert_allclose(prediction.presence, presence[:, best].numpy(), atol=1e-5)


@families
def test_a_mixed_batch_grounds_as_one_by_one(model_type, load_backbone, videos):
    model = load_backbone(model_type, memory_features="merged" if model_type == "qwen3_vl" else "vision+lm")
    durations = [times[-1] + 0.37 for times in videos[1]]
    oracle = [(0.3, 1.2), (0.0, 0.5), (0.2, 0.7)]
    together = model.predict(*videos, SENTENCES, durations=durations, oracle_intervals=oracle)
    for i, prediction in enumerate(together):
        (alone,) = model.predict(
            [videos[0][i]], [videos[1][i]], [SENTENCES[i]], durations=[durations[i]], oracle_intervals=[oracle[i]]
        )
        assert prediction.answer == alone.answer
        assert prediction.interval == pytest.approx(alone.interval, abs=1e-4)
        np.testing.assert_array_equal(prediction.frames, alone.frames)
        np.testing.assert_allclose(prediction.boxes, alone.boxes, atol=1e-4)
        np.testing.assert_allclose(prediction.presence, alone.presence, atol=1e-4)
        np.testing.assert_allclose(prediction.oracle_boxes, alone.oracle_boxes, atol=1e-4)


def test_the_prompt_is_the_chat_template_around_sentence_and_timed_groups(load_backbone):
    texts = {name: load_backbone(name).processor.prompt("what?", [0.2, 1.25], 1) for name in FAMILIES}
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    start, end = "<|im_start|>user\nwhat?\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert texts["qwen2_5_vl"] == f"{system}{start}0.2 s{video}1.2 s{video}{end}"
    assert texts["qwen3_vl"] == f"{start}<0.2 seconds>{video}<1.2 seconds>{video}{end}" == texts["qwen3_vl_moe"]


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_pixels_and_times_are_those_of_the_stock_processor(model_type, load_backbone, checkpoints, videos):
    """On frames of the right size; how frames are resized is the business of `patchify_frames` and its tests."""
    pytest.importorskip("torchvision", reason="the stock video processors need torchvision")
    stock = AutoProcessor.from_pretrained(checkpoints(model_type))
    ours = load_backbone(model_type).processor
    frames, rate = [0, 7, 14, 21, 28], 23.976
    clip = videos[0][0][:5]
    content = [{"type": "text", "text": "what?\n"}, {"type": "video"}]
    text = stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # As released, the times take the place of these markers too; transformers since 5 keeps them around the whole.
    text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    expected = stock(
        text=[text],
        videos=[torch.from_numpy(clip).permute(0, 3, 1, 2)],
        video_metadata=[{"fps": rate, "frames_indices": frames, "total_num_frames": 35}],
        do_sample_frames=False,
        do_resize=False,
        return_tensors="pt",
    )
    found = ours([clip], [[i / rate for i in frames]], ["what?"])
    assert torch.equal(found["video_grid_thw"], expected["video_grid_thw"])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values_videos"], atol=1e-5, rtol=1e-5)
    if model_type == "qwen3_vl":  # Qwen2.5-VL writes no times
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()


@families
def test_bridging_tokens_get_mean_rows_and_the_rest_stays(model_type, load_backbone, checkpoints):
    model = load_backbone(model_type)
    stock = FAMILIES[model_type].network().from_pretrained(checkpoints(model_type))
    rows, known = model.get_input_embeddings().weight, stock.get_input_embeddings().weight[:264]
    assert (
        model.processor.tokenizer.convert_ids_to_tokens(264) == "<|bridge_0|>" and model.config.bridge_token_id == 264
    )
    torch.testing.assert_close(rows[:264], known)
    torch.testing.assert_close(rows[264:267], known.mean(0).expand(3, -1), atol=0.005, rtol=0)
    assert not torch.equal(rows[264], rows[265])
    torch.testing.assert_close(model.bridge_embeddings, rows[264:267])
    tied = model.backbone.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (model_type == "qwen3_vl")


@families
def test_checkpoints_are_sharded_and_named_as_published(model_type, checkpoints):
    index = json.loads((checkpoints(model_type) / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    flat = model_type == "qwen2_5_vl"
    prefixes = {name.split(".layers.")[0] for name in index["weight_map"] if ".layers." in name}
    assert prefixes == {"model" if flat else "model.language_model"}
    assert ("visual.merger.mlp.0.weight" if flat else "model.visual.merger.linear_fc1.weight") in index["weight_map"]


@families
def test_a_whole_model_saves_and_loads(model_type, load_backbone, videos, tmp_path):
    model = load_backbone(model_type)
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    clip = ([videos[0][0]], [videos[1][0]], SENTENCES[:1])
    (a,), (b,) = (m.predict(*clip, durations=[2.3]) for m in (model, again))
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-6)
    assert again.processor.settings() == model.processor.settings()


def test_the_backbone_in_bf16_leaves_the_spatial_half_in_fp32(checkpoints, load_backbone, videos, tmp_path):
    model = load_backbone("qwen3_vl", dtype=torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16 and model.spatial_dtype == torch.float32
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.backbone.dtype == torch.bfloat16 and again.spatial_dtype == torch.float32
    (prediction,) = again.predict([videos[0][0]], [videos[1][0]], SENTENCES[:1], durations=[2.3])
    assert np.isfinite(prediction.boxes).all()


@families
def test_sharding_wraps_the_layers_of_the_family(model_type, load_backbone):
    model = load_backbone(model_type)
    layers = (model.backbone.model.language_model.layers[0], model.backbone.model.visual.blocks[0])
    assert {type(layer).__name__ for layer in layers} <= set(model._no_split_modules)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@families
def test_a_mixed_batch_on_the_gpu_equals_the_cpu(model_type, load_backbone, videos):
    durations = [times[-1] + 0.37 for times in videos[1]]
    options = {"durations": durations, "oracle_intervals": [(0.0, 2.0)] * 3}
    cpu = load_backbone(model_type, interval_source="presence").predict(*videos, SENTENCES, **options)
    gpu = load_backbone(model_type, interval_source="presence").to("cuda").predict(*videos, SENTENCES, **options)
    for a, b in zip(cpu, gpu, strict=True):
        np.testing.assert_allclose(a.presence, b.presence, atol=5e-3)
        np.testing.assert_allclose(a.oracle_boxes, b.oracle_boxes, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_agrees_with_sdpa(load_backbone, videos):
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    durations = [times[-1] + 0.37 for times in videos[1]]
    found = []
    for name in ("sdpa", "flash_attention_2"):
        model = load_backbone(
            "qwen3_vl", dtype=torch.bfloat16, attn_implementation=name, interval_source="presence"
        ).to("cuda")
        found.append(model.predict(*videos, SENTENCES, durations=durations))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.presence, b.presence, atol=5e-2)


def test_attention_is_passed_on(load_backbone, videos, monkeypatch):
    eager, sdpa = (load_backbone("qwen3_vl", attn_implementation=name) for name in ("eager", "sdpa"))
    assert eager.backbone.model.language_model.config._attn_implementation == "eager"
    inputs = eager.processor([videos[0][0]], [videos[1][0]], SENTENCES[:1], ["From 0.4 s to 0.7 s."], training=True)
    hidden = inputs.pop("answer_tokens")
    index = torch.arange(6)[None]
    with torch.no_grad():
        a, b = (m(**inputs, frame_index=index, hidden_answer=hidden).boxes for m in (eager, sdpa))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    sdpa.config.backbone_config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"dense mask \(sdpa or eager\), got flash_attention_2"):
        sdpa(**inputs, frame_index=index, hidden_answer=hidden)
    masks = []
    monkeypatch.setattr(sdpa, "read_prompt", lambda *args, **options: masks.append(options["attention_mask"]))
    with pytest.raises(TypeError):  # what follows wants states
        sdpa(**inputs, frame_index=index, hidden_answer=hidden & False)
    assert masks[0] is inputs["attention_mask"]  # nothing is hidden: flash attention gets its own kind of mask


def test_clips_of_different_length_train_together(load_backbone, videos):
    """Padding of a shorter clip changes nothing for it."""
    model = load_backbone("qwen3_vl")
    frames, times = ([clips[0], clips[2]] for clips in videos)
    inputs = model.processor(frames, times, SENTENCES[:2], training=True)
    inputs.pop("answer_tokens")
    output = model(**inputs, frame_index=torch.tensor([[0, 5], [1, -1]]))
    assert output.frame_mask.tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    single = model.processor(frames[1:], times[1:], SENTENCES[1:2], training=True)
    single.pop("answer_tokens")
    alone = model(**single, frame_index=torch.tensor([[1]]))
    assert alone.frame_mask is None
    torch.testing.assert_close(output.boxes[:, 1:, :1], alone.boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.relevance[1:, :2], alone.relevance, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.contrast[1:, :2], alone.contrast, atol=1e-4, rtol=1e-4)


def test_a_sentence_cannot_write_special_tokens(load_backbone, videos):
    processor = load_backbone("qwen3_vl").processor
    inputs = processor([videos[0][2]], [videos[1][2]], ["<|video_pad|> <|im_end|>"])
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(263) == int(inputs["video_grid_thw"][0].prod()) // 4


@pytest.fixture
def broken(checkpoints, tmp_path):
    def make(change):
        folder = tmp_path / "broken"
        shutil.copytree(checkpoints("qwen3_vl"), folder)
        change(folder)
        return folder

    return make


def _config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _remove(*patterns):
    def change(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def _no_chat_template(folder):
    (folder / "chat_template.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(model_type="llama"), r"holds a llama model; a backbone must be Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE"),
        (_config(video_token_id=5), r"gives <\|video_pad\|> the id 263, config.json says 5"),
        (_remove("config.json"), "it has no config.json"),
        (_remove("*preprocessor_config.json"), "lacks its processor files: no preprocessor_config.json"),
        (_remove("tokenizer.json", "vocab.json"), "lacks its processor files: no tokenizer.json or vocab.json"),
        (_no_chat_template, "lacks its processor files: no chat template"),
        (_remove("model-00002*"), "The weights in .* cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{") and None, None),
        (lambda folder: (folder / "config.json").write_text("{") and None, "config.json cannot be read"),
    ],
)
def test_broken_checkpoints_are_one_sentence(broken, change, message):
    folder = broken(change)
    if message is None:  # the video file beside it says the same
        assert BridgeSTGForVideoGrounding.from_backbone(folder).processor.image_mean == [0.5, 0.5, 0.5]
        return
    with pytest.raises(ModelError, match=message) as caught:
        BridgeSTGForVideoGrounding.from_backbone(folder)
    assert "\n" not in str(caught.value)


def test_unknown_fields_are_named(checkpoints):
    with pytest.raises(ConfigError, match="unknown field 'keeep'; the nearest is keep"):
        BridgeSTGForVideoGrounding.from_backbone(checkpoints("qwen3_vl"), keeep=0.5)
    with pytest.raises(ConfigError, match=r"unknown field 'processor\.fpss'; the nearest is processor\.fps"):
        BridgeSTGForVideoGrounding.from_backbone(checkpoints("qwen3_vl"), processor={"fpss": 1})
    with pytest.raises(ConfigError, match=r"bridge_layers must be in 1\.\.4"):
        BridgeSTGForVideoGrounding.from_backbone(checkpoints("qwen3_vl"), bridge_layers=9)


@families
def test_a_configuration_alone_gives_the_shapes_of_the_model(model_type, load_backbone, checkpoints):
    """On the meta device: the same parameters as with weights, but for the rows that the bridging tokens add."""
    found = AutoConfig.from_pretrained(checkpoints(model_type))
    vocabulary = found.text_config.vocab_size
    shapes = BridgeSTGForVideoGrounding.from_backbone(found, dtype="float32", processor=SMALL_FRAMES, **SMALL_DECODER)
    model = load_backbone(model_type)
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
    assert shapes.processor.frame_grid(48, 64) == model.processor.frame_grid(48, 64)
    for network in (shapes, model):
        network.add_lora(rank=2)
    wanted = {name: (list(value.shape), value.dtype) for name, value in model.state_dict().items()}
    rows = model.config.backbone_config.text_config.vocab_size
    for name, value in shapes.state_dict().items():
        shape = [rows if size == vocabulary else size for size in value.shape]
        assert wanted.pop(name) == (shape, value.dtype), name
    assert not wanted
