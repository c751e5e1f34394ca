"""Report pages as a reader sees them."""

from html.parser import HTMLParser

from verl_aqn.runs.report.page import render
from verl_aqn.runs.report.page_data import read_runs


class Text(HTMLParser):
    """What a reader sees, and every tag with its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)


def page_of(*paths, answers: int = 24) -> Text:
    return Text(render(read_runs(paths), ["aqn.noise"], False, answers))
