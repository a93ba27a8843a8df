"""The report's page: the numbers of the run, pictures within it, and foreign text as text."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests import told_run
from tests.told_run import HOSTILE
from txl_jax import report_page, report_plots, story
from txl_jax.report_plots import Picture
from txl_jax.story import Launch, RentedHost, Story

_VOID = {"img", "meta"}
HOST = RentedHost(0, "i-0123", "p3dn.24xlarge", "us-east-1a", True, "running", 9.5, 2.0)
LAUNCH = Launch("python -m launcher --config=a", "ff00" * 10, True, (HOST,), 19.0)


class Page(HTMLParser):
    """What a browser finds in a page: elements, and the text of each kind of them."""

    def __init__(self, content: bytes):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(content.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def rows(self) -> list[list[str]]:
        """The rows of all tables, their cells."""
        cells = iter(self.texts["td"])
        shapes: list[int] = []
        for tag, _ in self.elements:
            if tag == "tr":
                shapes.append(0)
            elif tag == "td":
                shapes[-1] += 1
        return [[next(cells) for _ in range(shape)] for shape in shapes if shape]

    def tiles(self) -> dict[str, str]:
        return dict(zip(self.texts["dt"], self.texts["dd"], strict=True))

    def pictures(self) -> list[np.ndarray[Any, Any]]:
        sources = [attributes["src"] or "" for tag, attributes in self.elements if tag == "img"]
        begins = "data:image/png;base64,"
        assert all(source.startswith(begins) for source in sources)
        return [
            imread(io.BytesIO(base64.b64decode(source.removeprefix(begins)))) for source in sources
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return told_run.write(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def drawn(folder: Path) -> list[Picture]:
    return report_plots.draw(story.read(folder))


def page(told: Story, pictures: list[Picture]) -> Page:
    return Page(report_page.page(told, pictures))


def test_the_numbers_are_those_of_the_run(folder, drawn):
    found = page(story.read(folder), drawn)
    assert found.texts["h1"] == ["first"]
    assert found.texts["p"][0].startswith("Begun 2025-06-15 15:06:40 UTC; finished; last sign")
    assert found.tiles() == {
        "Steps": "402,560 tokens",
        "Parameters": "12,345",
        "Training loss": "3.0000bpb 4.328",
        "Lowest validation": "3.1250bpb 4.508, step 40",
        "Test": "4.0625bits per byte, memory 16",
        "Median tokens/s": "3454 x cpu",
        "Time at work": "0:00:13pauses left out",
        "Restarts": "10:01:28 lost",
    }
    rows = found.rows()
    assert ["valid", "1,234", "4.5000", "4.2500"] in rows
    assert ["test", "567", "4.7500", "4.0625"] in rows
    assert ["train.max_tokens", "25600", "1000000"] in rows
    assert ["train.batch", "4", "16"] in rows and ["model.attn_type", "0"] in rows
    cause = "not known: no watcher looked on"
    assert ["1", "2025-06-15 15:08:10", cause, "4 x cpu", "20", "0:01:28"] in rows
    host = json.loads((folder / "heartbeats" / "1.json").read_text())["host"]
    assert ["1", host, "39", "361", "11.00"] in [row[:2] + row[3:] for row in rows]
    commands = found.texts["pre"]
    assert "git checkout 0123456789abcdef0123456789abcdef01234567" in commands
    assert "python -m txl_jax.train --local --text-dir 'my text'" in commands
    assert any("Files were changed beyond that commit" in text for text in found.texts["p"])
    assert "Not known: it is the launcher that knows what hosts cost" in str(found.texts["p"])


def test_pictures_are_within_the_page_and_tell_their_numbers(folder, drawn):
    found = page(story.read(folder), drawn)
    assert found.texts["figcaption"] == [
        *("Loss over tokens", "Loss over time"),
        *("Bits per byte over tokens", "Bits per byte over time"),
        *("Throughput over time", "Throughput, as each process last saw it"),
        *("Learning rate", "Gradient norm, before clipping", "Overflows", "Memory of process 0"),
    ]
    assert len(found.pictures()) == 9  # nothing could overflow
    told = {picture.name: picture.about for picture in drawn}
    assert told["loss-tokens"] == (
        "Loss over tokens: training from 5.25 to 3, lowest 3, highest 5.25; "
        "validation from 3.125 to 3.125, lowest 3.125, highest 3.125."
    )
    assert "from 330 to 360" in told["throughput"] and "from 0.01 to 0.04" in told["learning-rate"]
    assert "from 2.5 to 2.5" in told["memory"] and "process 1: 361 tokens/s" in told["processes"]
    assert told["overflows"].startswith("only float16")
    alts = [attributes["alt"] for tag, attributes in found.elements if tag == "img"]
    assert alts == [picture.about for picture in drawn if picture.png]


def test_what_interrupted_it_is_drawn_and_told_and_float16_has_overflows(drawn, tmp_path):
    folder = told_run.write(tmp_path / "first")
    told_run.as_float16(folder)
    told = story.read(folder, told_run.watched())
    found = page(told, drawn)
    cause = f"host 1 was taken away {HOSTILE}"
    rows = found.rows()
    assert ["1", "2025-06-15 15:08:10", cause, "4 x cpu", "20", "0:01:28"] in rows
    event = ["2025-06-15 15:07:00", "preempted", cause, "1", "20", "0:01:28", "$0.50"]
    assert event in rows
    assert found.tiles()["Cost"] == "$1.25" and "$1.25 for all hosts." in found.texts["p"]
    again = report_plots.draw(told)
    assert "overflows so far from 0 to 2" in again[8].about and again[8].png
    for before, after in zip(drawn, again, strict=True):
        if before.png and after.png and before.name != "processes":
            assert not _red(before.png) and _red(after.png), before.name


def _red(png: bytes) -> bool:
    """Whether something in a picture is red."""
    red, green, blue = np.moveaxis(imread(io.BytesIO(png))[..., :3], -1, 0)
    return bool(np.any((red > 0.8) & (green < 0.5) & (blue < 0.5) & (abs(green - blue) < 0.05)))


def test_foreign_text_stays_text(folder, drawn):
    told = story.read(folder, told_run.watched())
    content = report_page.page(_saying(told, HOSTILE), drawn)
    found, harmless = Page(content), page(_saying(told, "harmless"), drawn)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
    assert [a.keys() for _, a in found.elements] == [a.keys() for _, a in harmless.elements]
    assert content.count(b"alert(1)") == content.count(b"&lt;script&gt;alert(1)") >= 15
    assert found.texts["h1"] == [HOSTILE] and found.texts["pre"].count(HOSTILE) == 4
    assert [f"{HOSTILE}.{HOSTILE}", json.dumps(HOSTILE), ""] in found.rows()
    assert Page(report_page.page(_saying(told, "\ud800"), drawn)).texts["h1"] == ["?"]


def _saying(told: Story, text: str) -> Story:
    """The story with this text wherever others could have written one."""
    host = dataclasses.replace(HOST, instance=text, kind=text, zone=text, state=text)
    start = dataclasses.replace(
        told.starts[0], command=text, devices=text, source=text, versions={text: text}
    )
    assert told.evaluation and told.watched
    bits = {text: {text: 1.0}}
    return dataclasses.replace(
        told,
        name=text,
        config={text: {text: text}, "data": {"vocab": "bytes"}},
        starts=(start, told.starts[1]),
        samples=tuple(dataclasses.replace(s, text=text) for s in told.samples),
        evaluation=dataclasses.replace(told.evaluation, bits=bits, sample=text),
        signs=tuple(dataclasses.replace(sign, host=text) for sign in told.signs),
        watched=dataclasses.replace(
            told.watched,
            events=tuple(dataclasses.replace(event, text=text) for event in told.watched.events),
        ),
        launch=dataclasses.replace(LAUNCH, command=text, hosts=(host,)),
        damage=(text,),
    )


def test_nothing_is_loaded_from_anywhere(folder, drawn):
    content = report_page.page(story.read(folder, told_run.watched(), LAUNCH), drawn)
    found = Page(content)
    for tag, attributes in found.elements:
        assert tag not in ("script", "link", "iframe", "base", "object")
        assert not {"href", "srcset", "style", "background"} & attributes.keys()
        assert tag == "img" or "src" not in attributes
    (policy,) = (a["content"] for _, a in found.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search("url\\(|@import", found.texts["style"][0])
    assert b"width=device-width" in content


def test_a_run_that_has_just_begun_says_so_in_place_of_pictures(tmp_path):
    told = story.read(told_run.begin(tmp_path / "young"))
    pictures = report_plots.draw(told)
    assert [picture.png for picture in pictures] == [None] * 10
    found = page(told, pictures)
    said = " ".join(found.texts["p"])
    assert "not finished: nothing was logged yet; no sign of life yet." in said
    for what in ("no validation yet", "one is written at each", "it is made when"):
        assert what in said
    assert "It was started once" in said
    assert found.tiles() == {"Restarts": "0"}


def test_one_line_of_a_log_is_seen(folder, tmp_path):
    young = told_run.begin(tmp_path / "young")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (young / "metrics.jsonl").write_text(lines[1] + "\n")
    told = story.read(young)
    pictures = {picture.name: picture for picture in report_plots.draw(told)}
    dot = imread(io.BytesIO(pictures["loss-tokens"].png or b""))
    assert np.any(np.all(np.isclose(dot[..., :3], [37 / 255, 99 / 255, 235 / 255]), axis=-1))
    assert "10 of" not in (said := page(told, [*pictures.values()]).texts["p"][0])
    assert "not finished: logged up to step 10, 2% of its tokens" in said


def test_what_was_launched_tells_its_hosts_and_its_cost(folder, drawn):
    found = page(story.read(folder, None, LAUNCH), drawn)
    row = ["0", "i-0123", "p3dn.24xlarge spot", "us-east-1a", "running", "$9.5000", "2.00"]
    assert [*row, "$19.00"] in found.rows()
    assert found.tiles()["Cost"] == "$19.00"
    assert "python -m launcher --config=a" in found.texts["pre"]
    assert any("name that folder instead" in text for text in found.texts["p"])
    # A watcher has counted those that EC2 has forgotten too.
    told = story.read(folder, {"cost": 50.0, "events": []}, LAUNCH)
    assert page(told, drawn).tiles()["Cost"] == "$50.00"
    unknown = dataclasses.replace(LAUNCH, cost=None)
    assert "Cost" not in page(story.read(folder, None, unknown), drawn).tiles()


def test_words_have_perplexity(drawn, tmp_path):
    folder = told_run.write(tmp_path / "first")
    told_run.with_words(folder)
    rows = page(story.read(folder), drawn).rows()
    assert ["test", "567", f"{2**4.75:.3f}", f"{2**4.0625:.3f}"] in rows


def test_numbers_without_measure_are_drawn_all_the_same(folder, tmp_path):
    young = told_run.begin(tmp_path / "young")
    (line, *_) = (folder / "metrics.jsonl").read_text().splitlines()[1:]
    tags = [tag for tag in json.loads(line) if "/" in tag]
    with (young / "metrics.jsonl").open("w") as file:
        for step, value in enumerate((1e300, -1e300, 0.0, 1e-300)):
            head = {"step": 1 << (20 * step), "tokens": 1 << (20 * step), "time": 1e9 * step}
            file.write(json.dumps(head | dict.fromkeys(tags, value)) + "\n")
    told = story.read(young)
    assert sum(picture.png is not None for picture in report_plots.draw(told)) == 8
