"""What a picture is worth under what was asked for: for search, and for learning from rewards.

A reward takes pictures [B, 3, Y, X] (uint8, or float in [-1, 1] as tokenizers give them) and what was asked for each,
and gives a number for each, float64 [B]; more is better. In the emoji world the truth is known:

    scene      the share of what a caption says that an exact detector finds
    picture    how near a picture is to the true one of a name
    emoji      either, by whether the words are a name
    clip       CLIP score of any text (`pip install 'arvis[text]'`); "clip:NAME" is another model, or a folder
"""

from arvis.rewards.clip import ClipReward
from arvis.rewards.emoji import EmojiReward, PictureReward, SceneReward, satisfied
from arvis.rewards.reward import Reward

__all__ = ["REWARDS", "ClipReward", "EmojiReward", "PictureReward", "Reward", "SceneReward", "reward", "satisfied"]

REWARDS = {"scene": SceneReward, "picture": PictureReward, "emoji": EmojiReward, "clip": ClipReward}


def reward(name: str) -> Reward:
    """A reward by name, as "scene" or "clip:openai/clip-vit-large-patch14"; KeyError naming the known ones."""
    kind, colon, model = name.partition(":")
    if kind not in REWARDS or (colon and kind != "clip"):
        raise KeyError(f"no reward is called {name!r}; there are {', '.join(REWARDS)} and clip:MODEL")
    return ClipReward(model) if model else REWARDS[kind]()
