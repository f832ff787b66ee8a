"""The page opens in a browser without an error, loads nothing, keeps names as text, and explains missing parts."""

import json
import os
import re
import tempfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import browser
from report_runs import QUICK, make_run
from spot_fast import report
from spot_fast.checkpoints.runs import CONFIG, METRICS
from spot_fast.reporting import images

EVIL = "<img src=x onerror=\"document.title='owned'\">"


def written(folder, *runs, options=()):
    out = folder / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "PANEL", 32)
        assert report.main([*map(str, runs), "--out", str(out), *QUICK, "--protocol", "spot,lsd", *options]) == 0
    return out


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A report of both stages and of a run in the standard order, one of which has a name and values made of markup."""
    root = tmp_path_factory.mktemp("page")
    evil = make_run(root / "runs" / EVIL.replace("/", ""))
    values = json.loads((evil / CONFIG).read_text())
    (evil / CONFIG).write_text(json.dumps(values | {"data": f"</td></table><script>{EVIL}</script>"}))
    return written(root, evil, make_run(root / "runs" / "two", 2), make_run(root / "runs" / "plain", orders="standard"))


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if path is None:
        reason = f"there is no browser: none of {', '.join(browser.NAMES)} is on the PATH"
        # Where everything is installed, a check that cannot be made is a failure.
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = browser.Browser(path, Path(profile))
        yield opened
        opened.close()


def test_a_browser_shows_all_of_it_without_an_error(chromium, two_stages):
    looks = {
        (width, dark): chromium.open(two_stages, width=width, dark=dark) for width, dark in ((1200, False), (400, True))
    }
    for (width, _), found in looks.items():
        assert found["errors"] == [] and found["requests"] == [], found
        assert [alt for alt, side in found["images"] if side == 0] == [] and len(found["images"]) > 60
        assert all(alt for alt, _ in found["images"])
        assert found["overflow"] <= 0, f"wider than {width}"
        assert found["title"] == f"SPOT report: {EVIL}, two, plain"
        assert "Gradient norm per patch" in found["text"] and EVIL in found["text"]
    light, dark = (re.findall(r"\d+", found["paper"])[:3] for found in looks.values())
    assert min(map(int, light)) > 200 and max(map(int, dark)) < 60


def test_the_browser_checks_can_fail(chromium, tmp_path):
    """A page with a missing image, an exception and something to load is told apart from a good one."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><title>bad</title><img alt=missing src=missing.png><div style='width:3000px'>-</div>"
        "<script>console.error('told'); throw new Error('thrown')</script>"
    )
    found = chromium.open(bad)
    assert found["images"] == [["missing", 0]] and found["overflow"] > 1000
    assert any("told" in error for error in found["errors"]) and any("thrown" in error for error in found["errors"])
    assert [url.rpartition("/")[2] for url in found["requests"]] == ["missing.png"]


class Checked(HTMLParser):
    """Opening and closing tags have to match; collects what a browser would load or run."""

    VOID = ("br", "col", "hr", "img", "link", "meta")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.loaded, self.counts = [], [], [], [], {}

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.counts[name] = self.counts.get(name, 0) + 1
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.loaded += [attributes[key] for key in ("src", "srcset", "data", "poster", "action") if key in attributes]
        assert not [key for key in attributes if key.startswith("on")], attributes
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def test_well_formed_and_nothing_to_load(two_stages):
    text = two_stages.read_text(encoding="utf-8")
    page = Checked()
    page.feed(text)
    assert page.open == [] and page.loaded and all(source.startswith("data:image/") for source in page.loaded)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids)) and len([i for i in page.ids if i.isalpha()]) == 9
    assert not {"script", "link", "iframe", "object"} & page.counts.keys()
    assert page.counts["figure"] <= page.counts["figcaption"] and page.counts["style"] == 1
    assert page.counts["svg"] == 7 + 2 + (2 + 2 + 1)  # curves, sizes of two sets, gradient maps of three runs
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style and "default-src 'none'" in text


def test_names_and_values_are_shown_as_text(two_stages):
    text = two_stages.read_text(encoding="utf-8")
    assert "<img src=x" not in text and "<script" not in text
    assert unescape(text).count(EVIL) > 20 and f"</td></table><script>{EVIL}</script>" in unescape(text)


def test_every_kind_of_run_has_its_figures(two_stages):
    text = unescape(two_stages.read_text(encoding="utf-8"))
    assert "plain: the decoder has one patch order, so there is nothing to average." in text
    assert "the-teacher" in text and "Attention loss" in text and "Shaded rows differ" in text
    # best, median and worst, of the two runs with nine orders; of all three runs
    assert text.count("<strong>average</strong>") == 6 and text.count('class="image iterations"') == 9
    assert text.count('<figure class="gradients">') == 3
    assert "without training, the same for every run" in text and "All metrics under lsd" in text
    for source in re.findall(r'<small class="source">(.*?)</small>', text):
        assert re.search(r"images? of scenes · seed 0 · float32 · spot_fast .*, torch .* · 20\d\d-", source)


def test_a_set_without_masks_a_run_without_log_and_an_mlp_decoder(tmp_path, monkeypatch):
    run = make_run(tmp_path / "bare", log=False, decoder="mlp", orders="standard")
    monkeypatch.setattr("spot_fast.data.datasets.scenes.Scenes.has_masks", False)
    text = unescape(written(tmp_path, run, options=["--gradient-images", "0"]).read_text(encoding="utf-8"))
    for sentence in (
        "scenes has no masks to compare with, so there are no scores.",
        "so there are no scores by size.",
        "bare: there is no metrics.jsonl in the folder, so no curves.",
        "Drawn at random.",
        "bare: the decoder has one patch order",
        "Left out: --gradient-images is 0",
    ):
        assert sentence in text, sentence
    assert "MLP, hidden width" in text and text.count('class="image iterations"') == 2 and "truth" not in text
    page = Checked()
    page.feed(text.replace("'none'", ""))
    assert page.open == []


def test_a_log_with_nothing_known_in_it(tmp_path):
    run = make_run(tmp_path / "odd", orders="standard")
    lines = [{"kind": "train", "step": 4, "loss": None}, {"kind": "skipped", "step": 4, "steps": [3]}]
    (run / METRICS).write_text("\n".join(map(json.dumps, lines)))
    (run / "training_state.safetensors").unlink()
    text = unescape(written(tmp_path, run, options=["--gradient-images", "0"]).read_text(encoding="utf-8"))
    assert "images/s" not in text and "1 step was left out" in text
