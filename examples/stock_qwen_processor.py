"""Give a stock Qwen2.5-VL our video processor: the same pixel values, several times faster.

    python examples/stock_qwen_processor.py

The model is a small random one of the stock class. Needs the extra `app`, and torchvision for the comparison.
"""

import time

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

from bridge_stg.models import BridgeSTGVideoProcessor

SMALL = {
    "text_config": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 4}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
    "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128},
}


def main() -> None:
    torch.manual_seed(0)
    video = torch.randint(0, 256, (16, 3, 360, 640), dtype=torch.uint8)
    stock, ours = Qwen2VLVideoProcessor(), BridgeSTGVideoProcessor(family="qwen2_vl")
    inputs = {}
    for name, processor in (("stock", stock), ("ours", ours)):
        processor(video, do_sample_frames=False, return_tensors="pt")
        start = time.perf_counter()
        inputs[name] = processor(video, do_sample_frames=False, return_tensors="pt")
        print(
            f"{name}: {1e3 * (time.perf_counter() - start):.0f} ms, {tuple(inputs[name]['pixel_values_videos'].shape)}"
        )
    equal = torch.equal(inputs["stock"]["pixel_values_videos"], inputs["ours"]["pixel_values_videos"])
    print(f"equal to the bit: {equal}")

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**SMALL)).eval()
    with torch.inference_mode():
        tokens = model.model.visual(inputs["ours"]["pixel_values_videos"], grid_thw=inputs["ours"]["video_grid_thw"])
    print(f"visual tokens: {tuple(tokens.pooler_output.shape)}")


if __name__ == "__main__":
    main()
