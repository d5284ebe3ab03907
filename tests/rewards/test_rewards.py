"""Rewards: true pictures have the most, each thing that is wrong costs its share, and what is missing is said."""

import importlib

import pytest
import torch

from arvis.data.emoji import load_emoji
from arvis.data.images import to_network
from arvis.data.scenes import Asked, Scenes, ScenesConfig, read_caption
from arvis.evaluation.skills import Found, Seen
from arvis.rewards import REWARDS, ClipReward, clip, reward, satisfied


def test_captions_are_read_as_they_were_made():
    """Every skill and split: what is read is what the scene was made of."""
    for split in ("train", "heldout"):
        scenes = Scenes(ScenesConfig(split=split))
        for i in range(1500):
            scene, asked = scenes.scene(i), read_caption(scenes.scene(i).caption)
            kinds: dict = {}
            for o in scene.objects:
                kinds[o.name, o.colour] = kinds.get((o.name, o.colour), 0) + 1
            assert [(*kind, count) for kind, count in kinds.items()] == list(asked.things), scene.caption
            assert asked.background == scene.background
            assert (asked.relation is not None) == (scene.skill == "position")
            assert asked.relation is None or f" {asked.relation} " in scene.caption
    for wrong in ("", "red apple", "a red apple on a plaid background", "a dog and", "a dog near a cat"):
        with pytest.raises(ValueError, match="is no caption of a scene"):
            read_caption(wrong)


def test_each_thing_that_is_said_counts():
    box = (0, 0, 20, 20)
    dog, cat = (Found(name=n, colour=None, box=b, score=1.0) for n, b in (("dog", box), ("cat", (40, 0, 60, 20))))
    car = Found(name="car", colour="red", box=box, score=1.0)
    asked = Asked(things=(("dog", None, 1), ("cat", None, 1)), relation="to the left of", background="blue")
    assert satisfied(asked, Seen(background="blue", objects=(dog, cat))) == {
        "dog": 1,
        "cat": 1,
        "to the left of": 1,
        "background": 1,
    }
    swapped = satisfied(
        Asked(things=asked.things[::-1], relation="to the left of", background="white"),
        Seen(background="blue", objects=(dog, cat)),
    )
    assert swapped == {"cat": 1, "dog": 1, "to the left of": 0, "background": 0}
    counted = Asked(things=(("dog", None, 3),), relation=None, background="white")
    shares = [satisfied(counted, Seen(background="white", objects=(dog,) * n))["dog, 3"] for n in (0, 1, 2, 3, 4, 6)]
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 0])
    painted = Asked(things=(("car", "blue", 1),), relation=None, background="white")
    assert satisfied(painted, Seen(background="white", objects=(car,))) == {"car": 1, "car, blue": 0, "background": 1}


def test_true_scenes_have_everything_and_others_do_not():
    scenes = Scenes(ScenesConfig(seed=3, skills=("two_object", "position", "color_attr")))
    images = torch.stack([scenes[i]["image"] for i in range(6)])
    captions = [scenes.scene(i).caption for i in range(6)]
    judge = reward("scene")
    assert judge(images, captions).tolist() == [1.0] * 6
    assert judge(to_network(images), captions).tolist() == [1.0] * 6
    assert float(judge(images, captions[1:] + captions[:1]).max()) < 0.7
    assert float(judge(torch.full_like(images, 255), captions).max()) <= 0.34


def test_the_true_picture_of_a_name_is_the_best():
    world = load_emoji(64)
    names = ["red apple", "dog face", "blue heart"]
    images = world.all_images()[[world.find(name) for name in names]]
    judge = reward("picture")
    assert judge(images, names).tolist() == [0.0] * 3
    worse = (images.long() + torch.tensor([0, 10, -25])[:, None, None, None]).clamp(0, 255).to(torch.uint8)
    found = judge(worse, names)
    wanted = ((worse.double() - images) / 255).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(found, -wanted)
    assert float(judge(images.flip(0), names).min()) < -0.2
    with pytest.raises(KeyError, match="no emoji named 'red aple' here; nearest: red apple"):
        judge(images[:1], ["red aple"])
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float(judge(larger, names).min()) > -0.03, "pictures of other sizes are brought to this one"


def test_names_and_captions_in_one_batch():
    world, scenes = load_emoji(64), Scenes(ScenesConfig(seed=3, skills=("single_object",)))
    images = torch.stack((world.all_images()[world.find("red apple")], scenes[0]["image"]))
    judge = reward("emoji")
    assert judge(images, ["red apple", scenes.scene(0).caption]).tolist() == [1.0, 1.0]
    assert float(judge(images.flip(0), ["red apple", scenes.scene(0).caption]).max()) < 0.9


def test_rewards_by_name():
    assert {name: type(reward(name)) for name in REWARDS} == REWARDS
    assert reward("clip:some/model").model == "some/model"
    for wrong in ("nice", "scene:x", ""):
        with pytest.raises(
            KeyError, match=r"no reward is called .*; there are scene, picture, emoji, clip and clip:MODEL"
        ):
            reward(wrong)


# -- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A CLIP with random weights in a folder."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path / "clip")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, "a": 4, "dog": 5, "cat": 6, "red": 7}
    core = Tokenizer(models.WordLevel(words, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", model_max_length=8
    ).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


def test_clip_score_is_the_cosine_of_both_embeddings(folder):
    judge, image = ClipReward(folder), torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    texts = ["a dog", "a red cat", "a dog"]
    found = judge(image, texts)
    tokenize, model = clip._loaded(folder, "cpu")
    for i, text in enumerate(texts):
        told = tokenize([text], return_tensors="pt")
        with torch.no_grad():
            pixels = clip.normalised(image[i : i + 1], 16)
            out = model(input_ids=told["input_ids"], attention_mask=told["attention_mask"], pixel_values=pixels)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        assert float(found[i]) == pytest.approx(2.5 * max(0.0, float(cosine)), abs=1e-5)
    assert found.dtype == torch.float64 and len(set(found.tolist())) > 1


def test_pictures_are_read_as_clip_was_taught():
    image = torch.full((1, 3, 30, 50), 128, dtype=torch.uint8)
    x = clip.normalised(image, 16)
    wanted = (128 / 255 - torch.tensor(clip.MEAN)) / torch.tensor(clip.DEVIATION)
    assert x.shape == (1, 3, 16, 16) and torch.allclose(x[0, :, 4, 4], wanted, atol=1e-5)
    split = torch.cat((torch.zeros(1, 3, 16, 20), torch.full((1, 3, 16, 20), 255.0)), 3).to(torch.uint8)
    left, right = clip.normalised(split, 16)[0, 0, 8].split(8)
    assert left.max() < right.min(), "the middle of a wide picture is kept"


def test_what_clip_lacks_is_said(monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(name)

    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(clip, "import_module", absent)
    with pytest.raises(ImportError, match=r"of some/model, which needs transformers: pip install 'arvis\[text\]'"):
        reward("clip:some/model")(image, ["a dog"])
    monkeypatch.setattr(clip, "import_module", importlib.import_module)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot be loaded, from the hub or as a folder"):
        ClipReward(str(tmp_path))(image, ["a dog"])
