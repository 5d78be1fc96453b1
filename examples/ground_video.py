"""Ground a sentence in a video: when does the event happen, and where is the object in every frame?

    python examples/ground_video.py [VIDEO SENTENCE]

Without arguments it uses a clip that comes with the package. It needs the extra `app`.
"""

import sys
from importlib import resources
from pathlib import Path

from bridge_stg import load_model
from bridge_stg.visualization import annotate_video, draw_strip

BUNDLED_CLIP = resources.files("bridge_stg") / "assets" / "clips" / "clips" / "test-2026-000000.mp4"


def main(video: str = str(BUNDLED_CLIP), sentence: str = "the purple cross that moves left") -> None:
    model = load_model()  # the tiny checkpoint; load_model("runs/mine") loads one of your own
    result = model.ground(video, sentence)

    # When: seconds on the video's own clock, as a player shows them.
    start, end = result.interval
    print(f"{start:.2f} s to {end:.2f} s, confidence {result.confidence:.2f}")

    # Where: one box a frame, in pixels of the video.
    for entry in result.tube[:3]:
        x1, y1, x2, y2 = entry.box
        print(f"frame {entry.frame} at {entry.time:.2f} s: ({x1:.0f}, {y1:.0f}) to ({x2:.0f}, {y2:.0f})")

    folder = Path("grounded")
    folder.mkdir(exist_ok=True)
    annotate_video(video, result, folder / "annotated.mp4")
    draw_strip(video, result, folder / "strip.png")
    (folder / "result.json").write_text(result.to_json(indent=2))
    print(f"The annotated video, a picture strip and the JSON are in {folder}/.")


if __name__ == "__main__":
    main(*sys.argv[1:])
