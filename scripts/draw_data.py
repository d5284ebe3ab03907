"""Draw the sample pictures of docs/data.md, docs/images/emoji.png and scenes.png, and print the captions."""

from pathlib import Path

from PIL import Image

from arvis.data.emoji import load_emoji
from arvis.data.images import grid, save_image
from arvis.data.scenes import SKILLS, Scenes, ScenesConfig

NAMES = """red apple, grinning face, dog, butterfly, sunflower, pizza, rocket, guitar, flag: Wales, castle
woman scientist, man scientist, scientist, man firefighter: medium skin tone, woman astronaut: dark skin tone,
person biking: light skin tone, merman, princess, woman: medium-light skin tone, curly hair, older person"""


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji()
    names = NAMES.replace("\n", ", ").replace(",,", ",").replace("tone, curly", "tone; curly").split(", ")
    images = [emoji[emoji.find(name.replace(";", ","))]["image"] for name in names]
    save_image(_small(grid(images, columns=10, gap=4)), folder / "emoji.png")
    rows = [Scenes(ScenesConfig(seed=k, skills=(skill,)), emoji) for k, skill in enumerate(SKILLS)]
    columns = [scenes[k]["image"] for k in range(4) for scenes in rows]
    save_image(_small(grid(columns, columns=len(SKILLS), gap=4)), folder / "scenes.png")
    for skill, scenes in zip(SKILLS, rows, strict=True):
        print(f"{skill}: " + "; ".join(scenes.scene(k).caption for k in range(4)))


def _small(image: Image.Image) -> Image.Image:
    """256 colours: enough to look at, a third of the bytes."""
    return image.quantize(256, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
