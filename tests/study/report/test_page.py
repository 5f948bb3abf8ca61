"""The report: as a file, and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_up_study import RECIPE, make_results
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tdkit.errors import StorageError
from tdkit.study.records import Measurement, Results
from tdkit.study.report.analysis import analyse
from tdkit.study.report.conclusions import Analysis
from tdkit.study.report.figures import charts, inline, render
from tdkit.study.report.findings import caveats, definitions, findings
from tdkit.study.report.html import Markup, tag
from tdkit.study.report.page import page, write_report

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;$x$'
VOID = {"meta", "link", "br", "input", "img"}


@pytest.fixture(scope="module")
def results() -> Results:
    """A study with all there can be: two stages, runs, a failure, trials that are still missing."""
    made, _ = make_results(images=500, runs=2, stages=("before", "after"))
    first, *rest = made.measurements
    failed = Measurement(first.trial, failure="the layer gave NaN")
    return replace(made, measurements=(failed, *rest[:-1]))


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report")
    write_report(results, make_results(images=10)[1], path)
    return path


@pytest.fixture(scope="module")
def html(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """What is in a page; complains about elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attrs) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attrs) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name) -> None:
        assert self.open.pop() == name

    def handle_data(self, data) -> None:
        self.texts.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def conclude(results: Results, text: str = RECIPE) -> tuple[Analysis, str]:
    _, recipe = make_results(text=text, images=10)
    analysis = analyse(results, recipe, resamples=50, rng=np.random.default_rng(0))
    return analysis, page(analysis, charts(analysis), results)


def test_everything_is_written(folder) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    figures = (
        "figure-1-tau-by-keep", "figure-2-tau-by-error", "figure-3-tau-by-choice",
        "figure-4-relative-weights", "figure-4-absolute-weights", "figure-5-change-by-layer",
        "figure-6-regret",
    )  # fmt: skip
    tables = (
        "candidates", "changes", "correlations", "failures", "keeps", "published", "ranks",
        "regret",
    )  # fmt: skip
    assert names == {
        "report.html",
        *(f"figures/{name}.{kind}" for name in figures for kind in ("png", "svg")),
        *(f"tables/{name}.csv" for name in tables),
    }
    for name in figures:
        assert (folder / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        root = ET.fromstring((folder / f"figures/{name}.svg").read_text(encoding="utf-8"))
        assert root.tag.endswith("svg")


def test_the_same_results_make_the_same_files(results) -> None:
    analysis, text = conclude(results)
    again, same = conclude(results)
    assert same == text
    files = render(charts(analysis)[3])
    assert render(charts(again)[3]) == files
    assert not re.search(r"<dc:date>|\d\d:\d\d:\d\d", files["svg"].decode())


def test_the_page_needs_nothing_else(html) -> None:
    reader = Reader(html)
    for name, attributes in reader.elements:
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or (name, value) == ("link", "data:,")
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(html) < 1_500_000


def test_the_policy_names_the_script(html) -> None:
    (policy,) = [m["content"] for m in Reader(html).all("meta") if "http-equiv" in m]
    script = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_figures_have_words(html) -> None:
    reader = Reader(html)
    ids = Counter(a["id"] for _, a in reader.elements if a.get("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    for reference in re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', html):
        assert reference in ids
    images = [a for _, a in reader.elements if a.get("role") == "img"]
    assert len(images) == 9  # figures 1, 2, 3 and 6 of two stages, and figure 5
    assert all(len(a["aria-label"] or "") > 20 for a in images)
    levels = [int(name[1]) for name, _ in reader.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert len(reader.all("caption")) == len(reader.all("table"))
    assert all(a.get("scope") in ("col", "row") for a in reader.all("th"))


def test_it_says_what_the_analysis_says(results) -> None:
    analysis, text = conclude(results)
    said = Reader(text).text
    for _, sentence in (*findings(analysis), *definitions(analysis)):
        assert sentence.replace("\u00a0", " ") in said
    for sentence in caveats(analysis):
        assert sentence.replace("\u00a0", " ") in said
    assert "not finished: " in said
    assert "the layer gave NaN" in said
    assert "0.775 ± 0.023" in said
    assert "(10, 4, 10)" in said
    found = analysis.correlation("before", "all", "relative-weights")
    assert f"{found.tau:.3f} ± {found.std:.3f}" in said


def test_hostile_names_are_text() -> None:
    made, recipe = make_results(images=100, layers=((HOSTILE, 5000), ("b", 6000)))
    first, *rest = made.measurements
    made = replace(
        made,
        measurements=(Measurement(first.trial, failure=HOSTILE), *rest),
        identity={HOSTILE: HOSTILE},
        recipe=HOSTILE,
    )
    recipe = replace(recipe, title=HOSTILE, notes=(HOSTILE,))
    analysis = analyse(made, recipe, resamples=20, rng=np.random.default_rng(0))
    reader = Reader(page(analysis, charts(analysis), made))
    assert reader.all("img") == []
    assert len(reader.all("script")) == 2
    assert not [a for _, a in reader.elements if "onerror" in a]
    assert HOSTILE in "".join(reader.texts)
    with_names = next(c for c in charts(analysis) if c.name.startswith("figure-4"))
    ET.fromstring(render(with_names)["svg"])


def test_escaping() -> None:
    made = tag("p", "<b>", Markup("<i></i>"), None, title='"&', hidden=True, lang=None)
    assert made == '<p title="&quot;&amp;" hidden>&lt;b&gt;<i></i></p>'
    assert tag("input", name="a", data_x=1, class_="c") == '<input name="a" data-x="1" class="c">'


def test_one_run_without_labels() -> None:
    methods = (("tucker", 1.0), ("tt", 1.1))
    made, _ = make_results(images=100, methods=methods, keeps=(0.5, 0.25))
    text = RECIPE.partition("[[published]]")[0]
    made = replace(made, baseline=replace(made.baseline, labelled=False), recipe=text)
    analysis, html = conclude(made, text)
    said = Reader(html).text
    assert "1 − agreement with the dense model" in said
    assert "no standard deviation over runs" in said
    assert "± std over runs" not in said
    assert "published" not in said.lower()
    assert "What failed" not in said
    assert {chart.name[:8] for chart in charts(analysis)} == {
        f"figure-{number}" for number in (1, 2, 3, 4, 6)
    }


def test_undefined_is_said() -> None:
    made, _ = make_results(images=100)
    same = made.measurements[0].correct
    made = replace(made, measurements=tuple(replace(m, correct=same) for m in made.measurements))
    analysis, html = conclude(made)
    assert "all performance errors are equal" in Reader(html).text
    assert "undefined: all performance errors are equal" in charts_text(analysis)


def test_published_values_stand_beside_measured_ones_and_their_ceiling(results) -> None:
    analysis, html = conclude(results)
    whole = re.sub(r"<[^>]*>", "|", html).replace("\u00a0", " ")
    head = "error and stage|published|measured|95 % interval|ceiling|difference|"
    assert head in re.sub(r"\|+", "|", whole)
    both = analysis.published[0]
    assert both.measured is not None
    low, high = both.measured.interval.low, both.measured.interval.high
    ceiling, difference = both.measured.ceiling, both.measured.tau - both.paper.mean
    row = f"{low:.3f} to {high:.3f}|{ceiling:.3f}|{difference:.3f}|".replace("-", "−")
    assert row in re.sub(r"\|+", "|", whole)


def charts_text(analysis: Analysis) -> str:
    chart = charts(analysis)[0]
    return inline(chart, chart.panels[0], "a")


def test_nothing_measured_is_a_page_too() -> None:
    made, _ = make_results(images=100)
    analysis, html = conclude(replace(made, measurements=()))
    assert "Nothing has been measured" in Reader(html).text
    assert charts(analysis) == ()


def test_an_earlier_report_is_replaced_and_a_bad_folder_refused(results, tmp_path) -> None:
    # Without figures, which take their time.
    recipe, made = make_results(images=50)[1], replace(results, measurements=())
    (tmp_path / "report.html").write_text("old")
    analysis = write_report(made, recipe, tmp_path)
    assert (tmp_path / "report.html").read_text() != "old"
    assert write_report(made, recipe, tmp_path / "new" / "folder", analysis=analysis) is analysis
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot be made"):
        write_report(made, recipe, tmp_path / "file", analysis=analysis)
    assert (tmp_path / "file").read_text() == "mine"
    assert not [*tmp_path.rglob(".tdkit-*")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium that reaches for nothing but the page."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "no chromium and chromedriver; on Debian: apt-get install chromium chromium-driver"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-first-run", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


def look(browser: webdriver.Chrome, folder: Path, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((folder / "report.html").as_uri())


WIDER = """
return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, .tip'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 90))
"""


HEIGHTS = """
return [...document.querySelectorAll('.panel svg text')].map(text => {
  const { a, b } = text.getScreenCTM();
  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
});
"""

PLACES = """
return [...document.querySelectorAll('#scatters .point')].map(p => p.getAttribute('transform'));
"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_in_a_browser_every_figure_is_there_and_nothing_sticks_out(
    browser, folder, width, scheme
) -> None:
    look(browser, folder, width, scheme)
    for number in range(1, 7):
        figure = browser.find_element(By.ID, f"figure-{number}")
        pictures = figure.find_elements(By.CSS_SELECTOR, ".panel svg")
        assert len(pictures) == (1 if number == 5 else 2)
        for picture in pictures:
            assert picture.is_displayed()
            assert picture.size["width"] > 250
            assert picture.size["height"] > 100
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(WIDER) == []
    # Text stays legible: nothing in a figure is smaller than 9 pixels.
    heights = browser.execute_script(HEIGHTS)
    assert len(heights) > 50
    assert min(heights) >= 9
    assert browser.get_log("browser") == []


def test_in_a_browser_a_point_says_which_candidate_it_is(browser, folder) -> None:
    look(browser, folder, 1200)
    panel = browser.find_element(By.CSS_SELECTOR, "#scatters .panel")
    tip = panel.find_element(By.CSS_SELECTOR, ".tip")
    points = panel.find_elements(By.CSS_SELECTOR, ".point")
    # Two runs of cp and one of the others, at three keeps of five layers.
    assert len(points) == (2 + 1 + 1) * 3 * 5
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    # The largest error stands alone.
    ActionChains(browser).move_to_element(points[-1]).perform()
    assert tip.is_displayed()
    name, rank, error, performance = tip.text.splitlines()
    assert points[-1].get_attribute("aria-label") == ", ".join((name, rank, error, performance))
    assert re.fullmatch(r"conv\d · (cp|tucker|tt) · keep 0\.\d+", name)
    assert re.match(r"rank \(?\d+.*, run \d, saves [\d,]+ parameters$", rank)
    assert re.fullmatch(r"relative weights error 0\.\d+", error)
    assert re.fullmatch(r"performance error [\d.]+ % \([\d.]+ to [\d.]+\)", performance)
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    assert browser.get_log("browser") == []


def test_in_a_browser_the_keyboard_steps_from_point_to_point(browser, folder) -> None:
    look(browser, folder, 1200)
    panel = browser.find_element(By.CSS_SELECTOR, "#scatters .panel")
    points = panel.find_elements(By.CSS_SELECTOR, ".point")
    assert [p.get_attribute("tabindex") for p in points].count("0") == 1
    points[0].send_keys(Keys.ARROW_RIGHT)
    active = browser.switch_to.active_element
    assert active == points[1]
    tip = panel.find_element(By.CSS_SELECTOR, ".tip")
    assert tip.text.splitlines()[0] in active.get_attribute("aria-label")
    active.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    assert browser.get_log("browser") == []


def test_in_a_browser_errors_stage_keeps_and_axes_can_be_chosen(browser, folder) -> None:
    look(browser, folder, 1200)
    scatters = browser.find_element(By.ID, "scatters")

    def count() -> int:
        return len(scatters.find_elements(By.CSS_SELECTOR, ".panel:first-of-type .point"))

    def choose(name: str, text: str) -> None:
        scatters.find_element(By.CSS_SELECTOR, f"[name={name}]").send_keys(text)

    def titles() -> list[str]:
        found = scatters.find_elements(By.CSS_SELECTOR, ".panel svg > text:first-of-type")
        return [element.text for element in found]

    before = count()
    choose("keeps", "all")
    assert count() > before
    choose("left", "scaled features")
    assert titles()[0].startswith("scaled features, τ 0.")
    assert titles()[1].startswith("absolute weights, τ 0.")
    old = titles()
    choose("stage", "After")
    assert titles() != old
    places = browser.execute_script(PLACES)
    scatters.find_element(By.CSS_SELECTOR, "[name=log]").click()
    moved = browser.execute_script(PLACES)
    assert len(moved) == len(places) > 0
    assert moved != places
    assert browser.get_log("browser") == []
