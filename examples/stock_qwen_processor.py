"""Give a stock Qwen2.5-VL this package's video processor: the same pixel values in less time.

    python examples/stock_qwen_processor.py

The model is a small random one of the stock class. It needs the extra `app`.
"""

import time

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

from bridge_stg.models import BridgeSTGVideoProcessor

CONFIG = Qwen2_5_VLConfig(
    text_config={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    },
    vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128},
)


def process(processor: Qwen2VLVideoProcessor, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Process a video twice and print the time of the second call; the first call warms up."""
    processor(video, do_sample_frames=False, return_tensors="pt")
    start = time.perf_counter()
    inputs = processor(video, do_sample_frames=False, return_tensors="pt")
    print(f"{type(processor).__name__}: {1e3 * (time.perf_counter() - start):.0f} ms")
    return inputs


def main() -> None:
    torch.manual_seed(0)
    video = torch.randint(0, 256, (16, 3, 360, 640), dtype=torch.uint8)
    stock = process(Qwen2VLVideoProcessor(), video)
    ours = process(BridgeSTGVideoProcessor(family="qwen2_vl"), video)
    assert torch.equal(stock["pixel_values_videos"], ours["pixel_values_videos"])
    print("Both give the same pixel values to the bit.")

    model = Qwen2_5_VLForConditionalGeneration(CONFIG).eval()
    with torch.inference_mode():
        tokens = model.model.visual(ours["pixel_values_videos"], grid_thw=ours["video_grid_thw"]).pooler_output
    print(f"The stock model's vision tower takes them: {tuple(tokens.shape)} visual tokens.")


if __name__ == "__main__":
    main()
