"""The command line as a stranger uses it: what is written, what is said, and how a mistake is told."""

import errno
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import arvis
from arvis import cli, loading
from arvis.cli import terminal
from arvis.cli.settings import each_set
from arvis.config import to_dict
from arvis.data.images import read_image, read_metadata
from small import built, halves, picture, small

ROOT = Path(__file__).parents[1]
FAST = ("fit.batch=2", "fit.precision=float32", "fit.warmup=0", "fit.compile=false")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, a tiny model as the one in the box, and small models `brush` and `var` in folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "box")
    small("brush").save_pretrained(tmp_path / "box" / "brush-64")
    small("var").save_pretrained("classes")
    return tmp_path


@pytest.fixture
def pictures():
    for kind in ("cat", "red_dog"):
        Path("pictures", kind).mkdir(parents=True)
        for i in range(3):
            picture(seed=i).save(f"pictures/{kind}/{i}.png")
    Path("pictures/cat/broken.png").write_bytes(b"nonsense")


def run(*args: str) -> None:
    cli.main(list(args))


@pytest.fixture
def refused(capsys):
    """What a command says when it refuses: one line."""

    def refuse(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(*args)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out
        assert re.fullmatch(r"arvis: [^\n]+\n", err), err
        return err

    return refuse


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_generate_writes_a_grid_with_the_request_in_it(capsys):
    run("generate", "red apple", "-n", "3", "-o", "deep/apple.png", "--seed", "5", "--set", "top_k=2", "cfg_scale=1")
    assert "deep/apple.png: 3 pictures in" in capsys.readouterr().out
    sheet = read_image("deep/apple.png")
    assert sheet.size == (50, 50), "two columns of 24 pixels and the gap"
    about = read_metadata("deep/apple.png")
    assert about is not None and about["arvis"] == arvis.__version__
    request = about["request"]
    assert (request["prompt"], request["model"], request["n"], request["seed"]) == ("red apple", "brush-tiny", 3, 5)
    assert request["settings"] == {"cfg_scale": 1.0, "top_k": 2, "top_p": 0.96, "temperature": 1.0}
    again = arvis.load("brush").generate(request["prompt"], n=1, seed=5, settings=request["settings"])[0]
    assert sheet.crop((0, 0, 24, 24)).tobytes() == again.tobytes(), "the request paints it again"


def test_generate_previews_after_each_scale():
    run("generate", "red apple", "-o", "a.png", "--preview")
    assert sorted(p.name for p in Path().glob("*.png")) == ["a-1.png", "a-2.png", "a.png"]
    about = read_metadata("a-2.png")
    assert about is not None and (about["step"], about["of"]) == (2, 3)


def test_generate_with_classes():
    run("generate", "1", "--model", "classes", "-o", "a.jpg")
    about = read_metadata("a.jpg")
    assert about is not None and about["request"]["class_labels"] == 1


def test_generate_paints_a_part_anew():
    picture(48).save("image.png")
    halves().save("mask.png")
    run("generate", "red apple", "--image", "image.png", "--mask", "mask.png", "-o", "a.png")
    about = read_metadata("a.png")
    assert about is not None and (about["request"]["image"], about["request"]["mask"]) == ("image.png", "mask.png")
    plain = arvis.load("brush").generate("red apple", image="image.png", mask="mask.png")[0]
    assert read_image("a.png").tobytes() == plain.tobytes()


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    run("generate", "red apple")
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    run("generate", "red apple")
    assert "3/3" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("RANK", "1")
    run("generate", "red apple")
    assert not sys.stderr.getvalue(), "one process of several draws"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("-n", "0"), "at least 1, got 0"),
        (("-n", "-1"), "at least 1, got -1"),
        (("-n", "1000000000"), "GiB; one call makes at most"),
        (("-o", "."), "is a folder; give the name of a picture"),
        (("-o", "a.txt"), "does not end in .png"),
        (("-o", "a.bmp"), "does not end in .png"),
        (("-o", "file/a.png"), "file is a file"),
        (("--model", "brsh"), "nearest: brush"),
        (("--model", "./nothing"), "no file or folder nothing"),
        (("--model", "file"), "does not say which system"),
        (("--model", "classes"), "give a class number instead of 'red apple'"),
        (("--set", "cfgscale=1"), "did you mean cfg_scale?"),
        (("--set", "cfg_scale"), "expected name=value, got 'cfg_scale'"),
        (("--set", "top_k=many"), "top_k: expected int, got 'many'"),
        (("--set", "top_p=2"), "at most 1, got 2"),
        (("--mask", "half.png"), "a mask without an image"),
        (("--image", "half.png"), "an image without a mask"),
        (("--image", "half.png", "--mask", "nothing.png"), "no picture at nothing.png"),
        (("--image", "broken.png", "--mask", "half.png"), "cannot decode broken.png"),
        (("--image", "half.png", "--mask", "black.png"), "black.png has no white"),
        (("--device", "toaster"), "no device 'toaster'"),
    ],
)
def test_generate_tells_mistakes(refused, args, told):
    Path("file").write_text("text")
    halves().save("half.png")
    Image.new("L", (48, 48)).save("black.png")
    Path("broken.png").write_bytes(Path("half.png").read_bytes()[:60])
    assert told in refused("generate", "red apple", *args)
    assert not Path("out.png").exists()


def test_reconstruct_shows_pairs(capsys, refused):
    for i in range(3):
        picture(seed=i).save(f"{i}.png")
    run("reconstruct", "0.png", "1.png", "2.png", "-o", "pairs.png")
    assert read_image("pairs.png").size == (3 * 26 - 2, 50)
    assert re.search(r"^1\.png: \d+\.\d\d dB$", capsys.readouterr().out, re.MULTILINE)
    assert "at least one" in refused("reconstruct")
    assert "no picture at 7.png" in refused("reconstruct", "7.png")


def test_evaluate_is_for_models_of_the_emoji_world(refused):
    assert "64 x 64" in refused("evaluate", "emoji")


# -- training ---------------------------------------------------------------------------------------------------------


def test_train_both_stages_resume_and_paint(capsys, pictures, refused):
    config = to_dict(built("brush")[1])
    tiny = [*(f"model.{name}={json.dumps(part)}" for name, part in config.items()), *FAST]
    asked = ("train", "brush", "--data", "pictures", "--steps", "2")
    run(*asked, "--stage", "tokenizer", "--run", "tok", "--set", *tiny, "fit.batch=4")  # two batches read all seven
    out, err = capsys.readouterr()
    assert "done at step 2 of 2" in out and f"model: {Path('tok/model')}" in out
    assert "step 2 of 2: loss" in err and "images/s" in err
    run(*asked, "--init", "tok/model", "--run", "gen", "--minutes", "1e-6", "--set", *tiny)
    assert "time at step 1 of 2; --resume goes on" in capsys.readouterr().out
    assert "already holds a run" in refused(*asked, "--init", "tok/model", "--run", "gen")
    assert "is a run of brush-64 --stage generator" in refused(
        "train", "brush", "--stage", "tokenizer", "--run", "gen", "--resume"
    )
    run("train", "brush", "--run", "gen", "--resume")
    assert "done at step 2 of 2" in capsys.readouterr().out
    run("generate", "cat", "--model", "gen/model")
    assert read_image("out.png").size == (24, 24)
    run("info", "gen/model")
    assert "model.scale.depth=2" in capsys.readouterr().out


@pytest.fixture
def little(monkeypatch):
    """`brush` means a tiny preset that is trained in no time."""
    from arvis import systems
    from test_whole import tiny_preset

    monkeypatch.setattr(systems.system("brush"), "PRESETS", {"brush-tiny": tiny_preset("brush")})


def test_train_makes_a_whole_model_and_says_what_it_does(capsys, little, pictures, refused):
    run("train", "brush", "--data", "pictures", "--run", "all", "--set", "generator.fit.steps=4")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"brush-tiny: the tokenizer on pictures, in {Path('all/tokenizer')}"
    assert lines[1] == f"brush-tiny: the generator on pictures, in {Path('all/generator')}"
    assert re.match(r"done at step 4 of 4: loss \d\.\d+, accuracy [\d.]+%, peak \d+ MB$", lines[2])
    assert lines[3] == f"model: {Path('all/model')}, report: {Path('all/report.html')}"
    assert re.search(r"step 3 of 3: .*, images/s|step 3 of 3: loss .* images/s", err)
    run("generate", "cat", "--model", "all/model")
    assert "already holds a run" in refused("train", "brush", "--data", "pictures", "--run", "all")
    assert "--resume takes no changes" in refused("train", "brush", "--run", "all", "--resume", "--steps", "9")
    run("train", "brush", "--run", "all", "--resume")
    assert "done at step 4 of 4" in capsys.readouterr().out
    run("train", "brush", "--stage", "tokenizer", "--data", "pictures", "--run", "one")
    told = capsys.readouterr().out
    assert re.search(
        r"done at step 3 of 3: loss .*, psnr [\d.]+ dB, usage [\d.]+%, perplexity [\d.]+, peak \d+ MB\n", told
    ), told


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("brsh",), "nearest: brush"),
        (("brush", "--stage", "generator", "--data", "one"), "give its folder with --init"),
        (("brush", "--data", "nowhere"), "no data set 'nowhere'"),
        (("brush", "--data", "empty"), "no pictures in empty"),
        (("brush", "--data", "gone"), "no pictures in gone"),
        (("brush", "--data", "torn"), "captions.jsonl, line 1: expected"),
        (("brush", "--stage", "tokenizer", "--data", "nowhere"), "no data set 'nowhere'"),
        (("brush", "--stage", "tokenizer", "--data", "empty"), "no pictures in empty"),
        (("brush", "--stage", "tokenizer", "--steps", "0"), "steps must be at least 1, got 0"),
        (("brush", "--steps", "0"), "steps must be at least 1, got 0"),
        (("brush", "--minutes", "0"), "more than 0, got 0"),
        (("brush", "--stage", "tokenizer", "--minutes", "-1"), "more than 0, got -1"),
        (("brush", "--set", "fit.lrr=1"), "did you mean fit.lr?"),
        (("brush", "--set", "generator.fit.lrr=1"), "did you mean fit.lr?"),
        (("brush", "--stage", "tokenizer", "--set", "fit.lrr=1"), "did you mean fit.lr?"),
        (("brush", "--stage", "tokenizer", "--set", "model.scale.dept=1"), "did you mean scale.depth?"),
        (("brush", "--stage", "tokenizer", "--set", "sise=1"), "did you mean size?"),
        (("brush", "--stage", "tokenizer", "--run", "file"), "file is a file"),
        (("brush", "--run", "file"), "file is a file"),
        (("brush", "--init", "nothing", "--data", "one"), "no file or folder nothing"),
        (("brush", "--resume"), "holds no run to resume"),
        (("brush", "--data", "one", "--run", "one/run"), "lies among the pictures in one"),
    ],
)
def test_train_tells_mistakes(refused, little, args, told):
    for name in ("empty", "gone", "torn", "one"):
        Path(name).mkdir()
    Path("gone/captions.jsonl").write_text('{"file": "a.png", "caption": "a"}')
    Path("torn/captions.jsonl").write_text('{"file": "a.png"')
    picture().save("torn/a.png")
    picture().save("one/a.png")
    Path("file").write_text("text")
    assert told in refused("train", *args)
    assert not list(Path().glob("runs/*/*.json")), "nothing stands in the way of the next try"


def test_pictures_that_are_none(capsys, little):
    Path("broken").mkdir()
    for name in ("a.png", "b.png"):
        Path("broken", name).write_bytes(b"nonsense")
    with pytest.raises(SystemExit) as end:
        run("train", "brush", "--data", "broken")
    *skipped, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and last.startswith("arvis: none of the 2 pictures could be read; the first: broken/")
    assert all(line.startswith("skipped broken/") for line in skipped) and not Path("runs/new/plan.json").exists()


def test_one_picture_is_enough(capsys, little):
    Path("one").mkdir()
    picture().save("one/a.png")
    run("train", "brush", "--data", "one", "--run", "all")
    assert "done at step 3 of 3" in capsys.readouterr().out


def test_a_full_disk_is_one_line(refused, little, pictures, monkeypatch):
    from arvis.training import checkpoint

    def full(*args, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SystemExit) as end:
        run("train", "brush", "--data", "pictures", "--run", "all")
    assert end.value.code == 2


def test_captions_for_missing_files_are_counted(capsys):
    Path("some").mkdir()
    picture().save("some/a.png")
    lines = [json.dumps({"file": name, "caption": "c"}) for name in ("a.png", "b.png")]
    Path("some/captions.jsonl").write_text("\n".join(lines))
    run("finetune", "some", "--steps", "1", "--set", *FAST)
    assert "1 pictures, too few to hold some out, 1 of them unreadable or missing" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_in_one_line(capsys, pictures):
    with pytest.raises(SystemExit) as end:
        asked = ("--steps", "9", "--set", *FAST, "fit.lr=1e38", "fit.clip=0", "fit.schedule=constant")
        run("finetune", "pictures", "--model", "brush", "--run", "nan", *asked)
    assert end.value.code == 2
    assert re.search(r"^arvis: loss = (nan|inf).* at step \d+ with lr", capsys.readouterr().err, re.MULTILINE)


def test_finetune_a_folder_then_paint_from_it(capsys, pictures, refused):
    run("finetune", "pictures", "--run", "mine", "--steps", "2", "--set", *FAST)
    out = capsys.readouterr().out
    first, second, *_, last = out.splitlines()
    verdict = r"the tokenizer is the bottleneck at \d+\.\d dB: .* \d+\.\d dB at worst \((cat|red_dog)/\d\.png\)"
    assert re.match(rf"7 pictures, too few to hold some out, 1 of them unreadable or missing; {verdict}", first)
    assert second.endswith(str(Path("mine/tokenizer.png"))) and read_image("mine/tokenizer.png").height == 50
    page = Path("mine/report.html").read_text()
    assert "the tokenizer is the bottleneck" in page and page.count("data:image/png") >= 3, "before, after, pairs"
    assert {"000000.png", "000002.png"} <= {p.name for p in Path("mine/samples").iterdir()}
    assert last == f'try: arvis generate "cat" --model {Path("mine/model")}'
    assert "already holds a run" in refused("finetune", "pictures", "--run", "mine")
    run("finetune", "pictures", "--run", "mine", "--steps", "3", "--resume")
    assert "done at step 3 of 3" in capsys.readouterr().out
    assert "the tokenizer is the bottleneck" in Path("mine/report.html").read_text(), "a resumed run keeps it"
    run(*shlex.split(last.removeprefix("try: arvis ")))
    about = read_metadata("out.png")
    assert about is not None and about["request"]["prompt"] == "cat"


def test_finetune_adapters(capsys, pictures, refused):
    run("finetune", "pictures", "--run", "mine", "--steps", "2", "--lora", "2", "--set", *FAST)
    assert (
        f"adapters of rank 2 are trained; they are kept in {Path('mine/lora.safetensors')}" in capsys.readouterr().out
    )
    for model in ("mine/lora.safetensors", "mine/model"):
        run("generate", "cat", "--model", model, "-o", f"{Path(model).stem}.png")
    assert read_image("lora.png").tobytes() == read_image("model.png").tobytes()
    assert "rank of the adapters" in refused("finetune", "pictures", "--run", "x", "--lora", "-1")


def test_finetune_the_decoder_then_the_generator(capsys, pictures):
    run("finetune", "pictures", "--run", "tok", "--stage", "tokenizer", "--steps", "2", "--set", *FAST)
    assert "psnr" in capsys.readouterr().out
    run("finetune", "pictures", "--run", "gen", "--model", "tok/model", "--steps", "1", "--set", *FAST)
    assert "done at step 1 of 1" in capsys.readouterr().out


def test_finetune_without_captions_says_so(capsys):
    Path("plain").mkdir()
    for i in range(2):
        picture(seed=i).save(f"plain/{i}.png")
    run("finetune", "plain", "--steps", "1", "--set", *FAST)
    assert "no captions and no class folders" in capsys.readouterr().out


def test_finetune_measures_pictures_held_out(capsys):
    Path("many/cat").mkdir(parents=True)
    for i in range(41):
        picture(seed=i).save(f"many/cat/{i}.png")
    run("finetune", "many", "--steps", "2", "--set", *FAST)
    told = r"loss: \d\.\d\d -> \d\.\d\d on pictures it learned from, \d\.\d\d -> \d\.\d\d on pictures held out"
    out = capsys.readouterr().out
    assert re.search(told, out) and re.match(r"\d\d pictures and \d held out; the tokenizer", out)


def test_finetune_of_classes_names_them(capsys, pictures, refused):
    run("finetune", "pictures", "--model", "classes", "--steps", "1", "--set", *FAST)
    out = capsys.readouterr().out
    assert "the model has the classes of the folder now, 2: 0 = cat, 1 = red_dog" in out
    assert f'try: arvis generate "cat" --model {Path("runs/finetune/model")}' in out
    for what in ("red_dog", "1"):
        run("generate", what, "--model", "runs/finetune/model", "-o", f"{what}.png")
    assert read_image("red_dog.png").tobytes() == read_image("1.png").tobytes()
    told = refused("generate", "bird", "--model", "runs/finetune/model")
    assert "give a class number instead of 'bird', or one of cat, red_dog" in told


def test_finetune_tells_mistakes(refused, pictures, monkeypatch):
    Path("empty").mkdir()
    assert "no pictures in empty" in refused("finetune", "empty")
    assert "nowhere does not exist" in refused("finetune", "nowhere")
    assert "no model is called" in refused("finetune", "pictures", "--model", "nothing")
    assert "holds no run to resume" in refused("finetune", "pictures", "--resume")
    assert "lies among the pictures" in refused("finetune", "pictures", "--run", "pictures/run")
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"nonsense")
    assert "none of the 1 pictures could be read" in refused("finetune", "broken")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "for one process" in refused("finetune", "pictures")


# -- systems and files ------------------------------------------------------------------------------------------------


def test_systems_lists_every_model(capsys):
    run("systems")
    out = capsys.readouterr().out
    assert re.search(r"^brush +system", out, re.MULTILINE) and re.search(r"brush-64 +in the box, licence Apache", out)
    assert re.search(r"var-d30 +on the hub, licence MIT", out)


def test_info_of_a_published_model_and_of_a_folder(capsys, refused):
    run("info", "var-d16")
    out = capsys.readouterr().out
    assert re.search(r"transformer +310\.28 M parameters  FoundationVision/var/var_d16\.pth", out)
    assert "680 tokens in 10 groups: 1x1, 2x2" in out and "published    FID 3.55" in out and "model.depth=16" in out
    run("info", "classes")
    assert "licence      MIT" in capsys.readouterr().out
    assert "no model is called" in refused("info", "nothing")


def test_cost_is_a_table_of_phases(capsys, refused):
    """The published size counted without its weights: ten steps, then the decoder."""
    run("info", "var-d16", "--cost", "--set", "cfg_scale=0")
    out = capsys.readouterr().out
    assert "10 steps" in out and re.search(r"decode +393\.8", out) and re.search(r"weights +1,599\.4 MiB", out)
    assert re.search(r"later steps +298\.0", out), "without guidance the transformer does half the work"
    assert "batch is the number of pictures" in refused("info", "var-d16", "--cost", "--batch", "0")
    assert "cfg_scale" in refused("info", "var-d16", "--cost", "--set", "cfg_scal=2")


def test_convert_in_both_directions(monkeypatch, capsys, refused):
    """Files with official names become a folder of ours that paints the same, and the same files again."""
    from arvis import systems
    from arvis.published import File, Preset

    parts = {part: File(repo="nobody/nothing", name=part) for part in ("tokenizer", "transformer")}
    tiny = Preset(config=lambda: built("var")[1], files=parts, licence="MIT", sampling={"top_k": 3})
    monkeypatch.setitem(systems.system("var").PRESETS, "var-tiny", tiny)
    run("convert", "classes", "official", "--official")
    assert "official/transformer.safetensors: 38 tensors" in capsys.readouterr().out.replace(os.sep, "/")
    assert "class_emb.weight" in load_file("official/transformer.safetensors")
    files = [f"{part}=official/{part}.safetensors" for part in parts]
    run("convert", "var-tiny", "ours", "--weights", *files)
    out, err = capsys.readouterr()
    assert "ours: var-tiny, 2.87 MB in float32, licence MIT" in out and "tokenizer from official" in err
    ours = arvis.load(Path("ours"))
    assert ours.settings == {"top_k": 3}
    request = {"class_labels": 1, "settings": {"top_k": 0}}
    assert ours.generate(**request)[0].tobytes() == small("var").generate(**request)[0].tobytes()
    run("convert", "ours", "again", "--official")
    for part in parts:
        assert Path(f"again/{part}.safetensors").read_bytes() == Path(f"official/{part}.safetensors").read_bytes()
    run("convert", "var-tiny", "whole", "--weights", "official", "--dtype", "bfloat16")
    assert "1.44 MB in bfloat16" in capsys.readouterr().out
    run("convert", "ours", "half", "--dtype", "bfloat16")
    assert Path("half/model.safetensors").stat().st_size == Path("whole/model.safetensors").stat().st_size < 1.5e6
    weight = small("var").system.transformer.head.linear.weight
    for folder in ("whole", "half"):
        stored = arvis.load(Path(folder)).system.transformer.head.linear.weight
        assert stored.equal(weight.bfloat16().float())
    run("info", "whole")
    assert re.search("converted +tokenizer from tokenizer.safetensors, sha256 [0-9a-f]{64}", capsys.readouterr().out)
    assert "PART=FILE" in refused("convert", "var-tiny", "x", "--weights", "tokenizer", "transformer")
    assert "no file tokenizer" in refused("convert", "var-tiny", "x", "--weights", "tokenizer")
    assert "no part 'vae'" in refused("convert", "var-tiny", "x", "--weights", "vae=y")
    assert "no file nothing.pth" in refused("convert", "var-tiny", "x", "--weights", "tokenizer=nothing.pth")
    assert "no official files" in refused("convert", "brush", "x", "--official")
    assert "one of the two" in refused("convert", "ours", "x", "--official", "--weights", *files)
    assert "holds no model of arvis" in refused("convert", "ours", "official")


def test_parity_and_check_say_what_there_is_not(refused):
    assert "nearest: var" in refused("parity", "vra")
    assert "nothing.json" in refused("parity", "var", "--keys", "nothing.json")
    assert "no recording" in refused("parity", "var", "--fixture", "nothing")
    assert "no system is called" in refused("check", "nothing")


def test_check_prints_claims_and_exits_by_them(monkeypatch, capsys):
    from arvis import checks

    claims = [checks.at_least("a", 2, 1), checks.at_most("b", 2, 1)]
    monkeypatch.setattr(checks, "run", lambda slug, mutants, on_step: on_step() or claims)
    with pytest.raises(SystemExit) as end:
        run("check", "var")
    assert end.value.code == 1 and capsys.readouterr().out.splitlines() == [str(claim) for claim in claims]


def test_doctor_groups_what_it_finds(capsys):
    with pytest.raises(SystemExit) as end:
        run("doctor")
    out = capsys.readouterr().out
    assert end.value.code == 0 and re.search(r"^versions\n  python +3\.", out, re.MULTILINE) and "\ndevice\n" in out


# -- the frame --------------------------------------------------------------------------------------------------------


def test_settings_may_follow_one_flag_or_several():
    apart = ["generate", "--set", "a=1", "--set", "b.c=2", "prompt", "x=y"]
    assert each_set(["generate", "--set", "a=1", "b.c=2", "prompt", "x=y"]) == apart == each_set(apart)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), "the disk is full: .*a.png"),
        (OSError(errno.EACCES, "Permission denied", "a.png"), r"a\.png: Permission denied"),
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("no model is called 'x'"), "no model is called 'x'"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory; fewer pictures"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; fewer pictures"),
    ],
)
def test_errors_in_one_line(error, told):
    assert re.fullmatch(rf"{told}.*", terminal.told(error) or "")


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    assert terminal.told(KeyError("name")) is None and terminal.told(RuntimeError("shapes differ")) is None
    monkeypatch.setenv("ARVIS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="nearest"):
        run("info", "brsh")


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "read_header", interrupted)
    with pytest.raises(SystemExit) as end:
        run("generate", "red apple")
    assert end.value.code == 130 and capsys.readouterr().err == "arvis: interrupted\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_few_flags_each_with_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    out = capsys.readouterr().out
    flags = set(re.findall(r"^│ (?:-\w(?: \w+)?, )?--([\w-]+)", out, re.MULTILINE)) - {"help", "set"}
    assert end.value.code == 0 and len(flags) <= 8, flags
    code = cli.COMMANDS[name].__code__
    documented = set(re.findall(r"^        (\w+): ", cli.COMMANDS[name].__doc__ or "", re.MULTILINE))
    assert documented == set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


@pytest.mark.parametrize(
    "page", ["README.md", "docs/commands.md", "docs/training.md", "docs/finetuning.md", "CONTRIBUTING.md"]
)
def test_commands_in_the_texts_are_understood(page, monkeypatch):
    """Each line that begins with `arvis` in a block of shell is parsed, not run."""
    called = []

    def recorded(name):
        @functools.wraps(cli.COMMANDS[name])
        def command(*args, **kwargs):
            called.append(name)

        return command

    for name in list(cli.COMMANDS):
        monkeypatch.setitem(cli.COMMANDS, name, recorded(name))
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.findall(r"^arvis (.*)$", block, re.MULTILINE)]
    for line in lines:
        run(*shlex.split(line, comments=True))
    assert len(called) == sum("--version" not in line for line in lines)
    if page == "docs/commands.md":
        assert set(called) == set(cli.COMMANDS), "each command has an example"


def test_the_python_of_the_readme_runs():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    space: dict = {}
    exec(block[1], space)
    assert space["model"].name == "brush-tiny"


def test_the_version_is_printed(capsys):
    run("--version")
    assert capsys.readouterr().out == f"arvis {arvis.__version__}\n"


def test_a_real_process(place):
    """A picture and a mistake, as the shell sees them."""

    def arvis_(*args: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "arvis.cli", *args]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=env, **options)

    painted = arvis_("generate", "red apple", "--model", "box/brush-64", "-o", "a.png")
    assert painted.returncode == 0 and not painted.stderr and Path("a.png").is_file()
    wrong = arvis_("generate", "red apple", "--model", "brsh")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "arvis: no model is called 'brsh'; nearest: brush, brush-64\n"


def test_settings_of_loading_and_of_searches(monkeypatch, refused):
    asked = []
    monkeypatch.setattr(arvis, "load", lambda name, **how: asked.append(how) or sys.exit("seen"))
    with pytest.raises(SystemExit, match="seen"):
        run("generate", "red apple", "--set", "load.quantize=int8", "cfg_scale=2", "--set", "load.fast=false")
    assert asked == [
        {
            "device": "auto",
            "precision": "float32",
            "fast": False,
            "quantize": "int8",
            "compile": False,
            "offload": False,
        }
    ]
    assert "load.quantize: expected one of int8, int4" in refused("generate", "red", "--set", "load.quantize=int3")
    assert "did you mean load.compile" in refused("generate", "red apple", "--set", "load.compil=true")
    assert "add --search" in refused("generate", "red apple", "--set", "search.reward=scene")


def test_bench_measures_and_counts(capsys, refused):
    run("bench", "brush", "-b", "1", "2", "--repeats", "1", "--precision", "float32")
    told = capsys.readouterr().out
    assert told.startswith("brush-64 on cpu: float32 as asked")
    assert re.search(r"batch 1 .* pictures/s; counted floor [\d.]+ s, \d+% of it reached", told) and "batch 2 " in told
    assert "at least 1" in refused("bench", "brush", "--repeats", "0")
