"""The report in a real browser: it fetches nothing, runs nothing that a model wrote, and fits a phone."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.helpers.run_folders import write_run
from verl_aqn.runs.report.page import write_report

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
EVIL = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "\"><svg onload='window.hacked = 3'> <a href='javascript:window.hacked = 4' autofocus onfocus='window.hacked = 5'>"
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Three runs: with noise, without, and failed. Hostile text is wherever a model or user can put text."""
    folder = tmp_path_factory.mktemp("report")
    answers = {
        f"{number} + 1? {EVIL}": (f"{number + 1}{EVIL}", f"{'x' * 300}{EVIL}", number % 2 == 0) for number in range(12)
    }
    other = {prompt: (truth, said, not right) for prompt, (truth, said, right) in answers.items()}
    runs = [
        write_run(folder / "a", "control", noise=False, answers=answers, steps=12),
        write_run(folder / "b", f"noisy {EVIL}", answers=other, steps=9, config={EVIL: {EVIL: EVIL}}),
        write_run(folder / "c", "failed", status="failed", message=EVIL, steps=3),
    ]
    write_report([run.path for run in runs], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path, f"no browser ({', '.join(names)}): apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [], timeout=60_000
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page_file):
    """`open_page(size, scheme)`: the page. The test fails if the page logs, fetches or runs anything."""
    said, fetched, contexts = [], [], []

    def start(size, scheme="light", script=True):
        context = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(page_file.as_uri())
        return page

    start.said = said  # type: ignore[attr-defined]
    yield start
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked") is None
        context.close()
    assert said == []
    assert {url for url in fetched if not url.startswith("data:")} == {page_file.as_uri()}


def overflow(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_readable(open_page, size, scheme):
    page = open_page(size, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert overflow(page) == 0
    assert page.locator("figure.chart").count() > 10
    # WCAG requires 4.5 to 1 for small text.
    ratios = page.evaluate("""() => {
      const light = (colour) => {
        const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
          .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
      };
      const behind = (element) => {
        const back = getComputedStyle(element).backgroundColor;
        return back === "rgba(0, 0, 0, 0)" && element.parentElement ? behind(element.parentElement) : back;
      };
      return [...document.querySelectorAll("body, .made, .legend, .ys, .good, .bad, a, summary, th, button, .none")]
        .filter((element) => element.offsetParent && element.textContent.trim())
        .map((element) => {
          const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        });
    }""")
    assert len(ratios) > 50
    assert min(ratios) >= 4.5


def test_hostile_text_is_shown_as_it_is(open_page):
    page = open_page(DESKTOP)
    assert EVIL in page.locator(".answer pre").first.text_content()
    assert page.locator("img, iframe, object, embed, form").count() == 0
    assert page.locator("script").count() == 2
    # Even text that was not escaped would not run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=proof>')")
    blocked = page.evaluate("""() => new Promise((done) => {
      document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective), { once: true });
      const script = document.createElement("script");
      script.textContent = "window.hacked = 6";
      document.getElementById("proof").append(script);
    })""")
    assert blocked.startswith("script-src")
    (complaint,) = open_page.said
    assert "Content Security Policy" in complaint
    open_page.said.clear()


def test_tables_sort_by_keyboard(open_page):
    page = open_page(DESKTOP)
    header = page.locator("#runs thead th").nth(2)  # steps
    header.locator("button").focus()
    column = page.locator("#runs tbody tr td:nth-child(3)")
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert column.all_text_contents() == ["3/3", "9/9", "12/12"]
    page.keyboard.press("Space")
    assert header.get_attribute("aria-sort") == "descending"
    assert column.all_text_contents() == ["12/12", "9/9", "3/3"]
    page.locator("#runs thead th").nth(0).locator("button").press("Enter")
    assert header.get_attribute("aria-sort") is None


def test_the_keyboard_reaches_everything_and_the_focus_is_seen(open_page):
    page = open_page(DESKTOP)
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    assert skip.evaluate("(one) => one === document.activeElement && one.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator("[onclick]").count() == 0
    controls = page.locator("[data-toggle], [data-filter], [data-part]")
    assert set(controls.evaluate_all("(all) => all.map((one) => one.tagName)")) == {"BUTTON"}


def test_one_cursor_moves_through_all_charts_over_steps(open_page):
    page = open_page(DESKTOP)
    reward = page.locator("[data-chart=reward]")
    shown = reward.locator("output").first
    assert shown.text_content() == "1.2"
    plot = reward.locator("[data-plot]")
    plot.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert shown.text_content() == "0.2"
    assert plot.get_attribute("role") == "slider"
    assert plot.get_attribute("aria-valuetext").startswith("step 2: control, seed 0 0.2; ")
    for key in ("reward", "sigma", "entropy", "length", "dlogp"):
        assert page.locator(f"[data-chart={key}] .where").text_content() == "2"
        assert page.locator(f"[data-chart={key}] .cursor").is_visible()
    places = {page.locator(f"[data-chart={key}] .cursor").bounding_box()["x"] for key in ("reward", "sigma", "entropy")}
    assert len(places) == 1  # one axis
    assert page.locator("[data-chart=sqnr0] .cursor").is_hidden()
    page.keyboard.press("Escape")
    assert shown.text_content() == "1.2"
    entropy = page.locator("[data-chart=entropy] [data-plot]")
    entropy.hover(position={"x": entropy.bounding_box()["width"] - 3, "y": 5})
    assert page.locator("[data-chart=reward] .where").text_content() == "12"


def test_runs_and_answers_can_be_hidden(open_page):
    page = open_page(DESKTOP)
    line = page.locator("[data-chart=reward] svg g[data-run='1']")
    button = page.locator("[data-toggle='1']")
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert line.is_hidden()
    button.click()
    assert line.is_visible()
    assert page.locator("[data-chart=dlogp] .legend li:visible").count() == 3
    page.locator("[data-part='']").click()
    assert page.locator("[data-chart=dlogp] .legend li:visible").count() == 9
    page.locator("[data-filter=differ]").click()
    kinds = page.locator(".item:visible").evaluate_all("(all) => all.map((one) => one.dataset.kind)")
    assert set(kinds) == {"differ"}


def test_theme_follows_the_system_until_it_is_chosen(open_page):
    page = open_page(PHONE, "dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    button = page.locator("#theme")
    assert button.text_content() == "Light theme"
    button.press("Enter")
    assert page.evaluate(back) == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(back) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="light")
    page.locator("#theme").click()
    assert page.evaluate(back) == dark


def test_without_a_script_it_is_still_a_report(open_page):
    page = open_page(PHONE, script=False)
    assert page.locator("[data-chart=reward] .line").count() == 3
    assert page.locator("[data-chart=reward] .legend output").first.text_content() == "1.2"
    assert page.locator("#theme").is_hidden()
