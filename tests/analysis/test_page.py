"""The page of `softhooks inspect --html`: complete, self-contained, and safe whatever the files contain."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tokens
import zoo
from on_disk import base, saved
from untouched import remove_all

from softhooks import LlamaAdapter, PrefixTuning, PromptTuning
from softhooks.analysis.page import write_page
from softhooks.analysis.svg import bars, heatmap
from softhooks.cli.prompt_facts import Questions, facts_of

P = 4
VOID = {"meta", "br", "line", "rect"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(path: Path, *folders: Path, **questions: object) -> Reader:
    asked = Questions(matrix=True, **questions)  # type: ignore[arg-type]
    write_page(path, [facts_of(folder, asked) for folder in folders])
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_a_page_has_words_plots_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder, model = base(tmp_path / "base", "llama")
    prompt = saved(
        tmp_path / "prompt", model, PromptTuning(P, init="text", init_text="word5", tokenizer=tokens.tokenizer())
    )
    saved(prompt / "initial", model, PromptTuning(P), scale=0.5)
    read = page_of(tmp_path / "page.html", prompt, model=str(folder))
    assert read.tags.count("svg") == 4  # norms, drift, similarities, attention
    for phrase in ("PromptTuning, 4 virtual tokens", "nearest words", "moved", "self-attention", "LlamaForCausalLM"):
        assert phrase in read.text
    assert re.search(r"word\d+", read.text)
    assert not {"script", "link", "img", "iframe", "style"} & {tag for tag in read.tags if tag != "style"}
    assert not [name for name, _ in read.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in (tmp_path / "page.html").read_text()
    assert ("name", "viewport") in read.attributes
    assert "prefers-color-scheme: dark" in (tmp_path / "page.html").read_text()


def test_a_page_of_several_prompts(tmp_path: Path) -> None:
    model = zoo.build("t5", "seq2seq")
    one, other = saved(tmp_path / "one", model, PrefixTuning(P)), saved(tmp_path / "two", model, LlamaAdapter(P))
    read = page_of(tmp_path / "page.html", one, other)
    assert read.tags.count("section") == 2
    assert read.tags.count("svg") == 3 * 2 + 2  # norms and similarities of three prefixes, the gates of two stacks
    assert read.text.count("Gates by layer") == 2


def test_what_a_browser_would_obey_is_spelled_out(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b[2J\"'&\ud800"
    facts = facts_of(saved(tmp_path / "prompt", zoo.build("llama"), PromptTuning(P)), Questions(matrix=True))
    facts["path"] = facts["base"]["name_or_path"] = facts["method"] = facts["file"] = hostile
    facts["options"] = {hostile: hostile}
    facts["tensors"][0]["name"] = hostile
    facts["versions"] = {hostile: hostile}
    write_page(tmp_path / "page.html", [facts])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert "\x1b" not in text
    assert "<script>alert(1)</script>" in reader.text


def test_bars_are_as_high_as_their_values() -> None:
    drawn = ET.fromstring(bars([1.0, 2.0, 0.0], x="layer", y="norm"))
    heights = [float(bar.get("height", "")) for bar in drawn.iter("rect")]
    assert heights[0] == pytest.approx(heights[1] / 2)
    assert heights[2] == 0
    full = ET.fromstring(bars([0.5], x="layer", y="share", top=1.0, unit="%"))
    assert [bar.findtext("title") for bar in full.iter("rect")] == ["layer 0: 50.0%"]


def test_a_map_has_a_cell_for_each_pair_and_is_averaged_if_there_are_many() -> None:
    drawn = ET.fromstring(heatmap([[1.0, -0.5], [-0.5, 1.0]], title="cosines"))
    cells = [
        (cell.get("class"), cell.get("fill-opacity")) for cell in drawn.iter("rect") if cell.get("class") != "frame"
    ]
    assert cells == [("above", "1.000"), ("below", "0.500"), ("below", "0.500"), ("above", "1.000")]
    many = ET.fromstring(heatmap([[0.25] * 200] * 200, title="cosines"))
    assert sum(1 for _ in many.iter("rect")) == 64 * 64 + 1
    assert [text.text for text in many.iter("text")][1] == "199"
