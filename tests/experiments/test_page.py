"""The HTML page: that it is whole, says what the rows say, and comes out in a real browser where there is one."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from lab.page import page
from made_up_rows import made_up, row

from lorafusion_jax.report import plot_means, scores

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
).split()
# Appended to a copy of the page: how wide its images came out, and whether anything but boxes that scroll is too wide.
_PROBE = """<script>
addEventListener("load", () => {
  const body = document.body;
  body.dataset.widths = [...document.images].map(image => image.naturalWidth).join(" ");
  body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
});
</script>"""


@pytest.fixture(scope="module")
def whole():
    """A page of both leagues, of 5 seeds, 6 tasks and 16 methods."""
    rows = [*made_up(), *made_up(league="5", options=False, start=1)]
    return page(rows, "Fusing <frozen> & other LoRAs", "First <b>.\n\nSecond.")


def test_without_a_whole_method_there_is_nothing_to_draw_but_a_page(tmp_path):
    rows = [row("easy", "a", 1, np.ones(8, bool)), row("hard", "b", 1, np.ones(8, bool))]
    with pytest.raises(ValueError, match="no method has results of all 2 tasks: there are no means to draw"):
        plot_means(scores(rows)[0], tmp_path / "means.png")
    assert "No method has results of all tasks yet" in page(rows, "early")


def test_all_text_is_escaped():
    name = "<script>alert('a\"b')</script>&"
    rows = [row(name, f"{method}{name}", 1, np.ones(8, bool)) for method in "ab"]
    for found in rows:
        found.update(device=name, versions={name: name}, config={name: {"x": found["method"]}})
    text = page(rows, name, name)
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;a&quot;b&#x27;)" in text


def test_the_page_is_whole_and_needs_nothing_else(whole):
    class Parser(HTMLParser):
        open, addresses, texts = [], [], []

        def handle_starttag(self, tag, attrs):
            self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
            if tag not in ("meta", "link", "img", "wbr"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.texts.append(data)

    parser = Parser()
    parser.feed(whole)
    parser.close()
    assert not parser.open
    assert len(parser.addresses) == 5 and all(address.startswith("data:") for address in parser.addresses)
    assert "http" not in re.sub('base64,[^"]*', "", whole) and "url(" not in whole and "@import" not in whole
    shown = "".join(parser.texts)
    for wanted in ("95 + 5 examples", "5 examples", "First <b>.", "recipe.lr", "jax 0.10.2", "fusion sum minus each"):
        assert wanted in shown
    assert whole.count("prefers-color-scheme: dark") == 1 and 'name="viewport"' in whole


def test_the_page_says_how_configurations_differ():
    rows = made_up(methods=("LoRA", "fusion sum"), tasks=("easy",), seeds=(1, 2), items=8)
    rows[0]["config"]["only"] = [1, 2]
    text = page(rows, "title", reference="LoRA")
    assert '<th scope="row">recipe.lr</th><td>0.002</td><td>0.02</td>' in text
    assert '<th scope="row">only</th><td>[1, 2]</td><td>–</td>' in text
    assert '<th scope="row">recipe.epochs</th><td>20</td></tr>' in text
    assert rows[0]["data_sha256"] in text and "LoRA minus each other method" in text


@pytest.mark.skipif(_BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_tables_and_images_without_errors(whole, tmp_path, width):
    probed = tmp_path / "page.html"
    probed.write_text(whole.replace("</body>", f"{_PROBE}</body>"))
    # A window is never narrower than 500: a frame is, which shows the same page.
    frame = tmp_path / "frame.html"
    script = "f.onload = () => setTimeout(() => { dom.textContent = f.contentDocument.body.outerHTML; }, 200)"
    frame.write_text(
        f'<link rel="icon" href="data:,"><iframe id="f" src="page.html" width="{width}" height="800"></iframe>'
        f'<pre id="dom"></pre><script>{script}</script>'
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [_BROWSER, *_FLAGS, profile, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = done.stdout.replace("&lt;", "<").replace("&gt;", ">")
    widths = [int(found) for found in re.search('data-widths="([^"]*)"', dom)[1].split()]
    assert len(widths) == 4 and min(widths) > 500
    assert re.search('data-overflow="([^"]*)"', dom)[1] == "0"
    assert dom.count("<table>") == 9 and dom.count("</table>") == 9
    assert dom.count("<caption>fusion sum minus each other method") == 2
