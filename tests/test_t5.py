"""Frozen text features: a small random T5 made here, cut and padded prompts, what is said where it is missing; captions
as they are cleaned before."""

import importlib
import json

import pytest
import torch

from arvis.data.captions import clean_caption
from arvis.nn import t5
from arvis.nn.t5 import t5_features
from arvis.systems import llamagen
from arvis.systems.llamagen import CaptionConfig

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "apple", "dog", "two")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A folder as the hub has it: an encoder of random weights, and a tokenizer that splits at spaces."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    ending = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    parts = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    special = [
        {"id": i, "content": w, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, w in enumerate(WORDS[:3])
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": parts,
            "pair": [*parts, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": ending},
        },
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "<unk>"},
    }
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **kind}))
    yield str(folder)
    t5._encoder.cache_clear()


def test_text_comes_first_and_padding_changes_nothing(repo):
    features, visible = t5_features(["a red apple", "dog", "a red apple two dog a red apple"], repo, 6)
    assert features.shape == (3, 6, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert visible.dtype == torch.bool and visible.sum(1).tolist() == [4, 2, 6], "with the end; long ones are cut"
    assert visible[1].tolist() == [True] * 2 + [False] * 4
    alone, _ = t5_features(["dog"], repo, 2)
    assert torch.allclose(features[1, :2], alone[0], atol=1e-5)
    assert not torch.allclose(features[0, 0], features[1, 0], atol=1e-2)
    again, _ = t5_features(["a red apple"], repo, 6)
    assert torch.allclose(again[0], features[0], atol=1e-6)


def test_features_of_a_generation_serve_training(repo):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        t5_features(["dog"], repo, 3)
    features, _ = t5_features(["dog"], repo, 3)
    weight = torch.ones(16, requires_grad=True)
    (features * weight).sum().backward()
    assert weight.grad is not None and features.dtype == torch.float32


def test_the_encoder_is_loaded_once_and_frozen(repo):
    t5._encoder.cache_clear()
    for _ in range(2):
        t5_features(["a"], repo, 3)
    found = t5._encoder.cache_info()
    assert (found.misses, found.hits) == (1, 1)
    encoder = t5._encoder(repo, "cpu")[1]
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_prompts_paint_as_their_features_do(repo):
    config = llamagen.LlamaGenConfig(
        tokenizer=llamagen.emoji_64().tokenizer,
        depth=1,
        width=16,
        heads=2,
        num_classes=0,
        caption=CaptionConfig(repo=repo, channels=16, rows=5),
    )
    system = llamagen.build(config)
    told = system.prepare({"prompt": ["a RED apple!", "<b>dog</b>"]})
    features, visible = t5_features(["a red apple!", "dog"], repo, 5)
    same = system.prepare({"text_features": features, "text_visible": visible})
    assert all(torch.equal(told[name], x) for name, x in same.items())
    assert told["text_visible"].long().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]  # "!" is a word of its own


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(t5, "import_module", absent)
    with pytest.raises(ImportError, match=r"google/small, which needs transformers: pip install 'arvis\[text\]'"):
        t5_features(["a"], "google/small", 3)
    monkeypatch.setattr(t5, "import_module", importlib.import_module)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot be loaded"):
        t5_features(["a"], str(tmp_path), 3)


@pytest.mark.parametrize(
    ("found", "clean"),
    [
        ("A Red  Apple", "a red apple"),
        ("A <b>red</b> apple https://shop.com/x?id=3 (FREE SHIPPING) IMG_1234.jpg", "a red apple"),
        ("photo of @someone at www.site.org/page", "photo of at"),
        ("“a dog’s life” — 漢字 1920x1080", "a dog's life"),
        ("red+apple%21", "red apple!"),
        ("words-joined-like-this-one", "words joined like this one"),
        ("well-known dog", "well-known dog"),
        ("tom &amp; jerry #123456 page 12", "tom jerry"),
        ("3.5 apples, 50% off", "3.5 apples, 50% off"),
        ("'quoted'", "quoted"),
        ("ab12345 9876543", ""),
    ],
)
def test_captions_are_clean_after_two_passes(found, clean):
    twice = clean_caption(clean_caption(found))
    assert twice == clean
    assert clean_caption(twice) == twice, "what is clean stays as it is"
