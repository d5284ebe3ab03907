"""Both stages by one command: what is left behind, how time is shared; a kill at any moment costs time alone."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import arvis
from arvis import recipes, systems
from arvis.data.images import read_image
from arvis.published import Preset
from arvis.recipes import run as stage_run
from arvis.recipes import whole
from arvis.training import folder
from arvis.weights import read_pretrained
from small import built, picture

REGISTERED = [slug for slug, row in systems.SYSTEMS.items() if row.kind == "system"]
FIT = {"steps": 3, "batch": 2, "lr": 1e-3, "precision": "float32", "ema": 0.5, "log_every": 1}


def tiny_preset(slug):
    """The tiny system as a preset with settings for both stages."""
    config = built(slug)[1]
    return Preset(config=lambda: config, licence="MIT", training={"tokenizer": FIT, "generator": FIT})


def two_classes(root):
    """Two classes of three pictures each."""
    for kind in ("cat", "red_dog"):
        (root / kind).mkdir(parents=True)
        for i in range(3):
            picture(seed=i).save(root / kind / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights of a run of three steps a stage that nothing disturbs."""
    place = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(systems.system("brush").PRESETS, "brush-tiny", tiny_preset("brush"))
        recipes.train_whole(recipes.plan_for("brush-tiny", two_classes(place / "pictures")), place / "run")
    return weights(place / "run")


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plans for tiny systems."""
    two_classes(tmp_path / "pictures")

    def make(slug="brush", **changes):
        monkeypatch.setitem(systems.system(slug).PRESETS, f"{slug}-tiny", tiny_preset(slug))
        return recipes.plan_for(f"{slug}-tiny", str(tmp_path / "pictures"), **changes)

    return make


def weights(run):
    return read_pretrained(run / "model").tensors


@pytest.mark.parametrize("slug", REGISTERED)
def test_one_command_makes_a_model(plan, slug, tmp_path):
    heard, run = [], tmp_path / "run"
    result = recipes.train_whole(plan(slug), run, on_stage=lambda r: heard.append((r.stage, r.run.name)))
    assert heard == [("tokenizer", "tokenizer"), ("generator", "generator")]
    assert (result.step, result.steps, result.stopped) == (3, 3, "done")
    model = arvis.load(run / "model")
    condition = {"class_labels": 1} if "class_labels" in model.system.conditions else {"prompt": "cat"}
    assert model.generate(**condition)[0].size == model.size[::-1]
    parts = {name.partition(".")[0] for name in weights(run)}
    fresh = read_pretrained(run / "tokenizer" / "model").tensors
    changed = {n.partition(".")[0] for n, t in weights(run).items() if not torch.equal(t, fresh[n])}
    assert changed == parts - {"tokenizer"}, "the generator learns on the tokens of the first stage"
    for name in ("samples.png", "reconstructions.png"):
        assert read_image(run / name).width > model.size[1]
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 2 and 'href="generator/report.html"' in page
    assert all((run / part / "report.html").is_file() for part in recipes.STAGES)


def test_a_run_is_not_overwritten_and_a_finished_one_stays(plan, tmp_path):
    asked = plan()
    recipes.train_whole(asked, tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run"):
        recipes.train_whole(asked, tmp_path / "run")
    before = weights(tmp_path / "run")
    kept, saved = recipes.planned(tmp_path / "run"), json.loads((tmp_path / "run" / whole.FILE).read_text())
    assert saved["name"] == "brush-tiny" and saved["done"] == ["tokenizer", "generator"]
    assert kept == replace(asked, done=recipes.STAGES) and recipes.planned(tmp_path) is None
    assert recipes.train_whole(kept, tmp_path / "run", resume=True).stopped == "done"
    assert all(torch.equal(t, before[n]) for n, t in weights(tmp_path / "run").items())


class Killed(BaseException):
    """The process ends here: nothing after it runs."""


MOMENTS = ("plan", "tokenizer step", "tokenizer model", "generator step", "generator model", "finish")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_it_goes_on_with_the_right_stage(plan, alone, tmp_path, monkeypatch, moment):
    """The weights are those of a run that was left alone, bit for bit."""
    asked, run = plan(set=("fit.save_every=1",)), tmp_path / "run"

    def die(*args, **named):
        raise Killed

    with monkeypatch.context() as patch:
        stage, _, what = moment.partition(" ")
        if moment == "plan":
            patch.setattr(whole, "train", die)
        elif moment == "finish":
            patch.setattr(whole, "_finish", die)
        elif what == "model":
            real = stage_run._keep

            def keep(trained, request, *rest):
                return die() if request.stage == stage else real(trained, request, *rest)

            patch.setattr(stage_run, "_keep", keep)
        current = []

        def step(info):
            if what == "step" and current[-1] == stage and info.step == 2:
                die()

        with pytest.raises(Killed):
            recipes.train_whole(asked, run, on_step=step, on_stage=lambda r: current.append(r.stage))
    heard = []
    kept = recipes.planned(run)
    result = recipes.train_whole(kept, run, resume=True, on_stage=lambda r: heard.append((r.stage, r.resume)))
    assert (
        heard[0]
        == {
            "plan": ("tokenizer", False),
            "tokenizer step": ("tokenizer", True),
            "tokenizer model": ("tokenizer", True),
            "generator step": ("generator", True),
            "generator model": ("generator", True),
            "finish": ("generator", True),
        }[moment]
    )
    assert result.stopped == "done"
    assert all(torch.equal(t, alone[n]) for n, t in weights(run).items())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from arvis import recipes, systems
from test_whole import tiny_preset
systems.system("brush").PRESETS["brush-tiny"] = tiny_preset("brush")
run = Path({run!r})
plan = recipes.planned(run)
asked = plan or recipes.plan_for("brush-tiny", {data!r}, steps=60, set=("fit.save_every=7",))
recipes.train_whole(asked, run, resume=plan is not None)
"""


@pytest.mark.slow
def test_killed_for_good_in_both_stages(plan, tmp_path):
    """SIGKILL to a real process, before the first checkpoint and later, in each stage."""
    asked, run = plan(steps=60, set=("fit.save_every=7",)), tmp_path / "run"
    recipes.train_whole(asked, tmp_path / "alone")
    text = SCRIPT.format(tests=str(Path(__file__).parent), run=str(run), data=asked.data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(arvis.__file__).parents[1])}
    for stage, lines in (("tokenizer", 2), ("tokenizer", 30), ("generator", 3), ("generator", 40)):
        process = subprocess.Popen([sys.executable, "-c", text], env=environment, stderr=subprocess.PIPE)
        file, deadline = run / stage / "metrics.jsonl", time.monotonic() + 240
        while not file.exists() or file.read_bytes().count(b"\n") < lines:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (run / "model").exists()
    subprocess.run([sys.executable, "-c", text], env=environment, check=True, capture_output=True)
    expected = weights(tmp_path / "alone")
    threads = torch.get_num_threads()
    close = torch.equal if threads == 1 else lambda a, b: torch.allclose(a, b, atol=1e-4)
    assert all(close(t, expected[n]) for n, t in weights(run).items())


@pytest.mark.slow
def test_two_processes_make_the_model_of_one(plan, alone, tmp_path):
    """As torchrun starts them: pictures are encoded by both, and the weights are those of one process."""
    run, text = tmp_path / "run", SCRIPT.replace('steps=60, set=("fit.save_every=7",)', "")
    text = text.format(tests=str(Path(__file__).parent), run=str(run), data=plan().data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {**os.environ, "PYTHONPATH": str(Path(arvis.__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]
    told = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
    assert all(torch.allclose(t.float(), alone[n].float(), atol=1e-4) for n, t in weights(run).items())


def test_time_is_shared_and_both_schedules_end(plan, tmp_path):
    """Many more steps were asked for than fit: each stage gets as many as do, and both come to their end."""
    asked, run = plan(steps=10**7, minutes=0.1), tmp_path / "run"
    began = time.monotonic()
    result = recipes.train_whole(asked, run, minutes=0.1)
    spent = time.monotonic() - began
    assert spent < 25, spent
    first, second = (folder.read(run / stage)["fit"] for stage in recipes.STAGES)
    assert 5 < first["steps"] < 10**6 and 5 < second["steps"] < 10**6
    assert result.steps == second["steps"] and (run / "model").is_dir()
    assert first["warmup"] <= first["steps"] // 5 and recipes.planned(run).done == recipes.STAGES
    assert not list(run.glob("*/.tried-*")), "trying out leaves no trace"


def test_trying_out_leaves_no_trace(plan, alone, tmp_path, monkeypatch):
    """A run whose speed was measured first has the weights of one where the same steps were asked for."""
    real, fitting, seen = stage_run.fit, stage_run._fitting, []

    def fit(*args, **named):
        seen.append(args[3].steps)
        return real(*args, **named)

    def as_asked(stage, data, config, seconds, run):
        fitting(stage, data, config, seconds, run)
        return config

    asked = plan(minutes=5.0)
    monkeypatch.setattr(stage_run, "fit", fit)
    monkeypatch.setattr(stage_run, "_fitting", as_asked)
    recipes.train_whole(asked, tmp_path / "timed", minutes=5.0)
    assert seen == [stage_run.TRIED, 3] * 2
    assert all(torch.equal(t, alone[n]) for n, t in weights(tmp_path / "timed").items())


def test_the_time_of_a_call_that_resumes_only_stops_it(plan, tmp_path):
    asked, run = plan(steps=400), tmp_path / "run"
    with pytest.raises(Killed):
        recipes.train_whole(asked, run, on_step=lambda info: (_ for _ in ()).throw(Killed))
    stopped = recipes.train_whole(recipes.planned(run), run, resume=True, minutes=1e-4)
    assert stopped.stopped == "time" and stopped.run.name == "tokenizer" and not (run / "model").exists()
    assert recipes.planned(run).done == () and folder.read(run / "tokenizer")["fit"]["steps"] == 400


def test_settings_of_one_stage_and_of_both(plan, tmp_path):
    texts = ("fit.batch=3", "generator.fit.lr=0.5", "tokenizer.loss.l1=0.25", "tokenizer.fit.steps=7")
    asked = plan(set=texts)
    first, second = (asked.request(stage, tmp_path) for stage in recipes.STAGES)
    assert (first.fit.batch, first.fit.lr, first.loss.l1, first.fit.steps) == (3, 1e-3, 0.25, 7)
    assert (second.fit.batch, second.fit.lr, second.loss.l1, second.fit.steps) == (3, 0.5, 1.0, 3)
    assert second.init == tmp_path / "tokenizer" / "model" and first.init is None
    with pytest.raises(ValueError, match="did you mean"):
        recipes.train_whole(plan(set=("generator.fit.lrr=1",)), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing stands in the way of the next try"


def test_a_model_of_classes_gets_as_many_as_the_data_has(plan, tmp_path):
    for i in range(9):
        (tmp_path / "pictures" / f"more{i}").mkdir()
        picture(seed=i).save(tmp_path / "pictures" / f"more{i}" / "a.png")
    asked = plan("var")
    assert asked.set == ("model.num_classes=11",)
    recipes.train_whole(asked, tmp_path / "run")
    kept = read_pretrained(tmp_path / "run" / "model")
    assert kept.config["num_classes"] == 11 and len(kept.source["classes"]) == 11
    assert arvis.load(tmp_path / "run" / "model").generate(class_labels=10)


def test_pictures_among_which_the_run_lies_are_refused(plan, tmp_path):
    with pytest.raises(ValueError, match="lies among the pictures"):
        recipes.train_whole(plan(), tmp_path / "pictures" / "run")
